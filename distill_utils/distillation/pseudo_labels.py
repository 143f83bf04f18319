"""The teacher's summaries as labels: written in shards, resumed after a kill, joined, cut in halves for cross-fitting.

Not here: how a summary is generated (generation.py, ctranslate.py), filters by measures (label_filters.py), training.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset, Features, Value, concatenate_datasets

from distill_utils import artifacts
from distill_utils.artifacts import InputError
from distill_utils.device import amp_dtype, device
from distill_utils.evaluation import ctranslate, generation
from distill_utils.models.loading import load_model, save_model

DECODING = ("num_beams", "max_new_tokens", "length_penalty", "no_repeat_ngram_size", "min_length")
SAMPLING = ("temperature", "top_k", "top_p")
# What a folder made before these settings existed was made with.
OLD_SETTINGS = {"num_candidates": 1, **dict.fromkeys((*SAMPLING, "seed"))}
LABEL_FEATURES = Features(
    {**{name: Value("string") for name in ("id", "document", "summary", "reference")}, "score": Value("float64")}
)


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
    num_candidates: int = 1,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
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

    With several candidates a document has so many rows, one after another, best first, with the ids `<id>#0`,
    `<id>#1`, ...: as beam search ranks them (by log-probability over length ** length_penalty), or independent samples
    by score. Some may be the same text; `join_labels` drops those.

    Args:
        model_folder: a saved model, or a name that `models.students.load_model` knows.
        num_candidates: labels a document; at most `num_beams` unless they are sampled.
        temperature: sample at this temperature in place of beams, from the `top_k` likeliest tokens or from the
            likeliest that together reach the probability `top_p`. The labels of a shard follow from `seed`, the shard
            and `batch_size`, whether or not a kill came between. Without it the teacher never samples.
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
    final, given = folder / "pseudo_labels.jsonl", [num_beams, max_new_tokens, length_penalty]
    if temperature is not None:
        given = [num_beams or 1, max_new_tokens, 1.0]  # the penalty is for beams
    with artifacts.lock(folder / "shards"), _local_model(model_folder, folder) as local_folder:
        config = ctranslate.read_config(local_folder)
        generation.check_source_length(max_source_length, config.get("max_position_embeddings"))
        own = ctranslate.read_generation_config(local_folder)
        settings = {
            "engine": _choose_engine(local_folder, engine),
            "quantization": quantization,
            "max_source_length": max_source_length,
            "num_candidates": num_candidates,
            **{"temperature": temperature, "top_k": top_k, "top_p": top_p},
            "seed": None if temperature is None else seed,
            **generation.decoding_settings(own, *given, no_repeat_ngram_size, min_length),
            "prefix": prefix,
            "shard_size": shard_size,
            "model": _model_fingerprint(local_folder),
            "documents": _documents_fingerprint(dataset),
        }
        if settings["engine"] == "transformers":
            settings["quantization"] = str(_dtype())
        if settings["min_length"] > settings["max_new_tokens"]:
            raise InputError(
                f"min_length {settings['min_length']} is beyond max_new_tokens {settings['max_new_tokens']}: raise "
                "max_target_length, or give a smaller min_length"
            )
        _check_candidates(settings, config.get("vocab_size"))
        _check_settings(folder / "settings.json", settings)
        if not final.exists():
            shards = _write_shards(local_folder, dataset, folder, settings, batch_size, num_threads)
            _merge_shards(dataset, shards, final, num_candidates)
            shutil.rmtree(folder / "ctranslate2", ignore_errors=True)
    shutil.rmtree(folder / "shards")
    with open(final, encoding="utf-8") as file:
        rows = [[row[name] for name in LABEL_FEATURES if name != "document"] for row in map(json.loads, file)]
    labelled = dataset.select_columns(["document"])
    if num_candidates > 1:
        labelled = labelled.select([i for i in range(len(dataset)) for _ in range(num_candidates)])
    for name, values in zip(("id", "summary", "reference", "score"), zip(*rows, strict=True), strict=True):
        labelled = labelled.add_column(name, list(values))
    return labelled.select_columns(list(LABEL_FEATURES))


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


def join_labels(datasets: Sequence[Dataset]) -> tuple[Dataset, int]:
    """Join labels of several teachers, and the references, to one training set; return (rows, duplicates dropped).

    Of rows with the same document and summary the first stays; otherwise the order is that of the data sets. An id that
    came before gets `@` and the number of its data set (from 0, and again where that is taken too). Columns are those
    of pseudo-labels; in a data set of references a row's reference is its summary and it has no score.
    """
    if not datasets:
        raise InputError("no labels to join: give at least one data set")
    parts = []
    for part in datasets:
        if "reference" not in part.column_names:
            part = part.add_column("reference", part["summary"])
        if "score" not in part.column_names:
            part = part.add_column("score", [None] * len(part), feature=Value("float64"))
        parts.append(part.select_columns(list(LABEL_FEATURES)).cast(LABEL_FEATURES))
    seen, taken, ids, kept, row = set(), set(), [], [], -1
    for number, part in enumerate(parts):
        for id_, document, summary in zip(part["id"], part["document"], part["summary"], strict=True):
            row += 1
            text = hashlib.sha256(json.dumps([document, summary]).encode()).digest()
            if text in seen:
                continue
            while id_ in taken:
                id_ = f"{id_}@{number}"
            seen.add(text)
            taken.add(id_)
            ids.append(id_)
            kept.append(row)
    joined = concatenate_datasets(parts).select(kept)
    joined = joined.remove_columns("id").add_column("id", ids).select_columns(list(LABEL_FEATURES))
    return joined, row + 1 - len(kept)


def cross_fit_halves(dataset: Dataset, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Cut a data set into two halves, each to be labelled by a teacher trained on the other.

    The half follows from seed and id alone, not from order or company; candidates of a document (`<id>#0`, ...) stay
    together. The halves are equal up to chance.
    """
    names = (re.sub(r"(#\d+)?(@\d+)*$", "", str(id_)) or str(id_) for id_ in dataset["id"])
    sides = [hashlib.sha256(f"{seed}:{name}".encode()).digest()[0] % 2 for name in names]
    if len(set(sides)) < 2:
        raise InputError(f"{len(sides)} rows leave one half empty: give more rows or another seed")
    first, second = ([i for i, side in enumerate(sides) if side == wanted] for wanted in (0, 1))
    return dataset.select(first), dataset.select(second)


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

        # The seed is the shard's own, so that a shard is the same whichever was written before it in this process.
        seed = int(artifacts.config_hash([settings["seed"], start])[:7], 16)
        options = {} if settings["temperature"] is None else {"seed": seed}
        labels = zip(*label(rows["document"], progress=report, **options), strict=True)
        artifacts.write_atomic(path, "".join(_json_line({"summary": text, "score": score}) for text, score in labels))
    return shards


def _labeller(model_folder, folder, settings, batch_size, num_threads) -> Callable:
    """Return the function (documents, progress) -> (summaries, scores) of the chosen engine."""
    options = {name: settings[name] for name in ("max_source_length", "prefix", "num_candidates", *DECODING)}
    if settings["engine"] == "ctranslate2":
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model_folder)
        converted = ctranslate.to_ctranslate2(model_folder, folder / "ctranslate2", settings["quantization"])
        options |= {"batch_tokens": batch_size * settings["max_source_length"], "num_threads": num_threads}
        options |= {name: settings[name] for name in SAMPLING}
        return partial(ctranslate.summarize_ctranslate2, converted, tokenizer, **options)
    model, tokenizer = load_model(str(model_folder), dtype=_dtype())
    model.to(device())
    options |= {"batch_size": batch_size, "dtype": torch.float32}  # no autocast: the weights have the dtype
    options["do_sample"] = settings["temperature"] is not None
    if options["do_sample"]:  # without top_k the library would fall back to one of its own
        neutral = {"top_k": 0, "top_p": 1.0}
        options |= {name: settings[name] if settings[name] is not None else neutral[name] for name in SAMPLING}
    return partial(generation.summarize_with_scores, model, tokenizer, **options)


def _merge_shards(dataset: Dataset, shards: list[Path], final: Path, num_candidates: int) -> None:
    """Write one JSON Lines file with documents, pseudo-labels, references and scores, row by row."""
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    candidates = ((row, f"#{place}") for row in dataset for place in range(num_candidates))
    try:
        with artifacts.disk_space_named(final), open(temporary, "w", encoding="utf-8") as file:
            for shard in shards:
                for line in shard.read_text(encoding="utf-8").splitlines():
                    label, (row, suffix) = json.loads(line), next(candidates)
                    id_ = row["id"] if num_candidates == 1 else f"{row['id']}{suffix}"
                    values = {"id": id_, "document": row["document"], "summary": label["summary"]}
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


def _check_candidates(settings: dict, vocab_size: int | None) -> None:
    """Raise InputError where beams, candidates and sampling do not go together."""
    temperature, top_k, top_p = (settings[name] for name in SAMPLING)
    num_beams, num_candidates = settings["num_beams"], settings["num_candidates"]
    if temperature is None:
        if top_k is not None or top_p is not None:
            raise InputError(f"top_k {top_k} and top_p {top_p} are for sampling: give a temperature too, such as 1.0")
        if not 1 <= num_candidates <= num_beams:
            raise InputError(
                f"num_candidates {num_candidates} of {num_beams} beams: give 1 to {num_beams}, more num_beams, "
                "or a temperature to sample"
            )
        return
    if temperature <= 0:
        raise InputError(f"temperature {temperature} draws nothing: give more than 0, or none for beams")
    if num_beams > 1:
        raise InputError(f"num_beams {num_beams} with a temperature: sampling has no beams, leave num_beams out")
    if num_candidates < 1:
        raise InputError(f"num_candidates {num_candidates} gives no label: give at least 1")
    if top_k is not None and top_p is not None:
        raise InputError(f"top_k {top_k} and top_p {top_p} together mean different things to the engines: give one")
    if top_k is not None and not 1 <= top_k <= (vocab_size or top_k):
        raise InputError(f"top_k {top_k} is outside 1 to {vocab_size}, the vocabulary: change it")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p {top_p} is no probability above 0: give at most 1")


def _check_settings(path: Path, settings: dict) -> None:
    found = OLD_SETTINGS | artifacts.read_json(path) if path.exists() else settings
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
    return (amp_dtype() if torch.cuda.is_available() else None) or torch.float32


@contextlib.contextmanager
def _local_model(name_or_folder: Path | str, folder: Path):
    """Yield a folder with the model: the given one, or a temporary copy of a model known by name."""
    if (Path(name_or_folder) / "config.json").is_file():
        yield Path(name_or_folder)
        return
    save_model(*load_model(str(name_or_folder)), folder / "model")
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
