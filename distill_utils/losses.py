"""Distillation losses as pure functions of tensors, in float32, averaged over valid tokens only.

Not here: models, batches and weights between terms; those are in objectives.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED = -100  # label of padding; the start token of T5 and Pegasus *is* padding, so only labels tell what is valid


def ce_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy per target token in nats.

    Shapes: logits (batch, target, vocab), labels (batch, target) with -100 for padding. Without any valid token the
    result is 0 and still has a gradient path. Raises ValueError when the shapes do not fit.
    """
    valid = _valid_tokens(labels, logits)
    return _ce_sum(logits[valid], labels[valid]) / valid.sum().clamp(min=1)


def kl_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the forward KL, KL(teacher || student), per target token in nats, times temperature squared.

    Shapes: logits (batch, target, vocab), labels (batch, target) with -100 for padding. The factor keeps the size
    of the gradient when the temperature changes (Hinton et al. 2015, section 2). Without any valid token the result is
    0 and still has a gradient path. Raises ValueError when the shapes do not fit.
    """
    valid = _valid_tokens(labels, student_logits)
    _valid_tokens(labels, teacher_logits)
    return _kl_sum(student_logits[valid], teacher_logits[valid], temperature) / valid.sum().clamp(min=1)


def hidden_loss(student_hidden: Tensor, teacher_hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the mean squared error between two layer outputs, each token normalised by itself first.

    Shapes: hidden (batch, length, dim), mask (batch, length), true or 1 where a token counts. Every token's vector is
    brought to mean 0 and variance 1 over dim, so the loss lies between 0 and 4, no layer with large states outweighs
    the rest, and padding changes nothing (Shleifer & Rush normalise over the whole padded tensor, which it would).
    Raises ValueError when the shapes do not fit.
    """
    if student_hidden.shape != teacher_hidden.shape or student_hidden.shape[:-1] != mask.shape:
        raise ValueError(
            f"hidden states {tuple(student_hidden.shape)} and {tuple(teacher_hidden.shape)} with mask "
            f"{tuple(mask.shape)} do not fit; teacher and student need the same width and the same tokens"
        )
    valid = mask.bool()
    width = student_hidden.shape[-1:]
    student_hidden = F.layer_norm(student_hidden[valid].float(), width, eps=1e-6)  # (tokens, dim)
    teacher_hidden = F.layer_norm(teacher_hidden[valid].float(), width, eps=1e-6)
    return F.mse_loss(student_hidden, teacher_hidden, reduction="sum") / (valid.sum().clamp(min=1) * width[0])


def chunked_token_losses(
    student_hidden: Tensor,
    student_project: Callable[[Tensor], Tensor],
    labels: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_project: Callable[[Tensor], Tensor] | None = None,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> dict[str, Tensor]:
    """Return `ce_loss`, and `kl_loss` when a teacher is given, without ever holding all logits.

    Same values and gradients as the dense functions on the projected states. Padding is dropped before the projection
    to the vocabulary; then `chunk_tokens` tokens at a time are projected, and projected again in the backward pass, so
    the peak is (chunk_tokens, vocab) instead of (batch, target, vocab). The teacher is projected without gradients.

    Shapes: hidden (batch, target, dim), labels (batch, target); the projections map (tokens, dim) to (tokens, vocab).
    """
    valid = _valid_tokens(labels, student_hidden)
    student_hidden, labels = student_hidden[valid], labels[valid]  # (tokens, dim), (tokens,)
    if teacher_hidden is not None:
        teacher_hidden = teacher_hidden[valid]

    def chunk_sums(student_hidden: Tensor, labels: Tensor, teacher_hidden: Tensor | None) -> tuple[Tensor, ...]:
        student_logits = student_project(student_hidden)  # (chunk, vocab)
        if teacher_hidden is None:
            return (_ce_sum(student_logits, labels),)
        with torch.no_grad():
            teacher_logits = teacher_project(teacher_hidden)
        return _ce_sum(student_logits, labels), _kl_sum(student_logits, teacher_logits, temperature)

    num_tokens = len(labels)
    chunks = []
    for start in range(0, max(num_tokens, 1), chunk_tokens):  # no valid token: one empty chunk, 0 with a gradient
        part = slice(start, start + chunk_tokens)
        inputs = (student_hidden[part], labels[part], None if teacher_hidden is None else teacher_hidden[part])
        if num_tokens <= chunk_tokens:  # a single chunk is within the bound already, recomputing only costs time
            chunks.append(chunk_sums(*inputs))
        else:
            chunks.append(checkpoint(chunk_sums, *inputs, use_reentrant=False, preserve_rng_state=False))
    sums = [torch.stack(terms).sum() / max(num_tokens, 1) for terms in zip(*chunks, strict=True)]
    return dict(zip(("ce_loss", "kl_loss"), sums, strict=False))


def _valid_tokens(labels: Tensor, values: Tensor) -> Tensor:
    if values.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels {tuple(labels.shape)} do not fit values {tuple(values.shape)}; give one label a position"
        )
    return labels != IGNORED


def _ce_sum(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def _kl_sum(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student has {student_logits.shape[-1]} vocabulary entries and teacher {teacher_logits.shape[-1]}; "
            "logits are only comparable over one vocabulary, so start the student from this teacher"
        )
    log_q = F.log_softmax(student_logits.float() / temperature, dim=-1)
    log_p = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    # Argument order trap: F.kl_div(input, target) is KL(target || input). Input is the student, target the teacher.
    return F.kl_div(log_q, log_p, log_target=True, reduction="sum") * temperature**2
