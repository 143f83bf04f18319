"""What summaries are worth: ROUGE, text diagnostics, and the results row of a test.

Out of scope: intervals and tests (statistics.py), speed (scoring.py), how summaries are generated (generation.py).
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Sequence
from difflib import SequenceMatcher
from functools import lru_cache
from types import SimpleNamespace

import numpy as np

from distill_utils.evaluation.generation import is_empty, is_repeating, words
from distill_utils.evaluation.statistics import bootstrap_interval, compare

METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")

# -------------------------------------------------------------------------------------------------------------- ROUGE


def split_sentences(text: str) -> str:
    """Put each sentence on its own line: after . ! or ? before a capital, digit, quote or bracket.

    Text that has line breaks already is left as it is. (The usual NLTK splitter needs data from the network.)
    """
    if "\n" in text.strip():
        return text
    return re.sub(r"(?<=[.!?])\s+(?=[A-Z0-9\"'(\[])", "\n", text.strip())


def rouge_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, np.ndarray]:
    """Return ROUGE-1, -2, -L, -Lsum, each (documents,): F1 x 100, Porter stemmer, as rouge-score defines them.

    Lsum compares sentences split by `split_sentences` on both sides. Raises ValueError when the two lists differ in
    length or are empty.
    """
    _check_lengths(predictions, references, "references")
    without_sum, with_sum = _rouge_scorers()
    rows = []
    for prediction, target in zip(map(split_sentences, predictions), map(split_sentences, references), strict=True):
        # With one sentence on both sides Lsum is L, and its table need not be filled twice.
        scorer = with_sum if "\n" in prediction or "\n" in target else without_sum
        scores = scorer.score(target, prediction)  # the target comes first
        rows.append([100 * scores.get(metric, scores["rougeL"]).fmeasure for metric in METRICS])
    return dict(zip(METRICS, np.array(rows).T, strict=True))


def _rouge_scorers() -> list:
    """Return scorers without and with Lsum; their stemmer remembers, as most of ROUGE's time is stemming again."""
    from nltk.stem.porter import PorterStemmer  # here: NLTK is slow to import, a new process of checks.py needs none
    from rouge_score import rouge_scorer, tokenize

    stemmer = SimpleNamespace(stem=lru_cache(maxsize=200_000)(PorterStemmer().stem))
    tokenizer = SimpleNamespace(tokenize=lambda text: tokenize.tokenize(text, stemmer))
    return [rouge_scorer.RougeScorer(metrics, tokenizer=tokenizer) for metrics in (METRICS[:3], METRICS)]


def _check_lengths(predictions: Sequence, others: Sequence, name: str) -> None:
    if len(predictions) != len(others) or not len(predictions):
        raise ValueError(f"{len(predictions)} predictions for {len(others)} {name}: give one each, at least one")


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
    checked = [facts_written(document, prediction) for document, prediction in zip(documents, predictions, strict=True)]
    counted = {
        "words": [len(summary) for _, summary in pairs],
        "empty": list(map(is_empty, predictions)),
        "repeating": list(map(is_repeating, predictions)),
        **{f"novel_{n}gram": [novel for pair in pairs for novel in _novel(*pair, n)] for n in (1, 2, 3)},
        "coverage": [lengths.sum() / written for lengths, written in fragments],
        "density": [(lengths**2).sum() / written for lengths, written in fragments],
        "numbers_supported": [known for found in checked for _, known in found["numbers"]],
        "names_supported": [known for found in checked for _, known in found["names"]],
    }
    return {name: float(np.mean(values)) if values else None for name, values in counted.items()}


def facts_written(document: str, prediction: str) -> dict[str, list[tuple[re.Match, bool]]]:
    """Return the `numbers` and `names` of a prediction, and of each whether it stands in the document."""
    known_numbers = set(re.findall(r"\d+(?:[.,]\d+)*", document))
    known_names = set(re.findall(r"[^\W\d]\w*", document.lower()))
    # Numbers that are words of their own, with inner points and commas: 3, 0.25, 1,000; of 2.5x not the 2 either.
    numbers = re.finditer(r"(?<![\w.])\d+(?:[.,]\d+)*(?!\w|[.,]\d)", prediction)
    return {
        "numbers": [(match, match[0] in known_numbers) for match in numbers],
        "names": [(match, known_names.issuperset(match[0].lower().split("."))) for match in _names(prediction)],
    }


def spans_to_mark(document: str, prediction: str, other: str) -> dict[str, list[tuple[int, int]]]:
    """Return the places (start, end) of a prediction that are `unsupported` and that `differs`.

    The former are numbers and names that the document lacks, the latter words outside of what the two texts share in
    the same order.
    """
    written = itertools.chain(*facts_written(document, prediction).values())
    ours, theirs = (list(re.finditer(r"\S+", text)) for text in (prediction, other))
    same = SequenceMatcher(None, [word[0] for word in ours], [word[0] for word in theirs], autojunk=False)
    differing = [part for tag, first, end, *_ in same.get_opcodes() if tag != "equal" for part in ours[first:end]]
    return {
        "unsupported": sorted(match.span() for match, known in written if not known),
        "differs": [word.span() for word in differing],
    }


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
    """Return for every n-gram of the summary whether the source lacks it."""
    written, known = (list(zip(*(tokens[i:] for i in range(n)), strict=False)) for tokens in (summary, source))
    known = set(known)
    return [ngram not in known for ngram in written]


def _names(text: str) -> list[re.Match]:
    """Identifiers (snake_case, CamelCase, dotted, upper case) anywhere, capitalised words inside a sentence."""
    found = []
    for match in re.finditer(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*", text):
        token, before = match.group(), text[: match.start()].rstrip(" \t\"'([`*")
        identifier = "_" in token.strip("_") or "." in token or any(letter.isupper() for letter in token[1:])
        starts_sentence = not before or before[-1] in ".!?:\n"
        if identifier or (token[0].isupper() and len(token) > 1 and not starts_sentence):
            found.append(match)
    return found


def evaluate_summaries(
    documents: Sequence[str], predictions: Sequence[str], references: Sequence[str],
    baseline_scores: dict[str, np.ndarray] | None = None,
) -> tuple[dict[str, float | None], dict[str, np.ndarray]]:  # fmt: skip
    """Return (one flat results row, ROUGE of every document).

    The row has `num_documents`, each ROUGE mean with its 95 % interval as `_low` and `_high`, the text diagnostics and,
    against the per-document scores of a baseline, `_difference`, `_difference_low`, `_difference_high`, `_p_value`.
    """
    scores = rouge_scores(predictions, references)
    row: dict[str, float | None] = {"num_documents": len(documents)}
    for metric, values in scores.items():
        row[metric], row[f"{metric}_low"], row[f"{metric}_high"] = bootstrap_interval(values)
        if baseline_scores is not None:
            test = compare(values, baseline_scores[metric])
            row[f"{metric}_difference"], row[f"{metric}_p_value"] = test["difference"], test["p_value"]
            row[f"{metric}_difference_low"], row[f"{metric}_difference_high"] = test["low"], test["high"]
    return row | text_diagnostics(documents, predictions), scores
