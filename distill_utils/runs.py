"""One student, described by one dataclass: cut, labelled, trained, evaluated; each step an artifact under runs/.

Not here: the objectives, the loop and the metrics themselves. This file only joins them.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from distill_utils import data, objectives, students
from distill_utils.artifacts import (
    InputError,
    artifact,
    config_hash,
    device,
    file_hash,
    read_json,
    report_progress,
    seed_everything,
    write_atomic,
)
from distill_utils.evaluation import decoding_runs, evaluate_summaries, measure_speed, ms_in_turns
from distill_utils.generation import summarize
from distill_utils.label_filters import bounds_of, filter_labels
from distill_utils.pseudo_labels import cross_fit_halves, filter_pseudo_labels, join_labels, pseudo_labels
from distill_utils.targets import check_targets, with_targets, write_targets
from distill_utils.training import Training, choose_attention, fit

METHODS = ("sft", "kd", "pl", "pl_kl", "pl_gold", "on_policy", "kd_cached")
ON_PSEUDO_LABELS = ("pl", "pl_kl", "pl_gold")
CROSS_FIT = ("", "other", "own")


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
    temperature: float = 2.0  # where the teacher's distribution is used: softens both
    divergence: str = "forward_kl"  # one of losses.DIVERGENCES
    jsd_beta: float = 0.5  # share of the teacher in the mixture of "jsd"
    match: str = "outputs"  # KD: compare what layers return, or "inputs", what they get, as published
    supervise_forward: bool = True  # KD: imitate the end of the block that a layer replaces, not the copied layer
    normalize_hidden: bool = True  # KD: bring every token's hidden state to mean 0 and variance 1 first
    teacher_dropout: bool = False  # KD: the teacher's dropout on, as in the published code
    on_policy_share: float = 0.5  # on-policy: share of a batch whose targets are the student's own samples
    top_k: int = 32  # cached KD: token ids kept of each of the teacher's distributions
    target_samples: int = 0  # cached KD: draws instead of the top ids, 0 = the top ids
    label_settings: dict = field(default_factory=dict)  # PL: decoding settings of the teacher
    label_filters: dict = field(default_factory=dict)  # PL: thresholds by measure (label_filters.py)
    label_teachers: list[str] = field(default_factory=list)  # PL: further teachers that label the same documents
    cross_fit: str = ""  # PL: label a half by a teacher trained on the "other" half, or on its "own"
    cross_fit_base: str = ""  # the pre-trained model that both such teachers start from
    cross_fit_steps: int = 300  # updates of such a teacher
    encoder_layer_ids: list[int] | None = None  # the teacher's layers to copy; None = `students.layer_map`
    decoder_layer_ids: list[int] | None = None
    variant: str = ""  # what sets this run apart from another of its method and shape, in names and tables

    @property
    def name(self) -> str:
        variant = "-" + re.sub(r"[^A-Za-z0-9.]+", "_", self.variant).strip("_") if self.variant else ""
        return f"{self.method}-{self.shape}{variant}-s{self.training.seed}"


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
        objectives.check_options(run.divergence, run.jsd_beta, run.match, run.on_policy_share)
        if run.cross_fit not in CROSS_FIT:
            raise InputError(f"cross_fit {run.cross_fit!r} is unknown: use other, own or leave it empty")
        if run.cross_fit and not run.cross_fit_base:
            raise InputError("cross_fit needs cross_fit_base: name the model that the teacher was fine-tuned from")
        if not 1 <= run.top_k <= teacher.config.vocab_size:
            raise InputError(f"top_k {run.top_k} is impossible: give 1 to the vocabulary's {teacher.config.vocab_size}")
        bounds_of(run.label_filters)
        encoder, decoder = parse_shape(run.shape, teacher)
        for name, layers, stack in (
            ("encoder_layer_ids", encoder, students.encoder_layers(teacher)),
            ("decoder_layer_ids", decoder, students.decoder_layers(teacher)),
        ):
            if getattr(run, name) is not None:
                students.check_layer_ids(name, getattr(run, name), layers, len(stack))
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
    student, encoder_ids, decoder_ids = students.init_student(
        teacher, encoder, decoder, run.encoder_layer_ids, run.decoder_layer_ids
    )
    depths = len(students.encoder_layers(teacher)), len(students.decoder_layers(teacher))
    # A cut encoder has to learn to close its gaps; only a whole one can stay as it is.
    students.freeze(student, encoder=run.freeze_encoder and encoder == depths[0], embeddings=run.freeze_embeddings)
    shared = students.has_teacher_encoder(student, teacher)
    divergence = {"temperature": run.temperature, "divergence": run.divergence, "jsd_beta": run.jsd_beta}
    options = {
        "sft": {},
        "kd": {
            **divergence,
            "encoder_layer_ids": students.supervision_map(depths[0], encoder) if run.supervise_forward else encoder_ids,
            "decoder_layer_ids": students.supervision_map(depths[1], decoder) if run.supervise_forward else decoder_ids,
            "ce_weight": run.ce_weight,
            "kl_weight": run.kl_weight,
            "hidden_weight": run.hidden_weight,
            "match": run.match,
            "normalize_hidden": run.normalize_hidden,
            "teacher_dropout": run.teacher_dropout,
            "shared_encoder": shared,
        },
        "pl": {},
        "pl_gold": {},
        "pl_kl": {**divergence, "shared_encoder": shared},
        "on_policy": {
            **divergence,
            "share": run.on_policy_share,
            "ce_weight": run.ce_weight,
            "kl_weight": run.kl_weight,
            "max_new_tokens": run.max_target_length,
            "shared_encoder": shared,
        },
        "kd_cached": {"ce_weight": run.ce_weight, "kl_weight": run.kl_weight},
    }[run.method]
    return student, {"options": options, "encoder_ids": encoder_ids, "decoder_ids": decoder_ids, "shared": shared}


def objective_of(method: str):
    """Return the objective function of a method; PL is SFT on the teacher's summaries."""
    return getattr(objectives, {"pl": "sft", "pl_gold": "sft"}.get(method, method))


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


def labelled(folder: Path, filters: dict | None = None) -> Dataset:
    """Return the usable pseudo-labels of an artifact: id, document, summary (the teacher's), reference, score."""
    with open(folder / "pseudo_labels.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    usable = filter_pseudo_labels(Dataset.from_list(rows))[0]
    return filter_labels(usable, filters)[0] if filters else usable


def cache_targets(run: StudentRun, teacher, tokenizer, train: Dataset) -> Path:
    """Return the artifact with the teacher's distributions over the references' tokens (targets/)."""
    inputs = {
        "teacher": model_fingerprint(run.teacher, teacher),
        "data": data.data_fingerprint(train),
        "lengths": [run.max_source_length, run.max_target_length, run.prefix],
    }
    kept = {"top_k": 0 if run.target_samples else run.top_k, "samples": run.target_samples}
    kept["temperature"] = run.temperature

    def build(folder: Path) -> dict:
        rows = data.tokenize_pairs(train, tokenizer, *inputs["lengths"])
        return write_targets(
            folder / "targets", teacher, rows, settings=inputs, pad_token_id=tokenizer.pad_token_id,
            batch_size=run.training.batch_size, **kept,
            progress=lambda done, total: report_progress(folder, "teacher targets", done, total, "documents"),
        )  # fmt: skip

    folder = artifact("teacher-targets", inputs | kept, build)
    check_targets(folder / "targets", inputs | kept)
    return folder


def training_rows(run: StudentRun, teacher, tokenizer, train: Dataset) -> Dataset:
    """Return what a run trains on: the references, or the teacher's summaries as its label settings ask for.

    With `cross_fit` every half of the data is labelled by a teacher that was trained on the other half, which cannot
    have memorised its references, or on its own half, which can; both are fine-tuned from `cross_fit_base`.
    """
    if run.method not in ON_PSEUDO_LABELS:
        return train
    if run.cross_fit:
        halves = cross_fit_halves(train, seed=0)
        tuned = [half_teacher(run, tokenizer, half) for half in halves]
        folders = [
            label(replace(run, teacher=str(folder / "teacher")), students.load_model(folder / "teacher")[0], half)
            for half, folder in zip(halves, tuned[::-1] if run.cross_fit == "other" else tuned, strict=True)
        ]
    else:
        others = [(name, students.load_model(name)) for name in run.label_teachers]
        for name, (_, other) in others:
            check_same_tokenizer(run.teacher, tokenizer, name, other)
        folders = [label(run, teacher, train)]
        folders += [label(replace(run, teacher=name), model, train) for name, (model, _) in others]
    rows = [labelled(folder, run.label_filters) for folder in folders]
    rows += [train] if run.method == "pl_gold" else []
    return join_labels(rows)[0] if len(rows) > 1 else rows[0]


def half_teacher(run: StudentRun, tokenizer, half: Dataset) -> Path:
    """Return the artifact of a teacher fine-tuned on one half of the training data: teacher/, history.csv."""
    training = replace(run.training, max_steps=run.cross_fit_steps, seed=0, eval_every=0)
    lengths = (run.max_source_length, run.max_target_length, run.prefix)
    settings = {"training": asdict(training), "lengths": lengths, "data": data.data_fingerprint(half)}

    def build(folder: Path) -> dict:
        seed_everything(training.seed)
        model.to(device())
        choose_attention(model, run.max_source_length)
        rows = data.tokenize_pairs(half, tokenizer, *lengths)
        batches = data.pair_stream(rows, tokenizer.pad_token_id, training.batch_size, 0, training.micro_batch_size)
        history = fit(
            model, lambda model, batch: objectives.sft(model, None, batch), batches, training, folder,
            stage="teacher of a half",
        )  # fmt: skip
        model.generation_config = students.load_model(run.teacher)[0].generation_config
        students.save_model(model.to("cpu"), tokenizer, folder / "teacher")
        return {"num_train": len(half), "final": history[-1]}

    model, own = students.load_model(run.cross_fit_base)
    check_same_tokenizer(run.teacher, tokenizer, run.cross_fit_base, own)
    return artifact("half-teacher", settings | {"base": model_fingerprint(run.cross_fit_base, model)}, build)


def check_same_tokenizer(teacher: str, tokenizer, name: str, other) -> None:
    """Refuse a second model whose token ids mean something else."""
    if tokenizer.get_vocab() != other.get_vocab():
        raise InputError(f"{name} has another tokenizer than {teacher}: choose two models of one vocabulary")


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
        rows = training_rows(run, teacher, tokenizer, train)
        seed_everything(run.training.seed)
        student, cut = cut_student(run, teacher)
        choose_attention(student, run.max_source_length)
        lengths = (run.max_source_length, run.max_target_length, run.prefix)
        tokenized = data.tokenize_pairs(rows, tokenizer, *lengths)
        batches = data.pair_stream(
            tokenized, tokenizer.pad_token_id, run.training.batch_size, run.training.seed, run.training.micro_batch_size
        )
        if run.method == "kd_cached":
            batches = with_targets(batches, cache_targets(run, teacher, tokenizer, train) / "targets")
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


def time_students(
    teacher: PreTrainedModel, tokenizer, plan: Sequence[StudentRun], trained: Mapping[str, Path],
    documents: Sequence[str], *, max_source_length: int, prefix: str = "", num_new_tokens: int = 16,
    **generation_settings,
) -> dict[tuple[str, str, str], dict[str, float]]:  # fmt: skip
    """Return latency_ms and ms_per_token of the teacher and of one student of each method, shape and variant.

    The keys are (method, shape, variant), the teacher's ("teacher", "", ""). All models are in memory and take turns,
    because times that were taken minutes apart differ by the machine's noise more than models do.
    """
    models = {("teacher", "", ""): teacher}
    for run in plan:
        if (run.method, run.shape, run.variant) not in models:
            student = students.load_model(trained[run.name] / "student")[0]
            models[run.method, run.shape, run.variant] = student.to(teacher.device)
    options = {"max_source_length": max_source_length, "prefix": prefix}
    timed = {
        (key, name): function
        for key, model in models.items()
        for name, function in decoding_runs(model, tokenizer, num_new_tokens, options, **generation_settings).items()
    }
    found = ms_in_turns(timed, documents, teacher.device)
    per_token = {key: found[key, "ms_per_token"] / num_new_tokens for key in models}
    return {key: {"latency_ms": found[key, "latency_ms"], "ms_per_token": per_token[key]} for key in models}


def read_predictions(folder: Path) -> list[dict]:
    """Return the rows id, document, reference, prediction of a test artifact."""
    with open(folder / "predictions.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_scores(folder: Path) -> dict[str, np.ndarray]:
    """Return the ROUGE scores of a test artifact, one value a document."""
    return {name: np.asarray(values) for name, values in read_json(folder / "scores.json").items()}
