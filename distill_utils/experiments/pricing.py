"""What a race was asked for, and what things cost here: an update, a label, a score, a load, in seconds.

Prices are measured once, before anything is trained, so that a race depends on them, the data and the seed alone. Out
of scope: what the prices pay for (race.py).
"""

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from distill_utils.artifacts import artifact, hashed, processor_name, read_json
from distill_utils.data import loading
from distill_utils.data.batches import tokenize_pairs
from distill_utils.device import amp_dtype, device, timed
from distill_utils.distillation.pseudo_labels import pseudo_labels
from distill_utils.distillation.teacher_cache import with_states
from distill_utils.experiments import budget, runs
from distill_utils.models.frozen import frozen_in
from distill_utils.models.loading import load_model, model_fingerprint
from distill_utils.training.loop import choose_attention, fit

COOLDOWN = 0.15  # share of a student's updates
UNPRICED = ("kd_cached",)  # the teacher's pass over all data, which nothing here measures
PRICE_SECONDS, PRICE_ROWS, PRICE_LABELS = 10.0, 512, (16, 80)  # what measuring one price may take


@dataclass
class Request:
    """What a race was asked for, loaded and checked: the notebook's parameters, models, data."""

    given: dict
    limits: budget.Budget
    teacher: torch.nn.Module
    tokenizer: object
    splits: dict[str, Dataset]
    base: runs.StudentRun
    decoding: dict  # changes to the teacher's decoding settings, for every student
    made: dict = field(default_factory=dict)  # (name, updates, seed): folders of the student and of its scores
    own_teacher: dict = field(default_factory=dict)  # of a teacher fine-tuned first: updates, priced_s, measured_s

    @property
    def options(self) -> dict:
        """How documents are read, by students and teacher alike."""
        return {"max_source_length": self.base.max_source_length, "prefix": self.base.prefix}


def measured_prices(asked: Request, plan: Mapping[str, runs.StudentRun]) -> Path:
    """Return the artifact of what things cost here, in seconds: an update of each method and shape, a label, a load.

    Updates are those of real training, data and optimizer included, of students that are thrown away.
    """
    kinds = {(run.method, run.shape): replace(run, variant="") for run in plan.values()}
    train = asked.splits["train"].select(range(min(PRICE_ROWS, len(asked.splits["train"]))))
    machine = {"processor": processor_name(), "threads": torch.get_num_threads(), "device": device().type}
    settings = {"runs": [hashed(run) for run in kinds.values()], "data": loading.data_fingerprint(train), **machine}
    settings |= {"teacher": model_fingerprint(asked.given["teacher"], asked.teacher), "states": asked.base.cache_states}

    def build(folder: Path) -> dict:
        began = time.monotonic()
        load_model(asked.given["teacher"])
        loaded = time.monotonic()
        tokenize_pairs(train, asked.tokenizer, *asked.base.lengths)
        found = {"load": loaded - began, "row": (time.monotonic() - loaded) / len(train), "label": 0.0}
        if any(method in runs.ON_PSEUDO_LABELS for method, _ in kinds):
            few, more = (min(size, len(train)) for size in PRICE_LABELS)
            spent = [_label_seconds(asked, train.select(range(size)), folder / str(size)) for size in (few, more)]
            # The difference, because each begins with a conversion.
            found["label"] = max(spent[1] - spent[0], 0.0) / (more - few) if more > few else spent[1] / more
        found["states"] = sum(timed(partial(_states, asked, run, train)) for run in kinds.values()) / len(train)
        return found | {"update": {_kind(run): _update_seconds(asked, run, train) for run in kinds.values()}}

    return artifact("prices", settings, build)


def _kind(run: runs.StudentRun) -> str:
    return f"{run.method} {run.shape}"


def _states(asked: Request, run: runs.StudentRun, train: Dataset) -> list[Path]:
    stored = runs.cut_student(run, asked.teacher)[1]["stored"]
    return runs.stored_states(run, stored, asked.teacher, asked.tokenizer, train, train)


def _label_seconds(asked: Request, rows: Dataset, folder: Path) -> float:
    name, decoding = asked.given["teacher"], asked.base.label_settings
    return timed(partial(pseudo_labels, name, rows, folder, **asked.options, **decoding))


def _update_seconds(asked: Request, run: runs.StudentRun, train: Dataset) -> float:
    """Return the mean seconds of an update after the first two, of 16 or as many as PRICE_SECONDS allow."""
    batches, seconds = runs.batches_of(run, asked.tokenizer, train), PRICE_SECONDS
    batches = with_states(batches, *_states(asked, run, train))
    for most in (2, 16):
        num = int(np.clip(PRICE_SECONDS / seconds, 2, most))
        student, cut = runs.cut_student(run, asked.teacher)
        choose_attention(student.to(device()), run.max_source_length)
        objective = partial(runs.objective_of(run.method), teacher=asked.teacher, **cut["options"])
        settings = replace(run.training, max_steps=2 + num, log_every=1, schedule="constant", checkpoint_every=0,
                           patience=0)  # fmt: skip
        with tempfile.TemporaryDirectory() as folder, frozen_in(amp_dtype(), student, asked.teacher):
            history = fit(student, lambda model, batch, loss=objective: loss(model, batch=batch), batches, settings,
                          Path(folder), stage=f"price of {run.group}")  # fmt: skip
        seconds = max((history[-1]["seconds"] - history[1]["seconds"]) / num, 1e-4)
    return seconds


def race_prices(asked: Request, plan: Mapping[str, runs.StudentRun], shapes: Path, priced: Path) -> dict:
    """Return the prices of a race (race.py) from the two artifacts; what they took to build is spent before it."""
    measured, costs = read_json(shapes / "results.json"), read_json(priced / "results.json")
    rows = {row["name"]: row for row in measured["rows"]}
    num, batch_size = {split: len(found) for split, found in asked.splits.items()}, asked.base.training.batch_size
    found = {}
    for name, run in plan.items():
        row, update = rows[run.shape], costs["update"][_kind(run)]
        # Models, tokens of rows and of their order, and the loss on validation documents, dear as updates at most.
        overhead = 2 * costs["load"] + 2 * num["train"] * costs["row"] + update * num["validation"] / batch_size
        found[name] = {"update": update, "score": overhead + num["validation"] * row["decode_s"],
                       "labels": run.method in runs.ON_PSEUDO_LABELS, "parameters": row["parameters_m"]}  # fmt: skip
    slowest = max((rows[run.shape] for run in plan.values()), key=lambda row: row["decode_s"])
    tests = [(rows["teacher"], "validation"), (rows["teacher"], "test"), (slowest, "test")]
    return {
        "candidates": found, "labels": costs["load"] + num["train"] * costs["label"],
        "end": 4 * costs["load"] + sum(num[split] * row["decode_s"] for row, split in tests),
        "measured": measured["build_seconds"] + costs["build_seconds"] + asked.own_teacher.get("priced_s", 0.0)
        + costs["states"] * (num["train"] + num["validation"]),
        "first_rung": asked.base.training.max_steps, "cooldown_share": COOLDOWN,
        "max_rungs": asked.given["max_rungs"],
    }  # fmt: skip
