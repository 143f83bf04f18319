"""Objectives against the Hugging Face forward pass and against each other."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tiny_models import FAMILIES, tiny_bart, tiny_batch, tiny_pegasus
from torch import nn

from distill_utils import objectives
from distill_utils.losses import ce_loss, hidden_loss, kl_loss
from distill_utils.objectives import kd, pl_kl, sft
from distill_utils.students import freeze, has_teacher_encoder, init_student, supervision_map

each_family = pytest.mark.parametrize("family", FAMILIES)
ALL_KD = partial(kd, encoder_layer_ids=[0, 2], decoder_layer_ids=[2])


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
def test_a_teacher_teaches_itself_nothing(family):
    teacher, batch = FAMILIES[family](3, 3), tiny_batch()
    student, encoder_ids, decoder_ids = init_student(teacher, 3, 3)
    losses = kd(student, teacher, batch, encoder_layer_ids=encoder_ids, decoder_layer_ids=decoder_ids)
    assert losses["kl_loss"].item() == pytest.approx(0.0, abs=1e-5)  # attention kernels with and without gradients may
    assert losses["hidden_loss"].item() == pytest.approx(0.0, abs=1e-8)  # differ in the last bits
    assert losses["loss"].item() == pytest.approx(0.2 * teacher(**batch).loss.item(), rel=1e-5)
    losses = pl_kl(student, teacher, batch)
    assert losses["kl_loss"].item() == pytest.approx(0.0, abs=1e-5)
    assert losses["loss"].item() == pytest.approx(0.8 * teacher(**batch).loss.item(), rel=1e-5)


@each_family
def test_kd_equals_dense_losses_on_the_models_own_outputs(family):
    teacher, batch = FAMILIES[family](3, 3), tiny_batch(padding=1)
    student, _, _ = init_student(teacher, 2, 2)
    losses = kd(student, teacher, batch, encoder_layer_ids=[1, 0], decoder_layer_ids=[0, 1])
    with torch.no_grad():
        ours, theirs = (model(**batch, output_hidden_states=True) for model in (student, teacher))
    labels, valid = batch["labels"], batch["labels"] != -100
    ce, kl = ce_loss(ours.logits, labels), kl_loss(ours.logits, theirs.logits, labels, 2.0)
    torch.testing.assert_close(losses["ce_loss"], ce)
    torch.testing.assert_close(losses["kl_loss"], kl)
    if family not in ("bart", "marian"):
        return  # their last hidden state is after the final norm; the next test is for them
    hidden = 0.0
    for stack, mask, pairs in (
        ("encoder_hidden_states", batch["attention_mask"], [(1, 2), (2, 1)]),  # index 0 is the embedding output
        ("decoder_hidden_states", valid, [(1, 1), (2, 2)]),
    ):
        hidden += sum(hidden_loss(ours[stack][i], theirs[stack][j], mask) for i, j in pairs) / 2
    torch.testing.assert_close(losses["hidden_loss"], hidden)
    torch.testing.assert_close(losses["loss"], 0.2 * ce + 0.8 * kl + 3.0 * hidden)


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
@pytest.mark.parametrize("objective", [sft, ALL_KD, pl_kl])
def test_gradients_reach_every_part_of_the_student_only(family, objective):
    teacher, batch = FAMILIES[family](3, 3), tiny_batch()
    student, _, _ = init_student(teacher, 2, 1)
    teacher.train()  # as a careless loop leaves it
    gradients(student, objective(student, teacher, batch)["loss"])
    assert all(weight.grad is None for weight in teacher.parameters())
    assert all(weight.grad is not None for weight in student.parameters() if weight.requires_grad)
    assert objective is sft or not teacher.training


@each_family
@pytest.mark.parametrize("objective", [partial(kd, encoder_layer_ids=[0, 1, 2], decoder_layer_ids=[0]), pl_kl])
def test_shared_encoder_runs_once_and_changes_nothing(family, objective):
    teacher, batch = FAMILIES[family](3, 3), tiny_batch()
    student, _, _ = init_student(teacher, 3, 1)
    freeze(student)
    assert has_teacher_encoder(student, teacher)
    student.train()
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
def test_padding_amount_changes_no_loss(family):
    teacher = FAMILIES[family](3, 3)
    student, _, _ = init_student(teacher, 2, 1)
    for objective in (sft, ALL_KD, pl_kl):
        tight, loose = (objective(student, teacher, tiny_batch(padding=padding)) for padding in (0, 6))
        for name, value in tight.items():
            torch.testing.assert_close(value, loose[name], rtol=1e-4, atol=1e-5)


def test_a_batch_without_labels_gives_zero_token_losses():
    teacher, batch = tiny_bart(), tiny_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    student, _, _ = init_student(teacher, 3, 1)
    losses = kd(student, teacher, batch, encoder_layer_ids=[], decoder_layer_ids=[0])
    losses["loss"].backward()
    assert all(value.item() == 0.0 for value in losses.values())
    assert all(torch.isfinite(weight.grad).all() for weight in student.parameters() if weight.grad is not None)


def test_extra_keys_of_a_batch_are_ignored_and_hooks_removed():
    teacher, batch = tiny_pegasus(), tiny_batch() | {"ids": ["a", "b", "c"]}
    student, _, _ = init_student(teacher, 2, 1)
    ALL_KD(student, teacher, batch)
    assert not any(module._forward_hooks for model in (student, teacher) for module in model.modules())


def test_a_frozen_encoder_has_no_dropout_and_a_trained_one_has():
    student, batch = tiny_bart(dropout=0.5).train(), tiny_batch()
    first, second = (objectives.encode(student, batch)[0] for _ in range(2))
    assert not torch.equal(first, second)
    freeze(student)
    first, second = (objectives.encode(student, batch)[0] for _ in range(2))
    assert torch.equal(first, second) and not first.requires_grad and student.get_decoder().training


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


def test_a_student_of_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match="student has 96 vocabulary entries and teacher 97"):
        pl_kl(tiny_bart(), tiny_bart(vocab_size=97), tiny_batch())


def test_learning_from_the_teacher_brings_the_student_closer():
    teacher, batch = tiny_bart(), tiny_batch()
    student, _, _ = init_student(teacher, 3, 1)
    freeze(student)
    optimizer = torch.optim.AdamW([weight for weight in student.parameters() if weight.requires_grad], lr=0.02)
    values = []
    for _ in range(30):
        losses = pl_kl(student, teacher, batch, ce_weight=0.0, shared_encoder=True)
        optimizer.zero_grad()
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        values.append(losses["kl_loss"].item())
    assert values[-1] < 0.5 * values[0]
