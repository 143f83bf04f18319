"""The teacher's summaries as labels: written with resume, filtered by measures, joined, cut in halves.

Out of scope: how a summary is generated (generation.py, ctranslate.py), how a measure is computed (metrics.py).
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from datasets import Dataset, Features, Value
from transformers import GenerationConfig

from distill_utils import artifacts
from distill_utils.artifacts import InputError
from distill_utils.data.batches import document_id
from distill_utils.data.loading import data_fingerprint
from distill_utils.device import amp_dtype, device
from distill_utils.evaluation import ctranslate, generation, metrics
from distill_utils.models.loading import load_model, model_fingerprint, save_model
from distill_utils.models.loading import model_folder as find_folder

SHARD_SIZE = 512  # documents whose labels are written at a time, and lost by a kill at most
DECODING = ("num_beams", "max_new_tokens", "length_penalty", "no_repeat_ngram_size", "min_length")
SAMPLING = ("temperature", "top_k", "top_p")
LABEL_FEATURES = Features(
    {**{name: Value("string") for name in ("id", "document", "summary", "reference")}, "score": Value("float64")}
)
# Each measure of a label and the side on which a single number bounds it; a ratio is bounded on both.
MEASURES = {
    "reference_rouge2": "low",
    "copy_rate": "high",
    "length_ratio": "both",
    "repeating": "high",
    "unsupported_numbers": "high",
    "unsupported_names": "high",
}


def pseudo_labels(
    model_folder: Path | str, dataset: Dataset, folder: Path | str, *, max_source_length: int,
    num_candidates: int = 1, temperature: float | None = None, top_k: int | None = None, top_p: float | None = None,
    seed: int = 0, engine: str = "auto", prefix: str = "", quantization: str = "float32", batch_size: int = 32,
    **decoding: int | float | None,
) -> Dataset:  # fmt: skip
    """Label a data set with the teacher's summaries; called again after a kill, it resumes where it stopped.

    Returns columns id, document, summary (the pseudo-label), reference (the summary before) and score, as they are in
    pseudo_labels.jsonl of the folder; labels come in shards until it is there. The folder is an artifact's
    (`experiments.runs.label`), one for each set of arguments; another engine or data set is rejected there.
    Shleifer & Rush 2020, section 3.3.

    With several candidates a document has so many rows, one after another, best first, with the ids `<id>#0`,
    `<id>#1`, ...: as beam search ranks them (by log-probability over length ** length_penalty), or independent samples
    by score. Some may be the same text; `join_labels` drops those.

    Args:
        model_folder: a saved model, or a name that `models.loading.load_model` knows.
        num_candidates: labels per document; at most `num_beams` unless they are sampled.
        temperature: sample at this temperature in place of beams, from the `top_k` likeliest tokens or from the
            likeliest that together reach the probability `top_p`. The labels of a shard follow from `seed`, the shard
            and `batch_size`, whether or not a kill came between. Without it the teacher never samples.
        engine: "ctranslate2", "transformers", or "auto": CTranslate2 on the CPU where the model converts, else
            `generate`, in bf16 on CUDA.
        quantization: weights in CTranslate2; "int8" is faster and changes some labels.
        decoding: num_beams, max_new_tokens, length_penalty, no_repeat_ngram_size, min_length; else the teacher's own.
    """
    folder, source = Path(folder), find_folder(model_folder)
    if engine not in ("auto", "ctranslate2", "transformers"):
        raise InputError(f"engine {engine!r} is unknown: give auto, ctranslate2 or transformers")
    if not len(dataset):
        raise InputError("the data set to label is empty: give at least one document")
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    if not (source / "config.json").is_file():
        source = folder / "model"
        save_model(*load_model(str(model_folder)), source)
    config = artifacts.read_json(source / "config.json")
    generation.check_source_length(max_source_length, config.get("max_position_embeddings"))
    engine = _choose_engine(source, engine)
    decoding |= {"num_candidates": num_candidates, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    settings = {
        "engine": engine,
        "quantization": quantization if engine == "ctranslate2" else str(_dtype()),
        "max_source_length": max_source_length,
        "seed": None if temperature is None else seed,
        **checked_decoding(ctranslate.read_generation_config(source), config, **decoding),
        "prefix": prefix,
        "teacher": model_fingerprint(str(source), None),
        "data": data_fingerprint(dataset),
    }
    _check_settings(folder / "settings.json", settings)
    if not (folder / "pseudo_labels.jsonl").exists():
        shards = _write_shards(source, dataset, folder, settings, batch_size)
        artifacts.write_atomic(folder / "pseudo_labels.jsonl", b"".join(shard.read_bytes() for shard in shards))
    for left in ("shards", "ctranslate2", "model"):
        shutil.rmtree(folder / left, ignore_errors=True)
    return read_labels(folder)


def read_labels(folder: Path) -> Dataset:
    """Return all rows of a folder's pseudo_labels.jsonl, unusable ones included."""
    with open(folder / "pseudo_labels.jsonl", encoding="utf-8") as file:
        return Dataset.from_list([json.loads(line) for line in file], features=LABEL_FEATURES)


def join_labels(datasets: Sequence[Dataset]) -> tuple[Dataset, int]:
    """Join labels of several teachers, and the references, to one training set; return (rows, duplicates dropped).

    Of rows with the same document and summary the first stays; otherwise the order is that of the data sets. An id that
    came before gets `@` and the number of its data set (from 0, and again where that is taken too). Columns are those
    of pseudo-labels; in a data set of references a row's reference is its summary and it has no score.
    """
    if not datasets:
        raise InputError("no labels to join: give at least one data set")
    tables = [part.to_pandas().assign(number=number) for number, part in enumerate(datasets)]
    for table in tables:
        table["reference"] = table.get("reference", table["summary"])
        table["score"] = table.get("score", math.nan)
    rows = pd.concat(tables, ignore_index=True)
    kept = rows.drop_duplicates(["document", "summary"])
    ids: dict[str, None] = {}
    for name, number in zip(kept["id"], kept["number"], strict=True):
        while name in ids:
            name = f"{name}@{number}"
        ids[name] = None
    kept = kept.assign(id=list(ids))[list(LABEL_FEATURES)]
    joined = Dataset.from_pandas(kept, features=LABEL_FEATURES, preserve_index=False)
    return joined, len(rows) - len(kept)


def cross_fit_halves(dataset: Dataset, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Cut a data set into two halves, each to be labelled by a teacher trained on the other.

    The half follows from seed and id alone, not from order or company; candidates of a document (`<id>#0`, ...) stay
    together. The halves are equal up to chance.
    """
    names = (document_id(str(name)) for name in dataset["id"])
    sides = [hashlib.sha256(f"{seed}:{name}".encode()).digest()[0] % 2 for name in names]
    if len(set(sides)) < 2:
        raise InputError(f"{len(sides)} rows leave one half empty: give more rows or another seed")
    first, second = ([i for i, side in enumerate(sides) if side == wanted] for wanted in (0, 1))
    return dataset.select(first), dataset.select(second)


# ------------------------------------------------------------------------------------------------------------- shards


def _write_shards(model_folder, dataset, folder, settings, batch_size) -> list[Path]:
    """Write the shards that are not there yet, each whole: JSON Lines of documents, labels, references and scores."""
    total, candidates = len(dataset), settings["num_candidates"]
    shards = {start: folder / "shards" / f"{start:09d}.jsonl" for start in range(0, total, SHARD_SIZE)}
    missing = {start: path for start, path in shards.items() if not path.exists()}
    began, label = time.monotonic(), _labeller(model_folder, folder, settings, batch_size) if missing else None
    for start, path in missing.items():
        rows = dataset.select(range(start, min(start + SHARD_SIZE, total)))
        # The seed is the shard's own, so that a shard is the same whichever was written before it in this process.
        seed = int(artifacts.config_hash([settings["seed"], start])[:7], 16)
        options = {} if settings["temperature"] is None else {"seed": seed}
        options["progress"] = lambda done, _, start=start: artifacts.report_progress(
            folder, "pseudo-labels", start + done, total, "documents"
        )
        lines = []
        for i, (text, score) in enumerate(zip(*label(rows["document"], **options), strict=True)):
            row = rows[i // candidates]
            id_ = row["id"] if candidates == 1 else f"{row['id']}#{i % candidates}"
            values = {"id": id_, "document": row["document"], "summary": text, "reference": row["summary"]}
            lines.append(json.dumps(values | {"score": score}, allow_nan=False) + "\n")
        artifacts.write_atomic(path, "".join(lines))
        with open(folder / "seconds.txt", "a", encoding="utf-8") as file:  # of all shards, whatever comes between
            file.write(f"{time.monotonic() - began}\n")
        began = time.monotonic()
    return list(shards.values())


def _labeller(model_folder, folder, settings, batch_size) -> Callable:
    """Return the function (documents, progress) -> (summaries, scores) of the chosen engine."""
    options = {name: settings[name] for name in ("max_source_length", "prefix", "num_candidates", *DECODING)}
    if settings["engine"] == "ctranslate2":
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model_folder)
        converted = ctranslate.to_ctranslate2(model_folder, folder / "ctranslate2", settings["quantization"])
        options |= {name: settings[name] for name in SAMPLING}
        options["batch_tokens"] = batch_size * settings["max_source_length"]
        return partial(ctranslate.summarize_ctranslate2, converted, tokenizer, **options)
    model, tokenizer = load_model(str(model_folder), dtype=_dtype())
    model.to(device())
    options |= {"batch_size": batch_size, "dtype": torch.float32}  # no autocast: the weights have the dtype
    options["do_sample"] = settings["temperature"] is not None
    if options["do_sample"]:  # without top_k the library would fall back to one of its own
        neutral = {"top_k": settings["top_k"] or 0, "top_p": settings["top_p"] or 1.0}
        options |= {"temperature": settings["temperature"]} | neutral
    return partial(generation.summarize_with_scores, model, tokenizer, **options)


def _check_settings(path: Path, settings: dict) -> None:
    """Raise InputError where shards of other settings are there: as of an engine that the machine chose before."""
    found = artifacts.read_json(path) if path.exists() else settings
    for name, value in settings.items():
        if found.get(name) != value:
            raise InputError(f"{path.parent.name} was made with {name} {found.get(name)!r}, now {value!r}: delete it")
    artifacts.write_json(path, settings)


def checked_decoding(
    own: GenerationConfig, config: dict, *, num_candidates: int = 1, temperature: float | None = None,
    top_k: int | None = None, top_p: float | None = None, **decoding: int | float | None,
) -> dict:  # fmt: skip
    """Return all settings that labels are decoded with: those given, else a model's `own`.

    Raises InputError where lengths, or beams, candidates and sampling, do not go together.
    """
    if temperature is not None:  # the penalty is for beams
        decoding |= {"num_beams": decoding.get("num_beams") or 1, "length_penalty": 1.0}
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    settings = {"num_candidates": num_candidates, **sampling, **generation.decoding_settings(own, **decoding)}
    vocab_size, positions = config.get("vocab_size"), config.get("max_position_embeddings")
    num_beams, shortest, longest = (settings[name] for name in ("num_beams", "min_length", "max_new_tokens"))
    if positions and longest > positions:
        raise InputError(f"max_new_tokens {longest} is beyond the model's {positions} positions: lower it")
    if shortest > longest:
        raise InputError(
            f"min_length {shortest} is beyond max_new_tokens {longest}: raise max_target_length or lower it"
        )
    if num_candidates < 1 or (temperature is None and num_candidates > num_beams):
        most = f"1 to {num_beams}, more num_beams, or a temperature to sample" if temperature is None else "at least 1"
        raise InputError(f"num_candidates {num_candidates} of {num_beams} beams: give {most}")
    if temperature is None and (top_k is not None or top_p is not None):
        raise InputError(f"top_k {top_k} and top_p {top_p} are for sampling: give a temperature too, such as 1.0")
    if temperature is not None and temperature <= 0:
        raise InputError(f"temperature {temperature} is not positive: give more than 0, or leave it out for beams")
    if temperature is not None and num_beams > 1:
        raise InputError(f"num_beams {num_beams} with a temperature: sampling has no beams, leave num_beams out")
    if top_k is not None and top_p is not None:
        raise InputError(f"top_k {top_k} and top_p {top_p} together mean different things to the engines: give one")
    if top_k is not None and not 1 <= top_k <= (vocab_size or top_k):
        raise InputError(f"top_k {top_k} is outside 1 to {vocab_size}, the vocabulary: change it")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p {top_p} is not a probability above 0: give at most 1")
    return settings


def _choose_engine(model_folder: Path, engine: str) -> str:
    if engine == "transformers" or (engine == "auto" and torch.cuda.is_available()):
        return "transformers"
    try:
        ctranslate.check_convertible(model_folder)
    except ValueError:
        if engine == "ctranslate2":
            raise
        return "transformers"
    return "ctranslate2"


def _dtype() -> torch.dtype:
    """Weights of the teacher under `generate`: bf16 on CUDA where it has it, float32 on the CPU."""
    return (amp_dtype() if torch.cuda.is_available() else None) or torch.float32


# ------------------------------------------------------------------------------------------------------------ filters


def measure_labels(dataset: Dataset, names: Sequence[str] = tuple(MEASURES)) -> pd.DataFrame:
    """Return the named measures, one row per label.

    `reference_rouge2`: ROUGE-2 F1 x 100 against the column `reference` (Distil-Whisper filters by an error rate so).
    `copy_rate`: share of the label's words in fragments copied from the document, single words included (coverage).
    `length_ratio`: words over those of the reference, or of the document where the data set has no references.
    `repeating`: 1 or 0, by `generation.is_repeating`. `unsupported_numbers`, `unsupported_names`: share of those
    written that the document lacks, 0 where none is written. An empty label has copy rate 0.
    Raises InputError for `reference_rouge2` unless every row has a reference.
    """
    labels = dataset["summary"]
    references = dataset["reference"] if "reference" in dataset.column_names else [""] * len(dataset)
    missing = sum(not (reference or "").strip() for reference in references)
    measured = pd.DataFrame({"repeating": [float(generation.is_repeating(text)) for text in labels]})
    if "reference_rouge2" in names:
        if missing:
            raise InputError(f"reference_rouge2 needs references, {missing} of {len(dataset)} lack one: leave it out")
        measured["reference_rouge2"] = metrics.rouge_scores(labels, references)["rouge2"]
    if not set(names) <= set(measured):
        documents = dataset["document"]
        pairs = zip(documents, labels, strict=True)
        found = pd.DataFrame([metrics.text_diagnostics([document], [text]) for document, text in pairs], dtype=float)
        lengths = [len(generation.words(text)) for text in (documents if missing else references)]
        measured["copy_rate"] = found["coverage"].fillna(0.0)
        measured["length_ratio"] = found["words"] / pd.Series(lengths).clip(lower=1)
        measured["unsupported_numbers"] = 1 - found["numbers_supported"].fillna(1.0)
        measured["unsupported_names"] = 1 - found["names_supported"].fillna(1.0)
    return measured[list(names)]


def filter_labels(dataset: Dataset, thresholds: dict[str, float | list[float]]) -> tuple[Dataset, dict[str, int]]:
    """Drop empty labels, then those beyond each threshold, in the order given; return (kept rows, counts by reason).

    A threshold is [low, high], both allowed values, or one number: the lowest for `reference_rouge2`, the highest for
    the others (`length_ratio` takes two). `counts` has total, kept, empty and one number per threshold: the labels that
    it removed first.
    Raises InputError for an unknown name, a threshold that is no range, missing references, and when no label is left.
    """
    bounds = bounds_of(thresholds)
    measured = measure_labels(dataset, list(thresholds))
    reasons = pd.Series(["empty" if generation.is_empty(text) else "kept" for text in dataset["summary"]])
    for name, limits in bounds.items():
        reasons[(reasons == "kept") & ~measured[name].between(*limits)] = name
    counts = {"total": len(reasons)}
    counts |= {name: int((reasons == name).sum()) for name in ("kept", "empty", *thresholds)}
    if not counts["kept"]:
        raise InputError(f"no pseudo-label is left, {counts}: widen a threshold, or train the teacher first")
    return dataset.select(reasons.index[reasons == "kept"].tolist()), counts


def threshold_rows(dataset: Dataset, thresholds: dict[str, float | list[float]]) -> pd.DataFrame:
    """Return rows for a histogram per measure, one per label: measure, value, removed, low, high, share_removed.

    `removed` and `share_removed` are those of this threshold alone, empty labels left out before; an absent bound is
    infinite.
    """
    bounds = bounds_of(thresholds)
    measured = measure_labels(dataset, list(thresholds))
    measured = measured[[not generation.is_empty(text) for text in dataset["summary"]]]
    tables = []
    for name, (low, high) in bounds.items():
        removed = ~measured[name].between(low, high)
        table = pd.DataFrame({"measure": name, "value": measured[name], "removed": removed, "low": low, "high": high})
        tables.append(table.assign(share_removed=removed.mean()))
    return pd.concat(tables, ignore_index=True)


def bounds_of(thresholds: dict[str, float | list[float]]) -> dict[str, tuple[float, float]]:
    """Return the lowest and highest allowed value of each threshold, or reject it."""
    bounds = {}
    for name, value in thresholds.items():
        if name not in MEASURES:
            raise InputError(f"label filter {name!r} is unknown: give some of {', '.join(MEASURES)}")
        if isinstance(value, (int, float)) and MEASURES[name] != "both":
            value = [value, float("inf")] if MEASURES[name] == "low" else [float("-inf"), value]
        numbers = isinstance(value, (list, tuple)) and all(isinstance(bound, (int, float)) for bound in value)
        if not numbers or len(value) != 2 or not value[0] <= value[1]:
            raise InputError(f"threshold {value!r} of {name} is not a range: give [low, high], such as [0.5, 2.0]")
        bounds[name] = tuple(value)
    return bounds
