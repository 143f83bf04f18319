"""Losses against plain float64 loops, analytic gradients and their own dense forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from distill_utils.losses import ce_loss, chunked_token_losses, hidden_loss, kl_loss

LABELS = torch.tensor([[3, 0, 4, -100], [1, -100, -100, -100], [2, 2, 0, 1]])
VOCAB = 5


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, VOCAB, generator=generator) * 4 for _ in range(2)]


def softmax(row, temperature=1.0):
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def naive_ce(logits, labels):
    terms = []
    for rows, row_labels in zip(logits.double().tolist(), labels.tolist(), strict=True):
        for row, label in zip(rows, row_labels, strict=True):
            if label != -100:
                terms.append(-math.log(softmax(row)[label]))
    return sum(terms) / len(terms)


def naive_kl(student, teacher, labels, temperature):
    terms = []
    for s_rows, t_rows, row_labels in zip(
        student.double().tolist(), teacher.double().tolist(), labels.tolist(), strict=True
    ):
        for s_row, t_row, label in zip(s_rows, t_rows, row_labels, strict=True):
            if label != -100:
                p, q = softmax(t_row, temperature), softmax(s_row, temperature)
                terms.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) * temperature**2)
    return sum(terms) / len(terms)


def naive_hidden(student, teacher, mask):
    terms = []
    for s_rows, t_rows, row_mask in zip(
        student.double().tolist(), teacher.double().tolist(), mask.tolist(), strict=True
    ):
        for s_row, t_row, valid in zip(s_rows, t_rows, row_mask, strict=True):
            if valid:
                normal = []
                for row in (s_row, t_row):
                    mean = sum(row) / len(row)
                    deviation = math.sqrt(sum((value - mean) ** 2 for value in row) / len(row))
                    normal.append([(value - mean) / deviation for value in row])
                terms.append(sum((a - b) ** 2 for a, b in zip(*normal, strict=True)) / len(s_row))
    return sum(terms) / len(terms)


def test_ce_equals_naive_loop(logits):
    assert ce_loss(logits[0], LABELS).item() == pytest.approx(naive_ce(logits[0], LABELS), rel=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_kl_equals_naive_loop_in_this_direction(logits, temperature):
    value = kl_loss(logits[0], logits[1], LABELS, temperature).item()
    assert value == pytest.approx(naive_kl(logits[0], logits[1], LABELS, temperature), rel=1e-5)
    assert value != pytest.approx(naive_kl(logits[1], logits[0], LABELS, temperature), rel=0.01)


def test_kl_is_zero_only_for_the_same_distribution(logits):
    assert kl_loss(logits[0], logits[0], LABELS, 2.0).item() == 0.0
    assert kl_loss(logits[0] + 7.0, logits[0], LABELS, 2.0).item() == pytest.approx(0.0, abs=1e-6)
    assert kl_loss(logits[0], logits[1], LABELS, 2.0).item() > 0.1


def test_kl_gradient_is_temperature_times_difference_of_distributions(logits):
    student = logits[0].clone().requires_grad_()
    kl_loss(student, logits[1], LABELS, 2.0).backward()
    expected = 2.0 * ((student / 2).softmax(-1) - (logits[1] / 2).softmax(-1)) / (LABELS != -100).sum()
    expected[LABELS == -100] = 0.0
    torch.testing.assert_close(student.grad, expected.detach())


def test_hidden_equals_naive_loop():
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(2, 3, 8, generator=generator) * scale + 1 for scale in (0.5, 300.0))
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert hidden_loss(student, teacher, mask).item() == pytest.approx(naive_hidden(student, teacher, mask), rel=1e-4)
    assert hidden_loss(student * 5 + 3, student, mask).item() == pytest.approx(0.0, abs=1e-5)
    assert hidden_loss(-student, student, mask).item() == pytest.approx(4.0, rel=1e-4)


def test_padding_of_any_content_and_amount_changes_nothing(logits):
    extra = torch.full((3, 2, VOCAB), float("nan"))
    student, teacher = (torch.cat([values, extra], dim=1) for values in logits)
    labels = torch.cat([LABELS, torch.full((3, 2), -100)], dim=1)
    assert torch.equal(ce_loss(student, labels), ce_loss(logits[0], LABELS))
    assert torch.equal(kl_loss(student, teacher, labels, 2.0), kl_loss(*logits, LABELS, 2.0))
    assert torch.equal(hidden_loss(student, teacher, labels != -100), hidden_loss(*logits, LABELS != -100))


def test_no_valid_token_gives_zero_and_a_zero_gradient(logits):
    nothing = torch.full_like(LABELS, -100)
    head = nn.Linear(VOCAB, VOCAB)
    for loss in (
        lambda x: ce_loss(x, nothing),
        lambda x: kl_loss(x, logits[1], nothing),
        lambda x: hidden_loss(x, logits[1], nothing != -100),
        lambda x: sum(chunked_token_losses(x, head, nothing, logits[1], head).values()),
    ):
        student = logits[0].clone().requires_grad_()
        value = loss(student)
        value.backward()
        assert value.item() == 0.0 and torch.equal(student.grad, torch.zeros_like(student))


def test_half_precision_inputs_are_computed_in_float32(logits):
    student, teacher = (values.bfloat16() for values in logits)
    for half, full in (
        (ce_loss(student, LABELS), ce_loss(student.float(), LABELS)),
        (kl_loss(student, teacher, LABELS, 2.0), kl_loss(student.float(), teacher.float(), LABELS, 2.0)),
        (
            hidden_loss(student, teacher, LABELS != -100),
            hidden_loss(student.float(), teacher.float(), LABELS != -100),
        ),
    ):
        assert half.dtype == torch.float32 and torch.equal(half, full)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 7, 8, 1024])
def test_chunked_losses_equal_the_dense_ones_with_gradients(chunk_tokens):
    results = []
    for chunked in (False, True):
        torch.manual_seed(2)
        student_hidden, teacher_hidden = torch.randn(3, 4, 6, requires_grad=True), torch.randn(3, 4, 6)
        student_head, teacher_head = nn.Linear(6, 40), nn.Linear(6, 40)
        seen = []
        student_head.register_forward_hook(lambda *call, seen=seen: seen.append(call[-1].shape))
        if chunked:
            losses = chunked_token_losses(
                student_hidden, student_head, LABELS, teacher_hidden, teacher_head, 2.0, chunk_tokens
            )
        else:
            student_logits, teacher_logits = student_head(student_hidden), teacher_head(teacher_hidden).detach()
            losses = {"ce_loss": ce_loss(student_logits, LABELS)}
            losses["kl_loss"] = kl_loss(student_logits, teacher_logits, LABELS, 2.0)
        (losses["ce_loss"] + 3 * losses["kl_loss"]).backward()
        results.append([*losses.values(), student_hidden.grad, student_head.weight.grad, student_head.bias.grad])
        if chunked:
            assert max(shape[0] for shape in seen) <= chunk_tokens  # never more logits than asked for
            assert teacher_head.weight.grad is None
    for dense, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, dense, rtol=1e-5, atol=1e-6)


def test_chunked_losses_without_teacher_have_no_kl():
    losses = chunked_token_losses(torch.randn(3, 4, 6), nn.Linear(6, 9), LABELS)
    assert list(losses) == ["ce_loss"]


def test_shapes_that_do_not_fit_are_named(logits):
    with pytest.raises(ValueError, match=r"labels \(3, 3\) do not fit"):
        ce_loss(logits[0], LABELS[:, :3])
    with pytest.raises(ValueError, match="student has 5 vocabulary entries and teacher 4"):
        kl_loss(logits[0], logits[1][..., :4], LABELS)
    with pytest.raises(ValueError, match="same width"):
        hidden_loss(logits[0], logits[1][..., :4], LABELS != -100)
