"""Denoising: packed text corrupted in several ways, as streams of batches that are a function of the step.

All objectives see windows of one flat array of token ids, the texts one after another with an end token behind each.
They cross the borders of texts, as in T5, so that nothing is padded. They are visited in a new order every epoch and
corrupted anew every time, except that gap sentences are chosen, not drawn.
"""

import hashlib
import json
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
from datasets import Dataset

from distill_utils.artifacts import InputError, artifact, config_hash
from distill_utils.data import loading, pydocs
from distill_utils.data.batches import collate_parts

# Share of the tokens (gap sentences: of the sentences) that each hides, as in its paper.
OBJECTIVES = {"span_corruption": 0.15, "text_infilling": 0.3, "sentence_permutation": 0.0, "gap_sentences": 0.3}
MEAN_SPAN = 3.0  # tokens, of span corruption and of text infilling
_hashes: dict[str, str] = {}  # of token ids, by their bytes


def pack_text(texts: list[str], tokenizer) -> np.ndarray:
    """Return the token ids of all texts as one flat array, an end token behind each; uint16 if the vocabulary fits."""
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end token to put between texts: set its eos_token")
    kind, parts = np.uint16 if len(tokenizer) <= 2**16 else np.uint32, []
    for start in range(0, len(texts), 1000):  # not all at once: as Python numbers ids take many times the memory
        encoded = tokenizer(texts[start : start + 1000], add_special_tokens=False, verbose=False)["input_ids"]
        parts += [np.asarray([*ids, tokenizer.eos_token_id], dtype=kind) for ids in encoded]
    return np.concatenate(parts)


def load_tokens(name: str, split: str, tokenizer, num: int = 0) -> np.ndarray:
    """Return `pack_text` of the texts that `load_text` finds, from disk if they were packed before."""
    texts = loading.load_text(name, split, num=num)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab(), "end": tokenizer.eos_token_id}
    if backend:  # without what calls before have set
        described["backend"] = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    content = hashlib.sha256("\0".join(texts).encode(errors="surrogatepass")).hexdigest()

    def build(folder: Path) -> dict:
        tokens = pack_text(texts, tokenizer)
        np.save(folder / "tokens.npy", tokens)
        return {"texts": len(texts), "tokens": len(tokens)}

    packed = artifact(f"tokens-{split}", {"texts": content, "tokenizer": config_hash(described)}, build, quiet=True)
    return np.load(packed / "tokens.npy")


def tokens_hash(tokens: np.ndarray) -> str:
    """Return the `config_hash` of token ids as a list, which names the runs that read them: seconds, so only once."""
    content = f"{tokens.dtype} {hashlib.sha256(tokens).hexdigest()}"
    if content not in _hashes:
        _hashes[content] = config_hash(tokens.tolist())
    return _hashes[content]


def denoising_stream(
    tokens: np.ndarray, tokenizer, objective: str, source_length: int, batch_size: int, seed: int,
    micro_batch_size: int = 0, *, aligned_steps: int = 0,
) -> Callable[[int], list[dict]]:  # fmt: skip
    """Return `batches(step)`: micro-batches of corrupted windows of `tokens`, a function of step and seed alone.

    `source_length` bounds the tokens that the encoder sees, end token included; span corruption meets it exactly, and
    its target length too. In the first `aligned_steps` of text infilling spans are not collapsed: cross-attention finds
    copying by position long before it does by content.
    Raises InputError for an unknown objective, a tokenizer without the tokens it needs, and sizes that do not fit.
    """
    if objective not in OBJECTIVES:
        raise InputError(f"denoising objective {objective!r} is unknown: use one of {', '.join(OBJECTIVES)}")
    bos, eos, mask_id = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id
    start, end = np.array([bos] if bos is not None else [], dtype=np.int64), np.array([eos])
    first = start if getattr(tokenizer, "model_writes_bos", False) else start[:0]
    window = source_length - len(start) - 1
    if objective == "span_corruption":
        window, _ = span_corruption_lengths(source_length)  # the target is never the longer side
        sentinel_ids = find_sentinels(tokenizer)
    elif objective == "gap_sentences":  # Pegasus has a second mask for whole sentences
        mask_id = tokenizer.get_vocab().get("<mask_1>", mask_id)
    if mask_id is None and objective in ("text_infilling", "gap_sentences"):
        raise InputError(f"the tokenizer has no mask token, which {objective} needs: use span_corruption")
    split = sentence_splitter(tokenizer) if "sentence" in objective else None

    def corrupt(texts: np.ndarray, generator: np.random.Generator, step: int):
        """Yield (input_ids, labels) of each window."""
        if objective == "span_corruption":
            yield from zip(*corrupt_spans(texts, sentinel_ids, eos, generator), strict=True)
            return
        for text in texts:
            source = target = text
            if objective == "text_infilling":
                source = infill(text, mask_id, generator, collapse=step >= aligned_steps)
            elif objective == "sentence_permutation":
                source = permute_sentences(split(text), generator)
            else:
                source, target = mask_sentences(split(text), mask_id, eos)
            yield np.concatenate([start, source, end])[:source_length], np.concatenate([first, target, end])

    padding = tokenizer.pad_token_id, 1 if objective == "span_corruption" else 8
    return _window_stream(tokens, window, corrupt, "window {}".format, padding, batch_size, micro_batch_size, seed)


def _window_stream(
    tokens: np.ndarray, window: int, corrupt: Callable, name: Callable, padding: tuple[int, int], batch_size: int,
    micro_batch_size: int, seed: int,
) -> Callable[[int], list[dict]]:  # fmt: skip
    """Return `batches(step)`: windows as `corrupt(windows, generator, step)` pairs them, in a new order every epoch."""
    count = len(tokens) // window if window > 0 else 0
    per_epoch = count // batch_size
    if not per_epoch:
        raise InputError(
            f"the text of {len(tokens)} tokens has {count} windows of {window}, fewer than batch_size {batch_size}: "
            "give more text, or lower the batch size or the length"
        )
    windows = tokens[: count * window].reshape(count, window)
    epoch_order = lru_cache(maxsize=1)(lambda epoch: np.random.default_rng([seed, epoch]).permutation(count))

    def batches(step: int) -> list[dict]:
        epoch, place = divmod(step, per_epoch)
        numbers = epoch_order(epoch)[place * batch_size : (place + 1) * batch_size]
        pairs = corrupt(windows[numbers].astype(np.int64), np.random.default_rng([seed, 1, step]), step)
        rows = [
            {"id": name(number), "input_ids": source, "labels": target}
            for number, (source, target) in zip(numbers.tolist(), pairs, strict=True)
        ]
        return collate_parts(rows, micro_batch_size or batch_size, *padding)

    batches(0)  # what cannot work is rejected here, not at the first update
    return batches


# ------------------------------------------------------------------------------------------------------ language models


def language_model_stream(
    tokens: np.ndarray, tokenizer, objective: str, source_length: int, batch_size: int, seed: int,
    micro_batch_size: int = 0,
) -> Callable[[int], list[dict]]:  # fmt: skip
    """Return `batches(step)`: windows in the order of `denoising_stream`, for a model of one stack.

    Of "masked" text some tokens are to be found (`mask_tokens`); the labels of "causal" text are its input ids.
    Raises InputError for too little text, and for a tokenizer with neither mask token nor sentinel.
    """
    mask_id, words = tokenizer.mask_token_id, np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
    if mask_id is None:
        mask_id = tokenizer.get_vocab().get("<extra_id_0>")  # T5 has no mask, and its first sentinel is as good
    if mask_id is None and objective == "masked":
        raise InputError("the tokenizer has neither a mask token nor <extra_id_0>, which bert needs: use opt only")

    def corrupt(ids: np.ndarray, generator: np.random.Generator, step: int):
        return zip(*(mask_tokens(ids, mask_id, words, generator) if objective == "masked" else (ids, ids)), strict=True)

    padding = tokenizer.pad_token_id, 1
    return _window_stream(tokens, source_length, corrupt, int, padding, batch_size, micro_batch_size, seed)


def mask_tokens(
    ids: np.ndarray, mask_id: int, words: np.ndarray, generator: np.random.Generator, share: float = 0.15
) -> tuple[np.ndarray, np.ndarray]:
    """Return input ids and labels (batch, length) of masked language modelling (Devlin et al. 2019, section 3.1).

    In every window the same number of tokens is chosen, at least one. Of these 80 % become the mask, 10 % any of
    `words` and 10 % stay; all others have label -100.
    """
    num = max(1, round(share * ids.shape[1]))
    chosen = generator.random(ids.shape).argsort(axis=1) < num  # a random permutation per row has `num` such places
    fate = generator.random(ids.shape)
    inputs = np.where(chosen & (fate < 0.8), mask_id, ids)
    inputs = np.where(chosen & (fate >= 0.9), generator.choice(words, size=ids.shape), inputs)
    return inputs, np.where(chosen, ids, -100)


# ------------------------------------------------------------------------------------------------------ T5: spans


def _noise_counts(length: int) -> tuple[int, int]:
    """Return how many of `length` tokens are hidden and in how many spans; every span and every gap has a token."""
    noise = min(max(round(length * OBJECTIVES["span_corruption"]), 1), length - 1)
    return noise, min(max(round(noise / MEAN_SPAN), 1), noise, length - noise)


def span_corruption_lengths(source_length: int) -> tuple[int, int]:
    """Return the packed length that span corruption turns into `source_length` tokens, and its target length.

    Both corrupted sides include one sentinel per span and the end token (Raffel et al. 2020, section 3.1.4): 512 gives
    (568, 114).
    """
    if source_length < 3:
        raise InputError(f"source_length {source_length} has no room for a hidden span: give at least 3")

    def lengths(packed: int) -> tuple[int, int]:
        noise, spans = _noise_counts(packed)
        return packed - noise + spans + 1, noise + spans + 1

    packed = 2
    while lengths(packed + 1)[0] <= source_length:  # a token more makes the source longer by one or none
        packed += 1
    return packed, lengths(packed)[1]


def corrupt_spans(
    ids: np.ndarray, sentinel_ids: list[int], eos: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return T5's source and target of windows `ids` (batch, packed): each hides spans that the other one shows.

    The first span is hidden by the first sentinel and so on; both sides end with `eos`. As in T5 a window begins with a
    visible token and ends with a hidden one. Lengths are those of `span_corruption_lengths`.
    Raises InputError when there are more spans than sentinels.
    """
    batch, packed = ids.shape
    noise, spans = _noise_counts(packed)
    if spans > len(sentinel_ids):
        raise InputError(
            f"windows of {packed} tokens have {spans} spans, the tokenizer has {len(sentinel_ids)} sentinels "
            "<extra_id_0> to the last: lower source_length or add sentinels"
        )
    shown, hidden = (_segments(generator, batch, items, spans) for items in (packed - noise, noise))
    lengths = np.stack([shown, hidden], axis=2)  # (batch, spans, 2): they take turns
    is_noise = np.repeat(np.arange(lengths.size) % 2 == 1, lengths.ravel()).reshape(batch, packed)

    def collapse(mask: np.ndarray) -> np.ndarray:
        """Put one sentinel for each run of the mask, and an end token behind."""
        first = mask & ~np.pad(mask, ((0, 0), (1, 0)))[:, :-1]
        marked = np.where(first, np.asarray(sentinel_ids)[np.cumsum(first, axis=1) - 1], ids)
        return np.pad(marked[first | ~mask].reshape(batch, -1), ((0, 0), (0, 1)), constant_values=eos)

    return collapse(is_noise), collapse(~is_noise)


def _segments(generator: np.random.Generator, batch: int, items: int, count: int) -> np.ndarray:
    """Return lengths (batch, count) of parts, none empty, into which `items` are cut; all ways are equally likely."""
    cuts = np.sort(generator.random((batch, items - 1)).argsort(axis=1)[:, : count - 1], axis=1) + 1
    return np.diff(np.pad(cuts, ((0, 0), (1, 1)), constant_values=((0, 0), (0, items))), axis=1)


def find_sentinels(tokenizer) -> list[int]:
    """Return the ids of <extra_id_0>, <extra_id_1>, ... in this order, which is not that of T5's ids."""
    vocabulary, found = tokenizer.get_vocab(), []
    while (sentinel := f"<extra_id_{len(found)}>") in vocabulary:
        found.append(vocabulary[sentinel])
    return found


# ---------------------------------------------------------------------------------------- BART and Pegasus: sentences


def sentence_splitter(tokenizer) -> Callable[[np.ndarray], list[np.ndarray]]:
    """Return `split(ids)`: the sentences of a window as arrays of token ids, at least two.

    A sentence ends with a token that ends in . ! or ? before one that starts a word, and at the end token of a text; a
    window without any is cut in the middle. Ids are split, not text, so that nothing is tokenised twice and windows
    stay those of the other objectives.
    """
    words = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    closing = np.array([bool(re.search(r"[.!?][\"')\]]*$", word)) for word in words])
    opening = np.array([word.startswith(("Ġ", "Ċ", "▁", " ")) for word in words])
    opening[tokenizer.eos_token_id] = False  # it closes the sentence before it

    def split(ids: np.ndarray) -> list[np.ndarray]:
        ends = closing[ids[:-1]] & opening[ids[1:]] | (ids[:-1] == tokenizer.eos_token_id)
        places = np.flatnonzero(ends) + 1
        return np.split(ids, places if len(places) else [len(ids) // 2])

    return split


def permute_sentences(sentences: list[np.ndarray], generator: np.random.Generator) -> np.ndarray:
    """Return the ids of all sentences in random order (Lewis et al. 2020, section 2.2)."""
    return np.concatenate([sentences[i] for i in generator.permutation(len(sentences))])


def mask_sentences(sentences: list[np.ndarray], mask_id: int, eos: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a window with a mask for each gap sentence, and the gap sentences in order (Zhang et al. 2020, Pegasus).

    Gaps are the sentences whose tokens have the highest ROUGE-1 F1 with the rest of their text, scored one by one, at
    least one and not all. An end token behind a gap sentence stays in the source.
    """
    _, words = np.unique(np.concatenate(sentences), return_inverse=True)
    lengths = np.array([len(sentence) for sentence in sentences])
    counts = np.zeros((len(sentences), words.max() + 1))  # of each token in each sentence
    np.add.at(counts, (np.repeat(np.arange(len(sentences)), lengths), words), 1)
    text_ids = np.cumsum([0, *(sentence[-1] == eos for sentence in sentences[:-1])])
    of_text = np.equal.outer(text_ids, text_ids).astype(float)
    rest = of_text @ counts - counts
    overlap = np.minimum(counts, rest).sum(axis=1)
    f1 = 2 * overlap / (lengths + rest.sum(axis=1))
    num = min(max(round(OBJECTIVES["gap_sentences"] * len(sentences)), 1), len(sentences) - 1)
    gaps = set(np.argsort(-f1, kind="stable")[:num].tolist())
    source = [[mask_id, *s[s == eos]] if i in gaps else s for i, s in enumerate(sentences)]
    target = [s[s != eos] for i, s in enumerate(sentences) if i in gaps]
    return np.concatenate(source), np.concatenate(target)


def infill(tokens: np.ndarray, mask_id: int, generator: np.random.Generator, collapse: bool = True) -> np.ndarray:
    """Return BART text infilling of one token sequence: spans of Poisson(3) tokens, each replaced by one mask.

    Lewis et al. (2020), section 2.2; a span of length 0 inserts a mask. Without `collapse` every token of a span
    becomes a mask of its own and spans of length 0 change nothing, so that source and target stay aligned.
    """
    budget, spans = round(OBJECTIVES["text_infilling"] * len(tokens)), []
    while budget > 0:
        spans.append(min(int(generator.poisson(MEAN_SPAN)), budget))
        budget -= max(spans[-1], 1)
    # Gaps between spans: a random composition of the tokens that stay, so that spans never touch the same token.
    lengths = np.array(spans, dtype=int)
    cuts = np.sort(generator.integers(0, len(tokens) - lengths.sum() + 1, size=len(spans)))
    ids, kept = tokens.astype(np.int64), np.ones(len(tokens), dtype=bool)
    kept[np.repeat(cuts, lengths) + np.arange(lengths.sum())] = False
    if not collapse:
        return np.where(kept, ids, mask_id)
    starts = cuts + np.cumsum(lengths) - lengths
    return np.insert(ids, starts, mask_id)[np.insert(kept, starts, True)]


def gap_pairs(texts: list[str], max_words: int = 40) -> Dataset:
    """Return pairs from raw docstrings whose first paragraph is replaced by a mask: the paragraph is the target.

    This is gap-sentence generation (Zhang et al. 2020, Pegasus) with the sentence chosen by position.
    """
    rows = []
    for text in texts:
        name, separator, rest = text.partition("\n")
        first, _, body = rest.partition("\n\n")
        first = " ".join(first.split())
        if separator and 3 <= len(first.split()) <= max_words and len(body) > 20:
            document = f"{name} <mask> {' '.join(body.split())[: pydocs.MAX_DOCUMENT_CHARACTERS]}"
            rows.append({"id": f"gap {len(rows)}", "document": document, "summary": first})
    return Dataset.from_list(rows)
