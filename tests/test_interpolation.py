"""Assistants between teacher and student, and targets mixed of both: budgets, refusals, values and exact resume."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_miniend import TRAINING
from tiny_models import VOCAB_SIZE, tiny_batch, tiny_t5, tiny_tokenizer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from distill_utils.artifacts import InputError, read_json
from distill_utils.distillation import objectives
from distill_utils.distillation.losses import chunked_token_losses
from distill_utils.experiments import interpolation, miniend
from distill_utils.experiments.miniend import AgnosticRun
from distill_utils.models import students
from distill_utils.models.loading import load_model, save_model
from distill_utils.training import loop
from distill_utils.training.loop import read_history

LABELS = torch.tensor([[3, 0, 4, -100], [1, -100, -100, -100], [2, 2, 0, 1]])


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_RUNS", str(tmp_path / "runs"))
    teacher = tiny_t5(3, 3)
    save_model(teacher, tiny_tokenizer(), tmp_path / "teacher")
    teacher, tokenizer = load_model(tmp_path / "teacher")
    generator = np.random.default_rng(0)
    tokens, held_out = (generator.integers(5, 60, size=size).astype(np.uint16) for size in (2000, 600))
    run = AgnosticRun(
        path="miniend_logits", shape="1-1", teacher=str(tmp_path / "teacher"), source_length=16,
        training=replace(TRAINING, max_steps=6, warmup_steps=3), denoising="text_infilling", width=8,
        num_relation_heads=2,
    )  # fmt: skip
    return run, teacher, tokenizer, tokens, held_out


# ---------------------------------------------------------------------------------------------------------- assistants


def test_teacher_to_assistant_to_student_in_the_direct_run_s_budget(place):
    run, teacher, *rest = place
    before = {name: weight.clone() for name, weight in teacher.named_parameters()}
    shape, width = "3-3", 8  # MiniLM's rule: as deep as the teacher, as wide as the student
    found = interpolation.with_assistant(run, shape, width, teacher, *rest, share=1 / 3)
    direct = miniend.distill(run, teacher, *rest)
    results = {name: read_json(folder / "results.json") for name, folder in found.items()}
    straight = read_json(direct / "results.json")
    assert [result["final"]["step"] for result in results.values()] == [2, 4]
    assert sum(result["target_tokens"] for result in results.values()) == straight["target_tokens"]
    assert results["student"]["parameters"] == straight["parameters"]
    assert "validation_loss" in results["student"]["final"]
    sizes = [students.count_parameters(teacher)["total"], *(r["parameters"]["total"] for r in results.values())]
    assert sizes[0] > sizes[1] > sizes[2]
    assert all(torch.equal(weight, before[name]) for name, weight in teacher.named_parameters())
    names = {read_json(folder / "results.json")["name"] for folder in (*found.values(), direct)}
    assert len(names) == 3
    assert interpolation.with_assistant(run, shape, width, teacher, *rest, share=1 / 3) == found  # reused


def test_the_assistant_is_who_teaches_the_student(place, monkeypatch):
    run, teacher, *rest = place
    taught = {}
    distill = miniend.distill

    def spy(run, teacher, *rest):
        folder = distill(run, teacher, *rest)
        taught[folder] = (run.teacher, {name: weight.clone() for name, weight in teacher.named_parameters()})
        return folder

    monkeypatch.setattr(miniend, "distill", spy)
    found = interpolation.with_assistant(run, "2-2", 16, teacher, *rest)
    name, weights = taught[found["student"]]
    assistant, _ = load_model(found["assistant"] / "student")
    assert name == str(found["assistant"] / "student") and len(students.encoder_layers(assistant)) == 2
    assert all(torch.equal(weight, weights[name]) for name, weight in assistant.named_parameters())
    assert taught[found["assistant"]][0] == run.teacher


@pytest.mark.parametrize(("width", "middle"), [(0, 0), (0, 16), (8, 0), (8, 8)])
def test_the_student_is_that_of_the_direct_run_to_the_last_weight(place, width, middle):
    run, teacher, *_ = place
    run = replace(run, width=width)
    assistant, student = interpolation.split_run(run, "2-2", middle, teacher)
    assistant_model = miniend.new_student(assistant, teacher)
    assert assistant_model.config.d_model == (middle or 16)
    ours = miniend.new_student(student, assistant_model).state_dict()
    direct = miniend.new_student(run, teacher).state_dict()
    assert ours.keys() == direct.keys() and all(torch.equal(ours[name], direct[name]) for name in ours)


@pytest.mark.parametrize("share", [0.5, 0.2, 0.7])
def test_updates_and_warm_up_are_split_and_all_else_kept(place, share):
    run, teacher, *_ = place
    run = replace(run, training=replace(run.training, max_steps=10, warmup_steps=5), mix_start=0.4)
    rounds = interpolation.split_run(run, "2-2", 0, teacher, share)
    assert [part.training.max_steps for part in rounds] == [round(10 * share), 10 - round(10 * share)]
    assert sum(part.training.warmup_steps for part in rounds) == 5
    for part in rounds:
        same = replace(part.training, max_steps=10, warmup_steps=5)
        assert same == run.training and (part.path, part.mix_start) == (run.path, 0.4)


@pytest.mark.parametrize(
    ("shape", "width", "changes", "said"),
    [
        ("3-3", 0, {}, "3-3 and width 16 has (\\d+) parameters, the teacher \\1 and the student \\d+: choose"),
        ("1-1", 8, {}, "1-1 and width 8 has (\\d+) parameters, the teacher \\d+ and the student \\1: choose"),
        ("1-2", 8, {"shape": "1-1", "width": 0}, "choose one that lies between them"),
        ("2-9", 0, {}, "student_layers is 9"),
        ("2-1", 0, {"shape": "2-2"}, "student_layers is 2: the teacher has 1 layers"),
        ("2-2", 7, {}, "width 7 leaves no whole"),
        ("2-2", 8, {"init": "copied", "width": 0}, "a student of width 8 cannot copy layers"),
        ("2-2", 0, {"num_relation_heads": 16}, "num_relation_heads 16 does not divide"),
    ],
)
def test_what_is_no_assistant_is_refused_before_training(place, shape, width, changes, said):
    run, teacher, *rest = place
    with pytest.raises(InputError, match=said):
        interpolation.with_assistant(replace(run, **changes), shape, width, teacher, *rest)


@pytest.mark.parametrize("share", [0.0, 1.0, 0.05, -1.0])
def test_a_round_without_updates_is_refused(place, share):
    run, teacher, *_ = place
    with pytest.raises(InputError, match=f"share {share} of 6 updates leaves"):
        interpolation.split_run(run, "2-2", 0, teacher, share)


# --------------------------------------------------------------------------------------------------------- mixed target


def naive_mixed(student, teacher, labels, temperature, mix):
    """Value and gradient of KL(mixed || student) in float64, token by token; the mixture has no gradient."""
    value, gradient, num = 0.0, torch.zeros_like(student, dtype=torch.float64), int((labels != -100).sum())
    for place in (labels != -100).nonzero().tolist():
        s, z = (logits[tuple(place)].double().tolist() for logits in (student, teacher))
        mixed = [(1 - mix) * a + mix * b for a, b in zip(s, z, strict=True)]
        powers = [[math.exp(x / temperature) for x in row] for row in (s, mixed)]
        q, p = ([power / sum(row) for power in row] for row in powers)
        value += temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / num
        gradient[tuple(place)] = torch.tensor([temperature * (b - a) / num for a, b in zip(p, q, strict=True)])
    return value, gradient


@pytest.mark.parametrize("mix", [0.1, 0.4, 0.9])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("chunk_tokens", [3, 1024])
def test_a_mixed_target_equals_the_naive_one_with_gradient(mix, temperature, chunk_tokens):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 4, 5, generator=generator) * 4 for _ in range(2))
    value, gradient = naive_mixed(student, teacher, LABELS, temperature, mix)
    mixed, same = student.clone().requires_grad_(), nn.Identity()
    loss = chunked_token_losses(mixed, same, LABELS, teacher, same, temperature, chunk_tokens, mix=mix)["kl_loss"]
    assert loss.item() == pytest.approx(value, rel=1e-5)
    loss.backward()
    torch.testing.assert_close(mixed.grad.double(), gradient, rtol=1e-4, atol=1e-6)


def test_all_teacher_is_the_plain_divergence_and_all_student_is_none():
    student, teacher, batch = tiny_t5(1, 1, seed=1), tiny_t5(2, 2), tiny_batch()
    only = {"encoder_self_weight": 0, "decoder_self_weight": 0, "cross_weight": 0, "kl_weight": 1.0}
    losses, gradients = [], []
    for options in ({}, {"mix": 1.0}, {"mix": 0.0}, {"mix": 0.5}):
        student.zero_grad()
        losses.append(objectives.miniend(student, teacher, batch, **only, **options)["loss"])
        losses[-1].backward()
        gradients.append(student.shared.weight.grad.clone())
    assert torch.equal(losses[0], losses[1]) and torch.equal(gradients[0], gradients[1])
    assert losses[2].abs() < 1e-6 and gradients[2].abs().max() < 1e-6
    assert 0 < losses[3] < losses[0]


def test_mixing_never_holds_the_logits_of_all_tokens():
    student_hidden, teacher_hidden = torch.randn(4, 64, 8, requires_grad=True), torch.randn(4, 64, 8)
    head, labels, sizes = nn.Linear(8, 500), torch.zeros(4, 64, dtype=torch.long), []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            sizes.extend(
                x.numel() for x in (found if isinstance(found, (tuple, list)) else [found]) if torch.is_tensor(x)
            )
            return found

    with Sizes():
        losses = chunked_token_losses(student_hidden, head, labels, teacher_hidden, head, 1.0, 16, mix=0.5)
        losses["kl_loss"].backward()
    assert max(sizes) == 16 * 500


def test_the_share_of_the_teacher_grows_as_published():
    """Algorithm 1 of TAID by hand, and its bounds."""
    losses, rate, start, steps = [3.0, 2.0, 2.5, 1.0, 1.0], 0.5, 0.2, 6
    mixing, shares = {"mix": start}, []
    t, m, before = start, 0.0, None
    for n, loss in enumerate(losses):
        objectives.grow_mix(mixing, n + 1, {"kl_loss": loss, "loss": 9.0}, start=start, rate=rate, max_steps=steps)
        m = 0.99 * m + (0.01 * (before - loss) / before if before else 0.0)
        t = min(1.0, max(start + (1 - start) * (n + 1) / (steps - 1), t + rate / (1 + math.exp(-m)) * (1 - t)))
        before = loss
        shares.append(mixing["mix"])
        assert mixing["mix"] == pytest.approx(t, rel=1e-12) and mixing["momentum"] == pytest.approx(m, rel=1e-12)
    assert shares == sorted(shares) and shares[-1] == 1.0
    assert shares[0] > start + (1 - start) / (steps - 1)  # faster than the line
    falling, rising = ({"mix": 0.2, "kl_loss": 1.0, "momentum": 0.0} for _ in range(2))
    objectives.grow_mix(falling, 1, {"kl_loss": 0.1}, start=0.2, rate=0.5, max_steps=100)
    objectives.grow_mix(rising, 1, {"kl_loss": 10.0}, start=0.2, rate=0.5, max_steps=100)
    assert falling["mix"] > rising["mix"]


def test_short_runs_keep_to_the_line_whatever_the_losses():
    generator = np.random.default_rng(0)
    mixing = {"mix": 0.3}
    for done in range(1, 200):
        losses = {"kl_loss": float(generator.uniform(0, 5))}
        objectives.grow_mix(mixing, done, losses, start=0.3, rate=1 / 200, max_steps=200)
        assert mixing["mix"] == pytest.approx(0.3 + 0.7 * done / 199)
    hostile = {"mix": 0.3}
    for loss in (0.0, 1e30, 0.0, 5.0):  # no overflow, no division by zero
        objectives.grow_mix(hostile, 1, {"kl_loss": loss}, start=0.3, rate=1.0, max_steps=9)
    assert 0.3 <= hostile["mix"] <= 1


def test_a_run_with_mixing_shows_its_share_and_ends_with_the_teacher(place):
    run, teacher, *rest = place
    folders = {start: miniend.distill(replace(run, mix_start=start), teacher, *rest) for start in (1.0, 0.4)}
    assert "-mix0.4-s0" in folders[0.4].name and "mix" not in folders[1.0].name
    shares = [row["mix"] for row in read_history(folders[0.4])]
    assert shares == pytest.approx([0.4, 0.52, 0.64, 0.76, 0.88, 1.0])
    assert "mix" not in read_history(folders[1.0])[0]
    first = [read_history(folder)[0]["kl_loss"] for folder in folders.values()]
    assert first[1] < first[0]  # the same student and batch, a nearer target


def test_a_stopped_run_goes_on_with_the_same_mixture(place, monkeypatch, tmp_path):
    run, teacher, *rest = place
    # A rate at which the losses matter: the share is then no function of the step alone.
    run = replace(
        run, path="logits", mix_start=0.2, mix_rate=0.9,
        training=replace(run.training, max_steps=9, checkpoint_every=2, micro_batch_size=2),
    )  # fmt: skip
    straight = miniend.distill(run, teacher, *rest)
    shutil.move(straight, tmp_path / "straight")
    save = loop.save_checkpoint

    def stop(folder, *arguments):
        save(folder, *arguments)
        if (folder / "checkpoint-000004").exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        miniend.distill(run, teacher, *rest)
    monkeypatch.setattr(loop, "save_checkpoint", save)
    assert {"mix", "momentum", "kl_loss"} == read_json(straight / "checkpoint-000004" / "state.json")["memory"].keys()
    resumed = miniend.distill(run, teacher, *rest)
    weights = [load_model(folder / "student")[0].state_dict() for folder in (tmp_path / "straight", resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    histories = [
        [{k: v for k, v in row.items() if k not in ("seconds", "examples_per_second")} for row in read_history(folder)]
        for folder in (tmp_path / "straight", resumed)
    ]
    assert histories[0] == histories[1]
    line = [0.2 + 0.8 * n / 8 for n in range(9)]
    assert any(row["mix"] > at + 0.01 for row, at in zip(histories[0], line, strict=True))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mix_start": 0.0}, "mix_start 0.0 with mix_rate 0.0005 is impossible: use a start above 0"),
        ({"mix_start": 1.5}, "mix_start 1.5"),
        ({"mix_start": 0.4, "mix_rate": -1.0}, "mix_rate -1.0"),
        ({"path": "miniend", "mix_start": 0.4}, "path miniend imitates no distribution"),
        ({"path": "scratch", "mix_start": 0.4}, "path scratch imitates no distribution"),
    ],
)
def test_impossible_mixtures_are_refused(place, changes, said):
    run, teacher, *_ = place
    with pytest.raises(InputError, match=said):
        miniend.check_runs([replace(run, **changes)], teacher)


def test_vocabularies_must_agree_to_mix():
    student, teacher = torch.randn(1, 2, VOCAB_SIZE), torch.randn(1, 2, VOCAB_SIZE + 1)
    with pytest.raises(ValueError, match="only comparable over one vocabulary"):
        same = nn.Identity()
        chunked_token_losses(student, same, torch.zeros(1, 2, dtype=torch.long), teacher, same, mix=0.5)


@pytest.mark.parametrize(("label", "found"), [("6-6-w96", ("6-6", 96)), ("4-12", ("4-12", 0))])
def test_assistants_are_written_as_layers_and_width(label, found):
    assert interpolation.parse_assistant(label) == found


@pytest.mark.parametrize("label", ["", "6", "6-6-96", "6-6-w", "a-6"])
def test_an_assistant_that_is_not_understood_is_named(label):
    with pytest.raises(InputError, match=f"assistant '{label}' is not understood"):
        interpolation.parse_assistant(label)
