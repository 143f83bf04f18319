"""Training objectives: each takes student, teacher and one batch, and returns `loss` and its terms.

Out of scope: the mathematics of the terms (losses.py) and the training loop, which alone sets the student's dropout.
Pseudo-labels (PL) need no objective of their own: they are `sft` on summaries that the teacher wrote.

A batch holds input_ids and attention_mask (batch, source) and labels (batch, target) with -100 for padding. Decoder
inputs come from the labels by the model's own shift. `shared_encoder` says that the student's encoder is the teacher's,
frozen (`has_teacher_encoder`): it then runs once and serves both. A term of weight 0 is neither computed nor
returned. `kl_loss` is the divergence in use, forward KL unless `divergence` names another of losses.DIVERGENCES.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from distill_utils.artifacts import InputError
from distill_utils.device import eval_mode
from distill_utils.distillation.losses import (
    IGNORED,
    check_divergence,
    chunked_cached_losses,
    chunked_token_losses,
    hidden_loss,
    relation_loss,
)
from distill_utils.models.hooks import capture
from distill_utils.models.students import decoder_layers, encoder_layers, project

MATCHES = ("outputs", "inputs")
# Terms of `miniend`: the site, and whether its queries, keys and values are of source or of target tokens.
RELATION_TERMS = {
    "encoder_self_loss": ("encoder_self", "sss"),
    "decoder_self_loss": ("decoder_self", "ttt"),
    "cross_loss": ("decoder_cross", "tss"),
}


def sft(
    student: PreTrainedModel, teacher: PreTrainedModel | None, batch: dict[str, Tensor], *, label_smoothing: float = 0.0
) -> dict[str, Tensor]:
    """Shrink and fine-tune: cross-entropy on the labels, the teacher unused (Shleifer & Rush 2020)."""
    decoded, _ = decode(student, batch, encode(student, batch)[0])
    options = {"weights": (1.0, 0.0), "label_smoothing": label_smoothing}
    return chunked_token_losses(decoded, partial(project, student), batch["labels"], **options)


def kd(
    student: PreTrainedModel, teacher: PreTrainedModel, batch: dict[str, Tensor], *,
    encoder_layer_ids: Sequence[int],
    decoder_layer_ids: Sequence[int],
    ce_weight: float = 0.2,
    kl_weight: float = 0.8,
    hidden_weight: float = 3.0,
    temperature: float = 2.0,
    shared_encoder: bool = False,
    divergence: str = "forward_kl",
    jsd_beta: float = 0.5,
    match: str = "outputs",
    normalize_hidden: bool = True,
    teacher_dropout: bool = False,
    label_smoothing: float = 0.0,
) -> dict[str, Tensor]:  # fmt: skip
    """Knowledge distillation: labels, the teacher's distribution and its hidden states (Shleifer & Rush 2020).

    The output of student layer i imitates that of teacher layer ids[i]; with `match="inputs"`, as published, it is the
    input of both, which leaves the student's last layer to the distribution. `hidden_loss` is the mean over the
    encoder's matched layers plus the mean over the decoder's, whatever the depth (published: the sum). Empty lists of
    ids leave the hidden states out. `teacher_dropout` leaves the teacher's dropout on, as the released code does by
    accident; a shared encoder never has any. A batch with decoder_states (teacher_cache.py), and encoder_layers_states
    where they are compared, spares the teacher's pass.
    """
    check_options(divergence=divergence, jsd_beta=jsd_beta, match=match)
    labels = batch["labels"]
    decoder_layer_ids = decoder_layer_ids if hidden_weight else ()
    # One encoder has nothing to match with itself.
    encoder_layer_ids = encoder_layer_ids if hidden_weight and not shared_encoder else ()
    encoded, encoder_hidden = encode(student, batch, range(len(encoder_layer_ids)), match)
    decoded, decoder_hidden = decode(student, batch, encoded, range(len(decoder_layer_ids)), match)
    teacher_decoded = None
    if "decoder_states" in batch:  # (batch, target, 1 + layers, dim)
        teacher_decoded, *teacher_decoder_hidden = batch["decoder_states"].unbind(2)
        teacher_encoder_hidden = batch["encoder_layers_states"].unbind(2) if encoder_layer_ids else []
    elif kl_weight or hidden_weight:
        with teacher_mode(teacher, teacher_dropout):
            teacher_encoded, teacher_encoder_hidden = (
                (encoded, []) if shared_encoder else encode(teacher, batch, encoder_layer_ids, match)
            )
            teacher_decoded, teacher_decoder_hidden = decode(teacher, batch, teacher_encoded, decoder_layer_ids, match)
    losses = {}
    if ce_weight or kl_weight:
        losses = chunked_token_losses(
            decoded, partial(project, student), labels, teacher_decoded if kl_weight else None,
            partial(project, teacher), temperature, divergence=divergence, jsd_beta=jsd_beta,
            weights=(ce_weight, kl_weight), label_smoothing=label_smoothing,
        )  # fmt: skip
    if hidden_weight:
        mask, target_mask = batch["attention_mask"], labels != IGNORED
        losses["hidden_loss"] = match_layers(encoder_hidden, teacher_encoder_hidden, mask, normalize_hidden)
        losses["hidden_loss"] += match_layers(decoder_hidden, teacher_decoder_hidden, target_mask, normalize_hidden)
    return weighted_loss(losses, loss=1.0, hidden_loss=hidden_weight)


def pl_kl(
    student: PreTrainedModel, teacher: PreTrainedModel, batch: dict[str, Tensor], *,
    ce_weight: float = 0.8, kl_weight: float = 1.0, **options,
) -> dict[str, Tensor]:  # fmt: skip
    """Pseudo-labels with KL: the teacher's summaries and its distribution over them (Gandhi et al. 2023).

    It is `kd` without hidden states, in other proportions; `options` are those of `kd`.
    """
    layers = {"encoder_layer_ids": (), "decoder_layer_ids": (), "hidden_weight": 0.0}
    return kd(student, teacher, batch, ce_weight=ce_weight, kl_weight=kl_weight, **layers, **options)


def on_policy(
    student: PreTrainedModel, teacher: PreTrainedModel, batch: dict[str, Tensor], *,
    max_new_tokens: int, share: float = 0.5,
    ce_weight: float = 0.8, kl_weight: float = 1.0, **options,
) -> dict[str, Tensor]:  # fmt: skip
    """On-policy distillation: on a share of the rows the student learns on its own samples (Agarwal et al. 2024).

    These rows' labels are replaced by summaries drawn from the student's own distribution, and only the divergence
    counts there, as `own_kl_loss`; the others are `pl_kl`, which gets the `options`. Each kind counts by its share of
    rows, so that long samples do not outweigh labels. Sampling has no gradient.
    """
    check_options(share=share)
    rows = len(batch["labels"])
    num_own = max(1, round(share * rows))
    own = torch.arange(num_own) * rows // num_own  # evenly over the batch, whose rows are sorted by length
    given = torch.ones(rows, dtype=torch.bool).index_fill(0, own, False).nonzero().flatten()
    imitate = partial(pl_kl, student, teacher, **options)

    sources = {name: batch[name][own] for name in ("input_ids", "attention_mask")}
    samples = draw_samples(student, sources, max_new_tokens)
    losses = {"own_kl_loss": imitate(samples, ce_weight=0.0)["kl_loss"]}
    if len(given):
        labelled = {name: batch[name][given] for name in ("input_ids", "attention_mask", "labels")}
        losses |= imitate(labelled, ce_weight=ce_weight, kl_weight=kl_weight)
    return weighted_loss(losses, loss=len(given) / rows, own_kl_loss=kl_weight * num_own / rows)


def kd_cached(
    student: PreTrainedModel, teacher: PreTrainedModel | None, batch: dict[str, Tensor], *,
    ce_weight: float = 0.2, kl_weight: float = 0.8,
) -> dict[str, Tensor]:  # fmt: skip
    """Knowledge distillation from cached targets: `kd` without hidden states, the teacher unused.

    The batch comes from `teacher_cache.with_targets`, with target_ids and target_probs (batch, target, k), and the
    target_temperature they were made with. `kl_loss` is a lower bound of the forward KL, or an unbiased estimate of its
    gradient (`losses.chunked_cached_losses`).
    """
    decoded, _ = decode(student, batch, encode(student, batch)[0])
    losses = chunked_cached_losses(
        decoded, partial(project, student), batch["labels"], batch["target_ids"], batch["target_probs"],
        batch["target_temperature"], with_ce=ce_weight != 0,
    )  # fmt: skip
    return weighted_loss(losses, ce_loss=ce_weight, kl_loss=kl_weight)


def miniend(
    student: PreTrainedModel, teacher: PreTrainedModel | None, batch: dict[str, Tensor], *,
    encoder_self_weight: float = 1.0,
    decoder_self_weight: float = 1.0,
    cross_weight: float = 1.0,
    ce_weight: float = 0.0,
    kl_weight: float = 0.0,
    hidden_weight: float = 0.0,
    num_relation_heads: int = 32,
    temperature: float = 1.0,
    mix: float = 1.0,
) -> dict[str, Tensor]:  # fmt: skip
    """Relation distillation of self- and cross-attention, as we read the abstract of MiniEnD (Zhang et al. 2023).

    The student's last layers imitate the teacher's last layers. `loss` is the weighted *mean* of the relation terms
    plus the weighted others. `hidden_loss` is that of the encoder's last state plus that of the decoder's. `mix` is the
    teacher's share in the logits that `kl_loss` aims at, the rest is the student's own (`grow_mix`).

    Both models run only as far as the terms need. BERT-like and GPT-like ones have but the self-attention of their one
    stack, so the other sites need weight 0; the labels of the latter are the input ids and are shifted here.
    """
    weights = {
        "encoder_self_loss": encoder_self_weight, "decoder_self_loss": decoder_self_weight, "cross_loss": cross_weight,
    }  # fmt: skip
    weights = {name: weight / sum(weights.values()) for name, weight in weights.items() if weight}
    sites = [RELATION_TERMS[name][0] for name in weights]
    with_teacher_states = bool(kl_weight or hidden_weight)
    ours, states = forward_with_attention(student, batch, sites, with_teacher_states or bool(ce_weight))
    theirs, teacher_states = {}, [None]
    if sites or with_teacher_states:
        with teacher_mode(teacher):
            theirs, teacher_states = forward_with_attention(teacher, batch, sites, with_teacher_states)

    labels, masks = batch["labels"], {"s": batch["attention_mask"].bool()}
    masks["t"] = labels != IGNORED if student.config.is_encoder_decoder else masks["s"]
    losses = {}
    for name in weights:
        site, sides = RELATION_TERMS[name]
        losses[name] = match_relations(ours[site], theirs[site], sides, masks, num_relation_heads)
    if ce_weight or kl_weight:
        if student.config.model_type == "opt":
            labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        losses |= chunked_token_losses(
            states[-1], head(student), labels, teacher_states[-1] if kl_weight else None, head(teacher), temperature,
            weights=(ce_weight, kl_weight), mix=mix,
        )  # fmt: skip
    if hidden_weight:
        losses["hidden_loss"] = sum(map(hidden_loss, states, teacher_states, masks.values()))
    return weighted_loss(losses, loss=1.0, **weights, hidden_loss=hidden_weight)


# ------------------------------------------------------------------------------------------------------ their parts


def check_options(
    divergence: str = "forward_kl", jsd_beta: float = 0.5, match: str = "outputs", share: float = 1.0
) -> None:
    """Reject an unknown name or an impossible number among an objective's options, before anything is computed."""
    check_divergence(divergence, jsd_beta)
    if match not in MATCHES:
        raise InputError(f"match {match!r} is unknown: use {', '.join(MATCHES)}")
    if not 0 < share <= 1:
        raise InputError(f"share {share} of own samples is not above 0 and at most 1: use for example 0.5")


def weighted_loss(losses: dict[str, Tensor], **weights: float) -> dict[str, Tensor]:
    """Return the terms with their weighted sum as `loss` before them."""
    terms = [weight * losses[name] for name, weight in weights.items() if name in losses]
    if not terms:
        raise InputError("every weight of the objective is 0: make one of them positive")
    return {"loss": sum(terms)} | losses | {"loss": sum(terms)}  # of those given, one may be called loss itself


def encode(
    model: PreTrainedModel, batch: dict[str, Tensor], layer_ids: Sequence[int] = (), match: str = "outputs"
) -> tuple[Tensor, list[Tensor]]:
    """Return the encoder's last hidden state (batch, source, dim) and the outputs (or inputs) of the given layers.

    Dropout is as the model's modes say: those of `training.loop.train_mode` for a student, `teacher_mode`'s else.
    A batch with encoder_states (teacher_cache.py) has the former already.
    """
    if "encoder_states" in batch and not layer_ids:
        return batch["encoder_states"], []
    with layer_outputs(encoder_layers(model), layer_ids, match) as states:
        encoded = model.get_encoder()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return encoded.last_hidden_state, [states[i] for i in layer_ids]


def decode(
    model: PreTrainedModel, batch: dict[str, Tensor], encoded: Tensor, layer_ids: Sequence[int] = (),
    match: str = "outputs",
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Return the decoder's last hidden state (batch, target, dim) and the outputs (or inputs) of the given layers."""
    inputs, labels = batch.get("decoder_input_ids"), batch["labels"]  # only samples have inputs of their own
    if inputs is None:
        if model.config.model_type == "mbart":  # its shift looks for the last token of a row, which may have none
            labels = labels.where((labels != IGNORED).any(1, keepdim=True), model.config.eos_token_id)
        inputs = model.prepare_decoder_input_ids_from_labels(labels)
    source = {"encoder_hidden_states": encoded.to(model.dtype), "encoder_attention_mask": batch["attention_mask"]}
    with layer_outputs(decoder_layers(model), layer_ids, match) as states:
        decoded = model.get_decoder()(input_ids=inputs, **source, use_cache=False)
    return decoded.last_hidden_state, [states[i] for i in layer_ids]


def forward_with_attention(
    model: PreTrainedModel, batch: dict[str, Tensor], sites: Sequence[str], to_the_end: bool
) -> tuple[dict[str, dict[str, Tensor]], list[Tensor]]:
    """Return queries, keys and values of each site's last layer, {site: {"q", "k", "v"}}, and each stack's last state.

    Unless `to_the_end`, the pass stops once the former are there, and the states are those known by then.
    """
    states = []
    with capture(model, [(site, -1) for site in sites], stop=not to_the_end) as captured:
        if model.config.is_encoder_decoder:
            states.append(encode(model, batch)[0])
            states.append(decode(model, batch, states[0])[0])
        else:
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            states.append(model.base_model(**inputs).last_hidden_state)
    return {site: captured[site, -1] for site in sites}, states


def match_relations(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], sides: str, masks: dict[str, Tensor], num_relation_heads: int
) -> Tensor:
    """Return the mean `relation_loss` of queries, keys and values; `sides` names the mask of each (RELATION_TERMS)."""
    losses = [  # relations among target tokens are causal
        relation_loss(ours[name], theirs[name], masks[side], num_relation_heads, causal=side == "t")
        for name, side in zip("qkv", sides, strict=True)
    ]
    return torch.stack(losses).mean()


def grow_mix(
    mixing: dict[str, float], done: int, losses: dict[str, float], *, start: float, rate: float, max_steps: int
) -> None:
    """Move `mixing["mix"]`, the teacher's share in the target, towards 1 after `done` updates.

    As in TAID (Shing et al. 2025), it grows faster while `kl_loss` falls: by `rate` times the sigmoid of the loss's
    relative fall, averaged with momentum 0.99, times what is missing to 1. It never lies below the straight line from
    `start` to 1 at the last update. The dictionary holds all that the next update needs.
    """
    before, now = mixing.get("kl_loss", losses["kl_loss"]), losses["kl_loss"]
    momentum = 0.99 * mixing.get("momentum", 0.0) + 0.01 * (before - now) / max(before, 1e-15)
    faster = mixing["mix"] + rate * (0.5 + 0.5 * math.tanh(momentum / 2)) * (1 - mixing["mix"])  # sigmoid, no overflow
    line = start + (1 - start) * done / max(max_steps - 1, 1)
    mixing |= {"mix": min(1.0, max(faster, line)), "momentum": momentum, "kl_loss": now}


def head(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """Return the map of last states (..., dim) to logits (..., vocab); BERT's has layers of its own."""
    return getattr(model, "cls", None) or partial(project, model)


@torch.no_grad()
def draw_samples(student: PreTrainedModel, batch: dict[str, Tensor], max_new_tokens: int) -> dict[str, Tensor]:
    """Return the batch with labels (batch, length) drawn from the student's own distribution, -100 after the end token.

    Nothing bends the distribution: no beams, no truncation, none of the decoding settings the student carries. Dropout
    is off; the random state is the caller's. decoder_input_ids are those drawn from, because mBART's shift takes the
    start token from the end of the labels, where a sample cut by its length has none.
    """
    own, special = student.generation_config, {}
    for name in ("decoder_start_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(own, name)
        special[name] = getattr(student.config, name, None) if value is None else value
    # Settings left out would be filled up from those the student carries, so these are replaced as a whole.
    student.generation_config = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=max_new_tokens, bad_words_ids=own.bad_words_ids,  # Marian's padding
        **special,
    )  # fmt: skip
    try:
        with eval_mode(student):
            drawn = student.generate(**batch)  # (batch, 1 + length), the start token first
    finally:
        student.generation_config = own
    labels = drawn[:, 1:]
    is_end = torch.isin(labels, torch.tensor(special["eos_token_id"], device=labels.device))
    labels = labels.masked_fill(is_end.cumsum(1) > is_end.long(), IGNORED)
    return batch | {"decoder_input_ids": drawn[:, :-1], "labels": labels}


def match_layers(
    student_hidden: list[Tensor], teacher_hidden: list[Tensor], mask: Tensor, normalize: bool = True
) -> Tensor:
    """Return the mean `hidden_loss` over pairs of layer states, or 0 without any."""
    pairs = zip(student_hidden, teacher_hidden, strict=True)
    losses = [hidden_loss(ours, theirs, mask, normalize) for ours, theirs in pairs]
    return torch.stack(losses).mean() if losses else torch.zeros((), device=mask.device)


@contextmanager
def teacher_mode(teacher: PreTrainedModel, dropout: bool = False) -> Iterator[None]:
    """Hold the teacher without gradients in eval mode, or with dropout and in eval mode again afterwards."""
    teacher.train(dropout)
    try:
        with torch.no_grad():
            yield
    finally:
        teacher.eval()


@contextmanager
def layer_outputs(
    layers: nn.ModuleList, layer_ids: Sequence[int], match: str = "outputs"
) -> Iterator[dict[int, Tensor]]:
    """Collect {layer id: output, or input, (batch, length, dim)} of every forward pass inside the block.

    Unlike `output_hidden_states`, whose last entry is after the final norm in Pegasus, mBART and T5, these are all what
    the layers return, so that a student's last layer can be compared with a teacher's middle one.
    """
    states: dict[int, Tensor] = {}

    def keep(layer_id: int, module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
        state = inputs if match == "inputs" else output
        states[layer_id] = state[0] if isinstance(state, tuple) else state

    with ExitStack() as hooks:
        for i in layer_ids:
            hooks.enter_context(layers[i].register_forward_hook(partial(keep, i)))
        yield states
