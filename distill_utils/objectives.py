"""Training objectives: each takes student, teacher and one batch, and returns `loss` and its terms.

Not here: the mathematics of the terms (losses.py) and the loop around them (training.py). Pseudo-labels (PL) need no
objective of their own: they are `sft` on summaries that the teacher wrote.

A batch holds input_ids and attention_mask (batch, source) and labels (batch, target) with -100 for padding. Decoder
inputs come from the labels by the model's own shift. `shared_encoder` says that the student's encoder is the teacher's,
frozen (`students.has_teacher_encoder`): it then runs once and serves both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill_utils.losses import IGNORED, chunked_token_losses, hidden_loss
from distill_utils.students import decoder_layers, encoder_layers, project


def sft(student: PreTrainedModel, teacher: PreTrainedModel | None, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Shrink and fine-tune: cross-entropy on the labels, the teacher unused (Shleifer & Rush 2020)."""
    encoded, _ = encode(student, batch)
    decoded, _ = decode(student, batch, encoded)
    losses = chunked_token_losses(decoded, partial(project, student), batch["labels"])
    return {"loss": losses["ce_loss"], **losses}


def kd(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batch: dict[str, Tensor],
    *,
    encoder_layer_ids: Sequence[int],
    decoder_layer_ids: Sequence[int],
    ce_weight: float = 0.2,
    kl_weight: float = 0.8,
    hidden_weight: float = 3.0,
    temperature: float = 2.0,
    shared_encoder: bool = False,
) -> dict[str, Tensor]:
    """Knowledge distillation: labels, the teacher's distribution and its hidden states (Shleifer & Rush 2020).

    The output of student layer i imitates the output of teacher layer ids[i]. `hidden_loss` is the mean over the
    encoder's matched layers plus the mean over the decoder's, so its size does not depend on the depth. Empty lists
    of ids leave the hidden states out.
    """
    labels = batch["labels"]
    encoder_layer_ids = () if shared_encoder else encoder_layer_ids  # one encoder has nothing to match with itself
    encoded, encoder_hidden = encode(student, batch, range(len(encoder_layer_ids)))
    decoded, decoder_hidden = decode(student, batch, encoded, range(len(decoder_layer_ids)))
    with teacher_mode(teacher):
        teacher_encoded, teacher_encoder_hidden = (
            (encoded, []) if shared_encoder else encode(teacher, batch, encoder_layer_ids)
        )
        teacher_decoded, teacher_decoder_hidden = decode(teacher, batch, teacher_encoded, decoder_layer_ids)
    losses = chunked_token_losses(
        decoded, partial(project, student), labels, teacher_decoded, partial(project, teacher), temperature
    )
    encoder_loss = match_layers(encoder_hidden, teacher_encoder_hidden, batch["attention_mask"])
    losses["hidden_loss"] = encoder_loss + match_layers(decoder_hidden, teacher_decoder_hidden, labels != IGNORED)
    loss = ce_weight * losses["ce_loss"] + kl_weight * losses["kl_loss"] + hidden_weight * losses["hidden_loss"]
    return {"loss": loss, **losses}


def pl_kl(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batch: dict[str, Tensor],
    *,
    ce_weight: float = 0.8,
    kl_weight: float = 1.0,
    temperature: float = 2.0,
    shared_encoder: bool = False,
) -> dict[str, Tensor]:
    """Pseudo-labels with KL: the teacher's summaries and its distribution over them (Gandhi et al. 2023)."""
    encoded, _ = encode(student, batch)
    decoded, _ = decode(student, batch, encoded)
    with teacher_mode(teacher):
        teacher_encoded = encoded if shared_encoder else encode(teacher, batch)[0]
        teacher_decoded, _ = decode(teacher, batch, teacher_encoded)
    losses = chunked_token_losses(
        decoded, partial(project, student), batch["labels"], teacher_decoded, partial(project, teacher), temperature
    )
    return {"loss": ce_weight * losses["ce_loss"] + kl_weight * losses["kl_loss"], **losses}


# ------------------------------------------------------------------------------------------------------ their parts


def encode(
    model: PreTrainedModel, batch: dict[str, Tensor], layer_ids: Sequence[int] = ()
) -> tuple[Tensor, list[Tensor]]:
    """Return the encoder's last hidden state (batch, source, dim) and the outputs of the given layers.

    A frozen encoder runs without dropout: it is a fixed function, the same for teacher, student and every objective.
    """
    encoder = model.get_encoder()
    encoder.train(model.training and any(weight.requires_grad for weight in encoder.parameters()))
    with layer_outputs(encoder_layers(model), layer_ids) as outputs:
        encoded = encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return encoded.last_hidden_state, [outputs[i] for i in layer_ids]


def decode(
    model: PreTrainedModel, batch: dict[str, Tensor], encoded: Tensor, layer_ids: Sequence[int] = ()
) -> tuple[Tensor, list[Tensor]]:
    """Return the decoder's last hidden state (batch, target, dim) and the outputs of the given layers; no logits."""
    with layer_outputs(decoder_layers(model), layer_ids) as outputs:
        decoded = model.get_decoder()(
            input_ids=model.prepare_decoder_input_ids_from_labels(batch["labels"]),
            encoder_hidden_states=encoded.to(model.dtype),
            encoder_attention_mask=batch["attention_mask"],
            use_cache=False,
        )
    return decoded.last_hidden_state, [outputs[i] for i in layer_ids]


def match_layers(student_hidden: list[Tensor], teacher_hidden: list[Tensor], mask: Tensor) -> Tensor:
    """Return the mean `hidden_loss` over pairs of layer outputs, or 0 without any."""
    pairs = zip(student_hidden, teacher_hidden, strict=True)
    losses = [hidden_loss(ours, theirs, mask) for ours, theirs in pairs]
    return torch.stack(losses).mean() if losses else torch.zeros((), device=mask.device)


@contextmanager
def teacher_mode(teacher: PreTrainedModel) -> Iterator[None]:
    """Hold the teacher in eval mode without gradients, whatever a training loop did to it before."""
    teacher.eval()
    with torch.no_grad():
        yield


@contextmanager
def layer_outputs(layers: nn.ModuleList, layer_ids: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Collect {layer id: output (batch, length, dim)} of every forward pass inside the block.

    Unlike `output_hidden_states`, whose last entry is after the final norm in Pegasus, mBART and T5, these are all what
    the layers return, so that a student's last layer can be compared with a teacher's middle one.
    """
    outputs: dict[int, Tensor] = {}

    def keep(layer_id: int, module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
        outputs[layer_id] = output[0] if isinstance(output, tuple) else output

    hooks = [layers[i].register_forward_hook(partial(keep, i)) for i in layer_ids]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
