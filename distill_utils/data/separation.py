"""What keeps the embedded corpus's splits apart: modules, duplicates, and text that held-out data share with training.

Splits are drawn by a hash of the module, never of the item. That alone does not hold text apart: docstrings are
inherited, vendored and copied under other names. What repeats goes from the held-out side, so that training text stays.
"""

import hashlib
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import cache

import numpy as np
from scipy.sparse import csr_array

SPLITS = ("train", "validation", "test")
HELD_OUT = {"validation": (0, 40), "test": (40, 130)}  # module hash modulo 1000
NEAR_DUPLICATE = 0.5  # Jaccard similarity of word 3-grams of document and summary together
NGRAM = 8  # words; the unit in which held-out text is looked for in training text
SHARED = 0.25  # of a held-out text's n-grams: from here on it counts as seen in training
SHORTEST = 4  # words of a summary that counts as seen where it stands in training text as it is

_WORD = re.compile(r"\w+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n\n")
_LAST = np.uint64(2**64 - 1)  # the hash of no n-gram, so that a search ends inside the table


def split_of(module: str) -> str:
    """Return the split of a module: a stable hash of its dotted name, the same on every machine and version."""
    bucket = int.from_bytes(hashlib.sha256(module.encode()).digest()[:4], "big") % 1000
    return next((split for split, (low, high) in HELD_OUT.items() if low <= bucket < high), "train")


def separate_splits(items: list[dict]) -> tuple[dict[str, list[dict]], dict[str, int]]:
    """Assign items to splits by module and remove what repeats.

    Everywhere a document or id seen before is dropped; from validation and test also an item whose summary stands word
    for word in train, or which is a near duplicate of a train item (for validation also: of a test item).
    Returns split -> items, and the number removed by reason.
    """
    removed: Counter[str] = Counter()
    pairs: dict[str, list[dict]] = {split: [] for split in SPLITS}
    seen: set[str] = set()
    # Train first, so that it is the held-out copy of a repeated document that goes.
    for item in sorted(items, key=lambda row: (SPLITS.index(split_of(row["module"])), row["id"])):
        split, keys = split_of(item["module"]), {normalise(item["document"]), item["id"]}
        if keys & seen:
            removed[f"{split}: exact duplicate document"] += 1
            continue
        seen |= keys
        pairs[split].append(item)
    for split, others in (("test", ("train",)), ("validation", ("train", "test"))):
        references = [row for other in others for row in pairs[other]]
        summaries = {normalise(row["summary"]) for row in references}
        kept = [row for row in pairs[split] if normalise(row["summary"]) not in summaries]
        removed[f"{split}: summary also in {' or '.join(others)}"] += len(pairs[split]) - len(kept)
        near = near_duplicates([_joined(row) for row in kept], [_joined(row) for row in references])
        pairs[split] = [row for index, row in enumerate(kept) if index not in near]
        removed[f"{split}: near duplicate of {' or '.join(others)}"] += len(near)
    return pairs, dict(removed)


def _joined(row: dict) -> str:
    return f"{row['summary']} {row['document']}"


def normalise(text: str) -> str:
    """Return lower-case words only, so that case and punctuation make no difference."""
    return " ".join(_WORD.findall(text.lower()))


def near_duplicates(held_out: list[str], references: list[str]) -> set[int]:
    """Return the indices of held-out texts whose 3-gram Jaccard similarity with a reference reaches NEAR_DUPLICATE.

    Exact, not sampled: a product of sparse matrices counts the 3-grams that two texts share.
    """
    grams, texts = _ngrams(_word_hashes([*held_out, *references]), 3)
    table, columns = np.unique(grams, return_inverse=True)
    found = csr_array((np.ones_like(texts), (texts, columns)), (len(held_out) + len(references), len(table)))
    found.sum_duplicates()
    found.data[:] = 1  # a 3-gram counts once in each text
    sizes = found.sum(axis=1)
    shared = (found[: len(held_out)] @ found[len(held_out) :].T).tocoo()
    union = sizes[shared.row] + sizes[len(held_out) + shared.col] - shared.data
    return set(shared.row[shared.data >= NEAR_DUPLICATE * union].tolist())


def separate_text(texts: list[dict], pairs: dict[str, list[dict]]) -> tuple[dict[str, list[dict]], dict[str, int]]:
    """Split raw text by module; drop repeats, and training text that contains most of a held-out pair."""
    unique: dict[str, dict] = {}
    for row in sorted(texts, key=lambda row: (row["module"], row["text"])):
        unique.setdefault(normalise(row["text"]), row)
    removed = {"text: exact duplicate": len(texts) - len(unique)}
    split_texts: dict[str, list[dict]] = {split: [] for split in SPLITS}
    for row in unique.values():
        split_texts[split_of(row["module"])].append(row)
    # Denoising must not memorize held-out summaries: no training text may hold one as a sentence, nor be a near
    # duplicate of the pair.
    held_out = pairs["validation"] + pairs["test"]
    summaries = {normalise(row["summary"]) for row in held_out}
    training = [row for row in split_texts["train"] if summaries.isdisjoint(_sentences(row["text"]))]
    removed["text: holds a held-out summary"] = len(split_texts["train"]) - len(training)
    near = near_duplicates([row["text"] for row in training], [_joined(row) for row in held_out])
    split_texts["train"] = [row for index, row in enumerate(training) if index not in near]
    removed["text: near duplicate of a held-out pair"] = len(near)
    return split_texts, removed


def _sentences(text: str) -> set[str]:
    # A docstring's first line is the object's name, which would hide the sentence after it.
    return {normalise(part) for start in (text, text.partition("\n")[2]) for part in _SENTENCE_END.split(start)}


# --------------------------------------------------------------------------------------------------------------- leaks


def remove_leaks(pairs: dict[str, list[dict]], text: dict[str, list[dict]]) -> dict[str, int]:
    """Remove held-out pairs and raw texts that share text with training, in place; return the numbers removed.

    A document or raw text shares it when a quarter of its 8-grams stand in training pairs or training text; a summary
    when one of its 8-grams does or, if it is shorter, the whole of it.
    """
    training = [row[key] for row in pairs["train"] for key in ("document", "summary")]
    known = _word_hashes(training + [row["text"] for row in text["train"]])
    summaries = defaultdict(list)  # by the length of the n-grams that are looked for
    for row in pairs["validation"] + pairs["test"]:
        summaries[min(len(_WORD.findall(row["summary"])), NGRAM)].append(row["summary"])
    lengths = range(SHORTEST, NGRAM + 1)
    documents = [row["document"] for row in pairs["validation"] + pairs["test"]]
    raw = [row["text"] for row in text["validation"] + text["test"]]
    leaks = (
        ("document", pairs, "document", _seen(known, documents, NGRAM, SHARED)),
        ("summary", pairs, "summary", set().union(*(_seen(known, summaries[n], n) for n in lengths))),
        ("raw text", text, "text", _seen(known, raw, NGRAM, SHARED)),
    )
    removed = {}
    for split in HELD_OUT:
        for what, rows, key, seen in leaks:
            kept = [row for row in rows[split] if row[key] not in seen]
            removed[f"{split}: {what} shares text with train"] = len(rows[split]) - len(kept)
            rows[split] = kept
    return removed


def _seen(known: np.ndarray, texts: list[str], length: int, share: float = 0.0) -> set[str]:
    """Return the texts of whose n-grams more than none, and at least a share, stand in the known words."""
    grams, numbers = _ngrams(_word_hashes(texts), length)
    table = np.append(np.sort(_ngrams(known, length)[0]), _LAST)
    found = table[np.searchsorted(table, grams)] == grams  # np.isin takes five times as long
    counts, hits = (np.bincount(which, minlength=len(texts)) for which in (numbers, numbers[found]))
    return {texts[i] for i in np.flatnonzero((hits > 0) & (hits >= share * counts))}


def _word_hashes(texts: Iterable[str]) -> np.ndarray:
    """Return the hashes of all words as 64-bit numbers, a break of 0 behind each text."""
    words = (map(_word_hash, [*_WORD.findall(text.lower()), ""]) for text in texts)
    return np.fromiter(itertools.chain.from_iterable(words), dtype=np.uint64)


@cache
def _word_hash(word: str) -> int:  # not Python's own, which is another one in every process
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big") if word else 0


def _ngrams(words: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the hash of every n-gram that lies within one text, and the number of that text."""
    count = max(len(words) - length + 1, 0)
    hashes, inside = np.zeros(count, dtype=np.uint64), np.ones(count, dtype=bool)
    for shift in range(length):
        following = words[shift : shift + count]
        hashes = hashes * np.uint64(0x100000001B3) + following
        inside &= following != 0
    return hashes[inside], np.cumsum(words == 0)[:count][inside]
