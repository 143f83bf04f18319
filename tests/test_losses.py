"""Losses against plain float64 loops, analytic gradients and their own dense forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from distill_utils.distillation import losses
from distill_utils.distillation.losses import (
    DIVERGENCES,
    ce_loss,
    chunked_cached_losses,
    chunked_token_losses,
    hidden_loss,
    kl_loss,
    relation_loss,
)

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


def naive_divergence(student, teacher, labels, temperature, divergence, beta=0.5):
    """By the definitions, distribution by distribution in float64."""

    def kl(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

    terms = []
    for q_row, p_row in zip(student[labels != -100].double(), teacher[labels != -100].double(), strict=True):
        p, q = softmax(p_row.tolist(), temperature), softmax(q_row.tolist(), temperature)
        m = [beta * x + (1 - beta) * y for x, y in zip(p, q, strict=True)]
        terms.append(
            {
                "forward_kl": kl(p, q) * temperature**2,
                "reverse_kl": kl(q, p) * temperature**2,
                "jsd": (beta * kl(p, m) + (1 - beta) * kl(q, m)) * temperature**2,
                "tvd": sum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2 * temperature,
            }[divergence]
        )
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


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("temperature", "beta"), [(1.0, 0.5), (2.0, 0.1), (0.5, 0.9)])
def test_divergences_equal_their_definitions_with_gradients(logits, divergence, temperature, beta):
    student = logits[0].clone().requires_grad_()
    value = kl_loss(student, logits[1], LABELS, temperature, divergence, beta)
    value.backward()
    expected = naive_divergence(logits[0], logits[1], LABELS, temperature, divergence, beta)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    for place in ((0, 1, 2), (2, 3, 4), (1, 0, 0)):  # central differences of the plain definition
        values = []
        for step in (1e-5, -1e-5):
            moved = logits[0].double()
            moved[place] += step
            values.append(naive_divergence(moved, logits[1], LABELS, temperature, divergence, beta))
        assert student.grad[place].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-3, abs=1e-6)


def test_divergences_have_their_properties(logits):
    p, q = logits
    for divergence in DIVERGENCES:
        assert kl_loss(p, p, LABELS, 2.0, divergence).item() == pytest.approx(0.0, abs=1e-6)
        assert kl_loss(p, q, LABELS, 1.0, divergence).item() > 0.1
    torch.testing.assert_close(kl_loss(q, p, LABELS), kl_loss(p, q, LABELS, divergence="reverse_kl"))
    for divergence in ("jsd", "tvd"):
        torch.testing.assert_close(
            kl_loss(p, q, LABELS, divergence=divergence), kl_loss(q, p, LABELS, divergence=divergence)
        )
    swapped = kl_loss(p, q, LABELS, divergence="jsd", jsd_beta=0.8)
    torch.testing.assert_close(kl_loss(q, p, LABELS, divergence="jsd", jsd_beta=0.2), swapped)
    certain = 100.0 * torch.eye(VOCAB)[:2].expand(3, 2, 2, VOCAB)  # no overlap: the largest values there are
    bounds = {"jsd": math.log(2), "tvd": 1.0}
    for divergence, bound in bounds.items():
        value = kl_loss(certain[..., 0, :], certain[..., 1, :], LABELS[:, :2], divergence=divergence).item()
        assert value == pytest.approx(bound, rel=1e-5) and kl_loss(p, q, LABELS, 1.0, divergence).item() < bound
    for divergence, beta in (("forward_kl", 1e-3), ("reverse_kl", 1 - 1e-3)):
        near = kl_loss(p / 4, q / 4, LABELS, divergence="jsd", jsd_beta=beta) / min(beta, 1 - beta)
        assert near.item() == pytest.approx(kl_loss(p / 4, q / 4, LABELS, 1.0, divergence).item(), rel=0.02)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients_keep_their_size_when_the_temperature_changes(logits, divergence):
    sizes = []
    for temperature in (100.0, 1000.0):
        student = logits[0].double().requires_grad_()
        kl_loss(student, logits[1].double(), LABELS, temperature, divergence).backward()
        sizes.append(student.grad.norm().item())
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1)


def test_unknown_divergences_are_refused(logits):
    with pytest.raises(ValueError, match="'kl' is unknown: use forward_kl, reverse_kl, jsd, tvd"):
        kl_loss(*logits, LABELS, divergence="kl")
    for beta in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"jsd_beta {beta} is not between 0 and 1"):
            chunked_token_losses(logits[0], nn.Identity(), LABELS, divergence="jsd", jsd_beta=beta)


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


def test_hidden_without_normalisation_is_the_plain_error():
    student, teacher = torch.zeros(1, 2, 3), torch.tensor([[[1.0, 2.0, 3.0], [9.0, 9.0, 9.0]]])
    assert hidden_loss(student, teacher, torch.tensor([[1, 0]]), normalize=False).item() == pytest.approx(14 / 3)


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
        lambda x: sum(
            chunked_cached_losses(x, head, nothing, torch.zeros(3, 4, 2).long(), logits[1][..., :2]).values()
        ),
        *(lambda x, name=name: kl_loss(x, logits[1], nothing, 2.0, name) for name in DIVERGENCES),
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


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("chunk_tokens", [1, 3, 7, 8, 1024])
def test_chunked_losses_equal_the_dense_ones_with_gradients(chunk_tokens, divergence):
    results = []
    for chunked in (False, True):
        torch.manual_seed(2)
        student_hidden, teacher_hidden = torch.randn(3, 4, 6, requires_grad=True), torch.randn(3, 4, 6)
        student_head, teacher_head = nn.Linear(6, 40), nn.Linear(6, 40)
        seen = []
        student_head.register_forward_hook(lambda *call, seen=seen: seen.append(call[-1].shape))
        if chunked:
            losses = chunked_token_losses(
                student_hidden, student_head, LABELS, teacher_hidden, teacher_head, 2.0, chunk_tokens, divergence, 0.3
            )
        else:
            student_logits, teacher_logits = student_head(student_hidden), teacher_head(teacher_hidden).detach()
            losses = {"ce_loss": ce_loss(student_logits, LABELS)}
            losses["kl_loss"] = kl_loss(student_logits, teacher_logits, LABELS, 2.0, divergence, 0.3)
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


def test_a_data_loss_that_is_switched_off_is_not_computed(monkeypatch):
    student, teacher, head = torch.randn(3, 4, 6), torch.randn(3, 4, 6), nn.Linear(6, 9)
    expected = chunked_token_losses(student, head, LABELS, teacher, head)["kl_loss"]
    calls = []
    head.register_forward_hook(lambda *call: calls.append(1))
    monkeypatch.setattr("torch.nn.functional.cross_entropy", None)
    losses = chunked_token_losses(student, head, LABELS, teacher, head, with_ce=False)
    assert list(losses) == ["kl_loss"] and torch.equal(losses["kl_loss"], expected) and len(calls) == 2


def naive_cached(logits, ids, probs, labels, temperature):
    """KL over the kept ids and one bucket for all others, in float64."""
    terms = []
    for row, row_ids, row_probs in zip(*(x[labels != -100].tolist() for x in (logits, ids, probs)), strict=True):
        q = softmax(row, temperature)
        pairs = [(p, q[i]) for i, p in zip(row_ids, row_probs, strict=True)]
        if len(row_ids) < len(row):
            pairs.append((1 - sum(row_probs), sum(value for i, value in enumerate(q) if i not in row_ids)))
        terms.append(sum(p * math.log(p / value) for p, value in pairs) * temperature**2)
    return sum(terms) / len(terms)


@pytest.mark.parametrize("chunk_tokens", [3, 1024])
@pytest.mark.parametrize("top_k", [1, 3, VOCAB])
def test_cached_losses_equal_the_naive_loop_and_stay_below_the_full_divergence(logits, top_k, chunk_tokens):
    probs, ids = (logits[1].double() / 2).softmax(-1).topk(top_k)
    student = logits[0].clone().requires_grad_()
    losses = chunked_cached_losses(student, nn.Identity(), LABELS, ids.int(), probs, 2.0, chunk_tokens)
    expected = naive_cached(logits[0].double(), ids, probs, LABELS, 2.0)
    assert losses["kl_loss"].item() == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(losses["ce_loss"], ce_loss(student, LABELS))
    full = kl_loss(student, logits[1], LABELS, 2.0)
    (gradient,) = torch.autograd.grad(losses["kl_loss"], student)
    assert torch.isfinite(gradient).all() and not gradient[LABELS == -100].any()
    if top_k < VOCAB:
        assert 0 < losses["kl_loss"].item() < full.item()
    else:
        torch.testing.assert_close(losses["kl_loss"], full, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, *torch.autograd.grad(full, student), rtol=1e-4, atol=1e-6)


def test_cached_gradient_of_a_bucket_is_shared_by_what_the_student_believes(logits):
    """Inside the rest the teacher is silent, so a logit moves by its share of the error of the whole bucket."""
    labels = torch.tensor([[0]])
    student, probs = torch.tensor([[[30.0, 0.0, 1.0, 2.0]]], requires_grad=True), torch.tensor([[[0.9]]])
    chunked_cached_losses(student, nn.Identity(), labels, torch.tensor([[[0]]]), probs)["kl_loss"].backward()
    q = student.detach().double()[0, 0].softmax(-1)  # surer than float32 can say as 1 - q[0]
    share = torch.cat([q.new_zeros(1), q[1:] / q[1:].sum()])
    expected = q - 0.9 * torch.eye(4, dtype=torch.double)[0] - 0.1 * share
    torch.testing.assert_close(student.grad[0, 0].double(), expected, rtol=1e-4, atol=1e-7)


def test_probabilities_that_add_up_to_more_than_one_and_padding_ids_do_no_harm(logits):
    ids, probs = torch.tensor([1, 1]).expand(3, 4, 2), torch.tensor([1.0005, 0.0]).expand(3, 4, 2)
    losses = chunked_cached_losses(logits[0].requires_grad_(), nn.Identity(), LABELS, ids, probs)
    losses["kl_loss"].backward()
    alone = chunked_cached_losses(logits[0], nn.Identity(), LABELS, ids[..., :1], probs[..., :1])
    assert torch.isfinite(logits[0].grad).all() and torch.equal(losses["kl_loss"], alone["kl_loss"])


def test_shapes_that_do_not_fit_are_named(logits):
    with pytest.raises(ValueError, match=r"labels \(3, 3\) do not fit"):
        ce_loss(logits[0], LABELS[:, :3])
    with pytest.raises(ValueError, match="student has 5 vocabulary entries and teacher 4"):
        kl_loss(logits[0], logits[1][..., :4], LABELS)
    with pytest.raises(ValueError, match="same width"):
        hidden_loss(logits[0], logits[1][..., :4], LABELS != -100)


def naive_relations(student, teacher, row_mask, column_mask, num_heads, causal=False, scale=None):
    """Row by row and head by head in float64, over the valid columns only; student and teacher are pairs (a, b)."""
    terms = []
    for example, row in row_mask.nonzero().tolist():
        columns = column_mask[example].nonzero().flatten()
        columns = columns[columns <= row] if causal else columns
        for head in range(num_heads):
            logs = []
            for (a, b), factor in zip((student, teacher), scale or (None, None), strict=True):
                width = a.shape[-1] // num_heads
                part = slice(head * width, (head + 1) * width)
                scores = b[example, columns, part].double() @ a[example, row, part].double()
                logs.append((scores * (width**-0.5 if factor is None else factor)).log_softmax(-1))
            terms.append((logs[1].exp() * (logs[1] - logs[0])).sum())
    return torch.stack(terms).mean()


def relation_case(student_width=12, teacher_width=24, rows=5, columns=5, dtype=torch.float64):
    torch.manual_seed(3)
    shapes = [(3, length, width) for width in (student_width, teacher_width) for length in (rows, columns)]
    student_a, student_b, *teacher = (torch.randn(shape, dtype=dtype) for shape in shapes)
    row_mask = torch.arange(rows) < torch.tensor([[rows], [2], [rows - 1]])
    column_mask = torch.arange(columns) < torch.tensor([[columns - 1], [3], [columns]])
    return [student_a.requires_grad_(), student_b.requires_grad_()], teacher, row_mask, column_mask


@pytest.mark.parametrize("elements", [1, 60, 2**20])
@pytest.mark.parametrize("num_heads", [1, 4, 12])
@pytest.mark.parametrize(
    ("num_columns", "options"), [(5, {}), (5, {"causal": True}), (7, {}), (7, {"scale": (1.0, 0.3)})]
)
def test_relations_equal_the_naive_loop_in_value_and_gradient(monkeypatch, num_columns, options, num_heads, elements):
    monkeypatch.setattr(losses, "RELATION_ELEMENTS", elements)
    student, teacher, rows, columns = relation_case(columns=num_columns)
    columns = rows if options.get("causal") else columns
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        inputs = [x.detach().to(dtype).requires_grad_() for x in student]
        value = relation_loss(*inputs, *(x.to(dtype) for x in teacher), rows, columns, num_heads, **options)
        expected = naive_relations(student, teacher, rows, columns, num_heads, **options)
        assert value.dtype == dtype and value.item() == pytest.approx(expected.item(), rel=tolerance)
        gradients = torch.autograd.grad(3 * value, inputs)
        for ours, theirs in zip(gradients, torch.autograd.grad(3 * expected, student), strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=10 * tolerance, atol=tolerance)
    student, teacher = [student[0]] * 2, [teacher[0]] * 2  # QQ, KK and VV: one tensor in both places
    value = relation_loss(*student, *teacher, rows, rows, num_heads, **options)
    expected = naive_relations(student, teacher, rows, rows, num_heads, **options)
    gradients = [torch.autograd.grad(x, student[0])[0] for x in (value, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_relation_gradient_is_that_of_finite_differences(causal):
    student, teacher, rows, _ = relation_case()
    assert torch.autograd.gradcheck(lambda a, b: relation_loss(a, b, *teacher, rows, rows, 4, causal), student)
    assert torch.autograd.gradcheck(lambda a: relation_loss(a, a, *teacher, rows, rows, 4, causal), student[:1])


def test_relation_of_two_tokens_by_hand():
    """Student scores are all 0, so q is a half; the teacher's are 0 and ln 3 in both rows, so p is (1/4, 3/4)."""
    student, teacher = torch.zeros(1, 2, 1), torch.tensor([[[0.0], [1.0]]])
    both, factor = torch.ones(1, 2), math.log(3)
    kl = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    ones = torch.ones(1, 2, 1)
    value = relation_loss(student, student, ones, teacher, both, both, 1, scale=(1.0, factor))
    assert value.item() == pytest.approx(kl, rel=1e-6)
    # Causal: row 0 sees one column and has KL 0, row 1 sees both; the mean is over the two.
    value = relation_loss(student, student, ones, teacher, both, both, 1, True, (1.0, factor))
    assert value.item() == pytest.approx(kl / 2, rel=1e-6)


def test_relations_of_a_model_with_itself_and_of_the_first_causal_row_are_zero():
    student, teacher, rows, columns = relation_case(teacher_width=12)
    assert relation_loss(*student, *student, rows, columns, 4).item() == 0.0
    first = torch.arange(5).expand(3, 5) == 0
    assert relation_loss(*student, *teacher, first, rows, 4, causal=True).item() == pytest.approx(0.0, abs=1e-15)
    assert relation_loss(*student, *teacher, first, rows, 4).item() > 0.1


def test_padding_content_and_lack_of_valid_rows_do_no_harm_to_relations():
    student, teacher, rows, columns = relation_case()
    expected = relation_loss(*student, *teacher, rows, columns, 4)
    gradients = torch.autograd.grad(expected, student)
    for fill in (1e6, math.inf, math.nan):
        inputs = [x.detach().masked_fill(~mask[..., None], fill)
                  for x, mask in zip([*student, *teacher], (rows, columns) * 2, strict=True)]  # fmt: skip
        inputs = [x.requires_grad_() for x in inputs]
        value = relation_loss(*inputs, rows.long(), columns.long(), 4)
        assert torch.equal(value, expected)
        for ours, theirs in zip(torch.autograd.grad(value, inputs[:2]), gradients, strict=True):
            assert torch.equal(ours, theirs)
    value = relation_loss(*student, *teacher, torch.zeros_like(rows), columns, 4)
    value.backward()
    assert value.item() == 0.0 and not any(x.grad.any() for x in student)
    value = relation_loss(*student, *teacher, rows, torch.zeros_like(columns), 4)  # no column to tell apart
    assert value.item() == pytest.approx(0.0, abs=1e-15)


def test_relations_in_half_precision_are_computed_in_float32_even_under_autocast():
    student, teacher, rows, columns = relation_case(dtype=torch.float32)
    halves = [x.detach().bfloat16().requires_grad_() for x in student]
    rounded = [x.detach().float().requires_grad_() for x in halves]
    with torch.autocast("cpu", torch.bfloat16):
        value = relation_loss(*halves, *(x.bfloat16() for x in teacher), rows, columns, 4)
    expected = relation_loss(*rounded, *(x.bfloat16().float() for x in teacher), rows, columns, 4)
    assert value.dtype == torch.float32 and torch.equal(value, expected)
    assert value.item() == pytest.approx(relation_loss(*student, *teacher, rows, columns, 4).item(), rel=0.02)
    value.backward(), expected.backward()
    for half, full in zip(halves, rounded, strict=True):
        torch.testing.assert_close(half.grad, full.grad.bfloat16())


def test_relations_need_a_gradient_only_where_the_student_does():
    student, teacher, rows, columns = relation_case()
    expected = relation_loss(*student, *teacher, rows, columns, 4)
    with torch.no_grad():
        assert torch.equal(relation_loss(*student, *teacher, rows, columns, 4), expected)
    fixed = relation_loss(*(x.detach() for x in student), *teacher, rows, columns, 4)
    assert torch.equal(fixed, expected) and not fixed.requires_grad
    half = relation_loss(student[0], student[1].detach(), *teacher, rows, columns, 4)
    torch.testing.assert_close(torch.autograd.grad(half, student[0]), torch.autograd.grad(expected, student[0]))


def test_impossible_relations_are_refused():
    student, teacher, rows, columns = relation_case(columns=7)
    message = (
        "num_relation_heads 8 does not divide the inner widths 12 of the student and 24 of the teacher: use one of "
    )
    with pytest.raises(ValueError, match=message + "1, 2, 3, 4, 6, 12$"):
        relation_loss(*student, *teacher, rows, columns, 8)
    for options in ({"causal": True}, {}):
        with pytest.raises(ValueError, match=r"\(3, 5, 12\) and \(3, 7, 12\) do not fit masks"):
            relation_loss(*student, *teacher, rows, columns if options else rows, 4, **options)
