"""Evaluate a model on a test split: its summaries, their scores, and how fast it writes them.

Out of scope: what the machine could do at best (planning/plan.py).
"""

import json
import math
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset

from distill_utils.artifacts import artifact, read_json, report_progress, write_atomic, write_json
from distill_utils.data.loading import data_fingerprint
from distill_utils.device import eval_mode, mixed_precision, timed
from distill_utils.evaluation import tasks
from distill_utils.evaluation.ctranslate import converted_decoder, writes_as_generate
from distill_utils.evaluation.generation import check_source_length, summarize
from distill_utils.evaluation.metrics import evaluate_summaries, spans_to_mark

MANY_DOCUMENTS = 80  # from here on a conversion for CTranslate2, half a second, is worth its faster decoding


def engine_type(model, num_documents: int, **decoding) -> str:
    """Return the type in which CTranslate2 decodes many documents instead of `generate`, "" where it does not."""
    return "float32" if num_documents >= MANY_DOCUMENTS and writes_as_generate(model, **decoding) else ""


def decoder(model, tokenizer, folder: Path, quantization: str) -> Callable:
    """Return a function like `summarize` of an `engine_type`; the folder takes the converted model."""
    if quantization:
        return converted_decoder(model, tokenizer, folder, quantization)[0]
    return partial(summarize, model, tokenizer)


def evaluate_model(
    name: str, model, tokenizer, fingerprint: str, test: Dataset, *, max_source_length: int, prefix: str = "",
    baseline: Path | None = None, num_speed: int = 8, int8: bool = False, **generation_settings,
) -> Path:  # fmt: skip
    """Return the artifact of one model's test: predictions.jsonl, and results.json with quality and speed.

    Quality: ROUGE with 95 % bootstrap intervals over documents, a paired test against `baseline` (the teacher's
    artifact) and text diagnostics. The summaries are those of `generate`, or of CTranslate2 where that stands for it
    (`engine_type`) and with `int8`. Speed, of `model` itself by `generate`, is measured on the first `num_speed`
    documents, with 0 not at all.
    """
    check_source_length(max_source_length, getattr(model.config, "max_position_embeddings", None))
    options = {"max_source_length": max_source_length, "prefix": prefix, **generation_settings}
    settings = {"model": fingerprint, "data": data_fingerprint(test), "num_speed": num_speed, **options}
    quantization = "int8" if int8 else engine_type(model, len(test), **generation_settings)
    settings |= {"baseline": baseline.name if baseline else None}
    settings |= {"quantization": quantization} if quantization else {}

    def build(folder: Path) -> dict:
        documents, references = list(test["document"]), list(test["summary"])
        progress = partial(report_progress, folder, f"evaluating {name}", unit="documents")
        engine = folder / "engine"  # not in the system's temporary folder, which a large model may fill
        predictions = decoder(model, tokenizer, engine, quantization)(documents, progress=progress, **options)
        shutil.rmtree(engine, ignore_errors=True)
        against = read_scores(baseline) if baseline else None
        row, scores = evaluate_summaries(documents, predictions, references, against)
        if num_speed:
            row |= measure_speed(model, tokenizer, documents[:num_speed], **options)
        columns = {"id": list(test["id"]), "document": documents, "reference": references, "prediction": predictions}
        lines = pd.DataFrame(columns).to_json(orient="records", lines=True, force_ascii=False)
        write_atomic(folder / "predictions.jsonl", lines)
        rounded = {metric: [round(float(score), 4) for score in values] for metric, values in scores.items()}
        write_atomic(folder / "scores.json", json.dumps(rounded))
        return row

    return artifact(f"test-{name}", settings, build)


def evaluate_labels(
    name: str, model, tokenizer, fingerprint: str, task: str, test: Dataset, *, max_source_length: int
) -> Path:
    """Return the artifact of one model's test on a task with labels: results.json, and scores.json for paired tests."""
    settings = {"model": fingerprint, "task": task, "data": data_fingerprint(test), "length": max_source_length}
    settings |= label_settings(task)

    def build(folder: Path) -> dict:
        progress = partial(report_progress, folder, f"evaluating {name}", unit="documents")
        found = tasks.predict_labels(model, tokenizer, test, task, max_source_length, progress=progress)
        return save_label_scores(folder, task, found, test)

    return artifact(f"test-{name}", settings, build)


def label_settings(task: str) -> dict:
    """Return what sets a task's tests apart from those of before, which hold correct answers for F1, too."""
    return {} if tasks.TASKS[task].metrics == ("accuracy",) else {"values": "score"}


def save_label_scores(folder: Path, task: str, found: Sequence[str], test: Dataset) -> dict:
    """Write scores.json, a `tasks.document_values` per row, and return the task's metrics of the labels found."""
    values = tasks.document_values(task, found, test["label"]).tolist()
    write_json(folder / "scores.json", {"score" if label_settings(task) else "correct": values})
    return tasks.scores(task, found, test["label"])


def read_predictions(folder: Path) -> list[dict]:
    """Return the rows id, document, reference, prediction of a test artifact."""
    with open(folder / "predictions.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_scores(folder: Path) -> dict[str, np.ndarray]:
    """Return the scores of a test artifact, {metric: one per document}."""
    return {name: np.asarray(values) for name, values in read_json(folder / "scores.json").items()}


def side_by_side(
    teacher_test: Path, tested: Mapping[str, Path], num: int, seed: int, by_score: bool = False
) -> list[dict]:
    """Return `num` test documents with the reference and what the teacher and each student wrote.

    They are drawn at random; `by_score`: a quarter are the hardest, by the mean ROUGE-2 of all models, a quarter the
    easiest, and `drawn` says which. `marks` are the `spans_to_mark` of each student's text, beside the teacher's.
    """
    folders = {"teacher": teacher_test, **tested}
    written = {name: read_predictions(folder) for name, folder in folders.items()}
    texts, kinds = written["teacher"], {}
    order = random.Random(seed).sample(range(len(texts)), len(texts))
    if by_score:
        means = np.mean([read_scores(folder)["rouge2"] for folder in folders.values()], axis=0)
        ranked, few = np.argsort(means, kind="stable").tolist(), min(num, len(texts)) // 4
        kinds = dict.fromkeys(ranked[:few], "hardest") | dict.fromkeys(ranked[len(ranked) - few :], "easiest")
        order = [*kinds, *(i for i in order if i not in kinds)]
    rows = []
    for i in order[:num]:
        document, teacher = texts[i]["document"], texts[i]["prediction"]
        row = {"document": document, "reference": texts[i]["reference"]}
        row |= {name: found[i]["prediction"] for name, found in written.items()}
        row["marks"] = {name: spans_to_mark(document, row[name], teacher) for name in written}
        rows.append(row | ({"drawn": f"{kinds.get(i, 'random')}, {means[i]:.0f}"} if by_score else {}))
    return rows


def interleaved_latency_ms(
    runs: Mapping[object, Callable[[list[str]], object]], documents: Sequence[str], device: torch.device,
    repeats: int = 3, max_seconds: float = 60.0,
) -> dict[object, float]:  # fmt: skip
    """Return milliseconds a document of several functions of a list with one document.

    They take turns document by document, so that a busy moment of the machine meets them all; of repeats the best
    counts, since what disturbs a measurement only adds to it, and of documents the median. No repeat begins after
    `max_seconds`: large models on a processor are slow, and their times steady.
    """
    best = {name: [math.inf] * len(documents) for name in runs}
    began = time.perf_counter()
    for run in runs.values():  # a warm-up: kernels, caches, allocator
        run(documents[:1])
    for repeat in range(repeats):
        if repeat and time.perf_counter() - began > max_seconds:
            break
        for i, text in enumerate(documents):
            for name, run in runs.items():
                best[name][i] = min(best[name][i], timed(partial(run, [text]), device))
    return {name: 1000 * float(np.median(times)) for name, times in best.items()}


def decoding_runs(model, tokenizer, num_new_tokens: int, options: dict, **generation_settings) -> dict[str, Callable]:
    """Return functions of documents to time: a model's own decoding, and greedily exactly `num_new_tokens` tokens."""
    # Equal limits force the number of tokens; min_length counts the decoder's start token, max_new_tokens does not.
    fixed = {"num_beams": 1, "max_new_tokens": num_new_tokens, "min_length": num_new_tokens + 1}
    decode = partial(summarize, model, tokenizer, **options)
    return {"latency_ms": partial(decode, **generation_settings), "ms_per_token": partial(decode, **fixed)}


def measure_speed(
    model, tokenizer, documents: Sequence[str], *, max_source_length: int, num_new_tokens: int = 16, repeats: int = 3,
    batch_size: int = 16, prefix: str = "", **generation_settings,
) -> dict[str, float | None]:  # fmt: skip
    """Time a model on documents; every number is after one untimed pass, and tokenisation is part of it.

    `latency_ms`: batch 1, the model's own decoding (or the settings given), as `interleaved_latency_ms` measures it.
    `throughput`: summaries a second in length-sorted batches, the same decoding, best of the repeats; not of one.
    `ms_per_token`: batch 1, greedy, exactly `num_new_tokens` tokens, whole time (encoder too) over tokens.
    `encoder_ms`: the share of a latency that no shallower decoder removes. `peak_memory_gb`: most that CUDA held
    meanwhile, 2**30 bytes; None on the CPU, where the rest of the process cannot be separated from it.
    """
    if not documents:
        raise ValueError("no documents to time: give at least one")
    device, on_cuda = model.device, model.device.type == "cuda"
    options = {"max_source_length": max_source_length, "prefix": prefix, "batch_size": batch_size}
    runs = decoding_runs(model, tokenizer, num_new_tokens, options, **generation_settings)
    own = runs["latency_ms"]

    @torch.inference_mode()
    def encode(texts: list[str]) -> None:
        inputs = tokenizer(prefix + texts[0], truncation=True, max_length=max_source_length, return_tensors="pt")
        with mixed_precision(device, "auto" if on_cuda else None):
            model.get_encoder()(inputs["input_ids"].to(device), inputs["attention_mask"].to(device))

    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    with eval_mode(model):
        own(documents)
        row = interleaved_latency_ms(runs | {"encoder_ms": encode}, documents, device, repeats)
        row["ms_per_token"] /= num_new_tokens
        if len(documents) > 1:
            row["throughput"] = len(documents) / min(timed(partial(own, documents), device) for _ in range(repeats))
    row["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30 if on_cuda else None
    return row
