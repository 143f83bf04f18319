"""What a student is worth: ROUGE with intervals and paired tests, text diagnostics, speed.

Not here: how summaries are generated (generation.py), the gates around training (gates.py).
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from types import SimpleNamespace

import numpy as np
import torch

from distill_utils import artifacts, generation
from distill_utils.generation import is_empty, is_repeating, words

METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")

# -------------------------------------------------------------------------------------------------------------- ROUGE


def split_sentences(text: str) -> str:
    """Put each sentence on its own line: after . ! or ? before a capital, digit, quote or bracket.

    Text that has line breaks already is left as it is. (The usual NLTK splitter needs data from the network.)
    """
    if "\n" in text.strip():
        return text
    return re.sub(r"(?<=[.!?])\s+(?=[A-Z0-9\"'(\[])", "\n", text.strip())


def rouge_scores(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> dict[str, np.ndarray]:
    """Return ROUGE-1, -2, -L, -Lsum, each (documents,): F1 x 100, Porter stemmer, as rouge-score defines them.

    Lsum compares sentences split by `split_sentences` on both sides. Of several references for a document the best
    counts, for each metric alone. Raises ValueError when the two lists differ in length or are empty.
    """
    _check_lengths(predictions, references, "references")
    without_sum, with_sum = _rouge_scorers()
    rows = []
    for prediction, targets in zip(predictions, references, strict=True):
        prediction, found = split_sentences(prediction), [[0.0] * len(METRICS)]
        for target in map(split_sentences, [targets] if isinstance(targets, str) else targets):
            # With one sentence on both sides Lsum is L, and its table need not be filled twice.
            scorer = with_sum if "\n" in prediction or "\n" in target else without_sum
            scores = scorer.score(target, prediction)  # the target comes first
            found.append([100 * scores.get(metric, scores["rougeL"]).fmeasure for metric in METRICS])
        rows.append(np.max(found, axis=0))
    return dict(zip(METRICS, np.array(rows).T, strict=True))


def _rouge_scorers() -> list:
    """Return scorers without and with Lsum; their stemmer remembers, as most of ROUGE's time is stemming again."""
    from nltk.stem.porter import PorterStemmer  # here: NLTK is slow to import, and gates.py starts a process without it
    from rouge_score import rouge_scorer, tokenize

    stemmer = SimpleNamespace(stem=lru_cache(maxsize=200_000)(PorterStemmer().stem))
    tokenizer = SimpleNamespace(tokenize=lambda text: tokenize.tokenize(text, stemmer))
    return [rouge_scorer.RougeScorer(metrics, tokenizer=tokenizer) for metrics in (METRICS[:3], METRICS)]


def _check_lengths(predictions: Sequence, others: Sequence, name: str) -> None:
    if len(predictions) != len(others) or not len(predictions):
        raise ValueError(f"{len(predictions)} predictions for {len(others)} {name}: give one each, at least one")


def bootstrap_interval(
    values: Sequence[float], num_samples: int = 1000, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Return (mean, low, high): the percentile bootstrap interval over documents (not over training seeds)."""
    means = _bootstrap_means(values, num_samples, seed)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(np.mean(values)), float(low), float(high)


def paired_test(values: Sequence[float], baseline: Sequence[float], num_samples: int = 1000, seed: int = 0) -> dict:
    """Compare two systems on the same documents by the paired bootstrap.

    `difference` is the mean of values - baseline, `low` and `high` its 95 % percentile interval. `p_value` is two-sided
    for "no difference": twice the smaller share of draws in which the mean difference is at most 0, or at least 0, with
    one draw added so that it is never 0.
    """
    if len(values) != len(baseline):
        raise ValueError(f"{len(values)} values for {len(baseline)} of the baseline: score the same documents")
    differences = np.asarray(values, dtype=float) - np.asarray(baseline, dtype=float)
    means = _bootstrap_means(differences, num_samples, seed)
    low, high = np.quantile(means, [0.025, 0.975])
    tail = min((means <= 0).sum(), (means >= 0).sum())
    p_value = min(1.0, 2 * (tail + 1) / (num_samples + 1))
    return {"difference": float(differences.mean()), "low": float(low), "high": float(high), "p_value": float(p_value)}


def relation_of(test: Mapping) -> str:
    """Return how a `paired_test` reads: beats, loses to, or cannot be told from; its interval is `low` to `high`."""
    return "beats" if test["low"] > 0 else "loses to" if test["high"] < 0 else "cannot be told from"


def _bootstrap_means(values: Sequence[float], num_samples: int, seed: int) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    if not len(values):
        raise ValueError("no values to draw from: score at least one document")
    generator = np.random.default_rng(seed)
    rows = max(1, 4_000_000 // len(values))  # draws at a time, for memory
    sizes = [min(rows, num_samples - start) for start in range(0, num_samples, rows)]
    draws = (generator.integers(len(values), size=(size, len(values))) for size in sizes)
    return np.concatenate([values[drawn].mean(axis=1) for drawn in draws])


def lead_words(documents: Sequence[str], num_words: int) -> list[str]:
    """Return the first `num_words` words of each document: the baseline that costs nothing."""
    return [" ".join(document.split()[:num_words]) for document in documents]


# --------------------------------------------------------------------------------------------------- text diagnostics


def text_diagnostics(documents: Sequence[str], predictions: Sequence[str]) -> dict[str, float | None]:
    """Describe outputs without a reference; a value is None where no output has what it counts.

    Keys: `words` (mean a summary); `empty`, `repeating` (shares of summaries); `novel_1gram`, `novel_2gram`,
    `novel_3gram` (share of all n-grams written that the source lacks); `coverage`, `density` (extractive fragments,
    mean over non-empty summaries; Grusky et al. 2018); `numbers_supported`, `names_supported` (share of all numbers and
    names written that stand in the source; cheap signs of faithfulness, not proof).
    """
    _check_lengths(predictions, documents, "documents")
    pairs = [(words(document), words(prediction)) for document, prediction in zip(documents, predictions, strict=True)]
    fragments = [(np.array(fragment_lengths(*pair)), len(pair[1])) for pair in pairs if pair[1]]
    row = {"words": _mean([len(summary) for _, summary in pairs])}
    row |= {"empty": _mean(list(map(is_empty, predictions))), "repeating": _mean(list(map(is_repeating, predictions)))}
    for n in (1, 2, 3):
        row[f"novel_{n}gram"] = _mean([novel for pair in pairs for novel in _novel(*pair, n)])
    row["coverage"] = _mean([lengths.sum() / written for lengths, written in fragments])
    row["density"] = _mean([(lengths**2).sum() / written for lengths, written in fragments])
    numbers, names = [], []
    for document, prediction in zip(documents, predictions, strict=True):
        known_numbers = set(re.findall(r"\d+(?:[.,]\d+)*", document))
        known_names = set(re.findall(r"[^\W\d]\w*", document.lower()))
        # Numbers that are words of their own, with inner points and commas: 3, 0.25, 1,000.
        numbers += [number in known_numbers for number in re.findall(r"(?<![\w.])\d+(?:[.,]\d+)*(?!\w)", prediction)]
        names += [known_names.issuperset(name.lower().split(".")) for name in _names(prediction)]
    return row | {"numbers_supported": _mean(numbers), "names_supported": _mean(names)}


def fragment_lengths(source: Sequence[str], summary: Sequence[str]) -> list[int]:
    """Return the lengths of the extractive fragments of a summary, in words.

    From left to right, the longest run of words that stands in the source in the same order; then on behind it. Words
    that the source lacks belong to no fragment. Grusky et al. 2018, figure 2.
    """
    positions, lengths, start = defaultdict(list), [], 0
    for index, word in enumerate(source):
        positions[word].append(index)
    while start < len(summary):
        longest = 0
        for index in positions.get(summary[start], ()):
            limit, length = min(len(summary) - start, len(source) - index), 1
            while length < limit and summary[start + length] == source[index + length]:
                length += 1
            longest = max(longest, length)
        if longest:
            lengths.append(longest)
        start += max(longest, 1)
    return lengths


def _novel(source: list[str], summary: list[str], n: int) -> list[bool]:
    """Tell of every n-gram of the summary whether the source lacks it."""
    written, known = (list(zip(*(tokens[i:] for i in range(n)), strict=False)) for tokens in (summary, source))
    known = set(known)
    return [ngram not in known for ngram in written]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _names(text: str) -> list[str]:
    """Identifiers (snake_case, CamelCase, dotted, upper case) anywhere, capitalised words inside a sentence."""
    found = []
    for match in re.finditer(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*", text):
        token, before = match.group(), text[: match.start()].rstrip(" \t\"'([`*")
        identifier = "_" in token.strip("_") or "." in token or any(letter.isupper() for letter in token[1:])
        starts_sentence = not before or before[-1] in ".!?:\n"
        if identifier or (token[0].isupper() and len(token) > 1 and not starts_sentence):
            found.append(token)
    return found


def evaluate_summaries(
    documents: Sequence[str], predictions: Sequence[str], references: Sequence[str | Sequence[str]],
    baseline_scores: dict[str, np.ndarray] | None = None, seed: int = 0,
) -> tuple[dict[str, float | None], dict[str, np.ndarray]]:  # fmt: skip
    """Return (one flat results row, ROUGE of every document).

    The row has `num_documents`, each ROUGE mean with its 95 % interval as `_low` and `_high`, the text diagnostics and,
    against the per-document scores of a baseline, `_difference`, `_difference_low`, `_difference_high`, `_p_value`.
    """
    scores = rouge_scores(predictions, references)
    row: dict[str, float | None] = {"num_documents": len(documents)}
    for metric, values in scores.items():
        row[metric], row[f"{metric}_low"], row[f"{metric}_high"] = bootstrap_interval(values, seed=seed)
        if baseline_scores is not None:
            test = paired_test(values, baseline_scores[metric], seed=seed)
            row[f"{metric}_difference"], row[f"{metric}_p_value"] = test["difference"], test["p_value"]
            row[f"{metric}_difference_low"], row[f"{metric}_difference_high"] = test["low"], test["high"]
    return row | text_diagnostics(documents, predictions), scores


# -------------------------------------------------------------------------------------------------------------- speed


def _seconds(run: Callable, device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def ms_in_turns(
    runs: Mapping[object, Callable[[list[str]], object]], documents: Sequence[str], device: torch.device,
    repeats: int = 3, max_seconds: float = 60.0,
) -> dict[object, float]:  # fmt: skip
    """Return milliseconds a document of several functions of a list with one document.

    They take turns document by document, so that a busy moment of the machine meets them all; of repeats the best
    counts, since what disturbs a measurement only adds to it, and of documents the median. No repeat begins after
    `max_seconds`: large models on a processor are slow, and their times steady.
    """
    found = {name: np.full((repeats, len(documents)), np.inf) for name in runs}
    began = time.perf_counter()
    for repeat in range(-1, repeats):  # the first turn is a warm-up: kernels, caches, allocator
        if repeat > 0 and time.perf_counter() - began > max_seconds:
            break
        for i, text in enumerate(documents[:1] if repeat < 0 else documents):
            for name, run in runs.items():
                spent = _seconds(partial(run, [text]), device)
                if repeat >= 0:
                    found[name][repeat, i] = spent
    return {name: 1000 * float(np.median(times.min(0))) for name, times in found.items()}


def decoding_runs(model, tokenizer, num_new_tokens: int, options: dict, **generation_settings) -> dict[str, Callable]:
    """Return functions of documents to time: a model's own decoding, and greedily exactly `num_new_tokens` tokens."""
    # Equal limits force the number of tokens; min_length counts the decoder's start token, max_new_tokens does not.
    fixed = {"num_beams": 1, "max_new_tokens": num_new_tokens, "min_length": num_new_tokens + 1}
    summarize = partial(generation.summarize, model, tokenizer, **options)
    return {"latency_ms": partial(summarize, **generation_settings), "ms_per_token": partial(summarize, **fixed)}


def measure_speed(
    model, tokenizer, documents: Sequence[str], *, max_source_length: int, num_new_tokens: int = 16, repeats: int = 3,
    batch_size: int = 16, prefix: str = "", dtype: torch.dtype | None = None, **generation_settings,
) -> dict[str, float | None]:  # fmt: skip
    """Time a model on documents; every number is after one untimed pass, and tokenisation is part of it.

    `latency_ms`: batch 1, the model's own decoding (or the settings given), as `ms_in_turns` measures it.
    `throughput`: summaries a second in length-sorted batches, the same decoding, best of the repeats.
    `ms_per_token`: batch 1, greedy, exactly `num_new_tokens` tokens, whole time (encoder too) over tokens.
    `encoder_ms`: the share of a latency that no shallower decoder removes. `peak_memory_gb`: most that CUDA held
    meanwhile, 2**30 bytes; None on the CPU, where it cannot be told from the rest of the process.
    """
    if not documents:
        raise ValueError("no documents to time: give at least one")
    device, on_cuda = model.device, model.device.type == "cuda"
    options = {"max_source_length": max_source_length, "prefix": prefix, "dtype": dtype, "batch_size": batch_size}
    timed = decoding_runs(model, tokenizer, num_new_tokens, options, **generation_settings)
    own = timed["latency_ms"]
    cast = dtype or (artifacts.autocast_dtype(device) if on_cuda else None)

    @torch.inference_mode()
    def encode(texts: list[str]) -> None:
        inputs = tokenizer(prefix + texts[0], truncation=True, max_length=max_source_length, return_tensors="pt")
        with torch.autocast(device.type, dtype=cast, enabled=cast not in (None, torch.float32)):
            model.get_encoder()(inputs["input_ids"].to(device), inputs["attention_mask"].to(device))

    was_training = model.training
    model.eval()
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    own(documents)
    row = ms_in_turns(timed | {"encoder_ms": encode}, documents, device, repeats)
    row["ms_per_token"] /= num_new_tokens
    row["throughput"] = len(documents) / min(_seconds(partial(own, documents), device) for _ in range(repeats))
    row["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30 if on_cuda else None
    model.train(was_training)
    return row
