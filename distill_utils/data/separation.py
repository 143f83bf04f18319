"""What keeps the embedded corpus's splits apart: modules, duplicates, and text that held-out data share with training.

Splits are drawn by a hash of the module, never of the item. That alone does not hold text apart: docstrings are
inherited, vendored and copied under other names. What repeats goes from the held-out side, so that training text stays.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_array

SPLITS = ("train", "validation", "test")
HELD_OUT = {"validation": (0, 40), "test": (40, 130)}  # module hash modulo 1000
NEAR_DUPLICATE = 0.5  # Jaccard similarity of word 3-grams of document and summary together
NGRAM = 8  # words; the unit in which held-out text is looked for in training text
SHARED = 0.25  # of a held-out text's n-grams: from here on it counts as seen in training
SHORTEST = 4  # words of a summary that counts as seen where it stands in training text as it is

_WORD = re.compile(r"\w+")
_BREAK = np.uint64(0)
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
    seen_documents: set[str] = set()
    seen_ids: set[str] = set()
    # Train first, so that it is the held-out copy of a repeated document that goes.
    for item in sorted(items, key=lambda row: (SPLITS.index(split_of(row["module"])), row["id"])):
        key = normalise(item["document"])
        split = split_of(item["module"])
        if key in seen_documents or item["id"] in seen_ids:
            removed[f"{split}: exact duplicate document"] += 1
            continue
        seen_documents.add(key)
        seen_ids.add(item["id"])
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
    numbers: dict[str, int] = {}
    texts, grams, sizes = _shingles(held_out, numbers)
    others, other_grams, other_sizes = _shingles(references, numbers)
    table = np.append(np.sort(grams), _LAST)
    columns, other_columns = np.searchsorted(table, grams), np.searchsorted(table, other_grams)
    known = table[other_columns] == other_grams
    ours = csr_array((np.ones_like(texts), (texts, columns)), (len(held_out), len(table)))
    others, other_columns = others[known], other_columns[known]
    theirs = csr_array((np.ones_like(others), (others, other_columns)), (len(references), len(table)))
    shared = (ours @ theirs.T).tocoo()
    near = shared.data >= NEAR_DUPLICATE * (sizes[shared.row] + other_sizes[shared.col] - shared.data)
    return set(shared.row[near].tolist())


def _shingles(texts: Sequence[str], numbers: dict[str, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the distinct word 3-grams of all texts (of a shorter text the whole), text by text, and how many each has.

    Two arrays of equal length, the text's index and the hash of the 3-gram, and one with a count for each text.
    """
    words = _numbered(texts, numbers)
    hashes, inside = _ngrams(words, 3)
    ends = np.flatnonzero(words == _BREAK)
    starts = np.append(0, ends[:-1] + 1)[: len(ends)]
    for start, end in zip(starts[ends - starts < 3], ends[ends - starts < 3], strict=True):
        hashes[start], inside[start] = hash(tuple(words[start:end].tolist())) & (2**64 - 1), True
    text = np.repeat(np.arange(len(ends)), ends - starts + 1)[inside]
    order = np.lexsort((hashes[inside], text))
    text, grams = text[order], hashes[inside][order]
    new = np.append(True, (np.diff(text) != 0) | (grams[1:] != grams[:-1]))[: len(text)]
    return text[new], grams[new], np.bincount(text[new], minlength=len(ends))


def separate_text(texts: list[dict], pairs: dict[str, list[dict]]) -> tuple[dict[str, list[dict]], dict[str, int]]:
    """Split raw text by module; drop repeats, and training text that contains most of a held-out pair."""
    removed: Counter[str] = Counter()
    split_texts: dict[str, list[dict]] = {split: [] for split in SPLITS}
    seen: set[str] = set()
    for row in sorted(texts, key=lambda row: (row["module"], row["text"])):
        key = normalise(row["text"])
        if key in seen:
            removed["text: exact duplicate"] += 1
            continue
        seen.add(key)
        split_texts[split_of(row["module"])].append(row)
    # Denoising must not memorize held-out summaries: no training text may hold one as a sentence, nor be a near
    # duplicate of the pair.
    held_out = [_joined(row) for split in ("validation", "test") for row in pairs[split]]
    summaries = {normalise(row["summary"]) for split in ("validation", "test") for row in pairs[split]}
    training = [row for row in split_texts["train"] if summaries.isdisjoint(_sentences(row["text"]))]
    removed["text: holds a held-out summary"] += len(split_texts["train"]) - len(training)
    near = near_duplicates([row["text"] for row in training], held_out)
    split_texts["train"] = [row for index, row in enumerate(training) if index not in near]
    removed["text: near duplicate of a held-out pair"] += len(near)
    return split_texts, dict(removed)


def _sentences(text: str) -> set[str]:
    # A docstring's first line is the object's name, which would hide the sentence after it.
    parts = re.split(r"(?<=[.!?])\s+|\n\n", text) + re.split(r"(?<=[.!?])\s+|\n\n", text.partition("\n")[2])
    return {normalise(part) for part in parts}


# --------------------------------------------------------------------------------------------------------------- leaks


def remove_leaks(pairs: dict[str, list[dict]], text: dict[str, list[dict]]) -> dict[str, int]:
    """Remove held-out pairs and raw texts that share text with training, in place; return the numbers removed.

    A document or raw text shares it when a quarter of its 8-grams stand in training pairs or training text; a summary
    when one of its 8-grams does or, if it is shorter, the whole of it.
    """
    training = [row[key] for row in pairs["train"] for key in ("document", "summary")]
    training += [row["text"] for row in text["train"]]
    numbers: dict[str, int] = {}
    known = _numbered(training, numbers)
    held_out = [(split, row) for split in ("validation", "test") for row in pairs[split]]
    documents = _share_seen(known, _numbered([row["document"] for _, row in held_out], numbers), NGRAM) >= SHARED
    summaries = _seen_summaries(known, [row["summary"] for _, row in held_out], numbers)
    raw = [(split, row) for split in ("validation", "test") for row in text[split]]
    texts = _share_seen(known, _numbered([row["text"] for _, row in raw], numbers), NGRAM) >= SHARED

    removed: Counter[str] = Counter()
    for split in ("validation", "test"):
        for reason, rows, leaks in (
            ("document shares text with train", held_out, documents),
            ("summary shares text with train", held_out, summaries & ~documents),
            ("raw text shares text with train", raw, texts),
        ):
            mine = np.array([one == split for one, _ in rows], dtype=bool)
            removed[f"{split}: {reason}"] = int((leaks & mine).sum())
        leaked = documents | summaries
        pairs[split] = [row for (one, row), leak in zip(held_out, leaked, strict=True) if one == split and not leak]
        text[split] = [row for (one, row), leak in zip(raw, texts, strict=True) if one == split and not leak]
    return dict(removed)


def _seen_summaries(known: np.ndarray, summaries: Sequence[str], numbers: dict[str, int]) -> np.ndarray:
    """Return of each summary whether one of its n-grams, or the whole of a shorter one, stands in the known words."""
    lengths = np.array([min(len(_WORD.findall(text)), NGRAM) for text in summaries], dtype=int)
    seen = np.zeros(len(summaries), dtype=bool)
    for length in range(SHORTEST, NGRAM + 1):
        rows = np.flatnonzero(lengths == length)
        if len(rows):
            seen[rows] = _share_seen(known, _numbered([summaries[i] for i in rows], numbers), length) > 0
    return seen


def _numbered(texts: Sequence[str], numbers: dict[str, int]) -> np.ndarray:
    """Return all words as well-mixed 64-bit numbers, a break of 0 behind each text; new words extend `numbers`."""
    found = []
    for text in texts:
        found += [numbers.setdefault(word, len(numbers) + 1) for word in _WORD.findall(text.lower())]
        found.append(0)
    mixed = np.array(found, dtype=np.uint64)
    with np.errstate(over="ignore"):  # splitmix64, which leaves 0 at 0
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _share_seen(known: np.ndarray, words: np.ndarray, length: int) -> np.ndarray:
    """Return of each text in `words` which share of its n-grams of `length` words stands in the known words."""
    ends = np.flatnonzero(words == _BREAK)
    grams, inside = _ngrams(words, length)
    table, valid = _ngrams(known, length)
    table = np.append(np.sort(table[valid]), _LAST)
    seen = inside & (table[np.searchsorted(table, grams)] == grams)  # np.isin takes five times as long
    text = np.searchsorted(ends, np.arange(len(words)))  # which text a word stands in
    counts = np.bincount(text[inside], minlength=len(ends))
    return np.bincount(text[seen], minlength=len(ends)) / np.maximum(counts, 1)


def _ngrams(words: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a hash of the n-gram that begins at each word, and whether it ends within the same text."""
    padded = np.append(words, np.zeros(length, dtype=np.uint64))
    hashes, inside = np.zeros(len(words), dtype=np.uint64), np.ones(len(words), dtype=bool)
    with np.errstate(over="ignore"):
        for shift in range(length):
            following = padded[shift : shift + len(words)]
            hashes = hashes * np.uint64(0x100000001B3) + following
            inside &= following != _BREAK
    return hashes, inside
