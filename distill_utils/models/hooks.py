"""Queries, keys and values of chosen attention layers, taken by hooks, so that fused attention stays on."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

from torch import Tensor, nn
from transformers import PreTrainedModel

from distill_utils.artifacts import InputError

# {config.model_type: {site: path of a layer's attention}}; only the sites named exist in that architecture.
_BART = {
    "encoder_self": "model.encoder.layers.{}.self_attn",
    "decoder_self": "model.decoder.layers.{}.self_attn",
    "decoder_cross": "model.decoder.layers.{}.encoder_attn",
}
_T5 = {
    "encoder_self": "encoder.block.{}.layer.0.SelfAttention",
    "decoder_self": "decoder.block.{}.layer.0.SelfAttention",
    "decoder_cross": "decoder.block.{}.layer.1.EncDecAttention",
}
ATTENTIONS = {
    **dict.fromkeys(("bart", "mbart", "pegasus", "marian"), _BART),
    "t5": _T5,
    "bert": {"encoder_self": "bert.encoder.layer.{}.attention.self"},
    "opt": {"decoder_self": _BART["decoder_self"]},
}
PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("q", "k", "v"), ("query", "key", "value"))


class _Seen(Exception):
    """Leaves the forward pass once all that was wanted is there."""


@contextmanager
def capture(
    model: PreTrainedModel, sites: Sequence[tuple[str, int]], stop: bool = False
) -> Iterator[dict[tuple[str, int], dict[str, Tensor]]]:
    """Collect {(site, layer id): {"q", "k", "v": (batch, length, inner)}} of the forward pass inside the block.

    These are the outputs of the projections, before heads are split, scaled or biased; inner is the number of heads
    times their width, which in T5 need not be the model's width. Negative layer ids count from the end. With `stop` the
    forward pass is left, and with it the rest of the block, as soon as all is there: nothing after it is computed.

    Raises InputError for an architecture, site or layer that does not exist, and for a site that the block never ran.
    """
    captured = {site: {} for site in sites}

    def keep(site: tuple[str, int], name: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        captured[site][name] = output
        if stop and all(len(vectors) == 3 for vectors in captured.values()):
            raise _Seen

    with suppress(_Seen), ExitStack() as hooks:
        for site in captured:
            for name, projection in zip("qkv", projections(model, *site), strict=True):
                hooks.enter_context(projection.register_forward_hook(partial(keep, site, name)))
        yield captured
    for (site, layer_id), vectors in captured.items():
        if len(vectors) < 3 or not all(vector.numel() for vector in vectors.values()):
            raise InputError(f"layer {layer_id} of {site} was not run: run that stack, on some tokens, to capture it")


def projections(model: PreTrainedModel, site: str, layer_id: int) -> list[nn.Module]:
    """Return the modules that make queries, keys and values; InputError for what the model does not have."""
    family = model.config.model_type
    if family not in ATTENTIONS:
        raise InputError(f"attention of {family!r} models cannot be read: use one of {', '.join(ATTENTIONS)}")
    if site not in ATTENTIONS[family]:
        raise InputError(f"{family} models have no {site!r}: use {' or '.join(ATTENTIONS[family])}")
    stack, _, attention = ATTENTIONS[family][site].partition(".{}.")
    layers = model.get_submodule(stack)
    if not -len(layers) <= layer_id < len(layers):
        raise InputError(f"layer {layer_id} of {site} does not exist: give 0 to {len(layers) - 1}, or -1 for the last")
    attention = layers[layer_id].get_submodule(attention)
    return next([getattr(attention, name) for name in names] for names in PROJECTIONS if hasattr(attention, names[0]))
