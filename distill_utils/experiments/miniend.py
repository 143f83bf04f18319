"""Task-agnostic distillation: a student distilled on plain text along one path, then fine-tuned like any other model.

Not here: the objective (objectives.miniend), the corrupted text (denoising.py), fine-tuning and tests (runs.py).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from distill_utils.artifacts import InputError, artifact, config_hash, read_json, report_progress, write_json
from distill_utils.data import loading
from distill_utils.data.batches import pair_stream, tokenize_pairs
from distill_utils.data.denoising import denoising_stream
from distill_utils.device import device, seed_everything
from distill_utils.distillation import objectives
from distill_utils.distillation.losses import check_relation_heads
from distill_utils.evaluation import scoring, tasks
from distill_utils.evaluation.statistics import bootstrap_interval, format_comparison, paired_test
from distill_utils.experiments import runs
from distill_utils.experiments.comparison import FEW_DOCUMENTS
from distill_utils.models import students
from distill_utils.models.hooks import projections
from distill_utils.models.loading import load_model, model_fingerprint, save_model
from distill_utils.training.distributed import local_rows, sum_over_processes
from distill_utils.training.loop import Training, choose_attention, fit, recompute_activations

RELATIONS = ("encoder_self_weight", "decoder_self_weight", "cross_weight")
LOGITS = {"ce_weight": 0.5, "kl_weight": 0.5}
# What the student imitates: weights of `objectives.miniend`. The grid is ours; the paper's own paths are not known.
PATHS = {
    "scratch": {"ce_weight": 1.0},
    "logits": LOGITS,
    "encoder": {"encoder_self_weight": 1.0},
    "decoder": {"decoder_self_weight": 1.0},
    "self": {"encoder_self_weight": 1.0, "decoder_self_weight": 1.0},
    "decoder_cross": {"decoder_self_weight": 1.0, "cross_weight": 1.0},
    "miniend": dict.fromkeys(RELATIONS, 1.0),
    "miniend_logits": dict.fromkeys(RELATIONS, 1.0) | LOGITS,
    "hidden": {"hidden_weight": 1.0},
}
LATER_FIELDS = ("like", "embeddings")  # not hashed when empty: results from before they existed stay valid


@dataclass(frozen=True)
class AgnosticRun:
    """What determines one distilled student, before any task; JSON-serialisable by `dataclasses.asdict`."""

    path: str  # one of PATHS
    shape: str  # "<encoder layers>-<decoder layers>"
    teacher: str  # shipped name, folder or hub name
    training: Training
    source_length: int  # tokens of the encoder's input
    denoising: str = "span_corruption"  # one of denoising.OBJECTIVES
    width: int = 0  # of the student, 0 = the teacher's
    init: str = "random"  # or "copied": layers of the teacher, by `models.students.layer_map`
    num_relation_heads: int = 32
    mix_start: float = 1.0  # below 1 the target holds the student's own logits, too, ever fewer: `objectives.grow_mix`
    mix_rate: float = 5e-4  # how much faster than a straight line; as published
    options: dict = field(default_factory=dict)  # further arguments of `objectives.miniend`, over the path's weights
    variant: str = ""  # what sets this run apart from another of its path and shape
    like: str = ""  # the model whose sizes the student takes, "" = the teacher
    embeddings: str = ""  # the model whose token embeddings it starts from, narrowed where it is narrower; "" = random

    @property
    def name(self) -> str:
        size = f"-w{self.width}" if self.width else ""
        init = "-copied" if self.init == "copied" else ""
        init += f"-mix{self.mix_start:g}" if self.mix_start < 1 else ""
        variant = "-" + re.sub(r"[^A-Za-z0-9.]+", "_", self.variant).strip("_") if self.variant else ""
        return f"{self.path}-{self.shape}{size}{init}{variant}-s{self.training.seed}"

    @property
    def weights(self) -> dict:
        """All arguments that the path sets: weights it does not name are 0."""
        silent = dict.fromkeys((*RELATIONS, "ce_weight", "kl_weight", "hidden_weight"), 0.0)
        return silent | PATHS[self.path] | {"num_relation_heads": self.num_relation_heads} | self.options

    @property
    def has_head(self) -> bool:
        """Whether the path trains the language-model head, so that its loss on held-out text means something."""
        return self.weights["ce_weight"] > 0 or self.weights["kl_weight"] > 0


def check_runs(plan: Sequence[AgnosticRun], teacher) -> None:
    """Refuse what cannot work before anything is trained; one line names the value and the mend."""
    if not plan:
        raise InputError("there is nothing to distil: name at least one path, one student shape and one seed")
    for run in plan:
        if run.path not in PATHS:
            raise InputError(f"path {run.path!r} is unknown: use {', '.join(PATHS)}")
        if run.init not in ("random", "copied"):
            raise InputError(f"init {run.init!r} is unknown: use random or copied")
        if run.init == "copied" and run.width not in (0, teacher.config.d_model):
            raise InputError(f"a student of width {run.width} cannot copy layers: use init=random or width=0")
        if run.weights["hidden_weight"] and run.width not in (0, teacher.config.d_model):
            raise InputError(f"path {run.path} compares hidden states of equal width: use width=0, not {run.width}")
        if not 0 < run.mix_start <= 1 or not 0 <= run.mix_rate <= 1:
            raise InputError(
                f"mix_start {run.mix_start} with mix_rate {run.mix_rate} is impossible: use a start above 0 and at "
                "most 1, for example 0.4, 1 for the teacher alone, and a rate of 0 to 1"
            )
        if run.mix_start < 1 and not run.weights["kl_weight"]:
            raise InputError(f"path {run.path} imitates no distribution that could be mixed: use mix_start=1 or logits")
        encoder, decoder = runs.parse_shape(run.shape, teacher)
        with torch.device("meta"):
            student = students.new_student(teacher, encoder, decoder, run.width, run.like)
        if any(run.weights[name] for name in RELATIONS):
            widths = [projections(model, "encoder_self", -1)[0].out_features for model in (student, teacher)]
            try:
                check_relation_heads(run.num_relation_heads, *widths)
            except ValueError as error:
                raise InputError(str(error)) from None
    if len({run.name for run in plan}) < len(plan):
        raise InputError("a path, student shape or seed is named twice: name each once")


def new_student(run: AgnosticRun, teacher) -> torch.nn.Module:
    """Return the untrained student of a run; every path of a seed starts from the same weights."""
    encoder, decoder = runs.parse_shape(run.shape, teacher)
    if run.init == "copied":
        return students.init_student(teacher, encoder, decoder)[0]
    torch.manual_seed(run.training.seed)
    student = students.new_student(teacher, encoder, decoder, run.width, run.like)
    if run.embeddings:
        students.start_embeddings(student, load_model(run.embeddings)[0])
    return student


def untrained(run: AgnosticRun, teacher, tokenizer) -> Path:
    """Return the folder of the student that a run starts from: what fine-tuning alone makes of it is the floor."""
    settings = {"teacher": model_fingerprint(run.teacher, teacher), "shape": run.shape, "width": run.width}
    settings |= {name: value for name in LATER_FIELDS if (value := getattr(run, name))}

    def build(folder: Path) -> dict:
        save_model(new_student(run, teacher).to("cpu"), tokenizer, folder / "student")
        return {}

    name = f"untrained-{run.shape}-s{run.training.seed}"
    return artifact(name, settings | {"init": run.init, "seed": run.training.seed}, build) / "student"


def distill(
    run: AgnosticRun, teacher, tokenizer, tokens: np.ndarray, held_out: np.ndarray, recompute: bool = False,
    train: Callable[[Path], dict] | None = None,
) -> Path:  # fmt: skip
    """Return the artifact of one distilled student: student/, history.csv, results.json with costs.

    `tokens` and `held_out` are flat token ids of training and held-out text. The validation loss is the cross-entropy
    of corrupted held-out text, nats per target token; it is given for paths that train the head only. `recompute`
    saves memory by `loop.recompute_activations`. `train(folder)` does the work and returns the results, instead of
    this process (distributed.py). Neither changes what is trained, so the artifact is the same.
    """
    settings = {
        **{name: value for name, value in asdict(run).items() if name not in LATER_FIELDS or value},
        "weights": run.weights,
        "teacher": model_fingerprint(run.teacher, teacher),
        "text": [config_hash(array.tolist()) for array in (tokens, held_out)],
    }

    def build(folder: Path) -> dict:
        student = new_student(run, teacher)
        results = train_student(folder, run, student, teacher, tokenizer, tokens, held_out, recompute)
        save_model(student.to("cpu"), tokenizer, folder / "student")
        return results

    return artifact(run.name, settings, train or build)


def train_student(
    folder: Path, run: AgnosticRun, student, teacher, tokenizer, tokens: np.ndarray, held_out: np.ndarray,
    recompute: bool = False,
) -> dict:  # fmt: skip
    """Train the student of a run in place, from the newest checkpoint in `folder`, and return its results.

    Several processes that share the run call this together (distributed.py).
    """
    training = run.training
    seed_everything(training.seed)
    choose_attention(student, run.source_length)
    if recompute:
        recompute_activations(student)
    corrupt = partial(denoising_stream, tokenizer=tokenizer, objective=run.denoising, source_length=run.source_length)
    batches = corrupt(
        tokens, batch_size=training.batch_size, seed=training.seed, micro_batch_size=training.micro_batch_size
    )
    checks = corrupt(held_out, batch_size=min(32, len(held_out) // (2 * run.source_length)), seed=0)
    evaluate = partial(held_out_loss, batches=[checks(step)[0] for step in range(4)]) if run.has_head else None
    objective = partial(objectives.miniend, **run.weights)
    mixing = {"mix": run.mix_start} if run.mix_start < 1 else {}
    grow = partial(objectives.grow_mix, mixing, start=run.mix_start, rate=run.mix_rate, max_steps=training.max_steps)

    def loss_fn(model, batch: dict) -> dict:
        if not mixing:
            return objective(model, teacher, batch)
        losses = objective(model, teacher, batch, mix=mixing["mix"])
        return losses | {"mix": losses["loss"].new_tensor(mixing["mix"])}  # for the history

    began = time.monotonic()
    history = fit(
        student, loss_fn, batches, training, folder, evaluate, stage=run.name, memory=mixing,
        after_step=grow if mixing else None,
    )  # fmt: skip
    student.set_attn_implementation("sdpa")
    return {
        "name": run.name,
        "parameters": students.count_parameters(student),
        "seconds": round(time.monotonic() - began, 2),
        "target_tokens": sum(int((batch["labels"] != -100).sum()) for batch in batches(0)) * training.max_steps,
        "final": history[-1],
    }


@torch.no_grad()
def held_out_loss(student, batches: list[dict]) -> dict:
    """Return the validation_loss over batches, nats per target token; several processes share their rows."""
    total = torch.zeros(2, dtype=torch.float64)  # loss, tokens
    for batch in map(local_rows, batches):
        moved = {k: v.to(student.device) if torch.is_tensor(v) else v for k, v in batch.items()}
        count = int((batch["labels"] != objectives.IGNORED).sum())
        loss = float(objectives.sft(student, None, moved)["loss"])
        total += torch.tensor([loss * count, count], dtype=total.dtype)
    loss, tokens = sum_over_processes(total.to(student.device)).tolist()
    return {"validation_loss": loss / tokens}


@torch.no_grad()
def window_losses(
    model, tokenizer, tokens: np.ndarray, num: int, source_length: int, denoising: str = "span_corruption"
) -> np.ndarray:
    """Return the loss of the first windows of a fixed order of text, nats per target token, one value each."""
    stream = denoising_stream(tokens, tokenizer, denoising, source_length, 1, seed=0)
    return np.array([held_out_loss(model, stream(number))["validation_loss"] for number in range(num)])


# ------------------------------------------------------------------------------------------------------ fine-tuning


def load_task(task: str, split: str, num: int = 0, path: str = "") -> Dataset:
    """Return the rows of a task: pairs to summarize under the name "summaries", otherwise labelled texts."""
    if task == "summaries":
        return loading.load_pairs(path or "pydocs", split, num)
    return tasks.load_task(task, split, path, num)


def fine_tune(
    name: str, folder: str, model, tokenizer, task: str, train: Dataset, validation: Dataset, training: Training,
    max_source_length: int, max_target_length: int,
) -> Path:  # fmt: skip
    """Return the artifact of a model fine-tuned on one task, all of it trained: student/, history.csv, results.json.

    `folder` is where the model was loaded from, or the shipped name; `name` tells it from others.
    """
    shape = f"{len(students.encoder_layers(model))}-{len(students.decoder_layers(model))}"
    run = runs.StudentRun(
        method="sft", shape=shape, teacher=folder, training=training, max_source_length=max_source_length,
        max_target_length=max_target_length, freeze_encoder=False, freeze_embeddings=False, variant=f"{task} {name}",
    )  # fmt: skip
    return runs.train_student(run, model, tokenizer, train, validation)


def test_task(tuned: Path, task: str, test: Dataset, max_source_length: int, **generation_settings) -> Path:
    """Return the artifact of a fine-tuned model's test: ROUGE of summaries, or the task's own metrics.

    Either holds scores.json with one value a document, for paired tests, under "rouge2" or "correct".
    """
    model, tokenizer = load_model(tuned / "student")
    model.to(device())
    if task == "summaries":
        return scoring.evaluate_model(
            tuned.name, model, tokenizer, tuned.name, test, max_source_length=max_source_length, **generation_settings
        )
    settings = {"model": tuned.name, "task": task, "data": loading.data_fingerprint(test), "length": max_source_length}

    def build(folder: Path) -> dict:
        def progress(done: int, total: int) -> None:
            report_progress(folder, f"evaluating {tuned.name}", done, total, "documents")

        found = tasks.predict_labels(model, tokenizer, test, task, max_source_length, progress=progress)
        correct = [100.0 * (a == b) for a, b in zip(found, test["summary"], strict=True)]
        write_json(folder / "scores.json", {"correct": correct})
        return tasks.scores(task, found, test["label"])

    return artifact(f"test-{tuned.name}", settings, build)


# ---------------------------------------------------------------------------------------------------------- comparing


def mean_scores(tested: Sequence[Path]) -> np.ndarray:
    """Return one value a test document, averaged over seeds: ROUGE-2, 100 where correct, or mean log-likelihood."""
    found = [read_json(folder / "scores.json") for folder in tested]
    (name,) = {"rouge2", "correct", "log_likelihood"} & found[0].keys()
    return np.mean([scores[name] for scores in found], axis=0)


def result_row(name: str, task: str, tested: Sequence[Path], baseline: Sequence[Path] | None = None) -> dict:
    """Return one line of the grid: a model's score on a task, mean over seeds, with interval and paired test.

    The score is ROUGE-2 or the task's own; its interval is over documents, and so is the difference to `baseline`,
    which counts correct answers where the score itself is no mean over documents.
    """
    results, values = [read_json(folder / "results.json") for folder in tested], mean_scores(tested)
    key = "rouge2" if "rouge2" in results[0] else "score"
    row = {"name": name, "method": name, "task": task, "metric": "ROUGE-2" if key == "rouge2" else key}
    row["seeds"] = len(tested)
    row["score"] = float(np.mean([result[key] for result in results]))
    row["score_low"], row["score_high"] = bootstrap_interval(values)[1:]
    if key == "score" and abs(row["score"] - values.mean()) > 0.01:
        row |= {
            f"score_{end}": float(np.mean([result[f"score_{end}"] for result in results])) for end in ("low", "high")
        }
    if key == "rouge2":
        row |= {f"rouge2{end}": row[f"score{end}"] for end in ("", "_low", "_high")}
    return row | (paired_test(values, mean_scores(baseline)) if baseline else {})


def gap_closed(
    tested: Mapping[tuple[str, str], Sequence[Path]], name: str, low: str, high: str, num_samples: int = 1000
) -> dict:
    """Return which share of the way from model `low` to model `high` a model goes, mean over tasks, with its interval.

    `tested` is {(model, task): test artifacts of its seeds}. Every draw takes new documents of every task. A task
    where `high` is not above `low` says nothing and is left out; `tasks` names those that count.
    """
    generator, shares, used = np.random.default_rng(0), [], []
    for task in dict.fromkeys(task for _, task in tested):
        ours, bottom, top = (mean_scores(tested[model, task]) for model in (name, low, high))
        if paired_test(top, bottom)["low"] <= 0:
            continue
        drawn = generator.integers(len(ours), size=(num_samples, len(ours)))
        way = np.maximum((top - bottom)[drawn].mean(1), 1e-9)
        shares.append(np.append((ours - bottom)[drawn].mean(1) / way, (ours - bottom).mean() / (top - bottom).mean()))
        used.append(task)
    if not used:
        return {"share": None, "low": None, "high": None, "tasks": []}
    means = np.mean(shares, axis=0)
    interval = np.quantile(means[:-1], [0.025, 0.975])
    return {"share": float(means[-1]), "low": float(interval[0]), "high": float(interval[1]), "tasks": used}


def headline(
    ways: Sequence[Mapping], proposed: str, num_seeds: int, distill_steps: int, tune_steps: int, num_test: int
) -> str:
    """Return which path won as Markdown, computed from the shares of the gap; it says so where the run cannot tell."""
    if num_test < FEW_DOCUMENTS:
        return f"**Smoke run:** {num_test} test rows show that the code runs, nothing else."
    budget = (
        f"{num_seeds} seed(s), {distill_steps} updates on text, {tune_steps} of fine-tuning; intervals over test rows."
    )
    known = sorted((way for way in ways if way["share"] is not None), key=lambda way: -way["share"])
    paths = [way for way in known if way["path"] != "none"]
    if not paths:
        return f"**This run cannot tell**: no task shows the teacher above scratch, there is no gap to close. {budget}"

    def described(way: Mapping) -> str:
        return f"{100 * way['share']:.0f} % ({100 * way['low']:.0f} to {100 * way['high']:.0f})"

    best, lines = paths[0], []
    if best["low"] > 0:
        lines.append(
            f"**{best['path']} is the best path**: it closes {described(best)} of the gap from scratch to teacher."
        )
    else:
        lines.append(
            f"**No path is shown to beat scratch**; the best, {best['path']}, closes {described(best)} of the gap."
        )
    none = next((way for way in known if way["path"] == "none"), None)
    if none and none["high"] >= best["low"]:
        lines[0] += f" The untrained student closes {described(none)}: that text adds to its start is not shown."
    near = [way["path"] for way in paths[1:] if way["high"] >= best["low"]]
    lines += [f"Its interval overlaps with that of {', '.join(near)}."] if near else []
    ours = next((way for way in paths if way["path"] == proposed), None)
    if ours and ours is not best:
        lines.append(f"The proposed path, {proposed}, does not win: it closes {described(ours)}.")
    worse = [way["path"] for way in paths if way["high"] < 0]
    lines += [f"Worse than scratch: {', '.join(worse)}."] if worse else []
    return "\n\n".join([*lines, f"Tasks that count: {', '.join(best['tasks'])}. {budget}"])


# ----------------------------------------------------------------------------------------- protocol and task-specific


def search_learning_rate(
    run: AgnosticRun, rates: Sequence[float], train: Callable[[AgnosticRun], Sequence[Path]]
) -> tuple[float, list[dict]]:
    """Return the rate that fine-tunes best, and one row a rate; with a single rate nothing is trained.

    `train(run)` distils a student and returns its fine-tuned artifacts. Paths without a language-model head have no
    loss on text in common with the others, so all are judged after fine-tuning, on validation rows: cross-entropy,
    nats per target token, mean over tasks.
    """
    rows = []
    for rate in rates if len(rates) > 1 else ():
        tuned = train(replace(run, training=replace(run.training, learning_rate=rate)))
        losses = [read_json(folder / "results.json")["final"]["validation_ce"] for folder in tuned]
        rows.append({"path": run.path, "learning_rate": rate, "validation_ce": float(np.mean(losses))})
    best = min(rows, key=lambda row: row["validation_ce"], default=None)
    return (best["learning_rate"] if best else rates[0]), rows


def tokens_per_update(batches: Callable[[int], list[dict]], num: int = 20) -> float:
    """Return the mean number of source and target tokens that an update reads, padding left out, over `num` updates."""
    seen = [batch for step in range(num) for batch in batches(step)]
    return sum(int(batch["attention_mask"].sum() + (batch["labels"] != -100).sum()) for batch in seen) / num


def equal_token_steps(
    run: AgnosticRun, tuning: Training, tokenizer, tokens: np.ndarray, pairs: Dataset, max_source_length: int,
    max_target_length: int,
) -> int:  # fmt: skip
    """Return after how many updates on pairs a student has read what one distilled and then fine-tuned has.

    Both sides read the teacher's distribution for every token they learn from it; the teacher's own training is not
    counted on either side.
    """
    text = denoising_stream(
        tokens, tokenizer, run.denoising, run.source_length, run.training.batch_size, run.training.seed
    )
    tokenized = tokenize_pairs(pairs, tokenizer, max_source_length, max_target_length)
    on_pairs = pair_stream(tokenized, tokenizer.pad_token_id, tuning.batch_size, tuning.seed)
    return tuning.max_steps + round(tokens_per_update(text) * run.training.max_steps / tokens_per_update(on_pairs))


def task_specific(
    method: str, shape: str, tuned_teacher: Path, tokenizer, train: Dataset, validation: Dataset, training: Training,
    max_source_length: int, max_target_length: int,
) -> Path:  # fmt: skip
    """Return the artifact of a student that is cut out of a fine-tuned teacher and trained on the task alone."""
    folder = str(tuned_teacher / "student")
    teacher, _ = load_model(folder)
    teacher.to(device())
    run = runs.StudentRun(
        method=method, shape=shape, teacher=folder, training=training, max_source_length=max_source_length,
        max_target_length=max_target_length, variant="task_specific",
    )  # fmt: skip
    runs.check_runs([run], teacher)
    return runs.train_student(run, teacher, tokenizer, train, validation)


def verdict(row: Mapping, other: str) -> str:
    """Return "beats" and the like, with the difference, for a row with a paired test against `other`."""
    return format_comparison(row["name"], row, other)
