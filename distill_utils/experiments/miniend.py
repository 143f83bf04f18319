"""Task-agnostic distillation: a student distilled on plain text along one path, then fine-tuned like any other model.

Out of scope: an assistant on the way (interpolation.py).
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from distill_utils.artifacts import InputError, artifact, hashed, later, read_json
from distill_utils.data import loading
from distill_utils.data.batches import pair_stream, tokenize_pairs, tokens_per_update
from distill_utils.data.denoising import denoising_stream, tokens_hash
from distill_utils.device import amp_dtype, device, seed_everything, to_device
from distill_utils.distillation import objectives
from distill_utils.distillation.losses import check_relation_heads
from distill_utils.evaluation import scoring, tasks
from distill_utils.evaluation.statistics import bootstrap_interval, budget_in_words, compare, share_of_gap
from distill_utils.experiments import runs
from distill_utils.experiments.comparison import FEW_DOCUMENTS, smoke_note
from distill_utils.models import students
from distill_utils.models.frozen import frozen_in
from distill_utils.models.hooks import projections
from distill_utils.models.loading import ASSETS, load_model, model_fingerprint, save_model
from distill_utils.training.distributed import local_rows, sum_over_processes
from distill_utils.training.loop import (
    Training,
    check_training,
    choose_attention,
    fit,
    recompute_activations,
    set_attention,
)

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
SILENT = dict.fromkeys((*RELATIONS, "ce_weight", "kl_weight", "hidden_weight"), 0.0)  # a path leaves the others at 0


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
    like: str = later("")  # the model whose sizes the student takes, "" = the teacher
    embeddings: str = later("")  # the model whose token embeddings it starts from, narrowed as it needs; "" = random

    @property
    def name(self) -> str:
        size = f"-w{self.width}" if self.width else ""
        init = "-copied" if self.init == "copied" else ""
        init += f"-mix{self.mix_start:g}" if self.mix_start < 1 else ""
        variant = "-" + re.sub(r"[^A-Za-z0-9.]+", "_", self.variant).strip("_") if self.variant else ""
        return f"{self.path}-{self.shape}{size}{init}{variant}-s{self.training.seed}"

    @property
    def weights(self) -> dict:
        """All arguments that the path sets."""
        return SILENT | PATHS[self.path] | {"num_relation_heads": self.num_relation_heads} | self.options


def check_runs(plan: Sequence[AgnosticRun], teacher) -> None:
    """Reject what cannot work before anything is trained; one line names the value and the fix."""
    if not plan:
        raise InputError("there is nothing to distil: name at least one path, one student shape and one seed")
    for run in plan:
        if run.path not in PATHS:
            raise InputError(f"path {run.path!r} is unknown: use {', '.join(PATHS)}")
        if run.init not in ("random", "copied"):
            raise InputError(f"init {run.init!r} is unknown: use random or copied")
        changes_width = run.width not in (0, teacher.config.d_model)
        if changes_width and run.init == "copied":
            raise InputError(f"a student of width {run.width} cannot copy layers: use init=random or width=0")
        if changes_width and run.weights["hidden_weight"]:
            raise InputError(f"path {run.path} compares hidden states of equal width: use width=0, not {run.width}")
        if not 0 < run.mix_start <= 1 or not 0 <= run.mix_rate <= 1:
            values = f"mix_start {run.mix_start} with mix_rate {run.mix_rate}"
            raise InputError(f"{values} is impossible: use a start above 0 and at most 1, and a rate of 0 to 1")
        if run.mix_start < 1 and not run.weights["kl_weight"]:
            raise InputError(f"path {run.path} imitates no distribution to be mixed: use mix_start=1 or logits")
        check_training(run.training)
        student = without_weights(teacher, run.shape, run.width, run.like)
        limits = [getattr(model.config, "max_position_embeddings", None) for model in (student, teacher)]
        positions = min(filter(None, limits), default=math.inf)
        if -(-run.source_length // 8) * 8 > positions:  # batches are padded to multiples of 8
            raise InputError(f"source_length {run.source_length} exceeds the model's {positions} positions: lower it")
        if any(run.weights[name] for name in RELATIONS):
            widths = [projections(model, "encoder_self", -1)[0].out_features for model in (student, teacher)]
            check_relation_heads(run.num_relation_heads, *widths)
        if run.embeddings:
            students.check_embeddings(run.embeddings, run.teacher, student.config.d_model)
    if len({run.name for run in plan}) < len(plan):
        raise InputError("a path, student shape or seed is named twice: name each once")


def without_weights(teacher, shape: str, width: int, like: str = "") -> torch.nn.Module:
    """Return a student that has sizes only."""
    with torch.device("meta"):
        return students.new_student(teacher, *students.parse_shape(shape, teacher), width, like)


def new_student(run: AgnosticRun, teacher) -> torch.nn.Module:
    """Return the untrained student of a run; all paths with one seed start from the same weights."""
    shape = students.parse_shape(run.shape, teacher)
    if run.init == "copied":
        return students.init_student(teacher, *shape)[0]
    torch.manual_seed(run.training.seed)
    student = students.new_student(teacher, *shape, run.width, run.like)
    if run.embeddings:
        students.check_embeddings(run.embeddings, run.teacher, student.config.d_model)
        students.start_embeddings(student, load_model(run.embeddings)[0])
    return student


def _others(run: AgnosticRun) -> dict:
    """Return what further models of a run are, where their names may come to mean others: folders and trained runs."""
    names = {run.like, run.embeddings} - {"", *(path.name for path in ASSETS.iterdir())}
    return {"others": [model_fingerprint(name, load_model(name)[0]) for name in sorted(names)]} if names else {}


def untrained(run: AgnosticRun, teacher, tokenizer) -> Path:
    """Return the folder of the student that a run starts from: what fine-tuning alone makes of it is the floor."""
    settings = {n: v for n, v in hashed(run).items() if n in ("shape", "width", "init", "like", "embeddings")}
    settings |= {"teacher": model_fingerprint(run.teacher, teacher), "seed": run.training.seed} | _others(run)

    def build(folder: Path) -> dict:
        save_model(new_student(run, teacher).to("cpu"), tokenizer, folder / "student")
        return {}

    return artifact(f"untrained-{run.shape}-s{run.training.seed}", settings, build) / "student"


def distill(
    run: AgnosticRun, teacher, tokenizer, tokens: np.ndarray, held_out: np.ndarray, recompute: bool = False,
    train: Callable[[Path], dict] | None = None,
) -> Path:  # fmt: skip
    """Return the artifact of one distilled student: student/, history.csv, results.json with costs.

    `tokens` and `held_out` are flat token ids. `recompute` saves memory (`loop.recompute_activations`), `train(folder)`
    does the work in place of this process (launch.py). Neither changes what is trained, so the artifact is the same.
    """
    settings = {
        **hashed(run),
        "weights": run.weights,
        "teacher": model_fingerprint(run.teacher, teacher),
        "text": [tokens_hash(array) for array in (tokens, held_out)],
    } | _others(run)

    def build(folder: Path) -> dict:
        student = new_student(run, teacher)
        results = train_student(folder, run, student, teacher, tokenizer, tokens, held_out, recompute)
        save_model(student.to("cpu"), tokenizer, folder / "student")
        return results

    return artifact(run.name, settings, train or build)


def train_student(
    folder: Path, run: AgnosticRun, student, teacher, tokenizer, tokens: np.ndarray, held_out: np.ndarray,
    recompute: bool = False, stream: Callable = denoising_stream, start: int = 0,
) -> dict:  # fmt: skip
    """Train the student of a run in place, from the newest checkpoint in `folder`, and return its results.

    Several processes that share the run call this together (launch.py). `stream` makes the batches, as
    `denoising_stream` does; training begins with update `start` of it.
    """
    training = run.training
    seed_everything(training.seed)
    choose_attention(student, run.source_length)
    if recompute:
        recompute_activations(student)
    corrupt = partial(stream, tokenizer=tokenizer, objective=run.denoising, source_length=run.source_length)
    sizes = {"batch_size": training.batch_size, "micro_batch_size": training.micro_batch_size}
    batches = corrupt(tokens, seed=training.seed, **sizes)
    checks = corrupt(held_out, batch_size=min(32, max(1, len(held_out) // (2 * run.source_length))), seed=0)
    has_head = run.weights["ce_weight"] or run.weights["kl_weight"]  # else its loss on text means nothing
    evaluate = partial(held_out_loss, batches=[checks(step)[0] for step in range(4)]) if has_head else None
    mixing = {"mix": run.mix_start} if run.mix_start < 1 else {}
    grow = partial(objectives.grow_mix, mixing, start=run.mix_start, rate=run.mix_rate, max_steps=training.max_steps)

    def loss_fn(model, batch: dict) -> dict:
        losses = objectives.miniend(model, teacher, batch, mix=mixing.get("mix", 1.0), **run.weights)
        if mixing:
            losses["mix"] = losses["loss"].new_tensor(mixing["mix"])  # for the history
        return losses

    with frozen_in(amp_dtype(precision=training.precision), student, teacher):
        history = fit(
            student, loss_fn, lambda step: batches(start + step), training, folder, evaluate, stage=run.name,
            memory=mixing, after_step=grow if mixing else None,
        )  # fmt: skip
    set_attention(student, "sdpa")
    return {
        "name": run.name,
        "parameters": students.count_parameters(student) if student.config.is_encoder_decoder else None,
        "seconds": round(history[-1]["seconds"], 2),  # those before a resume included
        "target_tokens": sum(int((batch["labels"] != -100).sum()) for batch in batches(0)) * training.max_steps,
        "final": history[-1],
    }


@torch.no_grad()
def held_out_loss(model, batches: Sequence[dict]) -> dict:
    """Return the validation_loss over batches, nats per target token; several processes share their rows."""
    total = torch.zeros(2, dtype=torch.float64)  # loss, tokens
    for batch in map(local_rows, batches):
        count = int((batch["labels"] != objectives.IGNORED).sum())
        losses = objectives.miniend(model, None, to_device(batch, model.device), **SILENT | PATHS["scratch"])
        total += torch.tensor([float(losses["loss"]) * count, count], dtype=total.dtype)
    loss, tokens = sum_over_processes(total.to(model.device)).tolist()
    return {"validation_loss": loss / tokens}


@torch.no_grad()
def window_losses(
    model, tokenizer, tokens: np.ndarray, num: int, source_length: int, denoising: str = "span_corruption",
    stream: Callable = denoising_stream,
) -> np.ndarray:  # fmt: skip
    """Return the losses of the first windows of a fixed order of text, nats per target token."""
    batches = stream(tokens, tokenizer, denoising, source_length, 1, seed=0)
    return np.array([held_out_loss(model, batches(number))["validation_loss"] for number in range(num)])


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
    """Return the artifact of a model fine-tuned on one task, all of it trained; it was loaded from `folder`."""
    shape = f"{len(students.encoder_layers(model))}-{len(students.decoder_layers(model))}"
    run = runs.StudentRun(
        method="sft", shape=shape, teacher=folder, training=training, max_source_length=max_source_length,
        max_target_length=max_target_length, freeze_encoder=False, freeze_embeddings=False, variant=f"{task} {name}",
    )  # fmt: skip
    return runs.train_student(run, model, tokenizer, train, validation)


def test_task(tuned: Path, task: str, test: Dataset, max_source_length: int, **generation_settings) -> Path:
    """Return the artifact of a fine-tuned model's test: ROUGE of summaries, or the task's own metrics."""
    model, tokenizer = load_model(tuned / "student")
    model.to(device())
    options = {"max_source_length": max_source_length}
    if task == "summaries":
        return scoring.evaluate_model(tuned.name, model, tokenizer, tuned.name, test, **options, **generation_settings)
    return scoring.evaluate_labels(tuned.name, model, tokenizer, tuned.name, task, test, **options)


def document_scores(tested: Sequence[Path]) -> np.ndarray:
    """Return scores (seeds, documents): ROUGE-2, a task's `document_values`, log-likelihood, or loss of windows."""
    found = [scoring.read_scores(folder) for folder in tested]
    (name,) = {"rouge2", "correct", "score", "log_likelihood", "loss"} & found[0].keys()
    return np.array([scores[name] for scores in found])


def result_row(name: str, task: str, tested: Sequence[Path], baseline: Sequence[Path] | None = None) -> dict:
    """Return one line of the grid: a model's score on a task, mean over seeds, with interval and paired test.

    The score is ROUGE-2 or the task's own, which the intervals of `bootstrap_interval` and `compare` are about too.
    """
    results, values = [read_json(folder / "results.json") for folder in tested], document_scores(tested)
    key = "rouge2" if "rouge2" in results[0] else "score"
    score, (_, low, high) = float(np.mean([result[key] for result in results])), bootstrap_interval(values)
    row = {"name": name, "method": name, "task": task, "metric": "ROUGE-2" if key == "rouge2" else key}
    row |= {"seeds": len(tested), "num_documents": values.shape[1]}
    row |= {"score": score, "score_low": low, "score_high": high}
    if key == "rouge2":
        row |= {"rouge2": score, "rouge2_low": low, "rouge2_high": high}
    return row | (compare(values, document_scores(baseline)) if baseline else {})


def gap_rows(
    scores: Mapping[str, Mapping[str, np.ndarray]], low: Mapping[str, np.ndarray], high: Mapping[str, np.ndarray]
) -> list[dict]:
    """Return the `share_of_gap` of each path, and whether it is `near`: not shown to be below the best path's.

    That is a paired difference, so that what is hard for both cancels out. Scores are {path: {task: (seeds,
    documents)}}; the path "none" is never the best.
    """
    rows = [{"path": path, **share_of_gap(found, low, high)} for path, found in scores.items()]
    paths = [row for row in rows if row["path"] != "none" and row["share"] is not None]
    best = scores[max(paths, key=lambda row: row["share"])["path"]] if paths else {}
    for row in rows if best else []:
        ahead = {task: low[task] + best[task] - found for task, found in scores[row["path"]].items()}
        row["near"] = share_of_gap(ahead, low, high)["low"] <= 0
    return rows


def headline(
    ways: Sequence[Mapping], proposed: str, num_seeds: int, distill_steps: int, tune_steps: int, num_test: int
) -> str:
    """Return which path to imitate, from `gap_rows`, as one paragraph of Markdown, and what limits that."""
    if num_test < FEW_DOCUMENTS:
        return smoke_note(num_test, "test rows")
    if not ways:
        return "**No path was compared**: name scratch and another one in paths."
    budget = budget_in_words(distill_steps, num_seeds, f"{tune_steps:,} of fine-tuning, {num_test:,} test rows")
    ranked = sorted((way for way in ways if way["share"] is not None), key=lambda way: -way["share"])
    closes = {
        way["path"]: f"closes {100 * way['share']:.0f} % ({100 * way['low']:.0f} to {100 * way['high']:.0f})"
        for way in ranked
    }
    paths = [way for way in ranked if way["path"] != "none"]
    if not paths:
        return f"**Train longer**: no task shows the teacher above scratch, there is no gap to close. {budget}."
    best, low = paths[0]["path"], paths[0]["low"]
    wins = f"**Imitate {best}**" if low > 0 else "**Train on the text alone**: no path is shown to beat it"
    said = [f"{wins}. Of the gap between scratch (text alone) and the teacher, {best} {closes[best]}"]
    near = [way["path"] for way in ranked if way["path"] != best and way["near"]]
    said[0] += f"; not shown to be worse: {', '.join(near)}." if near else "."
    if proposed in closes and proposed not in (best, *near):
        said.append(f"The proposed path, {proposed}, {closes[proposed]}.")
    return f"{' '.join(said)} Tasks where the teacher beats scratch: {', '.join(paths[0]['tasks'])}. {budget}."


def equal_token_steps(
    run: AgnosticRun, tuning: Training, tokenizer, tokens: np.ndarray, pairs: Dataset, max_source_length: int,
    max_target_length: int,
) -> int:  # fmt: skip
    """Return after how many updates on pairs a student has read as many tokens as one distilled, then fine-tuned."""
    distilling = run.training
    text = denoising_stream(tokens, tokenizer, run.denoising, run.source_length, distilling.batch_size, distilling.seed)
    tokenized = tokenize_pairs(pairs, tokenizer, max_source_length, max_target_length)
    on_pairs = pair_stream(tokenized, tokenizer.pad_token_id, tuning.batch_size, tuning.seed)
    return tuning.max_steps + round(tokens_per_update(text) * distilling.max_steps / tokens_per_update(on_pairs))
