"""Objectives against the Hugging Face forward pass and against each other."""

import re
from functools import partial

import pytest
import torch
from test_hooks import one_stack
from test_losses import ce_loss, kl_loss
from tiny_models import EOS, FAMILIES, PAD, VOCAB_SIZE, tiny_bart, tiny_batch

from distill_utils.artifacts import InputError
from distill_utils.distillation import objectives
from distill_utils.distillation.losses import DIVERGENCES, hidden_loss, relation_loss
from distill_utils.distillation.objectives import draw_samples, kd, miniend, on_policy, pl_kl, sft
from distill_utils.models.hooks import capture
from distill_utils.models.students import freeze, has_teacher_encoder, init_student, supervision_map
from distill_utils.training.loop import train_mode

each_family = pytest.mark.parametrize("family", FAMILIES)
ALL_KD = partial(kd, encoder_layer_ids=[0, 2], decoder_layer_ids=[2])
OWN = partial(on_policy, max_new_tokens=5)
RELATED = partial(miniend, num_relation_heads=4)
ONLY = {  # weights that leave one term
    "encoder_self_loss": {"decoder_self_weight": 0.0, "cross_weight": 0.0},
    "decoder_self_loss": {"encoder_self_weight": 0.0, "cross_weight": 0.0},
    "cross_loss": {"encoder_self_weight": 0.0, "decoder_self_weight": 0.0},
}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def calls(module):
    seen = []
    module.register_forward_hook(lambda *call: seen.append(1))
    return seen


@each_family
def test_sft_equals_the_models_own_loss_with_gradients(family):
    model, batch = FAMILIES[family](2, 2), tiny_batch(padding=2)
    expected = model(**batch).loss
    expected_gradients = gradients(model, expected)
    losses = sft(model, None, batch)
    torch.testing.assert_close(losses["loss"], expected)
    for name, gradient in gradients(model, losses["loss"]).items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-5)


@each_family
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_kd_and_pl_kl_equal_dense_losses_on_the_models_own_outputs(family, divergence):
    teacher, batch = FAMILIES[family](3, 3), tiny_batch(padding=1)
    student, _, _ = init_student(teacher, 2, 2)
    options = {"divergence": divergence, "jsd_beta": 0.3}
    found = kd(student, teacher, batch, encoder_layer_ids=[1, 0], decoder_layer_ids=[0, 1], **options)
    labelled = pl_kl(student, teacher, batch, **options)
    with torch.no_grad():
        ours, theirs = (model(**batch).logits for model in (student, teacher))
    ce, kl = (x.float() for x in (
        ce_loss(ours, batch["labels"]), kl_loss(ours, theirs, batch["labels"], 2.0, divergence, 0.3)
    ))  # fmt: skip
    for losses in (found, labelled):
        torch.testing.assert_close(losses["ce_loss"], ce)
        torch.testing.assert_close(losses["kl_loss"], kl)
    torch.testing.assert_close(found["loss"], 0.2 * ce + 0.8 * kl + 3.0 * found["hidden_loss"])
    torch.testing.assert_close(labelled["loss"], 0.8 * ce + kl)


@each_family
def test_outputs_are_compared_before_the_final_norm_on_both_sides(family):
    """A freshly cut student's only layer returns what the teacher's first layer returns, final norm or not."""
    teacher, batch = FAMILIES[family](3, 3), tiny_batch()
    student, encoder_ids, decoder_ids = init_student(teacher, 3, 1)
    losses = kd(student, teacher, batch, encoder_layer_ids=encoder_ids, decoder_layer_ids=decoder_ids)
    assert losses["hidden_loss"].item() == pytest.approx(0.0, abs=1e-8) and losses["kl_loss"].item() > 0.01
    last = kd(student, teacher, batch, encoder_layer_ids=[], decoder_layer_ids=supervision_map(3, 1))
    assert last["hidden_loss"].item() > 0.01


@each_family
@pytest.mark.parametrize(
    "objective",
    [sft, ALL_KD, pl_kl, OWN, partial(OWN, share=1.0), partial(ALL_KD, match="inputs", divergence="tvd")],
)
def test_gradients_reach_every_part_of_the_student_only(family, objective):
    teacher, batch = FAMILIES[family](3, 3), tiny_batch()
    student, _, _ = init_student(teacher, 2, 1)
    teacher.train()  # as a careless loop leaves it
    gradients(student, objective(student, teacher, batch)["loss"])
    assert all(weight.grad is None for weight in teacher.parameters())
    assert all(weight.grad is not None for weight in student.parameters() if weight.requires_grad)
    assert objective is sft or not teacher.training


@each_family
@pytest.mark.parametrize(
    "objective",
    [
        partial(kd, encoder_layer_ids=[0, 1, 2], decoder_layer_ids=[0]),
        partial(pl_kl, divergence="jsd", jsd_beta=0.2),
    ],
)
def test_shared_encoder_runs_once_and_changes_nothing(family, objective):
    teacher, batch = FAMILIES[family](3, 3), tiny_batch()
    student, _, _ = init_student(teacher, 3, 1)
    freeze(student)
    assert has_teacher_encoder(student, teacher)
    train_mode(student)
    student.get_decoder().eval()  # dropout of the trained part would differ by chance; the frozen part has none
    teacher_calls, student_calls = calls(teacher.get_encoder()), calls(student.get_encoder())
    alone = objective(student, teacher, batch)
    alone_gradients = gradients(student, alone["loss"])
    assert (len(teacher_calls), len(student_calls)) == (1, 1)
    shared = objective(student, teacher, batch, shared_encoder=True)
    assert (len(teacher_calls), len(student_calls)) == (1, 2)
    for name, value in alone.items():
        assert torch.equal(value, shared[name])
    shared_gradients = gradients(student, shared["loss"])
    assert shared_gradients.keys() == alone_gradients.keys() and len(shared_gradients) > 0
    for name, gradient in alone_gradients.items():
        assert torch.equal(gradient, shared_gradients[name])


@each_family
@pytest.mark.parametrize(("match", "normalize"), [("inputs", True), ("inputs", False), ("outputs", True)])
def test_matched_states_are_the_models_own(family, match, normalize):
    if match == "outputs" and family not in ("bart", "marian"):
        pytest.skip("the last of the models' own hidden states is after the final norm")
    teacher, batch = FAMILIES[family](3, 3), tiny_batch(padding=1)
    student, _, _ = init_student(teacher, 2, 2)
    options = {"encoder_layer_ids": [1, 2], "decoder_layer_ids": [0, 2], "normalize_hidden": normalize}
    found = kd(student, teacher, batch, match=match, **options)["hidden_loss"]
    with torch.no_grad():
        ours, theirs = (model(**batch, output_hidden_states=True) for model in (student, teacher))
    expected, shift = 0.0, int(match == "outputs")  # index 0 is the embedding output
    for stack, mask, pairs in (
        ("encoder_hidden_states", batch["attention_mask"], [(0, 1), (1, 2)]),
        ("decoder_hidden_states", batch["labels"] != -100, [(0, 0), (1, 2)]),
    ):
        states = [(ours[stack][i + shift], theirs[stack][j + shift]) for i, j in pairs]
        expected += sum(hidden_loss(*pair, mask, normalize) for pair in states) / 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_term_of_weight_zero_is_neither_computed_nor_returned(monkeypatch):
    teacher, batch = tiny_bart(), tiny_batch()
    student, _, _ = init_student(teacher, 3, 1)
    layers = {"encoder_layer_ids": [0, 1, 2], "decoder_layer_ids": [2]}
    weights = {"ce_loss": "ce_weight", "kl_loss": "kl_weight", "hidden_loss": "hidden_weight"}
    full = kd(student, teacher, batch, **layers)
    assert list(full) == ["loss", *weights]
    for name, weight in weights.items():
        losses = kd(student, teacher, batch, **layers, **{weight: 0.0})
        assert losses.keys() == full.keys() - {name} and list(losses)[0] == "loss"
        assert all(torch.equal(losses[kept], full[kept]) for kept in weights if kept != name)
        expected = full["loss"] - {"ce_loss": 0.2, "kl_loss": 0.8, "hidden_loss": 3.0}[name] * full[name]
        torch.testing.assert_close(losses["loss"], expected)
    monkeypatch.setattr(teacher, "forward", None)
    teacher_calls = calls(teacher.get_decoder())
    assert list(kd(student, teacher, batch, **layers, kl_weight=0.0, hidden_weight=0.0)) == ["loss", "ce_loss"]
    assert list(pl_kl(student, teacher, batch, kl_weight=0.0)) == ["loss", "ce_loss"] and not teacher_calls


@pytest.mark.parametrize("frozen", [False, True])
def test_teacher_dropout_is_drawn_from_the_seed_and_switched_off_again(frozen):
    teacher, batch = tiny_bart(dropout=0.5).requires_grad_(not frozen), tiny_batch()
    student, _, _ = init_student(teacher, 2, 1)
    values = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses = ALL_KD(student, teacher, batch, teacher_dropout=True)
        values.append([losses["kl_loss"].item(), losses["hidden_loss"].item()])
        assert not any(module.training for module in teacher.modules())
    assert values[0] == values[1] != values[2]
    first, second = (ALL_KD(student, teacher, batch, decoder_layer_ids=[], kl_weight=0.0, teacher_dropout=True)
                     for _ in range(2))  # fmt: skip
    assert first["hidden_loss"] != second["hidden_loss"]  # in the encoder as well, frozen or not
    student.requires_grad_(True)
    gradients(student, losses["loss"])
    assert all(weight.grad is None for weight in teacher.parameters())
    with pytest.raises(ZeroDivisionError), objectives.teacher_mode(teacher, dropout=True):
        assert teacher.training
        raise ZeroDivisionError
    assert not teacher.training


@each_family
def test_samples_follow_the_students_distribution_and_end_at_the_end_token(family):
    """One-token samples of one row, against its probabilities; decoding settings of the model bend nothing."""
    student, batch = FAMILIES[family](2, 2).train(), tiny_batch()
    student.generation_config.bad_words_ids = None
    rows = {name: batch[name][:1].expand(2000, -1) for name in ("input_ids", "attention_mask")}
    torch.manual_seed(0)
    drawn = draw_samples(student, rows, 1)
    assert drawn["labels"].shape == (2000, 1) and student.training and student.generation_config.num_beams == 3
    with torch.no_grad():
        row = {name: values[:1] for name, values in drawn.items() if name != "labels"}
        probs = student.eval()(**row).logits[0, 0].softmax(-1)
    shares = torch.bincount(drawn["labels"][:, 0], minlength=len(probs)) / 2000
    assert (shares - probs).abs().sum() / 2 < (probs / 2000).sqrt().sum()  # twice what chance alone would give

    with torch.no_grad():  # make the end likely
        student.get_output_embeddings().weight[EOS] = 0.0
    rows = {name: values[:300] for name, values in rows.items()}
    drawn = draw_samples(student, rows, 6)
    labels = drawn["labels"]
    ends = (labels == EOS).sum(1)
    assert labels.shape[1] <= 6 and set(ends.tolist()) == {0, 1}
    start = student.config.decoder_start_token_id
    inputs = torch.cat([torch.full((300, 1), start), labels[:, :-1].masked_fill(labels[:, :-1] == -100, PAD)], dim=1)
    assert torch.equal(drawn["decoder_input_ids"], inputs)
    for row in labels.tolist():
        length = row.index(EOS) + 1 if EOS in row else len(row)
        assert -100 not in row[:length] and set(row[length:]) <= {-100}


@each_family
def test_special_tokens_of_samples_are_those_that_generate_takes(family):
    """Those of the generation settings come before the config's, which may have none, as mBART's start token."""
    student, batch = FAMILIES[family](1, 1), tiny_batch()
    rows = {name: batch[name] for name in ("input_ids", "attention_mask")}
    student.generation_config.update(decoder_start_token_id=7, eos_token_id=[EOS, 8])
    with torch.no_grad():  # as if every sample ended with the second end token at once
        student.get_output_embeddings().weight.mul_(1e-3)
        student.get_output_embeddings().bias = torch.nn.Parameter(torch.zeros(VOCAB_SIZE))
        student.get_output_embeddings().bias[8] = 100.0
    if family != "marian":  # whose config allows none to be missing
        student.config.decoder_start_token_id = None
    drawn = draw_samples(student, rows, 3)
    assert drawn["decoder_input_ids"].tolist() == [[7]] * 3 and drawn["labels"].tolist() == [[8]] * 3


@each_family
def test_on_policy_is_the_divergence_on_samples_and_pl_kl_on_the_rest(family):
    teacher, batch = FAMILIES[family](3, 3), tiny_batch(source_lengths=(9, 5, 7, 6), target_lengths=(4, 6, 3, 5))
    student, _, _ = init_student(teacher, 2, 1)
    torch.manual_seed(3)
    losses = OWN(student, teacher, batch, share=0.5, divergence="reverse_kl")
    torch.manual_seed(3)
    again = OWN(student, teacher, batch, share=0.5, divergence="reverse_kl")
    assert all(torch.equal(value, again[name]) for name, value in losses.items())
    torch.manual_seed(3)
    own = draw_samples(student, {name: batch[name][[0, 2]] for name in ("input_ids", "attention_mask")}, 5)
    drawn = pl_kl(student, teacher, own, divergence="reverse_kl")["kl_loss"]
    given = pl_kl(student, teacher, {k: v[[1, 3]] for k, v in batch.items()}, divergence="reverse_kl")
    assert list(losses) == ["loss", "own_kl_loss", "ce_loss", "kl_loss"]
    torch.testing.assert_close(losses["own_kl_loss"], drawn)
    torch.testing.assert_close(losses["ce_loss"], given["ce_loss"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses["loss"], 0.5 * given["loss"] + 0.5 * drawn, rtol=1e-4, atol=1e-5)
    assert list(OWN(student, teacher, batch, share=1.0)) == ["loss", "own_kl_loss"]


def test_sampling_leaves_modes_settings_and_gradients_of_the_training_pass_alone():
    teacher, batch = tiny_bart(), tiny_batch()
    student, _, _ = init_student(teacher, 3, 1)
    freeze(student)
    train_mode(student)
    modes = [module.training for module in student.modules()]
    settings = student.generation_config
    with torch.autocast("cpu", torch.bfloat16):  # whose cache of weights must not keep those cast for sampling
        losses = OWN(student, teacher, batch, shared_encoder=True)
    gradients(student, losses["loss"])
    assert [module.training for module in student.modules()] == modes and student.generation_config is settings
    trained = [weight for weight in student.parameters() if weight.requires_grad]
    assert trained and all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in trained)
    assert all(weight.grad is None for weight in teacher.parameters())


@pytest.mark.parametrize(
    ("objective", "options", "named"),
    [
        (ALL_KD, {"divergence": "kl"}, "'kl'"),
        (ALL_KD, {"jsd_beta": 1.5}, "jsd_beta 1.5 "),
        (ALL_KD, {"match": "middle"}, "'middle'"),
        (OWN, {"share": 0.0}, "share 0.0 "),
        (OWN, {"share": 1.5}, "share 1.5 "),
    ],
)
def test_unknown_options_are_rejected_before_any_pass(objective, options, named):
    with pytest.raises(InputError, match=named):
        objective(None, None, tiny_batch(), **options)


@pytest.mark.parametrize(
    ("objective", "teacher", "options", "named"),
    [
        (pl_kl, {}, {"ce_weight": 0.0, "kl_weight": 0.0}, "every weight"),
        (RELATED, {}, ONLY["cross_loss"] | {"cross_weight": 0.0}, "every weight"),
        (miniend, {}, {"num_relation_heads": 3}, "num_relation_heads 3 .* 16 .* 16 "),
        (RELATED, {"d_model": 8}, {"hidden_weight": 1.0}, "need the same width"),
        (RELATED, {"vocab_size": 97}, {"kl_weight": 1.0}, "student has 96 .* teacher 97"),
    ],
)
def test_what_cannot_be_compared_is_rejected(objective, teacher, options, named):
    with pytest.raises(ValueError, match=named):
        objective(tiny_bart(2, 2), tiny_bart(2, 2, **teacher), tiny_batch(), **options)


@each_family
def test_padding_amount_changes_no_loss(family):
    teacher = FAMILIES[family](3, 3)
    student, _, _ = init_student(teacher, 2, 1)
    for objective in (sft, ALL_KD, pl_kl):
        tight, loose = (objective(student, teacher, tiny_batch(padding=n) | {"ids": ["a"]}) for n in (0, 6))
        for name, value in tight.items():
            torch.testing.assert_close(value, loose[name], rtol=1e-4, atol=1e-5)
    assert not any(module._forward_hooks for model in (student, teacher) for module in model.modules())


@each_family
def test_a_batch_without_labels_gives_zero_token_losses(family, monkeypatch):
    teacher, batch = FAMILIES[family](), tiny_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    student, _, _ = init_student(teacher, 3, 1)
    losses = kd(student, teacher, batch, encoder_layer_ids=[], decoder_layer_ids=[0])
    losses["loss"].backward()
    assert all(value.item() == 0.0 for value in losses.values())
    assert all(torch.isfinite(weight.grad).all() for weight in student.parameters() if weight.grad is not None)
    monkeypatch.setattr(objectives, "draw_samples", lambda student, rows, _: rows | {"labels": batch["labels"]})
    assert OWN(student, teacher, batch, share=1.0)["loss"].item() == 0.0


@each_family
def test_dropout_belongs_to_what_is_trained_and_a_pass_changes_no_mode(family):
    """Frozen layers beneath trained embeddings stay without dropout: what `train_mode` set holds in every objective."""
    teacher, batch = FAMILIES[family](3, 3), tiny_batch()
    for options, frozen in (({}, True), ({"embeddings": False}, True), ({"encoder": False}, False)):
        student, _, _ = init_student(teacher, 3, 1)
        freeze(student, **options)
        train_mode(student)
        modes = [module.training for module in student.modules()]
        assert any(layer.training for layer in objectives.decoder_layers(student))
        assert all(layer.training != frozen for layer in objectives.encoder_layers(student))
        for objective in (sft, ALL_KD, pl_kl, OWN, RELATED):
            objective(student, teacher, batch)
            assert [module.training for module in student.modules()] == modes
        first, second = (objectives.encode(student, batch)[0] for _ in range(2))
        assert torch.equal(first, second) == (frozen and not options)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_half_precision_teacher_and_autocast_give_float32_losses(family):
    teacher, batch = FAMILIES[family](2, 2), tiny_batch()
    student, _, _ = init_student(teacher, 2, 1)
    freeze(student)
    full = pl_kl(student, teacher, batch, shared_encoder=True)
    teacher.to(torch.bfloat16)
    mixed = pl_kl(student, teacher, batch, shared_encoder=True)
    with torch.autocast("cpu", torch.bfloat16):
        auto = kd(student, teacher, batch, encoder_layer_ids=[], decoder_layer_ids=[0], shared_encoder=True)
    for losses in (mixed, auto):
        assert all(value.dtype == torch.float32 for value in losses.values())
        assert losses["kl_loss"].item() == pytest.approx(full["kl_loss"].item(), rel=0.1)
    trained = [weight for weight in student.parameters() if weight.requires_grad]
    gradients(student, auto["loss"])
    assert trained and all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in trained)


def narrow(family, encoder_layers=2, decoder_layers=2):
    sizes = {"d_kv": 4} if family.startswith("t5") else {}
    return FAMILIES[family](encoder_layers, decoder_layers, seed=1, d_model=8, **sizes)


@each_family
def test_miniend_is_the_mean_of_relations_by_hand(family):
    teacher, student, batch = FAMILIES[family](3, 3), narrow(family), tiny_batch(padding=1)
    losses = RELATED(student, teacher, batch, cross_weight=2.0)
    sites = ("encoder_self", "decoder_self", "decoder_cross")
    with capture(student, [(site, 1) for site in sites]) as ours:
        student(**batch)
    with capture(teacher, [(site, 2) for site in sites]) as theirs:
        teacher(**batch)
    source, target = batch["attention_mask"], batch["labels"] != -100

    def relation(site, name, mask, causal):
        return relation_loss(ours[site, 1][name], theirs[site, 2][name], mask, 4, causal) / 3

    expected = {
        "encoder_self_loss": sum(relation(sites[0], name, source, False) for name in "qkv"),
        "decoder_self_loss": sum(relation(sites[1], name, target, True) for name in "qkv"),
        "cross_loss": relation(sites[2], "q", target, True)
        + sum(relation(sites[2], name, source, False) for name in "kv"),
    }
    assert list(losses) == ["loss", *expected]
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-4, atol=1e-6)
    encoder, decoder, cross = expected.values()
    torch.testing.assert_close(losses["loss"], (encoder + decoder + 2 * cross) / 4, rtol=1e-4, atol=1e-6)
    loose = RELATED(student, teacher, tiny_batch(padding=6), cross_weight=2.0)
    torch.testing.assert_close(losses["loss"], loose["loss"], rtol=1e-4, atol=1e-6)


@each_family
def test_miniend_of_a_teacher_with_itself_is_zero_in_every_term(family):
    teacher, batch = FAMILIES[family](2, 2), tiny_batch()
    student, _, _ = init_student(teacher, 2, 2)
    losses = RELATED(student, teacher, batch, kl_weight=1.0, hidden_weight=1.0)
    assert list(losses) == ["loss", *ONLY, "kl_loss", "hidden_loss"]
    assert all(value.item() == pytest.approx(0.0, abs=1e-5) for value in losses.values())


@pytest.mark.parametrize("family", ["bart", "pegasus", "t5"])
def test_gradients_of_relations_reach_exactly_what_stands_before_them(family):
    teacher, student, batch = FAMILIES[family](3, 3), narrow(family), tiny_batch()
    names = {name for name, weight in student.named_parameters() if weight.requires_grad}
    before = {}
    for term, (site, _) in objectives.RELATION_TERMS.items():
        with capture(student, [(site, -1)]) as captured:
            student(**batch)
        before[term] = gradients(student, sum(vectors.sum() for vectors in captured[site, -1].values())).keys()
    encoder, decoder = ({name for name in names if re.search(rf"{side}coder\.\w+\.1\..*(fc1|wi)", name)}
                        for side in ("en", "de"))  # the last layers' feed-forward  # fmt: skip
    assert encoder and not encoder & before["encoder_self_loss"]
    # With cross-attention in the first decoder layer, decoder terms reach all of the encoder, its last FFN included.
    assert encoder <= before["decoder_self_loss"] and encoder <= before["cross_loss"]
    assert decoder and not any(decoder & reached for reached in before.values())
    paths = {(term,): ONLY[term] for term in ONLY} | {tuple(ONLY)[:2]: {"cross_weight": 0.0}, tuple(ONLY): {}}
    for terms, weights in paths.items():
        found = gradients(student, RELATED(student, teacher, batch, **weights)["loss"])
        assert found.keys() == set().union(*(before[term] for term in terms)), terms
        assert all(gradient.abs().sum() > 0 for gradient in found.values()), terms
    assert all(weight.grad is None for weight in teacher.parameters())
    assert gradients(student, RELATED(student, teacher, batch, kl_weight=1.0)["loss"]).keys() == names


@pytest.mark.parametrize("family", ["bart", "pegasus", "t5"])
def test_miniend_runs_no_further_than_its_terms_need(family):
    teacher, student, batch = FAMILIES[family](3, 3), narrow(family), tiny_batch()
    heads = [calls(model.get_output_embeddings()) for model in (student, teacher)]
    decoders = [calls(model.get_decoder()) for model in (student, teacher)]  # called when a pass ends
    first = [calls(objectives.decoder_layers(model)[0]) for model in (student, teacher)]
    early = RELATED(student, teacher, batch)
    assert not any([*heads, *decoders]) and all(len(seen) == 1 for seen in first)
    assert RELATED(student, teacher, batch, **ONLY["encoder_self_loss"])["loss"] == early["encoder_self_loss"]
    assert all(len(seen) == 1 for seen in first)
    late = RELATED(student, teacher, batch, ce_weight=0.5)
    assert [len(seen) for seen in (*heads, *decoders)] == [2, 0, 1, 0]  # a probe asks whether the head is trained
    for name, value in early.items():
        assert torch.equal(value, late[name]) or name == "loss"
    torch.testing.assert_close(late["loss"], early["loss"] + 0.5 * student(**batch).loss)
    scratch = miniend(student, None, batch, **ONLY["cross_loss"] | {"cross_weight": 0.0}, ce_weight=1.0)
    torch.testing.assert_close(scratch["loss"], student(**batch).loss)
    assert not any(module._forward_hooks and "capture" in str(module._forward_hooks) for module in teacher.modules())


@pytest.mark.parametrize(("family", "site"), [("bert", "encoder_self"), ("opt", "decoder_self")])
def test_miniend_serves_models_of_one_stack(family, site):
    student, teacher = models = one_stack(family, 2, 8), one_stack(family, 3, 16)
    batch = tiny_batch()
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    only = ONLY[f"{site}_loss"]
    losses = RELATED(student, teacher, batch, **only, ce_weight=1.0, kl_weight=1.0)
    assert losses["ce_loss"].item() == pytest.approx(student(**batch).loss.item(), rel=1e-5)
    vectors = []
    for model in models:
        with capture(model, [(site, -1)]) as captured:
            model(**batch)
        vectors.append(captured[site, -1])
    mask = batch["attention_mask"]
    expected = sum(relation_loss(vectors[0][name], vectors[1][name], mask, 4, family == "opt") for name in "qkv")
    torch.testing.assert_close(losses[f"{site}_loss"], expected / 3)
    same = RELATED(teacher, teacher, batch, **only, kl_weight=1.0, hidden_weight=1.0)
    assert same["loss"].item() == pytest.approx(0.0, abs=1e-5)
    with pytest.raises(InputError, match="models have no"):
        RELATED(student, teacher, batch)
