"""One student, described by one dataclass: cut, labelled, trained, evaluated; each step an artifact under runs/.

Not here: the objectives, the loop and the metrics themselves. This file only joins them.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from distill_utils import data, objectives, students
from distill_utils.artifacts import (
    InputError,
    artifact,
    autocast_dtype,
    config_hash,
    device,
    file_hash,
    read_json,
    report_progress,
    seed_everything,
    write_atomic,
)
from distill_utils.evaluation import evaluate_summaries, measure_speed
from distill_utils.generation import summarize
from distill_utils.pseudo_labels import filter_pseudo_labels, pseudo_labels
from distill_utils.training import Training, choose_attention, fit, train_mode

METHODS = ("sft", "kd", "pl", "pl_kl")
ON_PSEUDO_LABELS = ("pl", "pl_kl")


@dataclass(frozen=True)
class StudentRun:
    """What determines one trained student; JSON-serialisable by `dataclasses.asdict`."""

    method: str  # one of METHODS
    shape: str  # "<encoder layers>-<decoder layers>"
    teacher: str  # shipped name, folder or hub name
    max_source_length: int  # tokens
    max_target_length: int  # tokens
    training: Training
    prefix: str = ""  # written before every document, for T5
    freeze_encoder: bool = True  # where the student keeps the whole encoder
    freeze_embeddings: bool = True
    ce_weight: float = 0.2  # KD: labels
    kl_weight: float = 0.8  # KD: the teacher's distribution
    hidden_weight: float = 3.0  # KD: the teacher's hidden states
    temperature: float = 2.0  # KD, PL+KL: softens both distributions
    label_settings: dict = field(default_factory=dict)  # PL: decoding settings of the teacher

    @property
    def name(self) -> str:
        return f"{self.method}-{self.shape}-s{self.training.seed}"


def grid(base: StudentRun, methods: list[str], shapes: list[str], seeds: list[int]) -> list[StudentRun]:
    """Return one run for every method, shape and seed: the same description but for these."""
    return [
        replace(base, method=method, shape=shape, training=replace(base.training, seed=seed))
        for shape in shapes
        for method in methods
        for seed in seeds
    ]


def parse_shape(shape: str, teacher) -> tuple[int, int]:
    """Return (encoder layers, decoder layers) of a shape like "6-3", checked against the teacher's depths."""
    try:
        encoder, decoder = (int(part) for part in shape.split("-"))
    except ValueError as error:
        raise InputError(
            f"student shape {shape!r} is not understood: write encoder-decoder layers, as in 6-3"
        ) from error
    students.layer_map(len(students.encoder_layers(teacher)), encoder)
    students.layer_map(len(students.decoder_layers(teacher)), decoder)
    return encoder, decoder


def check_runs(runs: list[StudentRun], teacher) -> None:
    """Refuse unknown methods, impossible shapes and repeated runs before anything is trained."""
    if not runs:
        raise InputError("there is nothing to train: name at least one method, one student shape and one seed")
    for run in runs:
        if run.method not in METHODS:
            raise InputError(f"method {run.method!r} is unknown: use {', '.join(METHODS)}")
        parse_shape(run.shape, teacher)
    if len({run.name for run in runs}) < len(runs):
        raise InputError("a method, student shape or seed is named twice: name each once")
    positions = getattr(teacher.config, "max_position_embeddings", None)
    longest = max(max(run.max_source_length, run.max_target_length) for run in runs)
    if positions and -(-longest // 8) * 8 > positions:  # batches are padded to multiples of 8
        raise InputError(
            f"length {longest} exceeds the teacher's {positions} positions: lower max_source_length or "
            "max_target_length"
        )


def model_fingerprint(name_or_path: str, model) -> str:
    """Return a short hash that changes with a model's weights: of its file when local, of its commit on the hub."""
    folder = students.ASSETS / name_or_path
    folder = folder if folder.exists() else Path(name_or_path).expanduser()
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if files:
        return config_hash([file_hash(file) for file in files])
    return str(getattr(model.config, "_commit_hash", None) or config_hash(model.config.to_dict()))[:10]


def cut_student(run: StudentRun, teacher) -> tuple[torch.nn.Module, dict]:
    """Return the untrained student of a run, with its frozen parts, and the arguments its objective needs."""
    encoder, decoder = parse_shape(run.shape, teacher)
    student, encoder_ids, decoder_ids = students.init_student(teacher, encoder, decoder)
    depths = len(students.encoder_layers(teacher)), len(students.decoder_layers(teacher))
    # A cut encoder has to learn to close its gaps; only a whole one can stay as it is.
    students.freeze(student, encoder=run.freeze_encoder and encoder == depths[0], embeddings=run.freeze_embeddings)
    shared = students.has_teacher_encoder(student, teacher)
    if run.method == "kd":
        options = {
            "encoder_layer_ids": students.supervision_map(depths[0], encoder),
            "decoder_layer_ids": students.supervision_map(depths[1], decoder),
            "ce_weight": run.ce_weight,
            "kl_weight": run.kl_weight,
            "hidden_weight": run.hidden_weight,
            "temperature": run.temperature,
            "shared_encoder": shared,
        }
    elif run.method == "pl_kl":
        options = {"temperature": run.temperature, "shared_encoder": shared}
    else:
        options = {}
    return student, {"options": options, "encoder_ids": encoder_ids, "decoder_ids": decoder_ids, "shared": shared}


def objective_of(method: str):
    """Return the objective function of a method; PL is SFT on the teacher's summaries."""
    return {"sft": objectives.sft, "kd": objectives.kd, "pl": objectives.sft, "pl_kl": objectives.pl_kl}[method]


# ------------------------------------------------------------------------------------------------------------- steps


def label(run: StudentRun, teacher, train: Dataset) -> Path:
    """Return the artifact with the teacher's summaries of the training documents (pseudo_labels.jsonl)."""
    settings = {
        "teacher": model_fingerprint(run.teacher, teacher),
        "data": data.data_fingerprint(train),
        "max_source_length": run.max_source_length,
        "prefix": run.prefix,
        **run.label_settings,
    }

    def build(folder: Path) -> dict:
        began = time.monotonic()
        labels = pseudo_labels(
            students.ASSETS / run.teacher if run.teacher in students.shipped_models() else run.teacher,
            train, folder, max_source_length=run.max_source_length, prefix=run.prefix, **run.label_settings,
        )  # fmt: skip
        seconds = time.monotonic() - began
        _, counts = filter_pseudo_labels(labels)
        return {"counts": counts, "seconds": round(seconds, 2), "documents_per_second": round(len(train) / seconds, 2)}

    return artifact("pseudo-labels", settings, build)


def labelled(folder: Path) -> Dataset:
    """Return the usable pseudo-labels of an artifact: id, document, summary (the teacher's), reference, score."""
    with open(folder / "pseudo_labels.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return filter_pseudo_labels(Dataset.from_list(rows))[0]


def train_student(run: StudentRun, teacher, tokenizer, train: Dataset, validation: Dataset) -> Path:
    """Return the artifact of one trained student: student/, history.csv, results.json with costs.

    `train` holds the references; methods on pseudo-labels replace them by the teacher's summaries. `validation` is
    the same for every method: cross-entropy of the references and KL to the teacher at temperature 1.
    """
    settings = {
        **asdict(run),
        "teacher": model_fingerprint(run.teacher, teacher),
        "data": data.data_fingerprint(train),
        "validation": data.data_fingerprint(validation),
    }

    def build(folder: Path) -> dict:
        rows = labelled(label(run, teacher, train)) if run.method in ON_PSEUDO_LABELS else train
        seed_everything(run.training.seed)
        student, cut = cut_student(run, teacher)
        choose_attention(student, run.max_source_length)
        lengths = (run.max_source_length, run.max_target_length, run.prefix)
        batches = data.pair_stream(
            data.tokenize_pairs(rows, tokenizer, *lengths), tokenizer.pad_token_id, run.training.batch_size,
            run.training.seed, run.training.micro_batch_size,
        )  # fmt: skip
        held_out = data.batch_list(data.tokenize_pairs(validation, tokenizer, *lengths), tokenizer.pad_token_id, 32)
        objective = partial(objective_of(run.method), **cut["options"])
        began = time.monotonic()
        history = fit(
            student, lambda model, batch: objective(model, teacher, batch), batches, run.training, folder,
            partial(held_out_losses, teacher=teacher, batches=held_out, shared_encoder=cut["shared"]), stage=run.name,
        )  # fmt: skip
        student.set_attn_implementation("sdpa")  # what generation is fastest with; nothing of it is saved
        students.save_model(student.to("cpu"), tokenizer, folder / "student")
        return {
            "name": run.name,
            "parameters": students.count_parameters(student),
            "encoder_layer_ids": cut["encoder_ids"],
            "decoder_layer_ids": cut["decoder_ids"],
            "shared_encoder": cut["shared"],
            "num_train": len(rows),
            "seconds": round(time.monotonic() - began, 2),
            "final": history[-1],
        }

    return artifact(run.name, settings, build)


@torch.no_grad()
def held_out_losses(student, teacher, batches: list[dict], shared_encoder: bool = False) -> dict:
    """Return validation_ce (nats per reference token) and validation_kl (KL(teacher || student), nats) over batches."""
    sums, tokens = {"ce_loss": 0.0, "kl_loss": 0.0}, 0
    for batch in batches:
        moved = {k: v.to(student.device) if torch.is_tensor(v) else v for k, v in batch.items()}
        count = int((batch["labels"] != objectives.IGNORED).sum())
        losses = objectives.pl_kl(student, teacher, moved, temperature=1.0, shared_encoder=shared_encoder)
        for name in sums:
            sums[name] += float(losses[name]) * count
        tokens += count
    return {"validation_ce": sums["ce_loss"] / tokens, "validation_kl": sums["kl_loss"] / tokens}


def evaluate_model(
    name: str, model, tokenizer, fingerprint: str, test: Dataset, *, max_source_length: int, prefix: str = "",
    baseline: Path | None = None, num_speed: int = 8, **generation_settings,
) -> Path:  # fmt: skip
    """Return the artifact of one model's test: predictions.jsonl, and results.json with quality and speed.

    Quality: ROUGE with 95 % bootstrap intervals over documents, a paired test against `baseline` (the teacher's
    artifact) and text diagnostics. Speed is measured on the first `num_speed` documents.
    """
    settings = {
        "model": fingerprint,
        "data": data.data_fingerprint(test),
        "max_source_length": max_source_length,
        "prefix": prefix,
        "baseline": baseline.name if baseline else None,
        "num_speed": num_speed,
        **generation_settings,
    }

    def build(folder: Path) -> dict:
        documents, references = list(test["document"]), list(test["summary"])

        def progress(done: int, total: int) -> None:
            report_progress(folder, f"evaluating {name}", done, total, "documents")

        options = {"max_source_length": max_source_length, "prefix": prefix}
        predictions = summarize(
            model, tokenizer, documents, **options, batch_size=32, progress=progress, **generation_settings
        )
        against = read_scores(baseline) if baseline else None
        row, scores = evaluate_summaries(documents, predictions, references, against)
        speed = measure_speed(model, tokenizer, documents[:num_speed], **options, **generation_settings)
        lines = [
            json.dumps({"id": i, "document": d, "reference": r, "prediction": p}, ensure_ascii=False)
            for i, d, r, p in zip(test["id"], documents, references, predictions, strict=True)
        ]
        write_atomic(folder / "predictions.jsonl", "\n".join(lines) + "\n")
        write_atomic(
            folder / "scores.json", json.dumps({k: [round(float(x), 4) for x in v] for k, v in scores.items()})
        )
        return {**row, **speed}

    return artifact(f"test-{name}", settings, build)


def read_predictions(folder: Path) -> list[dict]:
    """Return the rows id, document, reference, prediction of a test artifact."""
    with open(folder / "predictions.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_scores(folder: Path) -> dict[str, np.ndarray]:
    """Return the ROUGE scores of a test artifact, one value a document."""
    return {name: np.asarray(values) for name, values in read_json(folder / "scores.json").items()}


# ------------------------------------------------------------------------------------------------------- before the run


def forecast(plan: list[StudentRun], teacher, tokenizer, train: Dataset) -> list[dict]:
    """Predict seconds, memory and disk of each method and shape, before anything is trained.

    Seconds come from the second of two optimizer steps' forward and backward passes on a batch of typical length;
    memory counts weights, gradients and the optimizer's two moments in float32; disk the student and one checkpoint.
    """
    rows = []
    for run in {(run.method, run.shape): run for run in plan}.values():
        student, cut = cut_student(run, teacher)
        student.to(device())
        choose_attention(student, run.max_source_length)
        train_mode(student)
        lengths = (run.max_source_length, run.max_target_length, run.prefix)
        sample = data.tokenize_pairs(train.select(range(min(256, len(train)))), tokenizer, *lengths)
        batch = data.pair_stream(sample, tokenizer.pad_token_id, run.training.batch_size, 0)(0)
        batch = {k: v.to(student.device) if torch.is_tensor(v) else v for k, v in batch[0].items()}
        half = autocast_dtype() if run.training.precision == "auto" else None
        for _ in range(2):
            began = time.perf_counter()
            with torch.autocast(student.device.type, half, enabled=half is not None):
                losses = objective_of(run.method)(student, teacher, batch, **cut["options"])
            losses["loss"].backward()
            losses["loss"].item()  # waits for the device
            seconds = time.perf_counter() - began
        counts = students.count_parameters(student)
        rows.append(
            {
                "student": f"{run.method} {run.shape}",
                "steps": run.training.max_steps,
                "predicted_seconds": seconds * run.training.max_steps,
                "memory (MB)": (4 * counts["total"] + 12 * counts["trainable"]) / 2**20,
                "disk (MB)": (8 * counts["total"] + 8 * counts["trainable"]) / 2**20,
            }
        )
    return rows
