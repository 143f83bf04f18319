"""Distillation losses as pure functions of tensors, in float32, averaged over valid tokens only.

Out of scope: models, batches and weights between terms (objectives.py).
"""

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from distill_utils.artifacts import InputError

IGNORED = -100  # label of padding; the start token of T5 and Pegasus *is* padding, so only labels tell what is valid
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tvd")
RELATION_ELEMENTS = 2**20  # relations held at a time, for each thread: with 2**18 in all two are no faster than one
CUDA_RELATION_ELEMENTS = 2**23  # there launching kernels costs more than memory does
CPU_CHUNK = 256  # tokens that are projected at a time; for fewer, products repack the output matrix too often
CPU_ELEMENTS = 2**21  # of their logits that are compared at a time: 8 MB in float32
MASKED = -1e30  # swallows every score, yet stays finite: a row without any column has two equal distributions, not NaN


def hidden_loss(student_hidden: Tensor, teacher_hidden: Tensor, mask: Tensor, normalize: bool = True) -> Tensor:
    """Return the mean squared error between two layer outputs, each token normalised by itself first.

    Shapes: hidden (batch, length, dim), mask (batch, length), true or 1 where a token counts. Every token's vector is
    brought to mean 0 and variance 1 over dim, so the loss lies between 0 and 4, no layer with large states outweighs
    the rest, and padding changes nothing (Shleifer & Rush normalise over the whole padded tensor, which it would).
    Without `normalize` it is the plain error, a mean over tokens and dim, and has no bound. Raises ValueError when
    the shapes do not fit.
    """
    if student_hidden.shape != teacher_hidden.shape or student_hidden.shape[:-1] != mask.shape:
        raise ValueError(
            f"hidden states {tuple(student_hidden.shape)} and {tuple(teacher_hidden.shape)} with mask "
            f"{tuple(mask.shape)} do not fit; teacher and student need the same width and the same tokens"
        )
    valid = mask.bool()
    width = student_hidden.shape[-1:]
    student_hidden, teacher_hidden = student_hidden[valid].float(), teacher_hidden[valid].float()  # (tokens, dim)
    if normalize:
        student_hidden = F.layer_norm(student_hidden, width, eps=1e-6)
        teacher_hidden = F.layer_norm(teacher_hidden, width, eps=1e-6)
    return F.mse_loss(student_hidden, teacher_hidden, reduction="sum") / (valid.sum().clamp(min=1) * width[0])


def chunked_token_losses(
    student_hidden: Tensor,
    student_project: Callable[[Tensor], Tensor],
    labels: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_project: Callable[[Tensor], Tensor] | None = None,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    divergence: str = "forward_kl",
    jsd_beta: float = 0.5,
    weights: tuple[float, float] | None = None,
    mix: float = 1.0,
    label_smoothing: float = 0.0,
) -> dict[str, Tensor]:
    """Return `ce_loss` and, given a teacher, `kl_loss` in nats per target token, without ever holding all logits.

    `kl_loss` is a divergence between teacher p and student q. `forward_kl` is KL(p || q), `reverse_kl` KL(q || p).
    `jsd` is b KL(p || m) + (1 - b) KL(q || m) with the mixture m = b p + (1 - b) q and b = `jsd_beta` (Agarwal et al.
    2024, GKD). `tvd` is half the sum of |p - q|, without unit (Wen et al. 2023).

    Both distributions are softened by the temperature, and the result is multiplied by its square, which keeps the size
    of the gradient (Hinton et al. 2015, section 2); TVD by the temperature itself, because its gradient holds only the
    sign of p - q. With `mix` below 1 the target is the softmax of (1 - mix) times the student's logits, held fixed,
    plus mix times the teacher's (Shing et al. 2025, TAID). `label_smoothing` gives all tokens a share of the target of
    the cross-entropy.

    Padding is dropped before the projection; then `chunk_tokens` tokens at a time are projected, and again in the
    backward pass, so the peak is (chunk_tokens, vocab) instead of (batch, target, vocab). The teacher has no gradient.
    Without any valid token the losses are 0 and still have a gradient path.

    `weights`, those of `ce_loss` and `kl_loss`, add their sum as `loss`, which then should be the only one to be
    differentiated; a cross-entropy of weight 0 is left out. With forward KL and a projection that is not trained,
    gradients are taken along with the values: no logits are kept or made again.

    Shapes: hidden (batch, target, dim), labels (batch, target) with -100 for padding; the projections map (tokens, dim)
    to (tokens, vocab). Raises ValueError for shapes that do not fit or an unknown divergence.
    """
    check_divergence(divergence, jsd_beta)
    valid = _valid_tokens(labels, student_hidden)
    if teacher_hidden is not None:
        _valid_tokens(labels, teacher_hidden)
        teacher_hidden = teacher_hidden[valid]
    student_hidden, labels = student_hidden[valid], labels[valid]
    probe = student_project(student_hidden[:0].detach())
    if weights and divergence == "forward_kl" and not probe.requires_grad:
        found = _TokenLosses.apply(
            student_hidden, labels, student_project, teacher_hidden, teacher_project, weights, temperature,
            chunk_tokens if probe.is_cuda else min(chunk_tokens, CPU_CHUNK), mix, label_smoothing,
            torch.is_grad_enabled(),
        )  # fmt: skip
        used = {"loss": True, "ce_loss": weights[0] != 0, "kl_loss": teacher_hidden is not None}
        return {name: value for (name, wanted), value in zip(used.items(), found, strict=True) if wanted}

    def chunk_sums(student_hidden: Tensor, labels: Tensor, teacher_hidden: Tensor | None) -> dict[str, Tensor]:
        student_logits = student_project(student_hidden)  # (chunk, vocab)
        with_ce = not weights or weights[0] != 0
        sums = {"ce_loss": _ce_sum(student_logits, labels, label_smoothing)} if with_ce else {}
        if teacher_hidden is not None:
            with torch.no_grad():
                teacher_logits = teacher_project(teacher_hidden)
            sums["kl_loss"] = _divergence_sum(student_logits, teacher_logits, temperature, divergence, jsd_beta, mix)
        return sums

    losses = _mean_over_chunks(chunk_sums, (student_hidden, labels, teacher_hidden), chunk_tokens)
    if not weights:
        return losses
    terms = zip(("ce_loss", "kl_loss"), weights, strict=True)
    return {"loss": sum(weight * losses[name] for name, weight in terms if name in losses)} | losses


def chunked_cached_losses(
    student_hidden: Tensor,
    student_project: Callable[[Tensor], Tensor],
    labels: Tensor,
    target_ids: Tensor,
    target_probs: Tensor,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    with_ce: bool = True,
) -> dict[str, Tensor]:
    """Return `ce_loss` and `kl_loss` as `chunked_token_losses` does, from k of the teacher's probabilities per token.

    The rest of the vocabulary is one bucket that holds what is missing to 1, on both sides: a lower bound of the
    forward KL at the temperature of the targets, and equal to it when all ids are there. Probabilities that are shares
    of samples (`teacher_cache.choose_targets`) leave no rest: the gradient is then that of the forward KL in
    expectation, whereas the value, KL(shares || q), is above it on average (Anshumann et al. 2025).

    Shapes: hidden (batch, target, dim), labels (batch, target), ids and probabilities (batch, target, k). An id may
    come twice with probability 0, as padding.
    """
    valid = _valid_tokens(labels, student_hidden) & _valid_tokens(labels, target_ids)

    def chunk_sums(student_hidden: Tensor, labels: Tensor, ids: Tensor, probs: Tensor) -> dict[str, Tensor]:
        logits = student_project(student_hidden)  # (chunk, vocab)
        sums = {"ce_loss": _ce_sum(logits, labels)} if with_ce else {}
        return sums | {"kl_loss": _cached_kl_sum(logits, ids.long(), probs.float(), temperature)}

    inputs = (student_hidden[valid], labels[valid], target_ids[valid], target_probs[valid])
    return _mean_over_chunks(chunk_sums, inputs, chunk_tokens)


def relation_loss(
    student: Tensor, teacher: Tensor, mask: Tensor, num_relation_heads: int = 32, causal: bool = False
) -> Tensor:
    """Return KL(teacher || student) in nats between relations softmax(x x^T / sqrt(d) + mask) per head and token.

    x are the queries, keys or values of a layer, those of all attention heads taken together and split anew into
    relation heads of width d, so that the models may differ in width and number of heads (Wang et al. 2021, MiniLMv2,
    section 3). The mean is over all heads and valid tokens; with `causal` token 0 sees only itself and counts as 0.

    A few heads at a time are compared, and their gradient is taken in the same pass: the memory does not grow with the
    number of heads and nothing is computed twice. Float64 stays float64, all else is computed in float32.

    Shapes: student and teacher (batch, length, inner), inner of either model; mask (batch, length), true or 1 where a
    token counts. Without any valid token the result is 0 and still has a gradient path. Raises ValueError when the
    shapes do not fit or the heads do not divide the widths.
    """
    check_relation_heads(num_relation_heads, student.shape[-1], teacher.shape[-1])
    if not student.shape[:-1] == teacher.shape[:-1] == mask.shape:
        raise ValueError(
            f"vectors {tuple(student.shape)} and {tuple(teacher.shape)} do not fit mask {tuple(mask.shape)}; "
            "give (batch, length, inner) and (batch, length)"
        )
    with_grad = torch.is_grad_enabled() and student.requires_grad
    with torch.autocast(student.device.type, enabled=False):
        return _RelationLoss.apply(student, teacher.detach(), mask.bool(), num_relation_heads, causal, with_grad)


def check_relation_heads(num_relation_heads: int, student_width: int, teacher_width: int) -> None:
    """Raise InputError when the relation heads do not divide the inner width of both models."""
    common = math.gcd(student_width, teacher_width)
    if num_relation_heads < 1 or common % num_relation_heads:
        valid = [heads for heads in range(1, common + 1) if common % heads == 0]
        raise InputError(
            f"num_relation_heads {num_relation_heads} does not divide the inner widths {student_width} of the student "
            f"and {teacher_width} of the teacher: use one of {', '.join(map(str, valid))}"
        )


class _RelationLoss(torch.autograd.Function):
    """The value, and the gradient along with it, by products of relations with the vectors.

    Under a row of relations p the mean of all scores is x_i times the mean of the x_j, and d KL / d scores is q - p.
    So scores are never kept and relations never subtracted entry by entry, which takes longer than the products.
    """

    @staticmethod
    def forward(ctx, student, teacher, mask, num_heads, causal, with_grad):
        dtype = torch.promote_types(student.dtype, torch.float32)
        batch, length = mask.shape
        weight = mask / (num_heads * mask.sum().clamp(min=1)).to(dtype)  # (batch, length)
        bias = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, MASKED)[:, None, None]
        if causal:
            bias = bias + bias.new_full((length, length), MASKED).triu(1)
        total = bias.new_zeros(())
        gradient = torch.empty_like(student) if with_grad else None

        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # (batch, heads, length, width of a head), a view

        held = CUDA_RELATION_ELEMENTS if bias.is_cuda else RELATION_ELEMENTS * torch.get_num_threads()
        pairs = max(1, min(held, CUDA_RELATION_ELEMENTS) // max(length**2, 1))
        examples, heads = min(batch, max(1, pairs // num_heads)), min(pairs, num_heads)
        work = bias.new_empty(examples * heads * length**2)  # allocating it for each chunk costs more than the sums
        for i, j in itertools.product(range(0, batch, examples), range(0, num_heads, heads)):
            chunk = (slice(i, i + examples), slice(j, j + heads))
            padding = ~mask[chunk[0], None, :, None]
            # The content of padding must not reach the sums, not even as 0 * inf.
            x, y = (split(x.detach())[chunk].to(dtype).masked_fill(padding, 0.0) for x in (student, teacher))
            row_weight = weight[chunk[0], None, :, None]
            scale = x.shape[-1] ** -0.5
            log_q, d_keys, x_q = _relate(x, [x], bias[chunk[0]], work, x * row_weight)
            log_p, d_keys_p, x_p, y_p = _relate(y, [x, y], bias[chunk[0]], work, x * row_weight)
            y_scores = (y * y_p).sum(-1, keepdim=True) * y.shape[-1] ** -0.5  # means under the teacher's relations
            x_scores = (x * x_p).sum(-1, keepdim=True) * scale
            total += ((y_scores - x_scores + log_q - log_p) * row_weight).sum()
            if with_grad:  # x is on both sides of the scores
                d_x = ((x_q - x_p) * row_weight + d_keys - d_keys_p) * scale
                split(gradient)[chunk] = d_x.masked_fill_(padding, 0.0)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss):
        return (ctx.saved_tensors[0] * d_loss, *[None] * 5)


def _relate(x: Tensor, vectors: list[Tensor], bias: Tensor, work: Tensor, queries: Tensor) -> tuple[Tensor, ...]:
    """Return log sum exp of each token's scores, the sum of `queries` that each token gets, and means of `vectors`.

    Sums and means are under the relations of x, all (batch, heads, length, width); `work` is room for the relations.
    """
    relations = work[: math.prod(x.shape[:-1]) * x.shape[-2]].view(*x.shape[:-1], x.shape[-2])
    torch.bmm((x * x.shape[-1] ** -0.5).flatten(0, 1), x.mT.flatten(0, 1), out=relations.flatten(0, 1))
    top = relations.add_(bias).amax(-1, keepdim=True)
    torch.softmax(relations, -1, out=relations)  # in one pass what its parts take four for
    # From the left: with few columns the product from the right takes a processor two to four times as long.
    means = (torch.cat(vectors, -1).mT @ relations.mT).mT.split([each.shape[-1] for each in vectors], -1)
    return top - relations.amax(-1, keepdim=True).log(), (queries.mT @ relations).mT, *means


class _TokenLosses(torch.autograd.Function):
    """Weighted sum, cross-entropy and forward KL per token, and the gradient of the sum along with them."""

    @staticmethod
    def forward(ctx, hidden, labels, project, teacher, project_teacher, weights, temperature, chunk_tokens, mix,
                label_smoothing, with_grad):  # fmt: skip
        with_grad = with_grad and hidden.requires_grad
        num_tokens, (ce_weight, kl_weight) = max(len(hidden), 1), weights
        ce = kl = torch.zeros((), device=hidden.device)
        gradient = torch.zeros_like(hidden) if with_grad else None
        with_grad = with_grad and bool(ce_weight or (teacher is not None and kl_weight))
        for start in range(0, len(hidden), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            with torch.set_grad_enabled(with_grad):
                own = hidden[chunk].detach().requires_grad_(with_grad)
                logits = project(own)  # (chunk, vocab)
            theirs = None if teacher is None else project_teacher(teacher[chunk])
            d_logits = torch.empty_like(logits) if with_grad else None
            num_rows = len(logits) if logits.is_cuda else max(1, CPU_ELEMENTS // logits.shape[-1])
            for row in range(0, len(logits), num_rows):
                rows = slice(row, row + num_rows)
                given = logits.detach()[rows].float(), labels[chunk][rows], None if theirs is None else theirs[rows]
                *sums, d_rows = _losses_of_rows(*given, weights, temperature, mix, label_smoothing, with_grad)
                ce, kl = ce + sums[0], kl + sums[1]
                if with_grad:
                    d_logits[rows] = d_rows.div_(num_tokens)
            if with_grad:
                logits.backward(d_logits)
                gradient[chunk] = own.grad
        ce, kl = ce / num_tokens, kl / num_tokens
        loss = ce_weight * ce + kl_weight * kl
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(ce, kl)
        return loss, ce, kl

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss, *_):
        return (ctx.saved_tensors[0] * d_loss, *[None] * 10)


def _losses_of_rows(z, labels, u, weights, temperature, mix, label_smoothing, with_grad) -> tuple:
    """Return the sums of cross-entropy and forward KL over tokens, and by z the gradient of their weighted sum.

    Logits (tokens, vocab): z the student's in float32, u the teacher's or None.
    """
    (ce_weight, kl_weight), ce, kl, d_logits = weights, 0.0, 0.0, None
    if ce_weight:
        q, target = z.softmax(-1), labels[:, None]
        log_sum, at_target = _log_sum(z, q), z.gather(-1, target).squeeze(-1)
        ce = (log_sum - (1 - label_smoothing) * at_target - label_smoothing * z.mean(-1)).sum()
        if with_grad:
            q.sub_(label_smoothing / z.shape[-1])
            q.scatter_add_(-1, target, torch.full_like(q[:, :1], label_smoothing - 1))
            d_logits = q.mul_(ce_weight)
    if u is not None:
        _check_vocabularies(z, u)
        u = torch.lerp(z, u.float(), mix) if mix != 1 else u.float()
        z, u = z / temperature, u / temperature
        q, p = z.softmax(-1), u.softmax(-1)
        log_sums = _log_sum(z, q) - _log_sum(u, p)
        with torch.autocast(z.device.type, enabled=False):  # in bf16 what the two differ by would be rounded
            kl = (torch.linalg.vecdot(p, u.sub_(z)) + log_sums).sum() * temperature**2
        if with_grad and kl_weight:
            q.sub_(p).mul_(kl_weight * temperature)
            d_logits = q if d_logits is None else d_logits.add_(q)
    return ce, kl, d_logits


def _log_sum(scores: Tensor, softmax: Tensor) -> Tensor:
    """Return log(sum(exp(scores))) over the last dimension, from their softmax: what it was divided by."""
    return scores.amax(-1) - softmax.amax(-1).log()


def check_divergence(divergence: str, jsd_beta: float = 0.5) -> None:
    """Raise InputError for an unknown divergence or a mixture weight outside of (0, 1)."""
    if divergence not in DIVERGENCES:
        raise InputError(f"divergence {divergence!r} is unknown: use {', '.join(DIVERGENCES)}")
    if not 0 < jsd_beta < 1:
        raise InputError(f"jsd_beta {jsd_beta} is not between 0 and 1: use 0.5, or forward_kl, reverse_kl for the ends")


def _mean_over_chunks(
    chunk_sums: Callable[..., dict[str, Tensor]], inputs: tuple[Tensor | None, ...], chunk_tokens: int
) -> dict[str, Tensor]:
    """Return the mean per token of what `chunk_sums` adds up for some tokens, recomputed in the backward pass."""
    num_tokens = len(inputs[0])
    chunks = []
    for start in range(0, max(num_tokens, 1), chunk_tokens):  # no valid token: one empty chunk, 0 with a gradient
        part = [None if values is None else values[start : start + chunk_tokens] for values in inputs]
        if num_tokens <= chunk_tokens:  # a single chunk is within the bound already, recomputing only costs time
            chunks.append(chunk_sums(*part))
        else:
            chunks.append(checkpoint(chunk_sums, *part, use_reentrant=False, preserve_rng_state=False))
    return {name: torch.stack([sums[name] for sums in chunks]).sum() / max(num_tokens, 1) for name in chunks[0]}


def _valid_tokens(labels: Tensor, values: Tensor) -> Tensor:
    if values.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels {tuple(labels.shape)} do not fit values {tuple(values.shape)}; give one label per position"
        )
    return labels != IGNORED


def _ce_sum(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    return F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=label_smoothing)


def _divergence_sum(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, divergence: str, jsd_beta: float, mix: float
) -> Tensor:
    _check_vocabularies(student_logits, teacher_logits)
    if mix != 1:
        teacher_logits = torch.lerp(student_logits.detach().float(), teacher_logits.float(), mix)
    log_q = F.log_softmax(student_logits.float() / temperature, dim=-1)
    log_p = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    if divergence == "forward_kl":
        return _kl_sum(log_p, log_q) * temperature**2
    if divergence == "reverse_kl":
        return _kl_sum(log_q, log_p) * temperature**2
    if divergence == "jsd":
        log_m = torch.logaddexp(log_p + math.log(jsd_beta), log_q + math.log(1 - jsd_beta))
        return (jsd_beta * _kl_sum(log_p, log_m) + (1 - jsd_beta) * _kl_sum(log_q, log_m)) * temperature**2
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum() * temperature


def _check_vocabularies(student_logits: Tensor, teacher_logits: Tensor) -> None:
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student has {student_logits.shape[-1]} vocabulary entries and teacher {teacher_logits.shape[-1]}; "
            "logits are only comparable over one vocabulary, so start the student from this teacher"
        )


def _kl_sum(log_a: Tensor, log_b: Tensor) -> Tensor:
    # Argument order trap: F.kl_div(input, target) is KL(target || input).
    return F.kl_div(log_b, log_a, log_target=True, reduction="sum")


def _cached_kl_sum(logits: Tensor, ids: Tensor, probs: Tensor, temperature: float) -> Tensor:
    log_q = F.log_softmax(logits.float() / temperature, dim=-1)  # (tokens, vocab)
    total = (torch.xlogy(probs, probs) - probs * log_q.gather(-1, ids)).sum()
    if ids.shape[-1] < logits.shape[-1]:
        rest = (1 - probs.sum(-1)).clamp(min=0)  # float16 probabilities may add up to a little more than 1
        # From the ids left over, not as 1 - sum: a sure student would leave nothing but rounding errors.
        log_rest = log_q.scatter(-1, ids, -math.inf).logsumexp(-1)
        total = total + (torch.xlogy(rest, rest) - rest * log_rest).sum()
    return total * temperature**2
