"""Finished students in use: found by name, listed, and summarizing any text.

Out of scope: writing a folder that others can load (export.py).
"""

import gzip
import json
import os
import re
import sys
import warnings
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import pandas as pd
from huggingface_hub import snapshot_download
from transformers import AutoTokenizer

from distill_utils.artifacts import InputError, read_json, runs_dir, write_atomic
from distill_utils.data import loading
from distill_utils.device import device
from distill_utils.evaluation import ctranslate, generation
from distill_utils.models.loading import load_config, load_model, model_folder, shipped_models

CONVERTED = "ctranslate2"  # the sub-folder of an exported model
SAVED = ("student", "teacher")  # where a run folder has its model
RUN_FOLDER = re.compile(r"[\w.-]+-[0-9a-f]{10}")
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
LONGEST_SOURCE = 1024  # tokens read of a text where neither the tokenizer nor the model names a limit

# ----------------------------------------------------------------------------------------------------------- by name


def find_model(name: str | Path) -> tuple[str, Path | None]:
    """Return what `load_model` takes, and the run folder that the model comes from, None for others.

    `name` is a shipped name, a folder with a model or with student/, a run's name ("kd-6-3-s0": the last one requested)
    or folder name, or a hub name. Raises InputError for an unfinished run and for a name that several runs share.
    """
    if str(name) in shipped_models():
        return str(name), None
    path = Path(name).expanduser()
    folder = path.resolve() if path.is_dir() else _find_run(str(name))
    if folder is None:
        if not HUB_NAME.fullmatch(str(name)) or path.parent.is_dir() and path.parent != Path():
            known = "`python -m distill_utils list` shows the trained ones, hub names are USER/NAME"
            raise InputError(f"no folder, run or shipped model {name}: {known}")
        return str(name), None
    if folder.name in SAVED and _is_run(folder.parent):
        folder = folder.parent
    if _is_run(folder) and not (folder / "results.json").exists():
        raise InputError(f"run {folder.name} is unfinished{_progress(folder)}: repeat its command to resume it")
    saved = [folder / part for part in SAVED if (folder / part / "config.json").is_file()]
    if saved:
        return str(saved[0]), folder
    if _is_run(folder):
        raise InputError(f"run {folder.name} has no model: take one that `python -m distill_utils list` shows")
    return str(folder), None


def _is_run(folder: Path) -> bool:
    config = folder / "config.json"
    return bool(RUN_FOLDER.fullmatch(folder.name)) and config.is_file() and "model_type" not in read_json(config)


def _progress(folder: Path) -> str:
    if not (folder / "progress.json").is_file():
        return ""
    progress = read_json(folder / "progress.json")
    return f" ({progress['stage']}: {progress['step']} of {progress['total']} {progress['unit']})"


def _find_run(name: str) -> Path | None:
    """Return the run folder of a name, None where no run has it."""
    if not re.fullmatch(r"[\w.-]+", name):
        return None
    pointer = runs_dir() / "students" / name
    if pointer.is_file() and _is_run(folder := runs_dir() / pointer.read_text(encoding="utf-8").strip()):
        return folder
    found = [runs_dir() / name, *sorted(runs_dir().glob(f"{name}-*"))]
    found = [folder for folder in found if _is_run(folder) and name in (folder.name, folder.name[:-11])]
    finished = [folder for folder in found if (folder / "results.json").exists()]
    if len(finished) > 1:
        raise InputError(f"{len(finished)} runs are called {name}: give one of {', '.join(f.name for f in finished)}")
    return next(iter(finished or found), None)


def tests_of_runs() -> dict[str, dict]:
    """Return {run folder's name: results of its test with ROUGE}, the test's settings under "settings".

    Scores of validation documents, by which choices are made, are no test. If a run has several tests,
    one compared with the teacher comes first, then the one on most documents, then the newest.
    """
    best: dict[str, tuple] = {}
    for path in runs_dir().glob("test-*/results.json"):
        settings, results = read_json(path.with_name("config.json")), read_json(path)
        rank = (bool(settings.get("baseline")), results.get("num_documents", 0), path.stat().st_mtime)
        trained = runs_dir() / str(settings["model"]) / "config.json"
        test = not trained.is_file() or read_json(trained).get("validation") != settings["data"]
        if test and "rouge2" in results and rank > best.get(settings["model"], ((),))[0]:
            best[settings["model"]] = (rank, results | {"settings": settings, "folder": path.parent})
    return {name: results for name, (_, results) in best.items()}


def list_runs() -> list[dict]:
    """Return one row per finished student, newest first: name, folder, ROUGE-2, ms per token, size, date."""
    tests = tests_of_runs()
    names = {path.read_text().strip(): path.name for path in (runs_dir() / "students").glob("[!.]*")}
    rows = []
    for path in runs_dir().glob("*/results.json"):
        folder, results = path.parent, read_json(path)
        if not (folder / "student").is_dir() or not results.get("parameters") or "notebook" in results:
            continue
        tested, files = tests.get(folder.name, {}), [file for file in folder.rglob("*") if file.is_file()]
        row = {"name": names.get(folder.name, folder.name), "folder": folder.name}
        row |= {key: tested.get(key) for key in ("rouge2", "rouge2_low", "rouge2_high", "ms_per_token")}
        row["parameters_m"] = round(results["parameters"]["total"] / 1e6, 1)
        row["size_mb"] = round(sum(file.stat().st_size for file in files) / 1e6, 1)
        rows.append(row | {"date": results["provenance"]["date"]})
    return sorted(rows, key=lambda row: row["date"], reverse=True)


def format_runs(rows: Sequence[dict]) -> str:
    """Return `list_runs` as a table in plain text."""
    if not rows:
        return "no finished student yet: `python -m distill_utils report 03` trains some"
    table = pd.DataFrame(rows).astype({"rouge2": float, "ms_per_token": float}).set_index("name").rename_axis(None)
    shown = ["rouge2", "ms_per_token", "parameters_m", "size_mb", "date", "folder"]
    return table[shown].to_string(float_format="{:.2f}".format, na_rep="-")


def export_line(folder: Path) -> str:
    """Return the Markdown line that says how to export a trained student from its run folder."""
    name = read_json(folder / "results.json")["name"]
    command = f"python -m distill_utils export {name} my-student"
    return f"Export it: `{command}`. Its folder: `runs/{folder.name}/student`."


# -------------------------------------------------------------------------------------------------------- summarizing


def summarize(
    texts: str | Sequence[str], model: str | Path, *, max_source_length: int = 0, prefix: str | None = None,
    batch_size: int = 32, progress: Callable[[int, int], None] | None = None, **generation_settings,
) -> str | list[str]:  # fmt: skip
    """Write one summary per text, in the order of the texts; a single string returns a string.

    The model is loaded once per call, by any name that `find_model` knows. On the CPU the summaries come from the
    CTranslate2 model of an exported folder, elsewhere from `generate`. Texts that are too long for the model are
    truncated, an empty text gets an empty summary; a warning says how many there are of each.

    Args:
        max_source_length: tokens read of a text, 0 = what the model was trained on where its tokenizer says so, else
            all its positions, else LONGEST_SOURCE.
        prefix: written before every text; None = what the model's configuration names.
        batch_size: texts per batch of `generate`; CTranslate2 makes batches of equally many tokens.
        progress: called with (texts done, texts in all).
        generation_settings: `num_beams`, `max_new_tokens`, ...; those not given are the model's own.
    """
    if isinstance(texts, str):
        return summarize([texts], model, max_source_length=max_source_length, prefix=prefix, **generation_settings)[0]
    texts = list(texts)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"text {i} is {text!r:.40}, a {type(text).__name__}: give strings")
        if re.search("[\ud800-\udfff]", text):  # no tokenizer takes it
            raise InputError(f"text {i} has half a character, as in \\ud83d: remove it")
    source, run = find_model(model)
    trained = read_json(run / "config.json") if run else {}
    converted = _find_converted(source) if device().type == "cpu" else None
    config = load_config(source)
    if converted:
        tokenizer = AutoTokenizer.from_pretrained(model_folder(source) if model_folder(source).is_dir() else source)
        write = partial(ctranslate.summarize_ctranslate2, converted, tokenizer)
    else:
        network, tokenizer = load_model(source)
        options = {"batch_size": batch_size, "with_scores": False}
        write = partial(generation.summarize_with_scores, network.to(device()), tokenizer, **options)
    positions = getattr(config, "max_position_embeddings", None)
    limit = max_source_length or trained.get("max_source_length") or longest_source(tokenizer, positions)
    prefix = trained.get("prefix", own_prefix(config)) if prefix is None else prefix

    generation.check_source_length(limit, positions)
    read = generation.tokenize_documents(tokenizer, texts, limit + 1, prefix)
    counts = {"empty, so is their summary": sum(not ids for ids in read)}
    counts[f"longer than {limit} tokens, of which only the beginning was read"] = sum(len(ids) > limit for ids in read)
    for what, count in counts.items():
        if count:
            warnings.warn(f"{count} of {len(texts)} texts are {what}", stacklevel=2)
    return write(texts, max_source_length=limit, prefix=prefix, progress=progress, **generation_settings)[0]


def _find_converted(source: str) -> Path | None:
    """Return the folder of an exported model's CTranslate2 model; of a hub name it is fetched."""
    folder = model_folder(source)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(source, allow_patterns=f"{CONVERTED}/*"))
        except Exception:  # the hub client raises many kinds; what is wrong `load_model` says
            return None
    return folder / CONVERTED if (folder / CONVERTED / "model.bin").is_file() else None


def longest_source(tokenizer, positions: int | None) -> int:
    """Return how many tokens of a text a model reads: the least of its tokenizer's length and its positions."""
    named = [length for length in (tokenizer.model_max_length, positions) if length and length < 1_000_000]
    return min(named, default=LONGEST_SOURCE)  # a tokenizer without a length names 10 ** 30


def own_prefix(config) -> str:
    """Return the prefix that a model's configuration puts before every text, as T5's does."""
    return (getattr(config, "task_specific_params", None) or {}).get("summarization", {}).get("prefix", "")


# -------------------------------------------------------------------------------------------------------------- files


def summarize_file(path: str, model: str, column: str = "", output: Path | None = None, as_json: bool = False) -> None:
    """Summarize a file ("-" for stdin): one summary per line, to `output` or to stdout."""
    if output and (output.is_dir() or not os.access(output.absolute().parent / ".", os.W_OK)):
        raise InputError(f"cannot write {output}: give --output a file in a writable folder")
    texts = read_texts(path, column)

    def show(done: int, total: int) -> None:
        print(f"\r{done} of {total} texts", end="\n" if done == total else "", file=sys.stderr, flush=True)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        summaries = summarize(texts, model, progress=show if sys.stderr.isatty() else None)
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    lines = [json.dumps({"summary": s}, ensure_ascii=False) if as_json else " ".join(s.split()) for s in summaries]
    content = "".join(f"{line}\n" for line in lines)
    if output:
        write_atomic(output, content)
    else:
        print(content, end="")


def read_texts(path: str, column: str = "") -> list[str]:
    """Return the texts of a file ("-" for stdin): CSV, Parquet, JSON Lines, or plain text, one on a line.

    Its name says that it is CSV or Parquet. It is JSON Lines where a column is named, its name says so, or its first
    line is an object; these and plain text may be gzipped. Empty lines of plain text are empty texts. Raises InputError
    for no text at all, for what is no UTF-8 text, for a missing column and for a broken line.
    """
    name = "standard input" if path == "-" else Path(path).name
    if re.search(r"\.(csv|parquet)(\.gz)?$", name, re.IGNORECASE):
        table = loading.read_files(Path(path), "")
        loading.check_column(table, column or "document", name, "name the right one by --column")
        if not len(table):
            raise InputError(f"{name} has no text: give at least one row")
        return ["" if text is None else text for text in table[column or "document"]]
    try:
        content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        if b"\0" in content:
            raise UnicodeError
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeError as error:
        raise InputError(f"{name} is not UTF-8 text: give plain text or JSON Lines, gzipped or not") from error
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{name} cannot be read ({reason}): give a file of text, or - for standard input") from error
    if not lines[-1]:
        del lines[-1]
    rows = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise InputError(f"{name} has no text: give at least one line")
    if column or re.search(r"\.jsonl?(\.gz)?$", name) or _parse(rows[0][1]):
        return [_text_of(line, column or "document", f"{name} line {number}") for number, line in rows]
    return [line.strip() for line in lines]


def _parse(line: str) -> dict | None:
    with suppress(ValueError):
        row = json.loads(line)
        return row if isinstance(row, dict) else None


def _text_of(line: str, column: str, place: str) -> str:
    row = _parse(line)
    if row is None:
        raise InputError(f"{place} is not a JSON object: expected one {{...}} per line")
    if column not in row:
        raise InputError(f"{place} has no column {column!r}: name one of {', '.join(row)} by --column")
    if not isinstance(row[column], str | None):
        raise InputError(f"{place}: {column!r} is a {type(row[column]).__name__}: give text")
    return row[column] or ""
