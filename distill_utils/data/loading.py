"""Pairs, plain text and classification rows: "pydocs", a hub name, a folder with one file per split, or one file.

One file, and a hub set with nothing but "train", is cut into 80 % train, 10 % validation and 10 % test by a hash of the
text. InputError for an unknown name, a missing file, split or column, a broken line, and when nothing is left.
"""

import glob
import gzip
import hashlib
import io
import json
import os
import random
import re
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

import pandas as pd
from datasets import Dataset, IterableDataset, disable_progress_bars, load_dataset

from distill_utils.artifacts import InputError, artifact, read_json, report_progress, write_atomic
from distill_utils.data import pydocs, separation
from distill_utils.data.batches import document_id

disable_progress_bars()
SPLITS = separation.SPLITS
TASKS = {"belongs": pydocs.belongs_task, "family": pydocs.family_task}
HUB_CONFIGS = {"abisee/cnn_dailymail": "3.0.0"}
HUB_COLUMNS = {"abisee/cnn_dailymail": ("article", "highlights")}
HALF = re.compile(r"\\u[dD][89a-fA-F]")  # of a surrogate pair
FILE_ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet", ".txt")


# ------------------------------------------------------------------------------------------------------------ loading


def load_pairs(
    name: str, split: str, num: int = 0, document_column: str = "document", summary_column: str = "summary"
) -> Dataset:
    """Return a data set with the columns id, document and summary.

    Rows with an empty document or summary are dropped and counted; `num` keeps the first rows, or all where there are
    fewer (0 = all).
    """
    found, undivided = _find_rows(name, "pairs", split, num)
    if (document_column, summary_column) == ("document", "summary"):
        document_column, summary_column = HUB_COLUMNS.get(name, (document_column, summary_column))
    label = f"{name} ({split})"
    for column in (document_column, summary_column):
        check_column(found, column, label, "name the right ones by document_column and summary_column")
    ids = found["id"] if "id" in found.column_names else range(len(found))
    texts = zip(ids, found[document_column], found[summary_column], strict=True)
    rows = [{"id": str(i), "document": _text(d).strip(), "summary": _text(s).strip()} for i, d, s in texts]
    names = [row["id"] for row in rows]
    if len(set(names)) < len(names) or any(document_id(name) != name for name in names):  # labels are found by them
        print(f"{label}: ids repeat or end in #number or @number, so the row number is appended to each")
        rows = [row | {"id": f"{row['id']}:{number}"} for number, row in enumerate(rows)]
    kept = [row for row in rows if row["document"] and row["summary"]]
    if len(kept) < len(rows):
        print(f"{label}: dropped {len(rows) - len(kept)} rows with an empty document or summary")
    if undivided:
        kept = [row for row in kept if _drawn_split(row["document"]) == split]
        print(f"{name} has no splits: {len(kept)} rows drawn for {split} by a hash of the document")
    check_count(label, len(kept), num, undivided)
    rows = Dataset.from_list(kept[:num] if num else kept)
    rows.info.dataset_name = path.name if (path := Path(name).expanduser()).exists() else name  # for model cards
    return rows


def load_splits(name: str, num_train: int, num_validation: int, num_test: int, **columns: str) -> dict[str, Dataset]:
    """Return {"train", "validation", "test"}, each by `load_pairs` with so many rows (0 = all)."""
    sizes = {"train": num_train, "validation": num_validation, "test": num_test}
    return {split: load_pairs(name, split, num, **columns) for split, num in sizes.items()}


def describe_splits(splits: dict[str, Dataset]) -> list[dict]:
    """Return one row per split: its name, pairs and fingerprint."""
    return [{"set": n, "pairs": len(rows), "fingerprint": data_fingerprint(rows)} for n, rows in splits.items()]


def load_text(name: str = "pydocs", split: str = "train", column: str = "text", num: int = 0) -> list[str]:
    """Return the raw texts of a split, one string each; of "pydocs" these are docstrings and comments.

    In .txt files blank lines stand between texts. Empty texts are dropped; `num` keeps the first ones, and of a hub
    set, which may be too large to keep, no more is then fetched than these need.
    """
    found, undivided = _find_rows(name, "text", split, num, stream=num > 0)
    label = f"{name} ({split})"
    with _hub_errors(label):  # a stream is read here only
        check_column(found, column, label, "name the right one by column")
        # In pieces: a hub set may exceed the memory, and rows one by one take seconds.
        texts = (_text(text) for rows in found.select_columns(column).iter(1000) for text in rows[column])
        kept = (text for text in texts if text.strip() and (not undivided or _drawn_split(text) == split))
        kept = list(islice(kept, num or None))
    check_count(label, len(kept), num, undivided)
    return kept


def load_classification(task: str, split: str) -> Dataset:
    """Return an embedded classification task ("belongs" or "family") with sentence1, sentence2 and label columns."""
    if task not in TASKS:
        raise InputError(f"classification task {task!r} is unknown: use one of {', '.join(TASKS)}")
    check_request(split)
    return Dataset.from_list(TASKS[task](_corpus_table("pairs", split).to_list()))


def data_fingerprint(dataset: Dataset) -> str:
    """Return a short hash of the ids, documents and summaries of a data set."""
    content = hashlib.sha256()
    for row in zip(dataset["id"], dataset["document"], dataset["summary"], strict=True):
        content.update("\0".join(row).encode())
    return content.hexdigest()[:12]


# --------------------------------------------------------------------------------------------------------- the corpus


def corpus_folder() -> Path:
    """Return the run folder of the built corpus `pydocs`, building it on first use (about a minute).

    The environment variable DISTILL_CORPUS names one built elsewhere: other package versions give different text.
    """
    if named := os.environ.get("DISTILL_CORPUS"):
        if not Path(named, "results.json").is_file():
            raise InputError(f"DISTILL_CORPUS {named} holds no corpus: name a folder like runs/pydocs-..., or unset it")
        return Path(named)

    def build(folder: Path) -> dict:
        progress = partial(report_progress, folder, unit="files")
        corpus = pydocs.build_corpus(progress)
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
        }

    return artifact("pydocs", pydocs.corpus_settings(), build, quiet=True)


def _corpus_table(kind: str, split: str) -> Dataset:
    return _read_parquet(corpus_folder() / f"{kind}-{split}.parquet")


def corpus_facts() -> dict:
    """Return what is known of the built corpus: fingerprint, sizes, and what was removed for which reason."""
    return read_json(corpus_folder() / "results.json")


# ------------------------------------------------------------------------------------------------- names, folders, hub


def check_request(split: str, num: int = 0) -> None:
    """Raise InputError for an unknown split and a negative number of rows."""
    if split not in SPLITS:
        raise InputError(f"split {split!r} is unknown: use one of {', '.join(SPLITS)}")
    if num < 0:
        raise InputError(f"number of examples {num} is negative: use 0 for all of them")


def check_count(label: str, found: int, num: int, undivided: bool = False) -> None:
    """Raise InputError if there is no row; print a note if there are fewer than requested."""
    if not found:
        fix = "give more, or a folder with a file for each split" if undivided else "give at least one"
        raise InputError(f"{label} has 0 usable rows: {fix}")
    if found < num:
        print(f"{label}: only {found} rows, {num} were requested")


def _find_rows(
    name: str, kind: str, split: str, num: int, stream: bool = False
) -> tuple[Dataset | IterableDataset, bool]:
    """Return the rows of a split, and whether they are those of all splits, to be drawn from by `_drawn_split`.

    `kind` is what is wanted of the corpus: pairs or text. With `stream` a hub set is not fetched yet.
    """
    check_request(split, num)
    path = Path(name).expanduser()
    if name == "pydocs":
        return _corpus_table(kind, split), False
    if path.exists() or name.startswith((".", "/", "~")) or name.endswith(FILE_ENDINGS):
        return read_files(path, split), path.is_file()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise InputError(f"data set {name!r} is unknown: use pydocs, a hub name like EdinburghNLP/xsum, or a path")
    parts = read_hub(name, HUB_CONFIGS.get(name), stream)
    if list(parts) == ["train"]:
        return parts["train"], True
    if split not in parts:
        raise InputError(f"data set {name!r} has no split {split!r}: it has {', '.join(parts)}")
    return parts[split], False


def _drawn_split(text: str) -> str:
    """Return the split of a text of an undivided set: a function of the text, so that copies stay together."""
    bucket = hashlib.sha256(text.encode()).digest()[0] % 10
    return {0: "test", 1: "validation"}.get(bucket, "train")


def check_column(found: Dataset | IterableDataset, column: str, name: str, fix: str) -> None:
    """Raise InputError for a missing column, naming the existing ones."""
    columns = found.column_names or list(next(iter(found), {}))  # some streams know them by their rows only
    if column not in columns:
        raise InputError(f"column {column!r} is missing in {name}: it has {', '.join(columns)}; {fix}")


def read_hub(name: str, config: str | None = None, stream: bool = False) -> dict[str, Dataset | IterableDataset]:
    """Return all splits of a hub set; with `stream` they are fetched row by row as they are read."""
    with _hub_errors(repr(name)):
        return load_dataset(name, config, streaming=stream)


@contextmanager
def _hub_errors(place: str) -> Iterator[None]:
    """Turn whatever the hub client raises, many kinds that mean the same here, into one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:150]
        raise InputError(f"data set {place} cannot be loaded: {reason}; check the name or use a local path") from error


def read_files(path: Path, split: str) -> Dataset:
    """Read a split from a folder (files named after splits) or from one file, by its ending."""
    if not path.exists():
        raise InputError(f"data path {path.name!r} does not exist: check the spelling")
    if path.is_dir():
        names = (split, "val", "valid", "dev") if split == "validation" else (split,)
        found = [path / f"{name}{ending}" for name in names for ending in FILE_ENDINGS]
        folder, path = path, next((file for file in found if file.exists()), None)
        if path is None:
            raise InputError(f"folder {folder.name!r} has no file for {split}: expected one like {split}.jsonl.gz")
    if not path.name.endswith(FILE_ENDINGS):
        raise InputError(f"file {path.name!r} has an unknown ending: use one of {', '.join(FILE_ENDINGS)}")
    if path.suffix == ".txt":
        texts = re.split(r"\n\s*\n", _decode(path.read_bytes(), path.name).replace("\r\n", "\n"))
        return Dataset.from_dict({"text": [text.strip() for text in texts]})
    reader = {".csv": _read_csv, ".parquet": _read_parquet}.get(path.suffix)
    if reader is None:
        return _read_json_lines(path)
    try:
        return reader(path)
    except Exception as error:  # the readers raise many kinds; where one is wrapped, its cause names the line
        reason = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0][:150]
        fix = "save it again, CSV as UTF-8 with texts in double quotes"
        raise InputError(f"file {path.name!r} cannot be read as {path.suffix[1:]}: {reason}; {fix}") from error


def _read_csv(path: Path) -> Dataset:
    with warnings.catch_warnings(action="error", category=pd.errors.ParserWarning):  # cells beyond the header's
        # Cells as they are written: guesses make 7 of 007, nothing of None, and an index of the first column.
        return Dataset.from_pandas(pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False))


def _read_parquet(path: Path) -> Dataset:
    return Dataset.from_parquet(glob.escape(str(path)), keep_in_memory=True)  # it takes a pattern


def _decode(content: bytes, name: str, offset: int = 0) -> str:
    try:
        return content.decode().removeprefix("\ufeff")  # a byte order mark is no text
    except UnicodeDecodeError as error:
        place = f"byte {offset + error.start} (0x{content[error.start]:02x})"
        raise InputError(f"{name} is not UTF-8 at {place}: save it as UTF-8 text") from error


def _read_json_lines(path: Path) -> Dataset:
    rows = []
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    text = _decode(line, f"{path.name} line {number}", file.tell() - len(line))
                    rows.append(json.loads(text))
                    if not isinstance(rows[-1], dict):
                        raise InputError(f"{path.name} line {number} is not an object: expected one {{...}} per line")
                    if HALF.search(text) and re.search("[\ud800-\udfff]", json.dumps(rows[-1], ensure_ascii=False)):
                        raise InputError(f"{path.name} line {number} has half a character, as in \\ud83d: remove it")
    except json.JSONDecodeError as error:
        raise InputError(f"{path.name} line {number} is not JSON ({error.msg}): fix or remove it") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path.name} cannot be read: {error}; save it as UTF-8 text, whole") from error
    if not rows:
        raise InputError(f"{path.name} has no rows: give a file with at least one line")
    columns = dict.fromkeys(key for row in rows for key in row)
    return Dataset.from_dict({name: [_text(row.get(name)) for row in rows] for name in columns})


def _text(value: object) -> str:
    """Return a cell of any format as text: sentences joined, and "" for what is missing."""
    if value is None or value != value:  # NaN is what pandas writes for a missing text
        return ""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):  # sentences
        return " ".join(value)
    return json.dumps(value, default=str) if isinstance(value, (bool, list, dict)) else str(value)
