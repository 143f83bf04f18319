"""Summaries in bulk with `generate`, and what both engines share: tokens, batches, decoding settings, text.

Out of scope: CTranslate2 (ctranslate.py), labels on disk (pseudo_labels.py), ROUGE (metrics.py).

A *score* is the mean natural log-probability of a summary's own tokens under the model that wrote it, the end token
included; tokens that the generation settings force (first language token, end at the length limit) do not count.
"""

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig
from transformers.modeling_outputs import BaseModelOutput

from distill_utils.artifacts import InputError
from distill_utils.device import amp_dtype, eval_mode, mixed_precision


def summarize(model, tokenizer, documents: Sequence[str], **options) -> list[str]:
    """Write one summary per document with `model.generate`; options are those of `summarize_with_scores`."""
    return summarize_with_scores(model, tokenizer, documents, with_scores=False, **options)[0]


@torch.inference_mode()
def summarize_with_scores(
    model, tokenizer, documents: Sequence[str], max_source_length: int, batch_size: int = 32, prefix: str = "",
    dtype: torch.dtype | None = None, progress: Callable[[int, int], None] | None = None, with_scores: bool = True,
    num_candidates: int = 1, seed: int | None = None, **generation_settings,
) -> tuple[list[str], list[float | None]]:  # fmt: skip
    """Return (summaries, scores) in the order of the documents; an empty document gives "" and None.

    Documents are cut to `max_source_length` tokens and batched by length, longest first, so that a batch too large
    for the memory fails at once. Settings not given are those the model carries. A document's candidates follow one
    another, best first: as beam search ranks them, samples by score.

    Args:
        dtype: bf16 or fp16 for autocast, float32 for none; None means what the device is good at on CUDA and
            float32 on the CPU, where results are then those of plain `generate`.
        progress: called with (documents done, documents in all) after each batch.
        seed: fixes what `do_sample` draws (with the same batches) and leaves the random state outside as it was.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    source_ids = tokenize_documents(tokenizer, documents, max_source_length, prefix, limit)
    settings = complete_settings(model.generation_config, generation_settings)
    device = model.device
    if dtype is None and device.type == "cuda":
        dtype = amp_dtype(device)
    # Always given: the model may carry others, and rows would then go to other documents.
    settings |= {"num_return_sequences": num_candidates, "return_dict_in_generate": False}
    summaries, scores = [""] * len(documents) * num_candidates, [None] * len(documents) * num_candidates
    own_state = torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=seed is not None)
    with eval_mode(model), own_state:
        if seed is not None:
            torch.manual_seed(seed)
        for chosen in batches_by_length([len(ids) for ids in source_ids], batch_size=batch_size, progress=progress):
            with mixed_precision(device, dtype):
                inputs = pad([source_ids[i] for i in chosen], tokenizer.pad_token_id, device)
                if with_scores:
                    sequences, batch_scores = _generate_with_scores(model, inputs, settings)
                else:
                    sequences = model.generate(**inputs, **settings)
                    batch_scores = [None] * len(sequences)
            sequences = sequences.tolist()
            for row, i in enumerate(chosen):
                rows = list(range(row * num_candidates, (row + 1) * num_candidates))
                if settings.get("do_sample") and with_scores:
                    rows.sort(key=lambda candidate: -batch_scores[candidate])
                for place, candidate in enumerate(rows, start=i * num_candidates):
                    summaries[place], scores[place] = to_text(tokenizer, sequences[candidate]), batch_scores[candidate]
    return summaries, scores


def _generate_with_scores(model, inputs: dict[str, Tensor], settings: dict) -> tuple[Tensor, list[float]]:
    """Return token ids (batch x candidates, length) and scores; the encoder runs once for both passes."""
    hidden = model.get_encoder()(**inputs).last_hidden_state  # (batch, source, dim)
    mask = inputs["attention_mask"]
    # generate() repeats the encoder output for each beam inside the object it gets, so it gets an own one; and the
    # source's ids, which some settings look at.
    own = BaseModelOutput(last_hidden_state=hidden)
    sequences = model.generate(**inputs, encoder_outputs=own, **settings)
    config = copy.deepcopy(model.generation_config)
    config.update(**settings)
    counted = _counted_tokens(sequences, config)  # (batch x candidates, length - 1)
    num_candidates, scores = len(sequences) // len(hidden), []
    for rows in torch.arange(len(sequences)).split(8):  # a few at a time: logits are (rows, length, vocabulary)
        sources = rows // num_candidates
        logits = model(
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden[sources]),
            attention_mask=mask[sources],
            decoder_input_ids=sequences[rows, :-1],
        ).logits.float()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), sequences[rows, 1:], reduction="none")
        means = (-losses * counted[rows]).sum(1) / counted[rows].sum(1).clamp(min=1)
        scores += [round(value, 6) for value in means.tolist()]
    return sequences, scores


def _counted_tokens(sequences: Tensor, config: GenerationConfig) -> Tensor:
    """Mark generated tokens up to the end token, without the forced ones; (batch, length - 1)."""
    tokens = sequences[:, 1:]
    is_end = torch.isin(tokens, torch.tensor(as_list(config.eos_token_id), device=tokens.device))
    counted = is_end.cumsum(1) - is_end.long() == 0
    if config.forced_bos_token_id is not None:
        counted[:, 0] = False
    limit = config.max_new_tokens + 1 if config.max_new_tokens else config.max_length or 21  # with the start token
    if config.forced_eos_token_id is not None and sequences.shape[1] == limit:
        counted[:, -1] = False
    return counted


# -------------------------------------------------------------------------------------------------- decoding settings


def complete_settings(config: GenerationConfig, settings: dict) -> dict:
    """Make settings that do not contradict those stored with the model, which `generate` would warn of."""
    settings = dict(settings)
    if settings.get("max_new_tokens") is not None and config.max_new_tokens is None:
        settings["max_length"] = settings.pop("max_new_tokens") + 1  # the decoder's start token counts as one
    if settings.get("num_beams") == 1:
        settings.setdefault("early_stopping", False)
        settings.setdefault("length_penalty", 1.0)
    return settings


def decoding_settings(config: GenerationConfig, **given: int | float | None) -> dict[str, int | float]:
    """Return the decoding settings in force: those given, else the model's own, else what `generate` falls back to."""
    fallback = {"num_beams": 1, "length_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0}
    fallback["max_new_tokens"] = (config.max_length or 21) - 1  # max_length counts the decoder's start token
    if unknown := given.keys() - fallback.keys():
        raise TypeError(f"{', '.join(unknown)} set nothing here: give some of {', '.join(fallback)}")
    ranked = {name: (given.get(name), getattr(config, name), value) for name, value in fallback.items()}
    return {name: next(value for value in values if value is not None) for name, values in ranked.items()}


# ---------------------------------------------------------------------------------------------------- tokens and text


def tokenize_documents(
    tokenizer, documents: Sequence[str], max_source_length: int, prefix: str = "", limit: int | None = None
) -> list[list[int]]:
    """Return token ids a document, [] for an empty one; `limit` is the number of the model's positions."""
    check_source_length(max_source_length, limit)
    full = [i for i, document in enumerate(documents) if document and document.strip()]
    source_ids: list[list[int]] = [[] for _ in documents]
    if full:
        encoded = tokenizer([prefix + documents[i] for i in full], truncation=True, max_length=max_source_length)
        for i, ids in zip(full, encoded["input_ids"], strict=True):
            source_ids[i] = ids
    return source_ids


def check_source_length(max_source_length: int, limit: int | None) -> None:
    """Raise InputError for a length without room for text or beyond the model's positions (T5 has no limit)."""
    if max_source_length < 2:
        raise InputError(f"max_source_length {max_source_length} leaves no room for text: give at least 2")
    if limit and max_source_length > limit:
        raise InputError(f"max_source_length {max_source_length} is beyond the model's {limit} positions: lower it")


def batches_by_length(
    lengths: list[int], *, batch_size: int = 0, batch_tokens: int = 0, progress: Callable | None = None
) -> Iterator[list[int]]:
    """Yield positions, longest first, of at most `batch_size` rows or `batch_tokens` padded tokens; skip length 0."""
    order = sorted((i for i, length in enumerate(lengths) if length), key=lambda i: (-lengths[i], i))
    done = len(lengths) - len(order)
    while order:
        size = batch_size or max(1, batch_tokens // lengths[order[0]])
        chosen, order = order[:size], order[size:]
        yield chosen
        done += len(chosen)
        if progress:
            progress(done, len(lengths))


def pad(rows: list[list[int]], pad_token_id: int, device) -> dict[str, Tensor]:
    """Return input_ids and attention_mask (batch, source) of token ids, padded on the right."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad_token_id)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def to_text(tokenizer, token_ids: list[int]) -> str:
    """Decode a summary; Pegasus writes new lines as a token of its own."""
    text = tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if "<n>" in text and tokenizer.convert_tokens_to_ids("<n>") not in (None, tokenizer.unk_token_id):
        text = re.sub(r"\s*<n>\s*", "\n", text)
    return text.strip()


def as_list(value: int | Sequence[int] | None) -> list[int]:
    """Return the ids of a setting that may be none, one or several."""
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def words(text: str) -> list[str]:
    """Split text into lower-case words: runs of letters, digits and underscores."""
    return re.findall(r"\w+", text.lower())


def is_empty(text: str) -> bool:
    """Tell whether a text holds no word."""
    return not words(text)


def is_repeating(text: str) -> bool:
    """Tell whether any word 3-gram occurs more than twice, or one word is over half of a text of four or more words."""
    tokens = words(text)
    if len(tokens) < 4:
        return False
    trigrams = Counter(zip(tokens, tokens[1:], tokens[2:], strict=False))
    return max(trigrams.values()) > 2 or max(Counter(tokens).values()) > len(tokens) / 2
