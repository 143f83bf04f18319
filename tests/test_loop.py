"""The training loop: arithmetic, refusals, and real processes that are killed and started again."""

import contextlib
import math
import multiprocessing
import os
import random
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_bart, tiny_batch, tiny_t5
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import PreTrainedModel

from distill_utils import artifacts
from distill_utils.artifacts import InputError, read_json
from distill_utils.device import amp_dtype, device
from distill_utils.distillation import objectives
from distill_utils.models.hooks import projections
from distill_utils.training import checkpoints, loop, optimizers
from distill_utils.training.loop import Training, fit


def loss_fn(model, batch):
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
    return {"loss": model(**inputs).loss}


def batches(step):
    return [tiny_batch(seed=step, padding=2) | {"ids": [f"row{3 * step + i}" for i in range(3)]}]


def same_batches(step):
    return batches(0)


def settings(**changes):
    return Training(
        **{"max_steps": 6, "batch_size": 3, "learning_rate": 1e-3, "log_every": 1, "precision": "float32"} | changes
    )


def weights_of(model):
    return {name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def timeless(history):
    times = ("seconds", "examples_per_second")
    return [{name: value for name, value in row.items() if name not in times} for row in history]


# --------------------------------------------------------------------------------------------------------- arithmetic


def test_loss_falls(tmp_path):
    model = tiny_bart(1, 1, dropout=0.0)
    history = fit(model, loss_fn, same_batches, settings(max_steps=60, learning_rate=1e-2, log_every=20), tmp_path)
    assert [row["step"] for row in history] == [20, 40, 60]
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert not model.training
    # three sources of 9, 5 and 7 tokens in 3 x 11 cells, three targets of 4, 6 and 3 in 3 x 8
    assert history[0]["padding"] == pytest.approx(1 - (21 + 13) / (33 + 24), abs=1e-4)
    assert all(row["examples_per_second"] > 0 for row in history)


def gradients_of_first_step(model, micro_batches, folder, **changes):
    """Return what the optimizer is given in the first step of `fit`, by parameter name."""
    seen = []
    names = {parameter: name for name, parameter in model.named_parameters()}

    def look(optimizer, *_):
        if not seen:
            (group,) = optimizer.param_groups
            seen.append({names[p]: p.grad.detach().cpu().clone() for p in group["params"]})

    hook = register_optimizer_step_pre_hook(look)
    try:
        history = fit(model, loss_fn, lambda step: micro_batches, settings(**changes), folder)
    finally:
        hook.remove()
    return seen[0], history


def cut(batch, rows):
    return {key: value[rows] for key, value in batch.items()}


def test_accumulation_equals_the_whole_batch(tmp_path):
    batch = tiny_batch((9, 5, 7, 4, 6, 8), (2, 2, 9, 9, 3, 12)) | {"ids": list("abcdef")}
    parts = [cut(batch, slice(i, i + 2)) for i in (0, 2, 4)]
    model = tiny_bart(2, 2, dropout=0.0)
    loss = loss_fn(model, batch)["loss"]
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    model.zero_grad()
    unweighted = sum(loss_fn(model, part)["loss"] for part in parts) / 3
    assert abs(unweighted.item() - loss.item()) > 0.01  # the tokens of the parts do differ
    changes = {"batch_size": 6, "max_steps": 1, "max_grad_norm": 1e9}
    for name, micro_batches in (("whole", [batch]), ("parts", parts)):
        found, history = gradients_of_first_step(
            tiny_bart(2, 2, dropout=0.0), micro_batches, tmp_path / name, **changes, micro_batch_size=0
        )
        assert history[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)
        assert found.keys() == expected.keys()
        for key, gradient in expected.items():
            assert (found[key] - gradient).abs().max() <= 1e-6 * scale, key


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"max_steps": 10, "warmup_steps": 4}, [1 / 4, 2 / 4, 3 / 4, 1, 6 / 6, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ({"max_steps": 4}, [1, 3 / 4, 2 / 4, 1 / 4]),
        ({"max_steps": 2, "warmup_steps": 4}, [1 / 4, 2 / 4]),
        ({"max_steps": 8, "warmup_steps": 2, "schedule": "constant"}, [1 / 2, *[1] * 7]),
        (
            {"max_steps": 8, "warmup_steps": 2, "schedule": "cooldown", "cooldown_share": 0.5},
            [1 / 2, 1, 1, 1, 1, 3 / 4, 2 / 4, 1 / 4],
        ),
    ],
)
def test_learning_rate_by_hand(changes, expected):
    run = Training(learning_rate=2.0, **changes)
    found = [optimizers.learning_rate_at(step, run) for step in range(run.max_steps)]
    assert found == pytest.approx([2 * rate for rate in expected])


def test_the_optimizer_gets_clipped_gradients_and_the_schedules_rate(tmp_path):
    """AdamW's first step is the learning rate times the sign of the gradient: moments of one value cancel."""
    model = tiny_bart(1, 1)
    before = weights_of(model)
    changes = {"max_steps": 1, "warmup_steps": 4, "learning_rate": 0.1, "max_grad_norm": 0.25}
    found, history = gradients_of_first_step(model, batches(0), tmp_path, **changes)
    norm = math.sqrt(sum(float(gradient.double().pow(2).sum()) for gradient in found.values()))
    assert norm == pytest.approx(0.25, rel=1e-3) and history[0]["lr"] == pytest.approx(0.025)
    for name, weight in weights_of(model).items():
        large = found[name].abs() > 1e-3
        moved = before[name] - weight
        torch.testing.assert_close(moved[large], 0.025 * found[name].sign()[large], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("make", [tiny_t5, tiny_bart])
@pytest.mark.parametrize("left_early", [True, False])
def test_recomputed_activations_give_the_same_gradients(make, left_early):
    """Also where the objective reads attention in the middle of a layer and leaves the pass there."""
    weights = {} if left_early else {"ce_weight": 0.5, "kl_weight": 0.5, "hidden_weight": 1.0}
    found = []
    for recompute in (False, True):
        student, teacher, runs = make(2, 2, seed=1).train(), make(3, 3, seed=2), []
        if recompute:
            loop.recompute_activations(student)
        projections(student, "encoder_self", 0)[0].register_forward_hook(lambda *_, runs=runs: runs.append(1))
        torch.manual_seed(0)  # dropout is on
        for step in range(2):
            loss = objectives.miniend(student, teacher, tiny_batch(seed=step), num_relation_heads=4, **weights)["loss"]
            before = len(runs)
            loss.backward()
            assert (len(runs) > before) == recompute
        found.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    assert equal(*found) and any(gradient.abs().max() > 1e-3 for gradient in found[0].values())


def test_transformers_5_17_is_spoken_to_as_it_understands(monkeypatch):
    """It has recomputation under its old name, and leaves out stacks whose configs are copies of the model's."""
    asked = []
    loop.recompute_activations(SimpleNamespace(gradient_checkpointing_enable=asked.append))
    assert asked == [{"use_reentrant": False}]
    monkeypatch.setattr(PreTrainedModel, "set_attn_implementation", lambda self, name: vars(self.config).update(
        _attn_implementation_internal=name))  # fmt: skip
    model = tiny_t5(1, 1)
    loop.set_attention(model, "eager")
    assert {part.config._attn_implementation for part in (model, model.encoder, model.decoder)} == {"eager"}


# ------------------------------------------------------------------------------------------------- frozen parts, modes


def test_a_frozen_encoder_stays_the_teachers(tmp_path):
    model = tiny_bart(2, 2, dropout=0.5)
    for parameter in model.model.encoder.parameters():  # the shared embeddings are among them
        parameter.requires_grad_(False)
    before = weights_of(model)
    outputs = []

    def frozen_loss(model, batch):
        assert not any(module.training for module in model.model.encoder.modules())
        assert model.model.decoder.training and all(layer.training for layer in model.model.decoder.layers)
        with torch.no_grad():
            outputs.append(model.model.encoder(input_ids=batch["input_ids"]).last_hidden_state)
        return loss_fn(model, batch)

    def evaluate(model):
        assert not any(module.training for module in model.modules())
        return {"validation_loss": 1.0}

    history = fit(model, frozen_loss, same_batches, settings(eval_every=2), tmp_path, evaluate)
    assert [row["step"] for row in history if "validation_loss" in row] == [2, 4, 6]
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    after = weights_of(model)
    encoder = [name for name in before if ".encoder." in name or "shared" in name]
    assert encoder and all(torch.equal(before[name], after[name]) for name in encoder)
    assert any(not torch.equal(before[name], after[name]) for name in before if ".decoder." in name)


def test_evaluation_changes_nothing_and_the_seed_does(tmp_path, capsys):
    def evaluate(model):
        assert not torch.is_grad_enabled()
        torch.manual_seed(99)  # as generation with sampling would
        return {"validation_loss": torch.rand(1).item()}

    first, second = tiny_bart(1, 1, dropout=0.3), tiny_bart(1, 1, dropout=0.3)
    plain = fit(first, loss_fn, batches, settings(), tmp_path / "plain")
    evaluated = fit(second, loss_fn, batches, settings(eval_every=1), tmp_path / "evaluated", evaluate, stage="naming")
    assert equal(weights_of(first), weights_of(second))
    assert [row["loss"] for row in plain] == [row["loss"] for row in evaluated]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and all(line.startswith("naming  step") and "validation_loss" in line for line in lines)
    other = tiny_bart(1, 1, dropout=0.3)
    fit(other, loss_fn, batches, settings(seed=1), tmp_path / "other")
    assert not equal(weights_of(first), weights_of(other))


@pytest.mark.parametrize(("major", "dtype"), [(7, None), (8, torch.bfloat16), (9, torch.bfloat16)])
def test_bf16_is_used_where_the_gpu_multiplies_it_not_where_it_is_emulated(monkeypatch, major, dtype):
    monkeypatch.setattr(torch.version, "hip", None)
    for name, value in {"is_available": True, "current_device": 0, "_check_bf16_tensor_supported": True}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=major))
    assert amp_dtype(torch.device("cuda")) == dtype


# ----------------------------------------------------------------------------------------- trunk, cooldown and patience


def end_of(run, folder, until=0, trunk=None, loss=loss_fn, **more):
    model = tiny_bart(1, 1, dropout=0.2)
    if trunk:
        history = loop.fit_from_trunk(model, loss, batches, run, folder, trunk, **more)
    else:
        history = fit(model, loss, batches, run, folder, until=until, **more)
    return weights_of(model), timeless(history)


def stopping(step):
    def stopping_loss(model, batch):
        if f"row{3 * step}" in batch["ids"]:
            raise KeyboardInterrupt
        return loss_fn(model, batch)

    return stopping_loss


def test_a_trunk_goes_on_and_every_cooldown_is_a_branch_of_it(tmp_path):
    constant = settings(max_steps=100, schedule="constant", log_every=4, checkpoint_every=3)
    end_of(constant, tmp_path / "trunk", 5)
    with pytest.raises(KeyboardInterrupt):
        end_of(constant, tmp_path / "trunk", 11, loss=stopping(7))
    weights, history = end_of(constant, tmp_path / "trunk", 11)
    straight = end_of(constant, tmp_path / "straight", 11)
    assert equal(straight[0], weights) and straight[1] == history
    kept = sorted(path.name for path in (tmp_path / "trunk").glob("checkpoint-*"))
    assert kept == ["checkpoint-000005", "checkpoint-000011"]
    short, long = (settings(max_steps=n, schedule="cooldown", cooldown_share=0.5, log_every=4) for n in (10, 16))
    for run, name in ((long, "long"), (short, "short")):
        branch = end_of(run, tmp_path / name, trunk=tmp_path / "trunk")
        alone = end_of(run, tmp_path / f"{name}-alone")  # the same schedule without any trunk
        assert equal(branch[0], alone[0]) and branch[1] == alone[1]
    assert equal(end_of(constant, tmp_path / "trunk", 11)[0], weights)  # no branch has changed it
    for depth, made, run, message in (
        (1, lambda step: batches(step + 1), constant, "other data"),
        (1, batches, replace(constant, learning_rate=2e-3), "learning_rate 0.001.* 0.002"),
        (1, batches, replace(constant, schedule="linear"), "schedule constant"),  # another learning rate all along
        (2, batches, constant, "another model, model.encoder.layers.1"),
    ):
        with pytest.raises(InputError, match=message):
            fit(tiny_bart(depth, 1), loss_fn, made, run, tmp_path / "trunk", until=13)
    (tmp_path / "trunk" / "checkpoint-000011" / "optimizer.safetensors").unlink()
    with pytest.raises(InputError, match="checkpoint-000011 lacks optimizer.safetensors"):
        fit(tiny_bart(1, 1), loss_fn, batches, constant, tmp_path / "trunk", until=13)


def scripted(values):
    """An evaluation that gives the next value each time it is asked; a resumed run starts with its first again."""
    counter = iter(values)
    return lambda model: {"validation_ce": next(counter)}


def test_patience_stops_and_keeps_the_best_weights(tmp_path):
    run = settings(max_steps=20, eval_every=2, patience=2, schedule="constant")
    weights, history = end_of(run, tmp_path / "run", evaluate=scripted([5, 3, 4, 2, 3, 2, 1]))
    assert [row["step"] for row in history if "validation_ce" in row] == [2, 4, 6, 8, 10, 12]
    assert history[-1]["step"] == 12 and optimizers.best_row(history, run)["step"] == 8
    at_best = settings(max_steps=20, eval_every=2, schedule="constant")
    assert equal(weights, end_of(at_best, tmp_path / "best", 8, evaluate=scripted([5, 3, 4, 2]))[0])

    never = end_of(replace(run, patience=7), tmp_path / "never", evaluate=scripted(range(10)))
    assert never[1][-1]["step"] == 16
    with pytest.raises(InputError, match="rouge2.*validation_ce"):
        end_of(replace(run, stop_metric="rouge2"), tmp_path / "other", evaluate=scripted([5]))


def test_patience_brings_the_cooldown_forward(tmp_path):
    run = settings(max_steps=40, schedule="cooldown", cooldown_share=0.25, eval_every=2, patience=2)
    evaluations = [5, 4, 4, 4, 3, 2]
    weights, history = end_of(run, tmp_path / "branch", trunk=tmp_path / "trunk", evaluate=scripted(evaluations))
    assert history[-1]["step"] == 11  # the trunk stopped at 8, a quarter of 11 updates is the cooldown
    assert [row["lr"] for row in history[-4:]] == pytest.approx([1e-3, 1e-3, 2e-3 / 3, 1e-3 / 3])
    further = replace(run, schedule="constant", patience=0)
    end_of(further, tmp_path / "trunk", 12, evaluate=scripted([3, 3]))
    again = end_of(run, tmp_path / "again", trunk=tmp_path / "trunk", evaluate=scripted([3, 2]))
    assert equal(again[0], weights) and again[1] == history  # a trunk that went on is the same trunk
    trunk, patient = tmp_path / "patient", replace(run, patience=5)
    longer = end_of(patient, tmp_path / "more", trunk=trunk, evaluate=scripted([5, 4, 4, 4, 4, 4, 4, 3, 2, 1]))
    assert longer[1][-1]["step"] > 11
    less = end_of(run, tmp_path / "less", trunk=trunk, evaluate=scripted(evaluations))
    assert equal(less[0], weights) and less[1] == history  # whoever came first


@pytest.mark.parametrize(
    ("changes", "evaluations", "begin", "end"),
    [
        ({"cooldown_share": 0.01}, [5, 6, 7, 4], 6, 7),  # one per cent of so few updates is none
        ({"cooldown_share": 0.2, "eval_every": 1, "patience": 1}, [4, 5, 3], 2, 3),
        ({"warmup_steps": 7}, [5, 6, 7, 8, 4, 3, 2], 8, 11),  # no plateau before the learning rate has risen
    ],
)
def test_patience_ends_a_trunk_of_few_updates(tmp_path, changes, evaluations, begin, end):
    run = settings(**{"max_steps": 100, "schedule": "cooldown", "cooldown_share": 0.25, "eval_every": 2, "patience": 2})
    run = replace(run, **changes)
    weights, history = end_of(run, tmp_path / "run", trunk=tmp_path / "trunk", evaluate=scripted(evaluations))
    assert [path.name for path in (tmp_path / "trunk").glob("checkpoint-*")] == [f"checkpoint-{begin:06d}"]
    assert history[-1]["step"] == end and history[-1]["lr"] <= history[begin - 1]["lr"] == 1e-3
    best = load_file(tmp_path / "run" / "best" / "model.safetensors")
    assert all(torch.equal(weights[name], weight) for name, weight in best.items())
    facts = optimizers.stop_facts(history, run)
    lowest = min(
        (row["validation_ce"], row["step"]) for row in history if row["step"] > begin and "validation_ce" in row
    )
    assert facts == {
        "trained_steps": end, "stop_metric": "validation_ce", "patience": run.patience, "best_step": lowest[1],
    }  # fmt: skip


@pytest.mark.parametrize("first", [None, torch.bfloat16])
def test_a_checkpoint_of_another_mixed_precision_is_refused(tmp_path, monkeypatch, first):
    """Updates before and after would be of two kinds."""
    second = None if first else torch.bfloat16
    run = settings(max_steps=4, checkpoint_every=2)
    monkeypatch.setattr(loop, "amp_dtype", lambda *_: first)
    end_of(run, tmp_path, 2)
    monkeypatch.setattr(loop, "amp_dtype", lambda *_: second)
    with pytest.raises(InputError, match=f"checkpoint-000002 was trained with .*{first}, this machine has {second}"):
        end_of(run, tmp_path)
    path = tmp_path / "checkpoint-000002" / "state.json"
    artifacts.write_json(path, {name: value for name, value in read_json(path).items() if name != "dtype"})
    end_of(run, tmp_path)  # older ones do not say


def test_a_checkpoint_holds_what_trains_and_one_with_all_weights_is_read_too(tmp_path):
    run = settings(max_steps=4, checkpoint_every=2)

    def model():
        made = tiny_bart(1, 1, dropout=0.0)
        made.get_encoder().requires_grad_(False)
        return made

    made = model()
    fit(made, loss_fn, batches, run, tmp_path / "straight")
    straight = weights_of(made)
    fit(made := model(), loss_fn, batches, run, tmp_path / "older", until=2)
    path = tmp_path / "older" / "checkpoint-000002" / "model.safetensors"
    kept = load_file(path)
    assert kept.keys() == {name for name, weight in made.named_parameters() if weight.requires_grad}
    save_file({name: kept.get(name, torch.zeros(3)) for name in weights_of(made)}, path)  # no frozen one is looked at
    fit(made := model(), loss_fn, batches, run, tmp_path / "older")
    assert equal(weights_of(made), straight)
    save_file({name: weight for name, weight in kept.items() if "decoder.layers.0" not in name}, path)
    with pytest.raises(InputError, match="checkpoint-000002 is of another model, model.decoder.layers.0"):
        fit(model(), loss_fn, batches, run, tmp_path / "older", until=3)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"max_steps": 0}, ["max_steps 0"]),
        ({"batch_size": 0}, ["batch_size 0"]),
        ({"log_every": 0}, ["log_every 0"]),
        ({"warmup_steps": -1}, ["warmup_steps -1"]),
        ({"checkpoint_every": -5}, ["checkpoint_every -5"]),
        ({"micro_batch_size": 2}, ["micro_batch_size 2", "batch_size 3"]),
        ({"micro_batch_size": -1}, ["micro_batch_size -1"]),
        ({"seed": -1}, ["seed -1"]),
        ({"learning_rate": 0.0}, ["learning_rate 0.0"]),
        ({"learning_rate": float("nan")}, ["learning_rate nan"]),
        ({"max_grad_norm": 0.0}, ["max_grad_norm 0.0"]),
        ({"precision": "half"}, ["'half'", "float32"]),
        ({"optimizer": "sgd"}, ["'sgd'", "muon"]),
        ({"schedule": "cosine"}, ["'cosine'", "cooldown"]),
        ({"cooldown_share": 1.0}, ["cooldown_share 1.0"]),
        ({"schedule": "cooldown", "cooldown_share": 0.5, "warmup_steps": 4}, ["warmup_steps 4", "max_steps 6"]),
        ({"schedule": "cooldown", "max_steps": 1}, ["cooldown of 1", "max_steps 1"]),
        ({"schedule": "cooldown", "cooldown_share": 0.95}, ["cooldown of 6", "max_steps 6"]),
        ({"patience": 2}, ["patience 2", "eval_every"]),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_computed(tmp_path, changes, parts):
    with pytest.raises(InputError) as error:
        fit(None, None, None, settings(**changes), tmp_path / "run")
    assert "\n" not in str(error.value) and all(part in str(error.value) for part in parts)
    assert not (tmp_path / "run").exists()


def test_a_frozen_model_is_refused(tmp_path):
    model = tiny_bart(1, 1).requires_grad_(False)
    with pytest.raises(InputError, match="frozen"):
        fit(model, loss_fn, batches, settings(), tmp_path)


def naive_orthogonal(gradient):
    """Muon's five Newton-Schulz steps in float64, as Jordan et al. (2024) write them."""
    x = gradient.double()
    x = x.T if x.shape[0] > x.shape[1] else x
    x = x / x.norm()
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x.T if gradient.shape[0] > gradient.shape[1] else x


@pytest.mark.parametrize("rank", [3, 99])
@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (5, 5), (8, 32), (32, 8)])
def test_newton_schulz_in_float32_is_that_of_float64_and_near_torchs_in_bf16(shape, rank):
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(size, generator=generator) for size in (shape, (shape[1], rank), (rank, shape[1]))]
    gradient = factors[0] @ factors[1] @ factors[2] if rank < min(shape) else factors[0]
    given = ((3.4445, -4.775, 2.0315), 5, 1e-7)
    found = optimizers.newton_schulz(gradient, *given)
    torch.testing.assert_close(found.double(), naive_orthogonal(gradient), rtol=0, atol=5e-5)
    if rank > min(shape):  # bf16 is wrong by 0.2 where singular values are zero
        torch.testing.assert_close(found, optimizers.BF16_PRODUCTS(gradient, *given).float(), rtol=0, atol=0.05)


@pytest.mark.skipif(device().type == "cuda", reason="there torch's own products are always taken")
@pytest.mark.parametrize(("precision", "native", "exact"), [("auto", 1, 0), ("float32", 1, 1), ("auto", 0, 1)])
def test_muon_multiplies_in_float32_where_that_is_asked_for_or_all_there_is(monkeypatch, precision, native, exact):
    monkeypatch.setattr(optimizers._muon, "_zeropower_via_newtonschulz", None)  # put back afterwards
    monkeypatch.setattr(
        optimizers, "amp_dtype", lambda on, wanted="auto": torch.bfloat16 if native and wanted == "auto" else None
    )
    model = tiny_bart(1, 1)
    run = settings(max_steps=1, optimizer="muon", precision=precision)
    optimizers.make_optimizers(model, dict(model.named_parameters()), run)
    products = optimizers.newton_schulz if exact else optimizers.BF16_PRODUCTS
    assert optimizers._muon._zeropower_via_newtonschulz is products


@pytest.mark.parametrize("tied", [True, False])
def test_muon_moves_the_inner_matrices_and_adamw_the_rest(tmp_path, tied):
    model = tiny_bart(1, 1, dropout=0.0)
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    before = weights_of(model)
    loss_fn(model, batches(0)[0])["loss"].backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    changes = {"max_steps": 1, "optimizer": "muon", "learning_rate": 1e-3, "max_grad_norm": 1e9}
    fit(model, loss_fn, batches, settings(**changes), tmp_path)
    inner = 0
    for name, weight in weights_of(model).items():
        moved = weight - before[name]
        if weight.ndim == 2 and "embed" not in name and "shared" not in name and "lm_head" not in name:
            inner += 1
            if gradients[name].norm() > 1e-4:
                expected = -2e-3 * 0.2 * max(weight.shape) ** 0.5 * naive_orthogonal(gradients[name])
                # It orthogonalises in bf16, hence the tolerance.
                cosine = torch.nn.functional.cosine_similarity(moved.double().flatten(), expected.flatten(), dim=0)
                assert cosine > 0.97 and moved.norm() == pytest.approx(float(expected.norm()), rel=0.05), name
        else:  # AdamW's first step: the learning rate times the gradient's sign
            assert moved.abs().max() <= 1.001e-3, name
    assert inner == 4 + 2 + 8 + 2  # projections of three attentions, two feed-forward blocks


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor"])
def test_a_stopped_run_goes_on_with_the_state_of_every_optimizer(tmp_path, optimizer):
    run = settings(max_steps=7, checkpoint_every=3, optimizer=optimizer)
    with pytest.raises(KeyboardInterrupt):
        end_of(run, tmp_path / "stopped", loss=stopping(5))
    stopped, straight = (end_of(run, tmp_path / name)[0] for name in ("stopped", "straight"))
    for name, weight in straight.items():
        torch.testing.assert_close(stopped[name], weight, rtol=0, atol=0 if device().type == "cpu" else 1e-4)


@pytest.mark.parametrize("kind", ["nan", "infinity", "gradient"])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path, kind):
    def breaking_loss(model, batch):
        losses = loss_fn(model, batch)
        if "row21" in batch["ids"]:  # step 7
            if kind == "gradient":  # the root's slope at zero is infinite while its value is not
                return {"loss": losses["loss"] + (model.model.shared.weight.sum() * 0).sqrt()}
            return {"loss": losses["loss"] * (math.nan if kind == "nan" else math.inf)}
        return losses

    run = settings(max_steps=9, checkpoint_every=5)
    model = tiny_bart(1, 1, dropout=0.2)
    with pytest.raises(InputError) as error:
        fit(model, breaking_loss, batches, run, tmp_path / "broken", stage="student 6-3")
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in ("student 6-3", "step 7", "row21, row22, row23", "learning_rate"))
    assert [path.name for path in (tmp_path / "broken").glob("*checkpoint*")] == ["checkpoint-000005"]
    assert all(torch.isfinite(weight).all() for weight in weights_of(model).values())


# ------------------------------------------------------------------------------------------------------------- history


def test_history_rows_are_means_over_their_steps_and_are_written_exactly(tmp_path):
    every = fit(tiny_bart(1, 1), loss_fn, batches, settings(max_steps=5), tmp_path / "every")
    run, folder = settings(max_steps=5, log_every=3), tmp_path / "thirds"
    thirds = fit(tiny_bart(1, 1), loss_fn, batches, run, folder, lambda model: {"validation_loss": 1 / 3, "rows": 7})
    losses = [row["loss"] for row in every]
    assert [row["loss"] for row in thirds] == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:]) / 2])
    assert [row["step"] for row in thirds] == [3, 5] and read_json(folder / "progress.json")["step"] == 5
    assert str(loop.read_history(folder)) == str(thirds)  # each number to the last digit, and no empty cell


# ---------------------------------------------------------------------------------------------------- killed processes

RUN = settings(max_steps=23, warmup_steps=3, weight_decay=0.01, checkpoint_every=5, eval_every=4, log_every=3, seed=9)
MODULES = ("bart", "mbart", "pegasus", "marian", "t5")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def plant(moment: str) -> None:
    """Let this process be killed at a moment of its first checkpoint, or right before its results."""
    calls = {
        "state": (checkpoints, "write_json", lambda *_: True),  # all tensors, no state
        "rename": (os, "replace", lambda _, target: Path(target).name.startswith("checkpoint-")),  # all is there
        "cleanup": (shutil, "rmtree", lambda path: Path(path).name.startswith("checkpoint-")),  # the old one beside it
        "history": (checkpoints, "write_history", lambda *_: True),  # the checkpoint is done, its history is not
        "results": (artifacts, "write_json", lambda path, _: path.name == "results.json"),
    }
    if moment in calls:
        module, name, is_it = calls[moment]
        call = getattr(module, name)
        setattr(module, name, lambda *given, **more: die() if is_it(*given) else call(*given, **more))
    elif moment == "weights":  # half of a file

        def half(tensors, path):
            save_file(tensors, path)
            os.truncate(path, os.path.getsize(path) // 2)
            die()

        checkpoints.save_file = half
    elif moment.startswith("update"):  # gradients are there, weights are old
        counter = iter(range(10**6))
        last = int(moment.removeprefix("update"))
        register_optimizer_step_pre_hook(lambda *_: die() if next(counter) == last else None)


def train(runs: str, moment: str, pipe=None) -> None:
    """Train the artifact "run" to its end in this process, or to a moment; tell every step through the pipe."""
    os.environ |= {"DISTILL_RUNS": runs, "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    plant(moment)

    def told_batches(step):
        if pipe is not None:
            pipe.send(step)
        if moment == f"step{step}":
            die()
        return [cut(batches(step)[0], slice(0, 1)), cut(batches(step)[0], slice(1, 3))]

    def evaluate(model):
        return {"validation_loss": loss_fn(model, batches(1000)[0])["loss"].item()}

    def build(folder):
        model = tiny_bart(1, 2, seed=4, dropout=0.2)
        history = fit(model, loss_fn, told_batches, RUN, folder, evaluate)
        save_file({name: weight.clone() for name, weight in model.state_dict().items()}, folder / "final.safetensors")
        return {"history": history}

    artifacts.artifact("run", {}, build)


@pytest.fixture(scope="module")
def processes():
    """Start real processes from a server that has the libraries loaded, so that a start costs little."""
    context = multiprocessing.get_context("forkserver")
    preload = [f"transformers.models.{name}.modeling_{name}" for name in MODULES]
    if hasattr(context, "set_forkserver_preload"):
        context.set_forkserver_preload(["torch", "pytest", "distill_utils.training.loop", *preload])
    return context


def live(processes, runs: Path, moment: str = "", pipe=None):
    process = processes.Process(target=train, args=(str(runs), moment, pipe))
    process.start()
    return process


def finished(processes, runs: Path) -> tuple[dict, list[dict]]:
    """Return the final weights and the history of a run that goes on to its end."""
    process = live(processes, runs)
    process.join()
    assert process.exitcode == 0
    (folder,) = runs.iterdir()
    history = read_json(folder / "results.json")["history"]
    assert loop.read_history(folder) == history
    assert not list(folder.glob(".*.tmp"))  # what killed processes left of checkpoints is gone
    return load_file(folder / "final.safetensors"), timeless(history)


@pytest.fixture(scope="module")
def uninterrupted(processes, tmp_path_factory):
    weights, history = finished(processes, tmp_path_factory.mktemp("uninterrupted"))
    assert [row["step"] for row in history] == [3, 4, 6, 8, 9, 12, 15, 16, 18, 20, 21, 23]
    start = tiny_bart(1, 2, seed=4).state_dict()
    assert not any(torch.equal(weights[name], start[name]) for name in weights if name.endswith("q_proj.weight"))
    return weights, history


# moment of death, and the checkpoints that must lie there afterwards: proof that it came when it was meant to
LIVES = [
    ("step3", []),
    ("weights", []),
    ("state", []),
    ("rename", []),
    ("update2", []),
    ("history", [5]),
    ("cleanup", [5, 10]),
    ("update4", [5, 10]),
    ("weights", [5, 10]),
    ("step13", [5, 10]),
    ("rename", [5, 10]),
    ("state", [5, 10]),
    ("results", [20]),
    ("step22", [20]),
]


def test_a_run_killed_at_every_kind_of_moment_ends_like_one_that_was_not(processes, uninterrupted, tmp_path):
    for moment, kept in LIVES:
        process = live(processes, tmp_path, moment)
        process.join()
        assert process.exitcode == -signal.SIGKILL, moment
        (folder,) = tmp_path.iterdir()
        assert not (folder / "results.json").exists()
        assert sorted(path.name for path in folder.glob("checkpoint-*")) == [f"checkpoint-{n:06d}" for n in kept]
    weights, history = finished(processes, tmp_path)
    assert equal(weights, uninterrupted[0]) and history == uninterrupted[1]


def test_a_run_killed_at_random_moments_ends_like_one_that_was_not(processes, uninterrupted, tmp_path):
    generator = random.Random(1)
    for _ in range(4):
        here, there = processes.Pipe()
        process = live(processes, tmp_path, pipe=there)
        there.close()
        with contextlib.suppress(EOFError):  # it had fewer steps left, and is done
            for _ in range(generator.randint(4, 12)):
                here.recv()
        process.kill()
        process.join()
    weights, history = finished(processes, tmp_path)
    assert equal(weights, uninterrupted[0]) and history == uninterrupted[1]


class Pressed:
    """Stands in for a pipe that is told every step: presses Ctrl-C when a step begins."""

    def __init__(self, step: int, presses: int):
        self.step, self.presses = step, presses

    def send(self, step: int) -> None:
        if step == self.step:
            for _ in range(self.presses):
                signal.raise_signal(signal.SIGINT)  # to this thread, at once: two in another are one to the interpreter


@pytest.fixture
def interrupts(monkeypatch, tmp_path):
    """Let `train` run in this process; what it does to the environment and the test to interrupts is undone."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(artifacts, "runs_dir", lambda: tmp_path)
    before = signal.getsignal(signal.SIGINT)
    yield partial(signal.signal, signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_waits_for_the_update_and_loses_nothing(processes, uninterrupted, tmp_path, interrupts):
    interrupts(signal.default_int_handler)
    for step, presses in ((7, 1), (13, 1), (17, 2)):
        with pytest.raises(KeyboardInterrupt):
            train(str(tmp_path), "", Pressed(step, presses))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
        # the second press does not wait: what is left is the checkpoint before
        expected = step + 1 if presses == 1 else 15
        assert [path.name for path in folder.glob("checkpoint-*")] == [f"checkpoint-{expected:06d}"]
    weights, history = finished(processes, tmp_path)
    assert equal(weights, uninterrupted[0]) and history == uninterrupted[1]


def test_an_interrupt_at_the_end_leaves_a_checkpoint_too(tmp_path, interrupts):
    interrupts(signal.default_int_handler)

    def evaluate(model):
        signal.raise_signal(signal.SIGINT)
        return {"validation_ce": 1.0}

    for name, run, last in (("end", settings(), 6), ("patience", settings(eval_every=1, patience=1), 1)):
        with pytest.raises(KeyboardInterrupt):
            end_of(run, tmp_path / name, evaluate=evaluate)
        assert [path.name for path in (tmp_path / name).glob("checkpoint-*")] == [f"checkpoint-{last:06d}"]
    assert equal(end_of(settings(), tmp_path / "end")[0], end_of(settings(), tmp_path / "whole")[0])


def test_an_evaluation_that_is_not_finite_stops_in_one_line(tmp_path):
    with pytest.raises(InputError, match="nan.* at step 6: lower learning_rate"):
        end_of(settings(), tmp_path / "run", evaluate=scripted([float("nan")]))


def test_a_run_in_the_background_goes_on_ignoring_interrupts(processes, uninterrupted, tmp_path, interrupts):
    interrupts(signal.SIG_IGN)
    train(str(tmp_path), "", Pressed(7, 2))
    assert equal(finished(processes, tmp_path)[0], uninterrupted[0])


def extend(folder: str, until: int, dies_at: int = 0) -> None:
    """Train a trunk up to an update in this process, or be killed at one before it."""
    os.environ |= {"CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    plant(f"update{dies_at}" if dies_at else "")
    run = replace(RUN, max_steps=10**6, schedule="constant", checkpoint_every=70)
    model = tiny_bart(1, 1, seed=4, dropout=0.2)
    fit(model, loss_fn, batches, run, Path(folder), until=until)
    save_file({name: weight.clone() for name, weight in model.state_dict().items()}, f"{folder}/final.safetensors")


@pytest.mark.slow
def test_a_trunk_of_300_extended_to_600_and_killed_twice_is_the_trunk_of_600(processes, tmp_path):
    for folder, until, updates, code in (
        ("extended", 300, 0, 0),
        ("extended", 600, 100, -signal.SIGKILL),  # at update 400, from 300 on
        ("extended", 600, 150, -signal.SIGKILL),  # at update 500, from 350 on
        ("extended", 600, 0, 0),
        ("straight", 600, 0, 0),
    ):
        process = processes.Process(target=extend, args=(str(tmp_path / folder), until, updates))
        process.start()
        process.join()
        assert process.exitcode == code
        last = max(path.name for path in (tmp_path / folder).glob("checkpoint-*"))
        assert last == f"checkpoint-{until if not code else 350 if updates == 100 else 490:06d}"
    assert equal(*(load_file(tmp_path / name / "final.safetensors") for name in ("extended", "straight")))
    rows = [loop.read_history(tmp_path / name) for name in ("extended", "straight")]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
