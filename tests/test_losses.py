"""Losses against their definitions in float64, analytic gradients and finite differences."""

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from distill_utils.distillation import losses
from distill_utils.distillation.losses import (
    DIVERGENCES,
    chunked_cached_losses,
    chunked_token_losses,
    hidden_loss,
    relation_loss,
)

LABELS = torch.tensor([[3, 0, 4, -100], [1, -100, -100, -100], [2, 2, 0, 1]])
VOCAB = 5


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, VOCAB, generator=generator) * 4 for _ in range(2)]


def ce_loss(logits, labels):
    """Cross-entropy by its definition, in float64."""
    valid = labels != -100
    return -logits[valid].double().log_softmax(-1).gather(-1, labels[valid][:, None]).mean()


def kl_loss(student, teacher, labels, temperature=1.0, divergence="forward_kl", beta=0.5):
    """Each divergence by its definition, in float64."""
    p, q = ((x[labels != -100].double() / temperature).softmax(-1) for x in (teacher, student))
    m = beta * p + (1 - beta) * q

    def kl(a, b):
        return (a * (a / b).log()).sum(-1).mean()

    return {
        "forward_kl": lambda: kl(p, q) * temperature**2,
        "reverse_kl": lambda: kl(q, p) * temperature**2,
        "jsd": lambda: (beta * kl(p, m) + (1 - beta) * kl(q, m)) * temperature**2,
        "tvd": lambda: (p - q).abs().sum(-1).mean() / 2 * temperature,
    }[divergence]()


def token_losses(student, teacher, labels, *arguments, **options):
    """`chunked_token_losses` of logits."""
    return chunked_token_losses(student, nn.Identity(), labels, teacher, nn.Identity(), *arguments, **options)


def naive_hidden(student, teacher, mask):
    a, b = ((x - x.mean(-1, keepdim=True)) / x.std(-1, correction=0, keepdim=True)
            for x in (student[mask.bool()].double(), teacher[mask.bool()].double()))  # fmt: skip
    return ((a - b) ** 2).mean()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("temperature", "beta"), [(1.0, 0.5), (2.0, 0.1), (0.5, 0.9)])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 7, 8, 1024])
def test_chunked_losses_equal_their_definitions_with_gradients(chunk_tokens, temperature, beta, divergence):
    torch.manual_seed(2)
    student, teacher = torch.randn(3, 4, 6, requires_grad=True), torch.randn(3, 4, 6)
    heads = nn.Linear(6, 40), nn.Linear(6, 40)
    leaves = [student, *heads[0].parameters()]
    dense = [head(hidden) for head, hidden in zip(heads, (student, teacher), strict=True)]
    expected = {"ce_loss": ce_loss(dense[0], LABELS)}
    expected["kl_loss"] = kl_loss(dense[0], dense[1].detach(), LABELS, temperature, divergence, beta)
    expected_gradients = torch.autograd.grad(expected["ce_loss"] + 3 * expected["kl_loss"], leaves)

    seen = []
    heads[0].register_forward_hook(lambda *call: seen.append(call[-1].shape[0]))
    found = chunked_token_losses(
        student, heads[0], LABELS, teacher, heads[1], temperature, chunk_tokens, divergence, beta
    )
    (found["ce_loss"] + 3 * found["kl_loss"]).backward()
    assert max(seen) <= chunk_tokens and heads[1].weight.grad is None  # never more logits than asked for
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-4)
    for leaf, gradient in zip(leaves, expected_gradients, strict=True):
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-4, atol=1e-5)


def test_hidden_equals_its_definition():
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(2, 3, 8, generator=generator) * scale + 1 for scale in (0.5, 300.0))
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    expected = naive_hidden(student, teacher, mask).item()
    assert hidden_loss(student, teacher, mask).item() == pytest.approx(expected, rel=1e-4)
    assert hidden_loss(student * 5 + 3, student, mask).item() == pytest.approx(0.0, abs=1e-5)
    assert hidden_loss(-student, student, mask).item() == pytest.approx(4.0, rel=1e-4)
    student, teacher = torch.zeros(1, 2, 3), torch.tensor([[[1.0, 2.0, 3.0], [9.0, 9.0, 9.0]]])
    assert hidden_loss(student, teacher, torch.tensor([[1, 0]]), normalize=False).item() == pytest.approx(14 / 3)


def test_padding_of_any_content_and_amount_changes_nothing(logits):
    extra = torch.full((3, 2, VOCAB), float("nan"))
    padded = [torch.cat([values, extra], dim=1) for values in logits]
    labels = torch.cat([LABELS, torch.full((3, 2), -100)], dim=1)
    tight, loose = token_losses(*logits, LABELS, 2.0), token_losses(*padded, labels, 2.0)
    assert all(torch.equal(value, loose[name]) for name, value in tight.items())
    assert torch.equal(hidden_loss(*padded, labels != -100), hidden_loss(*logits, LABELS != -100))


def test_no_valid_token_gives_zero_and_a_zero_gradient(logits):
    nothing, head = torch.full_like(LABELS, -100), nn.Linear(VOCAB, VOCAB)
    ids, probs = torch.zeros(3, 4, 2).long(), logits[1][..., :2]
    for loss in (
        lambda x: hidden_loss(x, logits[1], nothing != -100),
        lambda x: sum(chunked_cached_losses(x, head, nothing, ids, probs).values()),
        lambda x: token_losses(x, logits[1], nothing, weights=(1.0, 1.0))["loss"],
        *(
            lambda x, name=name: sum(token_losses(x, logits[1], nothing, 2.0, divergence=name).values())
            for name in DIVERGENCES
        ),
    ):
        student = logits[0].clone().requires_grad_()
        value = loss(student)
        value.backward()
        assert value.item() == 0.0 and torch.equal(student.grad, torch.zeros_like(student))


def test_half_precision_inputs_are_computed_in_float32(logits):
    half = [values.bfloat16() for values in logits]
    full = [values.float() for values in half]
    for name, value in token_losses(*half, LABELS, 2.0).items():
        assert value.dtype == torch.float32 and torch.equal(value, token_losses(*full, LABELS, 2.0)[name])
    value = hidden_loss(*half, LABELS != -100)
    assert value.dtype == torch.float32 and torch.equal(value, hidden_loss(*full, LABELS != -100))


@pytest.mark.parametrize("weights", [None, (0.0, 1.0), (0.2, 0.8)])
def test_divergence_of_distributions_is_taken_in_float32_even_under_autocast(weights):
    """Logits that lie apart by a constant are one distribution; in bf16 the constant would not cancel."""
    torch.manual_seed(0)
    hidden, head = torch.randn(3, 4, 6), nn.Linear(6, 40).requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        found = chunked_token_losses(hidden, head, LABELS, hidden, lambda x: head(x).float() + 3.01, weights=weights)
    assert found["kl_loss"].item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.2, 0.8)])
@pytest.mark.parametrize(("temperature", "mix", "label_smoothing"), [(1.0, 1.0, 0.0), (2.0, 0.4, 0.1), (0.5, 0.0, 0.2)])
@pytest.mark.parametrize(("chunk_tokens", "elements"), [(1, 2**21), (3, 2**21), (1024, 2**21), (1024, 3 * 40), (3, 7)])
@pytest.mark.parametrize("trained", [False, True])
def test_the_weighted_sum_and_its_gradient_are_those_of_the_terms(
    trained, chunk_tokens, elements, temperature, mix, label_smoothing, weights, monkeypatch
):
    """With a head that is trained all goes through the backward pass, else the gradient comes along with the values."""
    monkeypatch.setattr(losses, "CPU_ELEMENTS", elements)  # rows of logits within a chunk: all, three, one
    torch.manual_seed(3)
    student, teacher = torch.randn(3, 4, 6, dtype=torch.float64), torch.randn(3, 4, 6)
    heads = [nn.Linear(6, 40).requires_grad_(False) for _ in range(2)]
    own = (heads[0].double()(student.requires_grad_()))[LABELS != -100]
    theirs = torch.lerp(own.detach(), heads[1](teacher)[LABELS != -100].double(), mix)
    target = (1 - label_smoothing) * nn.functional.one_hot(LABELS[LABELS != -100], 40) + label_smoothing / 40
    p = (theirs / temperature).softmax(-1)
    expected = {"ce_loss": -(target * own.log_softmax(-1)).sum(-1).mean()}
    expected["kl_loss"] = (p * (p.log() - (own / temperature).log_softmax(-1))).sum(-1).mean() * temperature**2
    loss = sum(weight * value for weight, value in zip(weights, expected.values(), strict=True))
    (gradient,) = torch.autograd.grad(7.0 * loss, student)

    hidden, head = student.detach().float().requires_grad_(), heads[0].float().requires_grad_(trained)
    theirs = (teacher, heads[1]) if weights[1] else (None, None)
    options = {"weights": weights, "mix": mix, "label_smoothing": label_smoothing}

    def losses_now():
        return chunked_token_losses(hidden, head, LABELS, *theirs, temperature, chunk_tokens, **options)

    if not trained:
        with FlopCounterMode(display=False) as counter:  # its hooks take part in a backward pass
            losses_now()
        passes = 2 + bool(weights[1])  # the student's logits, their gradient, the teacher's logits
        assert counter.get_total_flops() == passes * 2 * 6 * 40 * int((LABELS != -100).sum())
    seen = []
    head.register_forward_hook(lambda *call: seen.append(call[-1].shape[0]))
    found = losses_now()
    assert found.keys() == {"loss"} | {name for name, w in zip(expected, weights, strict=True) if w}
    assert max(seen) <= chunk_tokens and sum(seen) == int((LABELS != -100).sum())  # each token once
    assert found["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    for name in found.keys() - {"loss"}:
        assert found[name].item() == pytest.approx(expected[name].item(), rel=1e-5)
        assert found[name].requires_grad == trained
    (7.0 * found["loss"]).backward()
    torch.testing.assert_close(hidden.grad, gradient.float(), rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(losses_now(), {name: value.detach() for name, value in found.items()})


def naive_cached(logits, ids, probs, labels, temperature):
    """KL over the kept ids and one bucket for all others, in float64."""
    valid = labels != -100
    q, ids, p = (logits[valid].double() / temperature).softmax(-1), ids[valid], probs[valid].double()
    kept = q.gather(-1, ids)
    total = (p * (p / kept).log()).sum(-1)
    if ids.shape[-1] < q.shape[-1]:
        rest = 1 - p.sum(-1)
        total = total + rest * (rest / (1 - kept.sum(-1))).log()
    return total.mean() * temperature**2


@pytest.mark.parametrize("chunk_tokens", [3, 1024])
@pytest.mark.parametrize("top_k", [1, 3, VOCAB])
def test_cached_losses_equal_the_definition_and_stay_below_the_full_divergence(logits, top_k, chunk_tokens):
    probs, ids = (logits[1].double() / 2).softmax(-1).topk(top_k)
    student = logits[0].clone().requires_grad_()
    found = chunked_cached_losses(student, nn.Identity(), LABELS, ids.int(), probs, 2.0, chunk_tokens)
    assert found["kl_loss"].item() == pytest.approx(naive_cached(student, ids, probs, LABELS, 2.0).item(), rel=1e-4)
    full = token_losses(student, logits[1], LABELS, 2.0)
    torch.testing.assert_close(found["ce_loss"], full["ce_loss"])
    (gradient,) = torch.autograd.grad(found["kl_loss"], student)
    assert torch.isfinite(gradient).all() and not gradient[LABELS == -100].any()
    if top_k < VOCAB:
        assert 0 < found["kl_loss"].item() < full["kl_loss"].item()
    else:
        torch.testing.assert_close(found["kl_loss"], full["kl_loss"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, *torch.autograd.grad(full["kl_loss"], student), rtol=1e-4, atol=1e-6)


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


@pytest.mark.parametrize(
    ("labels", "teacher", "options", "message"),
    [
        (LABELS[:, :3], (4, VOCAB), {}, r"labels \(3, 3\) do not fit"),
        (LABELS, (3, VOCAB), {}, r"labels \(3, 4\) do not fit values \(3, 3, 5\)"),
        (LABELS, (4, 4), {}, "student has 5 vocabulary entries and teacher 4"),
        (LABELS, (4, VOCAB), {"divergence": "kl"}, "'kl' is unknown"),
        (LABELS, (4, VOCAB), {"divergence": "jsd", "jsd_beta": 0.0}, "jsd_beta 0.0 "),
        (LABELS, (4, VOCAB), {"divergence": "jsd", "jsd_beta": 1.0}, "jsd_beta 1.0 "),
    ],
)
def test_bad_input_is_named(logits, labels, teacher, options, message):
    for weights in (None, (0.5, 0.5)):
        with pytest.raises(ValueError, match=message):
            token_losses(logits[0], torch.zeros(3, *teacher), labels, weights=weights, **options)


def test_hidden_states_of_another_width_are_rejected(logits):
    with pytest.raises(ValueError, match="same width"):
        hidden_loss(logits[0], logits[1][..., :4], LABELS != -100)


def naive_relations(student, teacher, mask, num_heads, causal=False):
    """Token by token and head by head in float64, over the valid tokens only."""
    terms = []
    for example, row in mask.nonzero().tolist():
        columns = mask[example].nonzero().flatten()
        columns = columns[columns <= row] if causal else columns
        for head in range(num_heads):
            logs = []
            for x in (student, teacher):
                width = x.shape[-1] // num_heads
                x = x[example, :, head * width : (head + 1) * width].double()
                logs.append((x[columns] @ x[row] * width**-0.5).log_softmax(-1))
            terms.append((logs[1].exp() * (logs[1] - logs[0])).sum())
    return torch.stack(terms).mean()


def relation_case(teacher_width=24, length=5, dtype=torch.float64):
    torch.manual_seed(3)
    student, teacher = (torch.randn(3, length, width, dtype=dtype) for width in (12, teacher_width))
    return student.requires_grad_(), teacher, torch.arange(length) < torch.tensor([[length], [2], [length - 1]])


@pytest.mark.parametrize("elements", [1, 60, 2**20])
@pytest.mark.parametrize("num_heads", [1, 4, 12])
@pytest.mark.parametrize(("length", "causal"), [(5, False), (5, True), (7, False)])
def test_relations_equal_the_naive_loop_in_value_and_gradient(monkeypatch, length, causal, num_heads, elements):
    monkeypatch.setattr(losses, "RELATION_ELEMENTS", elements)
    student, teacher, mask = relation_case(length=length)
    expected = naive_relations(student, teacher, mask, num_heads, causal)
    (expected_gradient,) = torch.autograd.grad(3 * expected, student)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        ours = student.detach().to(dtype).requires_grad_()
        value = relation_loss(ours, teacher.to(dtype), mask, num_heads, causal)
        assert value.dtype == dtype and value.item() == pytest.approx(expected.item(), rel=tolerance)
        (gradient,) = torch.autograd.grad(3 * value, ours)
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=10 * tolerance, atol=tolerance)


def test_padding_content_and_lack_of_valid_tokens_do_no_harm_to_relations():
    student, teacher, mask = relation_case()
    expected = relation_loss(student, teacher, mask, 4)
    (expected_gradient,) = torch.autograd.grad(expected, student)
    for fill in (1e6, math.inf, math.nan):
        ours, theirs = (x.detach().masked_fill(~mask[..., None], fill) for x in (student, teacher))
        value = relation_loss(ours.requires_grad_(), theirs, mask.long(), 4)
        assert torch.equal(value, expected) and torch.equal(*torch.autograd.grad(value, ours), expected_gradient)
    value = relation_loss(student, teacher, torch.zeros_like(mask), 4)
    value.backward()
    assert value.item() == 0.0 and not student.grad.any()


def test_relations_in_half_precision_are_computed_in_float32_even_under_autocast():
    student, teacher, mask = relation_case(dtype=torch.float32)
    half = student.detach().bfloat16().requires_grad_()
    rounded = half.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = relation_loss(half, teacher.bfloat16(), mask, 4)
    expected = relation_loss(rounded, teacher.bfloat16().float(), mask, 4)
    assert value.dtype == torch.float32 and torch.equal(value, expected)
    assert value.item() == pytest.approx(relation_loss(student, teacher, mask, 4).item(), rel=0.02)
    value.backward(), expected.backward()
    torch.testing.assert_close(half.grad, rounded.grad.bfloat16())


def test_relations_need_a_gradient_only_where_the_student_does():
    student, teacher, mask = relation_case()
    expected = relation_loss(student, teacher, mask, 4)
    with torch.no_grad():
        assert torch.equal(relation_loss(student, teacher, mask, 4), expected)
    fixed = relation_loss(student.detach(), teacher.requires_grad_(), mask, 4)
    assert torch.equal(fixed, expected) and not fixed.requires_grad


def test_impossible_relations_are_rejected():
    student, teacher, mask = relation_case()
    with pytest.raises(ValueError, match="num_relation_heads 8 .* 12 .* 24 .*: use one of 1, 2, 3, 4, 6, 12$"):
        relation_loss(student, teacher, mask, 8)
    with pytest.raises(ValueError, match=r"\(3, 5, 12\) and \(3, 4, 24\) do not fit mask \(3, 5\)"):
        relation_loss(student, teacher[:, :4], mask, 4)
