"""Data by name or path, tokenised, corrupted, batched by length; every stream is a function of the step.

Not here: reading docstrings (pydocs.py) and anything that knows a model.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import re
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars, load_dataset

from distill_utils import pydocs
from distill_utils.artifacts import InputError, artifact, read_json, report_progress, write_atomic

disable_progress_bars()
SPLITS = pydocs.SPLITS
TASKS = {"belongs": pydocs.belongs_task, "family": pydocs.family_task}
HUB_CONFIGS = {"abisee/cnn_dailymail": "3.0.0"}
HUB_COLUMNS = {"abisee/cnn_dailymail": ("article", "highlights")}
FILE_ENDINGS = {".jsonl": "json", ".jsonl.gz": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


# ------------------------------------------------------------------------------------------------------------ loading


def load_pairs(
    name_or_path: str,
    split: str,
    num: int = 0,
    document_column: str = "document",
    summary_column: str = "summary",
) -> Dataset:
    """Return a data set with the columns id, document and summary.

    `name_or_path` is "pydocs", a hub name such as "EdinburghNLP/xsum", a folder with one file a split, or one file,
    which is cut into 80 % train, 10 % validation and 10 % test by a hash of the document.
    Rows with an empty document or summary are dropped and counted; `num` keeps the first rows (0 = all).
    Raises InputError for an unknown name, a missing file, split or column, a broken line, and when nothing is left.
    """
    _check(split, num)
    if name_or_path == "pydocs":
        rows = Dataset.from_parquet(str(corpus_folder() / f"pairs-{split}.parquet"), keep_in_memory=True)
    elif _is_path(name_or_path):
        rows = _read_files(Path(name_or_path), split, num)
    else:
        rows = _read_hub(name_or_path, split)
        if (document_column, summary_column) == ("document", "summary"):
            document_column, summary_column = HUB_COLUMNS.get(name_or_path, (document_column, summary_column))
    for column in (document_column, summary_column):
        if column not in rows.column_names:
            raise InputError(
                f"column {column!r} is missing in {name_or_path} ({split}): it has {', '.join(rows.column_names)}; "
                "name the right ones by document_column and summary_column"
            )
    documents = [str(text or "").strip() for text in rows[document_column]]
    summaries = [str(text or "").strip() for text in rows[summary_column]]
    kept = [i for i, pair in enumerate(zip(documents, summaries, strict=True)) if all(pair)]
    if len(kept) < len(documents):
        print(f"{name_or_path} ({split}): dropped {len(documents) - len(kept)} rows with an empty document or summary")
    if not kept:
        raise InputError(f"{name_or_path} ({split}) has no row with a document and a summary: check the file")
    if _is_path(name_or_path) and Path(name_or_path).expanduser().is_file():
        kept = [i for i in kept if _drawn_split(documents[i]) == split]
        print(f"{name_or_path} is one file: {len(kept)} rows drawn for {split} by a hash of the document")
        if not kept:
            raise InputError(
                f"{name_or_path} leaves no row for {split}: give more rows or a folder with a file a split"
            )
    if num > len(kept):
        raise InputError(
            f"{name_or_path} ({split}) has {len(kept)} usable rows, {num} were asked for: lower the number"
        )
    kept = kept[:num] if num else kept
    ids = [str(value) for value in rows["id"]] if "id" in rows.column_names else [str(i) for i in range(len(documents))]
    return Dataset.from_dict(
        {
            "id": [ids[i] for i in kept],
            "document": [documents[i] for i in kept],
            "summary": [summaries[i] for i in kept],
        }
    )


def _drawn_split(document: str) -> str:
    """Return the split of a document of an undivided file: a function of its text, so that copies stay together."""
    bucket = hashlib.sha256(document.encode()).digest()[0] % 10
    return {0: "test", 1: "validation"}.get(bucket, "train")


def load_text(split: str) -> list[str]:
    """Return the corpus's raw text of a split: docstrings and comments, one string each."""
    _check(split)
    rows = Dataset.from_parquet(str(corpus_folder() / f"text-{split}.parquet"), keep_in_memory=True)
    return list(rows["text"])


def load_classification(task: str, split: str, num: int = 0) -> Dataset:
    """Return an embedded classification task ("belongs" or "family") with sentence1, sentence2 and label columns."""
    if task not in TASKS:
        raise InputError(f"classification task {task!r} is unknown: use one of {', '.join(TASKS)}")
    _check(split, num)
    pairs = Dataset.from_parquet(str(corpus_folder() / f"pairs-{split}.parquet"), keep_in_memory=True)
    rows = Dataset.from_list(TASKS[task](pairs.to_list()))
    return rows.select(range(min(num, len(rows)))) if num else rows


def corpus_folder() -> Path:
    """Return the run folder of the built corpus `pydocs`, building it on first use (about a minute)."""

    def build(folder: Path) -> dict:
        corpus = pydocs.build_corpus(lambda stage, done, total: report_progress(folder, stage, done, total, "files"))
        for kind in ("pairs", "text"):
            for split, rows in corpus[kind].items():
                if kind == "pairs":  # a fixed random order, so that the first rows are a fair sample
                    random.Random(0).shuffle(rows)
                content = io.BytesIO()  # written in one piece: on a full disk the Parquet writer aborts the process
                Dataset.from_list(rows).to_parquet(content)
                write_atomic(folder / f"{kind}-{split}.parquet", content.getvalue())
        return {
            "fingerprint": corpus["fingerprint"],
            "removed": corpus["removed"],
            "pairs": {split: len(rows) for split, rows in corpus["pairs"].items()},
            "texts": {split: len(rows) for split, rows in corpus["text"].items()},
            "characters": {split: sum(len(r["text"]) for r in rows) for split, rows in corpus["text"].items()},
        }

    return artifact("pydocs", pydocs.corpus_settings(), build, quiet=True)


def corpus_facts() -> dict:
    """Return what is known of the built corpus: fingerprint, sizes, and what was removed for which reason."""
    return read_json(corpus_folder() / "results.json")


def data_fingerprint(dataset: Dataset) -> str:
    """Return a short hash of the ids, documents and summaries of a data set."""
    content = hashlib.sha256()
    for row in zip(dataset["id"], dataset["document"], dataset["summary"], strict=True):
        content.update("\0".join(row).encode())
    return content.hexdigest()[:12]


def _check(split: str, num: int = 0) -> None:
    if split not in SPLITS:
        raise InputError(f"split {split!r} is unknown: use one of {', '.join(SPLITS)}")
    if num < 0:
        raise InputError(f"number of examples {num} is negative: use 0 for all of them")


def _is_path(name: str) -> bool:
    return Path(name).exists() or name.startswith((".", "/", "~")) or name.endswith(tuple(FILE_ENDINGS))


def _read_hub(name: str, split: str) -> Dataset:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise InputError(f"data set {name!r} is unknown: use pydocs, a hub name like EdinburghNLP/xsum, or a path")
    try:
        return load_dataset(name, HUB_CONFIGS.get(name), split=split)
    except Exception as error:  # the hub client raises many kinds; each means the same here
        reason = str(error).strip().split("\n")[0][:150]
        raise InputError(
            f"data set {name!r} ({split}) cannot be loaded: {reason}; check the name or use a local path"
        ) from error


def _read_files(path: Path, split: str, num: int) -> Dataset:
    """Read a split from a folder (files named after splits) or from one file, by its ending."""
    path = path.expanduser()
    if not path.exists():
        raise InputError(f"data path {path.name!r} does not exist: check the spelling")
    if path.is_dir():
        names = (split, "val", "valid", "dev") if split == "validation" else (split,)
        found = [path / f"{name}{ending}" for name in names for ending in FILE_ENDINGS]
        found = [file for file in found if file.exists()]
        if not found:
            raise InputError(f"folder {path.name!r} has no file for {split}: expected one like {split}.jsonl.gz")
        path = found[0]
    ending = next((e for e in sorted(FILE_ENDINGS, key=len, reverse=True) if path.name.endswith(e)), None)
    if ending is None:
        raise InputError(f"file {path.name!r} has an unknown ending: use one of {', '.join(FILE_ENDINGS)}")
    if path.stat().st_size == 0:
        raise InputError(f"file {path.name!r} is empty: give a file with at least one row")
    if FILE_ENDINGS[ending] == "json":
        return _read_json_lines(path)
    reader = Dataset.from_csv if ending == ".csv" else Dataset.from_parquet
    try:
        return reader(str(path), keep_in_memory=True)
    except Exception as error:  # the readers raise many kinds; where one is wrapped, its cause names the line
        reason = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0][:150]
        raise InputError(f"file {path.name!r} cannot be read as {ending[1:]}: {reason}") from error


def _read_json_lines(path: Path) -> Dataset:
    opener = gzip.open if path.name.endswith(".gz") else open
    rows = []
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise InputError(
                        f"{path.name} line {number} is not JSON ({error.msg}): mend or remove it"
                    ) from error
                if not isinstance(row, dict):
                    raise InputError(
                        f"{path.name} line {number} is not an object: expected one row like {{...}} a line"
                    )
                rows.append(row)
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path.name} cannot be read: {error}; save it as UTF-8 text, whole") from error
    if not rows:
        raise InputError(f"{path.name} has no rows: give a file with at least one line")
    columns = {key: None for row in rows for key in row}
    return Dataset.from_dict({c: [_text(row.get(c)) for row in rows] for c in columns})


def _text(value: object) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)


# --------------------------------------------------------------------------------------------------------- tokenising


def tokenize_pairs(
    dataset: Dataset, tokenizer, max_source_length: int, max_target_length: int, prefix: str = ""
) -> Dataset:
    """Return the columns id, input_ids and labels: lists of token ids, cut to the given lengths, end token included."""
    sources = [prefix + text for text in dataset["document"]]
    encoded = tokenizer(sources, truncation=True, max_length=max_source_length)["input_ids"]
    labels = tokenizer(text_target=list(dataset["summary"]), truncation=True, max_length=max_target_length)["input_ids"]
    # A start token in the labels would teach the student to write it twice: the model's shift adds its own.
    start = tokenizer.bos_token_id
    labels = [ids[1:] if ids and start is not None and ids[0] == start and len(ids) > 1 else ids for ids in labels]
    return Dataset.from_dict({"id": dataset["id"], "input_ids": encoded, "labels": labels})


def collate(rows: list[dict], pad_token_id: int, pad_to_multiple: int = 8) -> dict:
    """Pad rows to one batch: input_ids, attention_mask, labels (padding -100), each (batch, length), and ids.

    decoder_input_ids are left to the model, whose own shift knows its start token.
    """
    source_length = _round_up(max(len(row["input_ids"]) for row in rows), pad_to_multiple)
    target_length = _round_up(max(len(row["labels"]) for row in rows), pad_to_multiple)
    input_ids = torch.full((len(rows), source_length), pad_token_id)
    attention_mask = torch.zeros((len(rows), source_length), dtype=torch.long)
    labels = torch.full((len(rows), target_length), -100)
    for i, row in enumerate(rows):
        source, target = torch.as_tensor(row["input_ids"]), torch.as_tensor(row["labels"])
        input_ids[i, : len(source)] = source
        attention_mask[i, : len(source)] = 1
        labels[i, : len(target)] = target
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, "ids": [r["id"] for r in rows]}


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


# ------------------------------------------------------------------------------------------------------------- streams


def length_batches(lengths: list[int], batch_size: int, seed: int, epoch: int, pool: int = 32) -> list[list[int]]:
    """Return one epoch's batches of row numbers: shuffled, then sorted by length within pools of `pool` batches.

    Every row appears once, except that the last incomplete batch is filled up from the start of the epoch's order.
    The order depends on the arguments alone.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    if len(order) % batch_size:
        order = np.concatenate([order, np.resize(order, batch_size - len(order) % batch_size)])
    batches = []
    for start in range(0, len(order), batch_size * pool):
        chunk = order[start : start + batch_size * pool]
        chunk = chunk[np.argsort([lengths[i] for i in chunk], kind="stable")]
        batches += [chunk[i : i + batch_size].tolist() for i in range(0, len(chunk), batch_size)]
    return [batches[i] for i in generator.permutation(len(batches))]


def pair_stream(
    rows: Dataset, pad_token_id: int, batch_size: int, seed: int, micro_batch_size: int = 0
) -> Callable[[int], list[dict]]:
    """Return `batches(step)`: the micro-batches of an optimizer step, a function of step and seed alone.

    Because nothing is kept between calls, a resumed run sees the data of an uninterrupted one, and two methods with
    the same seed see the same order.
    """
    if not len(rows):
        raise InputError("there are no training rows: check the data set and num_train")
    sources, targets, ids = list(rows["input_ids"]), list(rows["labels"]), list(rows["id"])
    # By source alone: pseudo-labels have other lengths than references, and the order must not depend on the method.
    lengths = [len(source) for source in sources]
    epochs: dict[int, list[list[int]]] = {}
    per_epoch = -(-len(lengths) // batch_size)

    def batches(step: int) -> list[dict]:
        epoch, place = divmod(step, per_epoch)
        if epoch not in epochs:
            epochs.clear()
            epochs[epoch] = length_batches(lengths, batch_size, seed, epoch)
        numbers = epochs[epoch][place]
        size = micro_batch_size or batch_size
        return [
            collate(
                [{"id": ids[i], "input_ids": sources[i], "labels": targets[i]} for i in numbers[start : start + size]],
                pad_token_id,
            )
            for start in range(0, len(numbers), size)
        ]

    return batches


def batch_list(rows: Dataset, pad_token_id: int, batch_size: int) -> list[dict]:
    """Return all rows as batches in order of length, for evaluation."""
    order = np.argsort([len(ids) for ids in rows["input_ids"]], kind="stable")
    return [
        collate([rows[int(i)] for i in order[start : start + batch_size]], pad_token_id)
        for start in range(0, len(order), batch_size)
    ]


# ----------------------------------------------------------------------------------------------------------- denoising


def infill(
    tokens: np.ndarray,
    mask_id: int,
    generator: np.random.Generator,
    share: float = 0.3,
    mean: float = 3.0,
    collapse: bool = True,
) -> np.ndarray:
    """Return BART text infilling of one token sequence: spans of Poisson(mean) tokens, each replaced by one mask.

    `share` of the tokens is masked in expectation (Lewis et al. 2020, section 2.2); spans of length 0 insert a mask.
    Without `collapse` every token of a span becomes a mask of its own and spans of length 0 change nothing, so that
    source and target stay aligned position by position.
    """
    budget = int(round(share * len(tokens)))
    pieces, kept_from = [], 0
    spans = []
    while budget > 0 and len(spans) < len(tokens):
        length = min(int(generator.poisson(mean)), budget)
        spans.append(length)
        budget -= max(length, 1)
    # Gaps between spans: a random composition of the tokens that stay, so that spans never touch the same token.
    free = len(tokens) - sum(spans)
    cuts = np.sort(generator.integers(0, free + 1, size=len(spans)))
    taken = 0
    for cut, length in zip(cuts, spans, strict=True):
        start = cut + taken
        pieces += [tokens[kept_from:start], [mask_id] * (1 if collapse else length)]
        kept_from = start + length
        taken += length
    pieces.append(tokens[kept_from:])
    return np.concatenate(pieces).astype(np.int64)


def infilling_stream(
    tokens: np.ndarray, tokenizer, length: int, batch_size: int, seed: int, aligned_steps: int = 0
) -> Callable[[int], list[dict]]:
    """Return `batches(step)` of text infilling over packed text: windows of `length` tokens, the target is the whole.

    `tokens` is the flat corpus; windows are visited in a new order every epoch, corrupted anew every time. In the first
    `aligned_steps` spans are not collapsed: cross-attention finds copying by position long before it does by content.
    """
    window = length - 2  # start and end token
    count = len(tokens) // window
    per_epoch = count // batch_size
    if not per_epoch:
        raise InputError(
            f"the text has {count} windows of {window} tokens, batch_size {batch_size} needs more: lower it"
        )
    orders: dict[int, np.ndarray] = {}

    def batches(step: int) -> list[dict]:
        epoch, place = divmod(step, per_epoch)
        if epoch not in orders:
            orders.clear()
            orders[epoch] = np.random.default_rng([seed, epoch]).permutation(count)
        generator = np.random.default_rng([seed, 1, step])
        rows = []
        for number in orders[epoch][place * batch_size : (place + 1) * batch_size]:
            text = tokens[number * window : (number + 1) * window].astype(np.int64)
            source = infill(text, tokenizer.mask_token_id, generator, collapse=step >= aligned_steps)
            source = np.concatenate([[tokenizer.bos_token_id], source, [tokenizer.eos_token_id]])[:length]
            labels = np.concatenate([text, [tokenizer.eos_token_id]])
            rows.append({"id": f"window {number}", "input_ids": source, "labels": labels})
        return [collate(rows, tokenizer.pad_token_id)]

    return batches


def gap_pairs(texts: list[str], max_words: int = 40) -> Dataset:
    """Return pairs from raw docstrings whose first paragraph is replaced by a mask: the paragraph is the target.

    This is gap-sentence generation (Zhang et al. 2020, Pegasus) with the sentence chosen by position.
    """
    documents, summaries = [], []
    for text in texts:
        name, separator, rest = text.partition("\n")
        first, _, body = rest.partition("\n\n")
        first = " ".join(first.split())
        if separator and 3 <= len(first.split()) <= max_words and len(body) > 20:
            documents.append(f"{name} <mask> {' '.join(body.split())[: pydocs.MAX_DOCUMENT_CHARACTERS]}")
            summaries.append(first)
    return Dataset.from_dict(
        {"id": [f"gap {i}" for i in range(len(documents))], "document": documents, "summary": summaries}
    )
