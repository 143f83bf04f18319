"""The teacher's summaries as labels: written in shards, resumed after a kill, filtered before training.

Not here: how a summary is generated (generation.py, ctranslate.py), training on it (training.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset

from distill_utils import artifacts, ctranslate, generation, students
from distill_utils.artifacts import InputError

DECODING = ("num_beams", "max_new_tokens", "length_penalty", "no_repeat_ngram_size", "min_length")


def pseudo_labels(
    model_folder: Path | str,
    dataset: Dataset,
    folder: Path | str,
    *,
    max_source_length: int,
    num_beams: int | None = None,
    max_new_tokens: int | None = None,
    length_penalty: float | None = None,
    no_repeat_ngram_size: int | None = None,
    min_length: int | None = None,
    engine: str = "auto",
    prefix: str = "",
    quantization: str = "float32",
    batch_size: int = 32,
    shard_size: int = 512,
    num_threads: int = 0,
) -> Dataset:
    """Label a data set with the teacher's summaries; start again after a kill and it goes on where it stopped.

    Returns the data set with columns id, document, summary (the pseudo-label), reference (the summary before) and
    score. Decoding settings that are not given are the teacher's own. `folder` gets settings.json (decoding settings,
    engine, fingerprints of teacher and documents), shards of `shard_size` rows written atomically while it runs, and at
    the end pseudo_labels.jsonl, which `load_pairs` reads. A folder made with other settings is refused, and so is one
    that another live process fills. Shleifer & Rush 2020, section 3.3.

    Args:
        model_folder: a saved model, or a name that `students.load_model` knows.
        engine: "ctranslate2", "transformers", or "auto": CTranslate2 on the CPU where the model converts, else
            `generate`, in bf16 on CUDA.
        quantization: weights in CTranslate2; "int8" is faster and changes some labels.
    """
    folder = Path(folder)
    if engine not in ("auto", "ctranslate2", "transformers"):
        raise InputError(f"engine {engine!r} is unknown: give auto, ctranslate2 or transformers")
    if not len(dataset):
        raise InputError("the data set to label is empty: give at least one document")
    folder.mkdir(parents=True, exist_ok=True)
    final, given = folder / "pseudo_labels.jsonl", (num_beams, max_new_tokens, length_penalty)
    with artifacts.lock(folder / "shards"), _local_model(model_folder, folder) as local_folder:
        limit = ctranslate.read_config(local_folder).get("max_position_embeddings")
        generation.check_source_length(max_source_length, limit)
        own = ctranslate.read_generation_config(local_folder)
        settings = {
            "engine": _choose_engine(local_folder, engine),
            "quantization": quantization,
            "max_source_length": max_source_length,
            **generation.decoding_settings(own, *given, no_repeat_ngram_size, min_length),
            "prefix": prefix,
            "shard_size": shard_size,
            "model": _model_fingerprint(local_folder),
            "documents": _documents_fingerprint(dataset),
        }
        if settings["engine"] == "transformers":
            settings["quantization"] = str(_dtype())
        _check_settings(folder / "settings.json", settings)
        if not final.exists():
            shards = _write_shards(local_folder, dataset, folder, settings, batch_size, num_threads)
            _merge_shards(dataset, shards, final)
            shutil.rmtree(folder / "ctranslate2", ignore_errors=True)
    shutil.rmtree(folder / "shards")
    with open(final, encoding="utf-8") as file:
        rows = [(row["summary"], row["reference"], row["score"]) for row in map(json.loads, file)]
    labelled = dataset.select_columns(["id", "document"])
    for name, values in zip(("summary", "reference", "score"), zip(*rows, strict=True), strict=True):
        labelled = labelled.add_column(name, list(values))
    return labelled


def filter_pseudo_labels(dataset: Dataset) -> tuple[Dataset, dict[str, int]]:
    """Drop empty and repeating labels (`generation.is_empty`, `is_repeating`); return (kept rows, counts by reason)."""
    reasons = [
        "empty" if generation.is_empty(text) else "repeating" if generation.is_repeating(text) else "kept"
        for text in dataset["summary"]
    ]
    counts = {"total": len(reasons), **{name: reasons.count(name) for name in ("kept", "empty", "repeating")}}
    if not counts["kept"]:
        raise InputError(f"no pseudo-label of {counts['total']} is left (empty or repeating): train the teacher first")
    return dataset.select([i for i, reason in enumerate(reasons) if reason == "kept"]), counts


# ------------------------------------------------------------------------------------------------------------- shards


def _write_shards(model_folder, dataset, folder, settings, batch_size, num_threads) -> list[Path]:
    """Label the shards that are not there yet (each is written whole); one line a row."""
    size, total = settings["shard_size"], len(dataset)
    shards = [folder / "shards" / f"{start:09d}.jsonl" for start in range(0, total, size)]
    missing = [path for path in shards if not path.exists()]
    label = _labeller(model_folder, folder, settings, batch_size, num_threads) if missing else None
    for path in missing:
        start = int(path.stem)
        rows = dataset.select(range(start, min(start + size, total)))

        def report(done: int, _: int, start: int = start) -> None:
            artifacts.report_progress(folder, "pseudo-labels", start + done, total, "documents")

        labels = zip(*label(rows["document"], progress=report), strict=True)
        artifacts.write_atomic(path, "".join(_json_line({"summary": text, "score": score}) for text, score in labels))
    return shards


def _labeller(model_folder, folder, settings, batch_size, num_threads) -> Callable:
    """Return the function (documents, progress) -> (summaries, scores) of the chosen engine."""
    options = {name: settings[name] for name in ("max_source_length", "prefix", *DECODING)}
    if settings["engine"] == "ctranslate2":
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model_folder)
        converted = ctranslate.to_ctranslate2(model_folder, folder / "ctranslate2", settings["quantization"])
        options |= {"batch_tokens": batch_size * settings["max_source_length"], "num_threads": num_threads}
        return partial(ctranslate.summarize_ctranslate2, converted, tokenizer, **options)
    model, tokenizer = students.load_model(str(model_folder), dtype=_dtype())
    model.to(artifacts.device())
    options |= {"batch_size": batch_size, "dtype": torch.float32}  # no autocast: the weights have the dtype
    return partial(generation.summarize_with_scores, model, tokenizer, **options)


def _merge_shards(dataset: Dataset, shards: list[Path], final: Path) -> None:
    """Write one JSON Lines file with documents, pseudo-labels, references and scores, row by row."""
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    rows = iter(dataset)
    try:
        with artifacts.disk_space_named(final), open(temporary, "w", encoding="utf-8") as file:
            for shard in shards:
                for line in shard.read_text(encoding="utf-8").splitlines():
                    label, row = json.loads(line), next(rows)
                    values = {"id": row["id"], "document": row["document"], "summary": label["summary"]}
                    values |= {"reference": row.get("summary", ""), "score": label["score"]}
                    file.write(_json_line(values))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)


def _json_line(value: dict) -> str:
    # ASCII only: str.splitlines also breaks at U+2028 and its like, which text may hold.
    return json.dumps(value, ensure_ascii=True, allow_nan=False) + "\n"


# ---------------------------------------------------------------------------------------------------------- settings


def _check_settings(path: Path, settings: dict) -> None:
    found = artifacts.read_json(path) if path.exists() else settings
    for name, value in settings.items():
        if found.get(name) != value:
            raise InputError(
                f"{path.parent.name} holds pseudo-labels made with {name} {found.get(name)!r}, now {value!r}: "
                "choose another folder or delete it"
            )
    artifacts.write_json(path, settings)


def _choose_engine(model_folder: Path, engine: str) -> str:
    if engine == "transformers" or (engine == "auto" and torch.cuda.is_available()):
        return "transformers"
    try:
        ctranslate.refuse_unsupported(model_folder)
    except ValueError:
        if engine == "ctranslate2":
            raise
        return "transformers"
    return "ctranslate2"


def _dtype() -> torch.dtype:
    """Weights of the teacher under `generate`: bf16 on CUDA where it has it, float32 on the CPU."""
    return (artifacts.autocast_dtype() if torch.cuda.is_available() else None) or torch.float32


@contextlib.contextmanager
def _local_model(name_or_folder: Path | str, folder: Path):
    """Yield a folder with the model: the given one, or a temporary copy of a model known by name."""
    if (Path(name_or_folder) / "config.json").is_file():
        yield Path(name_or_folder)
        return
    students.save_model(*students.load_model(str(name_or_folder)), folder / "model")
    try:
        yield folder / "model"
    finally:
        shutil.rmtree(folder / "model", ignore_errors=True)


def _model_fingerprint(model_folder: Path) -> str:
    names = ("config.json", "generation_config.json", "tokenizer.json")
    paths = [model_folder / name for name in names] + sorted(model_folder.glob("*.safetensors"))
    return artifacts.config_hash({path.name: artifacts.file_hash(path) for path in paths if path.exists()})


def _documents_fingerprint(dataset: Dataset) -> str:
    digest = hashlib.sha256()
    for row in dataset.select_columns(["id", "document"]):
        digest.update(json.dumps([row["id"], row["document"]]).encode())
    return digest.hexdigest()[:10]
