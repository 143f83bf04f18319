"""The teacher's distributions and states from disk against its own passes: losses, gradients, trained students."""

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from datasets import Dataset
from test_objectives import calls, each_family, gradients
from test_runs import BASE, place, planted  # noqa: F401
from tiny_models import FAMILIES, PAD, VOCAB_SIZE, tiny_bart, tiny_batch

from distill_utils import device
from distill_utils.artifacts import InputError, read_json
from distill_utils.data.batches import batch_list, pair_stream
from distill_utils.distillation import teacher_cache
from distill_utils.distillation.objectives import kd, kd_cached, sft
from distill_utils.distillation.teacher_cache import with_states, with_targets
from distill_utils.experiments import runs
from distill_utils.experiments.checks import forecast
from distill_utils.models import students
from distill_utils.models.loading import load_model
from distill_utils.training.loop import read_history

TOKEN_LOSSES = partial(kd, encoder_layer_ids=[], decoder_layer_ids=[], hidden_weight=0.0)
write_targets, write_states = (
    partial(write, pad_token_id=PAD, batch_size=3)
    for write in (teacher_cache.write_targets, teacher_cache.write_states)
)


@pytest.fixture
def float32_teacher(monkeypatch):
    monkeypatch.setattr(device, "amp_dtype", lambda on=None: None)


def make_rows(count=7):
    batch = tiny_batch([5 + i % 4 for i in range(count)], [2 + i % 5 for i in range(count)])
    sources = [[t for t in row if t != PAD] for row in batch["input_ids"].tolist()]
    labels = [[t for t in row if t != -100] for row in batch["labels"].tolist()]
    return Dataset.from_dict({"id": [f"d{i}" for i in range(count)], "input_ids": sources, "labels": labels})


def renamed(rows, names):
    return rows.remove_columns("id").add_column("id", names)


# ------------------------------------------------------------------------------------------------------- distributions


@each_family
def test_all_ids_give_the_online_loss_and_gradients(family, tmp_path, float32_teacher):
    teacher, rows = FAMILIES[family](2, 2), make_rows()
    student, _, _ = students.init_student(teacher, 2, 1)
    write_targets(tmp_path / "all", teacher, rows, top_k=VOCAB_SIZE, temperature=2.0)
    batches = with_targets(pair_stream(rows, PAD, 4, seed=0, micro_batch_size=2), tmp_path / "all")
    for batch in batches(0):
        assert batch["target_ids"].shape == batch["target_probs"].shape == (*batch["labels"].shape, VOCAB_SIZE)
        online = TOKEN_LOSSES(student, teacher, batch)
        expected = gradients(student, online["loss"])
        cached = kd_cached(student, None, batch)
        torch.testing.assert_close(cached, online, rtol=2e-3, atol=2e-3)  # probabilities are kept in float16
        assert list(kd_cached(student, None, batch, ce_weight=0.0)) == ["loss", "kl_loss"]
        for name, gradient in gradients(student, cached["loss"]).items():
            torch.testing.assert_close(gradient, expected[name], rtol=5e-3, atol=5e-3)


def test_fewer_ids_give_a_lower_bound_that_rises_with_their_number(tmp_path, float32_teacher):
    teacher, rows = tiny_bart(2, 2), make_rows()
    student, _, _ = students.init_student(teacher, 2, 1)
    (batch,) = batch_list(rows, PAD, 7)
    exact = TOKEN_LOSSES(student, teacher, batch)
    values, residuals, done = [], [], []
    for top_k in (1, 4, 16, 64, VOCAB_SIZE):
        folder = tmp_path / str(top_k)
        facts = write_targets(folder, teacher, rows, top_k=top_k, progress=lambda *counts: done.append(counts))
        (cached,) = with_targets(lambda step: [batch], folder)(0)
        values.append(kd_cached(student, None, cached)["kl_loss"].item())
        residuals.append(facts["mean_residual"])
        assert facts["entries_per_token"] == top_k and facts["rows"] == 7
        assert facts["tokens"] == sum(map(len, rows["labels"]))
    assert done == [(3, 7), (6, 7), (7, 7)] * 5
    assert values == sorted(values) and residuals == sorted(residuals, reverse=True)
    assert 0 < values[0] < 0.9 * values[-1] and values[-1] == pytest.approx(exact["kl_loss"].item(), rel=2e-3)
    assert residuals[0] > 0.01 and residuals[-1] < 1e-6


def test_shares_of_samples_are_unbiased_over_all_draws():
    """Every outcome of three draws from four ids, weighted by its probability, averages to the distribution."""
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    mean = torch.zeros(4, dtype=torch.float64)
    for draws in itertools.product(range(4), repeat=3):
        weight = probs[list(draws)].prod()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "multinomial", lambda *a, draws=draws, **k: torch.tensor([draws]))
            values, ids = teacher_cache.choose_targets(probs[None], samples=3)
        assert values.sum() == 3 and values.shape == (1, 3)
        mean.scatter_add_(0, ids[0], weight * values[0] / 3)
    torch.testing.assert_close(mean, probs)


def test_samples_depend_on_the_seed_alone_and_their_shares_add_up(tmp_path):
    teacher, rows = tiny_bart(1, 1), make_rows(3)
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        torch.rand(1)
        facts = write_targets(tmp_path / name, teacher, rows, samples=8, seed=seed)
        assert facts["entries_per_token"] < 8 and 0 < facts["mean_residual"] < 1
    first, again, other = ((tmp_path / name / "ids.bin").read_bytes() for name in ("first", "again", "other"))
    assert first == again != other
    (cached,) = with_targets(lambda step: batch_list(rows, PAD, 3), tmp_path / "first")(0)
    assert cached["target_probs"].sum(-1)[cached["labels"] != -100].sub(1).abs().max() < 1e-6


def test_large_vocabularies_and_bf16_teachers_are_kept_too(tmp_path, monkeypatch):
    teacher, rows = tiny_bart(1, 1, vocab_size=70_000), make_rows(2)
    monkeypatch.setattr(device, "amp_dtype", lambda on=None: torch.bfloat16)
    with torch.no_grad():
        teacher.final_logits_bias[0, 69_999] = 1000.0
    write_targets(tmp_path / "large", teacher, rows, top_k=1)
    (batch,) = with_targets(lambda step: batch_list(rows, PAD, 2), tmp_path / "large")(0)
    valid = batch["labels"] != -100
    assert (batch["target_ids"][valid] == 69_999).all() and (batch["target_probs"][valid] == 1).all()


def test_targets_are_computed_in_the_dtype_asked_for(tmp_path, monkeypatch):
    teacher, rows = tiny_bart(1, 1), make_rows(3)
    monkeypatch.setattr(device, "amp_dtype", lambda on=None: torch.bfloat16)  # what the machine is good at
    (batch,) = batch_list(rows, PAD, 3)
    with torch.no_grad():
        logits = teacher(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).logits
    exact = (logits / 2).softmax(-1)[batch["labels"] != -100]
    errors = {}
    for name, options in {"float32": {"dtype": None}, "auto": {}}.items():
        write_targets(tmp_path / name, teacher, rows, top_k=VOCAB_SIZE, temperature=2.0, **options)
        (found,) = with_targets(lambda step: [batch], tmp_path / name)(0)
        probs = torch.zeros_like(logits).scatter_(-1, found["target_ids"], found["target_probs"])
        errors[name] = float((probs[batch["labels"] != -100] - exact).abs().max())
    assert errors["float32"] < 3e-4  # they lie on disk in float16
    assert errors["auto"] > 2 * errors["float32"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": VOCAB_SIZE + 1}, f"top_k {VOCAB_SIZE + 1} "),
        ({"top_k": 0}, "top_k is 0 and samples 0"),
        ({"top_k": 2, "samples": 2}, "top_k is 2 and samples 2"),
        ({"top_k": -1, "samples": 2}, "top_k is -1 and samples 2"),
        ({"samples": 4096}, "samples 4096 "),
        ({"top_k": 2, "temperature": 0.0}, "temperature 0.0 "),
        ({"top_k": 2, "rows": renamed(make_rows(2), ["d", "d"])}, "same id"),
        ({"top_k": 2, "rows": make_rows(2).select([])}, "no rows"),
    ],
)
def test_impossible_input_is_rejected_before_the_teacher_runs(tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(teacher_cache, "encode", None)
    with pytest.raises(InputError, match=message):
        write_targets(tmp_path / "top", tiny_bart(1, 1), **{"rows": make_rows(2)} | options)
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------------------- states


@pytest.mark.parametrize("match", ["outputs", "inputs"])
@each_family
def test_losses_and_gradients_are_those_of_the_teachers_own_passes(family, match, tmp_path):
    teacher, rows = FAMILIES[family](2, 2), make_rows()
    student, _, layer_ids = students.init_student(teacher, 2, 1)
    students.freeze(student)
    folders, written = (tmp_path / "encoder", tmp_path / "decoder"), []
    written.append(write_states(folders[0], teacher, rows, "encoder"))
    which = {"layer_ids": layer_ids, "match": match, "encoder": folders[0]}
    written.append(write_states(folders[1], teacher, rows, "decoder", **which))
    for facts, column, states in zip(written, ("input_ids", "labels"), (1, 2), strict=True):
        tokens = sum(map(len, rows[column]))
        assert facts == {"rows": 7, "tokens": tokens, "bytes": states * 4 * teacher.config.d_model * tokens}
    plain = pair_stream(rows, PAD, 4, seed=0, micro_batch_size=3)
    imitate = partial(kd, encoder_layer_ids=[], decoder_layer_ids=layer_ids, shared_encoder=True, match=match)
    passes = [calls(stack) for stack in (student.get_encoder(), teacher.get_encoder(), teacher.get_decoder())]
    for objective, read in ((sft, folders[:1]), (imitate, folders[:1]), (imitate, folders)):
        stored = with_states(plain, *read)
        for own, cached in zip(sum(map(plain, range(3)), []), sum(map(stored, range(3)), []), strict=True):
            expected = objective(student, teacher, own)
            expected_gradients = gradients(student, expected["loss"])
            before = [len(seen) for seen in passes]
            found = objective(student, teacher, cached)
            ran = [len(seen) - count for seen, count in zip(passes, before, strict=True)]
            assert ran == [0, 0, int(objective is imitate and len(read) == 1)]
            assert_equal(student, found, expected, expected_gradients)


def assert_equal(student, found, expected, expected_gradients):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    found_gradients = gradients(student, found["loss"])
    assert found_gradients.keys() == expected_gradients.keys()
    for name, gradient in found_gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("match", ["outputs", "inputs"])
@each_family
def test_a_trained_encoder_imitates_layers_from_disk_and_the_teacher_does_not_run(family, match, tmp_path):
    teacher, rows = FAMILIES[family](2, 2), make_rows()
    student, *layer_ids = students.init_student(teacher, 1, 1)
    folders = (tmp_path / "layers", tmp_path / "decoder")
    for folder, side, ids in zip(folders, ("encoder_layers", "decoder"), layer_ids, strict=True):
        write_states(folder, teacher, rows, side, layer_ids=ids, match=match)
    plain = pair_stream(rows, PAD, 4, seed=0, micro_batch_size=3)
    imitate = partial(kd, student, teacher, encoder_layer_ids=layer_ids[0], decoder_layer_ids=layer_ids[1], match=match)
    seen = [calls(stack) for stack in (teacher.get_encoder(), teacher.get_decoder())]
    for own, cached in zip(plain(0), with_states(plain, *folders)(0), strict=True):
        expected = imitate(own)
        expected_gradients, before = gradients(student, expected["loss"]), [len(each) for each in seen]
        assert_equal(student, imitate(cached), expected, expected_gradients)
        assert before == [len(each) for each in seen]


def test_students_train_as_without_and_share_the_states(place):  # noqa: F811
    base, teacher, tokenizer = place
    train, validation = planted(18, 1), planted(6, 2)
    # In bf16 the teacher's attention kernel and the student's differ by a thousandth.
    base = replace(base, training=replace(base.training, precision="float32"))
    plan = runs.grid(replace(base, cache_states=True), ["sft", "kd", "pl_kl", "on_policy"], ["3-1"], [0])
    # These train their encoders: SFT reads nothing, KD layers of both stacks, PL+KL the teacher's distribution.
    plan += [replace(base, cache_states=True, shape="2-1", method=method) for method in ("sft", "kd", "pl_kl")]
    assert forecast(plan, teacher, tokenizer, train)
    held = [forecast([replace(plan[1], cache_states=read)], teacher, tokenizer, train) for read in (False, True)]
    stacks = [module for stack in (teacher.get_encoder(), teacher.get_decoder()) for module in stack.modules()]
    idle = sum(w.numel() for module in stacks if isinstance(module, torch.nn.Linear) for w in module.parameters())
    assert held[0][0]["memory (MB)"] - held[1][0]["memory (MB)"] == pytest.approx(4 * idle / 2**20)
    for run in plan:
        cached = runs.train_student(run, teacher, tokenizer, train, validation)
        plain = runs.train_student(replace(run, cache_states=False), teacher, tokenizer, train, validation)
        assert cached != plain
        for one, other in zip(read_history(cached), read_history(plain), strict=True):
            assert {k: v for k, v in one.items() if "loss" in k or "validation" in k} == pytest.approx(
                {k: v for k, v in other.items() if "loss" in k or "validation" in k}, rel=1e-4, abs=1e-5
            )
        ours, theirs = (dict(load_model(path / "student")[0].named_parameters()) for path in (cached, plain))
        for name, weight in ours.items():
            if not name.endswith("k_proj.bias"):  # its gradient is 0, and Adam makes steps of what rounding leaves
                torch.testing.assert_close(weight, theirs[name], rtol=1e-2, atol=2e-4)
    # Of decoders: KD's rows with the layers of 3-1 and of 2-1, which are the same, and those of PL+KL.
    for side, numbers in (("encoder", [6, 18]), ("encoder_layers", [18]), ("decoder", [6, 18, 18])):
        folders = cached.parent.glob(f"{side}-states-*")
        assert sorted(read_json(folder / "results.json")["rows"] for folder in folders) == numbers


def test_a_method_that_reads_no_states_has_none_written(place):  # noqa: F811
    base, teacher, tokenizer = place
    run = replace(base, cache_states=True, shape="3-1", method="on_policy")
    trained = runs.train_student(run, teacher, tokenizer, planted(18, 1), planted(6, 2))
    assert not list(trained.parent.glob("*-states-*"))


def test_states_fit_or_not():
    teacher = tiny_bart()
    gigabytes = 4 * 10 * (24 + 8 * 2) * teacher.config.d_model / 1e9  # a layer's, of 8 target tokens the last too
    assert teacher_cache.fits_disk(teacher, 10, 24, 8, 1.01 * gigabytes)
    assert not teacher_cache.fits_disk(teacher, 10, 24, 8, 0.99 * gigabytes)
    assert BASE.cache_states is False and "cache_states" not in runs.hashed(BASE)
    assert runs.hashed(replace(BASE, cache_states=True)) == runs.hashed(BASE) | {"cache_encoder": True}


# ---------------------------------------------------------------------------------------------------------------- both


@pytest.mark.parametrize("kind", ["targets", "states"])
def test_rows_are_found_by_their_document_and_those_of_other_tokens_rejected(kind, tmp_path):
    write, attach = (
        (partial(write_targets, top_k=2), with_targets)
        if kind == "targets"
        else (partial(write_states, side="encoder"), with_states)
    )
    rows, folder = make_rows(), tmp_path / kind
    write(folder, tiny_bart(1, 1), rows)

    def read(rows):
        return attach(pair_stream(rows, PAD, 2, seed=0), folder)(0)[0]

    some = rows.select([3, 5])
    direct, labels = read(some), read(renamed(some, ["d3#1@2", "d5#0"]))
    for name in direct.keys() - {"ids", "target_temperature"}:
        assert torch.equal(labels[name], direct[name])
    cut = some.map(lambda row: {"input_ids": row["input_ids"][1:]})
    for other, message in (
        (renamed(some, ["d3", "elsewhere"]), f"elsewhere is not among .* {kind} "),
        (renamed(some, ["d5", "d4"]), f"d[45] has other tokens than .* {kind} "),
        (cut, f"d[35] has other tokens than .* {kind} "),
    ):
        with pytest.raises(InputError, match=message):
            read(other)
    with pytest.raises(InputError, match="same id"):
        write(tmp_path / "twice", tiny_bart(1, 1), renamed(some, ["d5", "d5"]))
