"""Teacher states from disk against the teacher's own passes: losses, gradients, trained students."""

from dataclasses import replace

import pytest
import torch
from test_objectives import gradients
from test_runs import BASE, place, planted  # noqa: F401
from test_targets import make_rows
from tiny_models import FAMILIES, PAD, tiny_bart

from distill_utils.artifacts import InputError, read_json
from distill_utils.data.batches import pair_stream
from distill_utils.distillation import teacher_states
from distill_utils.distillation.objectives import kd, sft
from distill_utils.experiments import runs
from distill_utils.experiments.checks import forecast
from distill_utils.models import students
from distill_utils.models.loading import load_model
from distill_utils.training.loop import read_history


def write(folder, teacher, rows, **options):
    return teacher_states.write_states(folder, teacher, rows, pad_token_id=PAD, batch_size=3, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_the_encoders_own_pass(family, tmp_path):
    teacher, rows = FAMILIES[family](2, 2), make_rows()
    student, _, layer_ids = students.init_student(teacher, 2, 1)
    students.freeze(student, encoder=True, embeddings=True)
    facts = write(tmp_path / "states", teacher, rows)
    assert facts["tokens"] == sum(map(len, rows["input_ids"])) and facts["rows"] == len(rows)
    assert facts["bytes"] == 4 * teacher.config.d_model * facts["tokens"]
    plain = pair_stream(rows, PAD, 4, seed=0, micro_batch_size=3)
    read = teacher_states.with_states(plain, tmp_path / "states")
    options = {"encoder_layer_ids": [], "decoder_layer_ids": layer_ids, "shared_encoder": True}
    runs_of = []
    hook = student.get_encoder().register_forward_hook(lambda *call: runs_of.append(1))
    for step in range(3):
        for own, cached in zip(plain(step), read(step), strict=True):
            for loss in (lambda batch: sft(student, None, batch), lambda batch: kd(student, teacher, batch, **options)):
                expected = loss(own)
                expected_gradients = gradients(student, expected["loss"])
                runs_of.clear()
                found = loss(cached)
                assert not runs_of, "the encoder ran although its states were there"
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
                found_gradients = gradients(student, found["loss"])
                assert found_gradients.keys() == expected_gradients.keys()
                for name, gradient in found_gradients.items():
                    torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-6)
    hook.remove()


@pytest.mark.parametrize("match", ["outputs", "inputs"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_the_teachers_own_passes(family, match, tmp_path):
    teacher, rows = FAMILIES[family](2, 2), make_rows()
    student, _, layer_ids = students.init_student(teacher, 2, 1)
    students.freeze(student, encoder=True, embeddings=True)
    folders = tmp_path / "encoder", tmp_path / "decoder"
    write(folders[0], teacher, rows)
    facts = write(folders[1], teacher, rows, layer_ids=layer_ids, match=match, encoder=folders[0])
    assert facts["tokens"] == sum(map(len, rows["labels"]))
    assert facts["bytes"] == 2 * 4 * teacher.config.d_model * facts["tokens"]
    plain = pair_stream(rows, PAD, 4, seed=0, micro_batch_size=3)
    read = teacher_states.with_states(plain, *folders)
    options = {"encoder_layer_ids": [], "decoder_layer_ids": layer_ids, "shared_encoder": True, "match": match}
    for step in range(3):
        for own, stored in zip(plain(step), read(step), strict=True):
            expected = kd(student, teacher, own, **options)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(type(teacher.get_decoder()), "forward", only(student.get_decoder()))
                found = kd(student, teacher, stored, **options)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
            expected_gradients = gradients(student, expected["loss"])
            for name, gradient in gradients(student, found["loss"]).items():
                torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-6)


def only(allowed):
    """Return a forward pass that no other module than the allowed one may take."""
    own = type(allowed).forward

    def forward(self, *args, **kwargs):
        assert self is allowed, "the teacher ran although its states were there"
        return own(self, *args, **kwargs)

    return forward


def test_labels_are_found_by_their_document_and_others_are_rejected(tmp_path):
    rows = make_rows()
    write(tmp_path / "states", tiny_bart(2, 2), rows)
    labels = rows.select([3, 5]).remove_columns("id").add_column("id", ["d3#1@2", "d5#0"])
    (batch,) = teacher_states.with_states(pair_stream(labels, PAD, 2, seed=0), tmp_path / "states")(0)
    (direct,) = teacher_states.with_states(pair_stream(rows.select([3, 5]), PAD, 2, seed=0), tmp_path / "states")(0)
    torch.testing.assert_close(batch["encoder_states"], direct["encoder_states"], rtol=0, atol=0)
    unknown = labels.remove_columns("id").add_column("id", ["d3", "elsewhere"])
    with pytest.raises(InputError, match="elsewhere is not among"):
        teacher_states.with_states(pair_stream(unknown, PAD, 2, seed=0), tmp_path / "states")(0)
    swapped = labels.remove_columns("id").add_column("id", ["d5", "d4"])
    with pytest.raises(InputError, match="has other tokens"):
        teacher_states.with_states(pair_stream(swapped, PAD, 2, seed=0), tmp_path / "states")(0)
    twice = labels.remove_columns("id").add_column("id", ["d5", "d5"])
    with pytest.raises(InputError, match="same id"):
        write(tmp_path / "twice", tiny_bart(2, 2), twice)


def test_students_train_as_without_and_share_the_states(place):  # noqa: F811
    base, teacher, tokenizer = place
    train, validation = planted(18, 1), planted(6, 2)
    plan = runs.grid(replace(base, cache_states=True), ["sft", "kd", "pl_kl", "on_policy"], ["3-1"], [0])
    # These train their encoders: SFT reads nothing, PL+KL the teacher's distribution.
    plan += [replace(base, cache_states=True, shape="2-1", method=method) for method in ("sft", "kd", "pl_kl")]
    assert forecast(plan, teacher, tokenizer, train)
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
    for side, numbers in (("encoder", [6, 18]), ("decoder", [6, 18, 18])):  # of decoders: KD's rows, and those of PL+KL
        folders = cached.parent.glob(f"{side}-states-*")
        assert sorted(read_json(folder / "results.json")["rows"] for folder in folders) == numbers


def test_states_fit_or_not():
    teacher, train = tiny_bart(), planted(10, 1)
    gigabytes = 4 * 10 * (24 + 8 * 2) * teacher.config.d_model / 1e9  # of 8 target tokens the last state and a layer's
    assert teacher_states.fits_disk(teacher, train, 24, 8, 1.01 * gigabytes)
    assert not teacher_states.fits_disk(teacher, train, 24, 8, 0.99 * gigabytes)
    assert BASE.cache_states is False and "cache_states" not in runs.hashed(BASE)
    assert runs.hashed(replace(BASE, cache_states=True)) == runs.hashed(BASE) | {"cache_encoder": True}
