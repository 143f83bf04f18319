"""SFT, KD and PL for every family on tiny models, and what Pegasus needs."""

import math
from dataclasses import replace

import pytest
import test_runs
import torch
from tiny_models import FAMILIES, VOCAB_SIZE, tiny_batch, tiny_pegasus, tiny_t5_v1_1, tiny_tokenizer

from distill_utils.artifacts import read_json
from distill_utils.distillation import objectives
from distill_utils.evaluation import scoring
from distill_utils.experiments import checks, runs
from distill_utils.models import students
from distill_utils.models.loading import load_model, save_model
from distill_utils.training import loop
from distill_utils.training.loop import Training, read_history


def tiny_flan(encoder_layers=2, decoder_layers=2, seed=0, **changes):
    """Flan-T5: T5 v1.1 whose vocabulary is larger than its tokenizer's."""
    return tiny_t5_v1_1(encoder_layers, decoder_layers, seed, **({"vocab_size": VOCAB_SIZE + 32} | changes))


MODELS = FAMILIES | {"flan": tiny_flan}
TRAINING = Training(max_steps=2, batch_size=4, learning_rate=1e-2, log_every=1)
BASE = replace(test_runs.BASE, shape="2-1", max_source_length=16, max_target_length=8, training=TRAINING)


@pytest.mark.parametrize("family", MODELS)
def test_sft_kd_and_pl_from_teacher_to_saved_student(family, tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_RUNS", str(tmp_path / "runs"))
    save_model(MODELS[family](2, 2), tiny_tokenizer(), tmp_path / "teacher")
    teacher, tokenizer = load_model(tmp_path / "teacher")
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    prefix = "read the text " if family.startswith(("t5", "flan")) else ""
    base = replace(BASE, teacher=str(tmp_path / "teacher"), prefix=prefix)
    train, validation = test_runs.planted(8, 0), test_runs.planted(4, 1)
    plan = runs.grid(base, ["sft", "kd", "pl"], ["2-1"], [0])
    checks.check_runs(plan, teacher)
    for run in plan:
        folder = runs.train_student(run, teacher, tokenizer, train, validation)
        history = read_history(folder)
        assert len(history) == 2
        for row in history:
            assert all(math.isfinite(value) for value in row.values())
        assert ("hidden_loss" in history[0]) == (run.method == "kd") and "validation_kl" in history[-1]

        cut, _ = runs.cut_student(run, teacher)
        student, own_tokenizer = load_model(folder / "student")
        start, trained = cut.state_dict(), student.state_dict()
        moved = {name for name in start if not torch.equal(start[name], trained[name])}
        assert moved  # the decoder learned, while the frozen encoder and embeddings stayed the teacher's
        frozen = {name for name, weight in cut.named_parameters() if not weight.requires_grad}
        assert frozen and not moved & frozen
        assert own_tokenizer.get_vocab() == tokenizer.get_vocab()
    options = {"max_source_length": run.max_source_length, "prefix": prefix, "num_speed": 1, "num_beams": 1}
    tested = scoring.evaluate_model(run.name, student, own_tokenizer, folder.name, validation, **options)
    row = read_json(tested / "results.json")
    assert all(math.isfinite(row[name]) for name in ("rouge1", "rouge2", "rougeL", "rougeLsum", "ms_per_token"))
    for name, weight in teacher.state_dict().items():
        assert torch.equal(weight, before[name]), f"the teacher's {name} changed"


# -------------------------------------------------------------------------------------------------------------- Pegasus


def huge_pegasus():
    """A Pegasus whose layers return states far beyond float16, as trained ones do: pre-norm streams are not bounded."""
    model = tiny_pegasus(2, 2)
    with torch.no_grad():
        for layer in [*students.encoder_layers(model), *students.decoder_layers(model)]:
            layer.fc2.weight *= 1e6
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalised_hidden_loss_is_finite_with_huge_states(dtype):
    teacher, batch = huge_pegasus().to(dtype), tiny_batch()
    student, _, _ = students.init_student(huge_pegasus(), 2, 1)
    largest = []
    students.decoder_layers(teacher)[1].register_forward_hook(lambda *call: largest.append(float(call[-1].abs().max())))
    terms = objectives.kd(student, teacher, batch, encoder_layer_ids=[0, 1], decoder_layer_ids=[1])
    assert largest[0] > torch.finfo(torch.float16).max
    assert all(torch.isfinite(value) for value in terms.values()) and 0 < terms["hidden_loss"] <= 8
    terms["loss"].backward()
    gradients = [weight.grad for weight in student.parameters() if weight.grad is not None]
    assert gradients and all(torch.isfinite(gradient).all() for gradient in gradients)


def test_weights_stay_float32_where_passes_are_in_bf16(tmp_path, monkeypatch):
    model = tiny_pegasus(1, 1)
    batch, seen = tiny_batch() | {"ids": ["a", "b", "c"]}, set()
    monkeypatch.setattr(loop, "amp_dtype", lambda *_: torch.bfloat16)

    def loss_fn(student, batch):
        seen.add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else student.dtype)
        return objectives.sft(student, None, batch)

    loop.fit(model, loss_fn, lambda step: [batch], replace(TRAINING, batch_size=3), tmp_path / "run")
    assert seen == {torch.bfloat16} and model.dtype == torch.float32
