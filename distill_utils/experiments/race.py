"""A budget in, a student out: what fits it races by synchronous halving, and the winner is tested once.

The race is a pure function of stored prices, the data and the seed, and all it makes are artifacts: killed and started
again it ends with the same winner and the same weights. Out of scope: which shapes fit (budget.py).
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset

from distill_utils.artifacts import InputError, artifact, hashed, processor_name, read_json
from distill_utils.data import loading
from distill_utils.data.batches import tokenize_pairs
from distill_utils.device import amp_dtype, device
from distill_utils.evaluation import generation, scoring, statistics
from distill_utils.evaluation.metrics import METRICS
from distill_utils.experiments import ablations, budget, comparison, runs
from distill_utils.models import students
from distill_utils.models.loading import load_model, model_fingerprint
from distill_utils.report.figures import method_label
from distill_utils.training.loop import Training, choose_attention, fit
from distill_utils.training.optimizers import cooldown_steps

MAX_CANDIDATES = 9
UNPRICED = ("kd_cached",)  # its cost is the teacher's pass over all data, which nothing here measures
PRICE_SECONDS, PRICE_ROWS, PRICE_LABELS = 10.0, 512, (16, 80)  # what measuring one price may take

# --------------------------------------------------------------------------------------------------- the race, by prices


def updates_at(prices: Mapping, rung: int) -> int:
    """Return how many updates a student of a rung has, its cooldown among them."""
    return prices["first_rung"] * 2**rung


def rung_seconds(prices: Mapping, name: str, rung: int) -> float:
    """Return the price of one rung: the trunk from where it stands, a cooldown, the decoded validation documents."""
    price, share = prices["candidates"][name], prices["cooldown_share"]
    cooldowns = [max(1, round(share * updates_at(prices, r))) for r in (rung - 1, rung)]
    stands = updates_at(prices, rung - 1) - cooldowns[0] if rung else 0
    return (updates_at(prices, rung) - stands) * price["update"] + price["score"]


def seed_seconds(prices: Mapping, name: str, updates: int) -> float:
    """Return the price of the same student with another seed, from nothing."""
    return updates * prices["candidates"][name]["update"] + prices["candidates"][name]["score"]


def next_rung(prices: Mapping, ranked: Sequence[str], rung: int, spent: float, seconds: float) -> list[str]:
    """Return which candidates the time pays the next rung for, best first; none ends the race.

    `ranked` are those still in it, best first. Each rung has half as many places as the one before, two at least. From
    the second on a second seed of two finalists must stay payable, and always the end: test, speed, export.
    """
    places = max(2, math.ceil(len(prices["candidates"]) / 2**rung))
    for size in range(min(places, len(ranked)), 0, -1):
        kept = list(ranked[:size])
        if rung and size < min(2, len(ranked)):
            break  # of two that cannot be told apart none is dropped for a longer training of the other
        needed = sum(rung_seconds(prices, name, rung) for name in kept)
        if rung == 0 and any(prices["candidates"][name]["labels"] for name in kept):
            needed += prices["labels"]
        if rung and size > 1:
            needed += sum(sorted(seed_seconds(prices, name, updates_at(prices, rung)) for name in kept)[-2:])
        if spent + needed + prices["end"] <= seconds:
            return kept
    return []


def check_hours(prices: Mapping, seconds: float) -> None:
    """Raise InputError when not even one candidate can be trained for one rung, naming the hours that it needs."""
    names = list(prices["candidates"])
    if not next_rung(prices, names, 0, prices["measured"], seconds):
        one, every = (_first_rung_hours(prices, chosen) for chosen in (names[:1], names))
        raise InputError(
            f"hours {seconds / 3600:g} is below one rung of {prices['first_rung']} updates: one candidate needs "
            f"{one:.2f}, all {len(names)} need {every:.2f}; raise hours, or lower first_rung, num_train or num_test"
        )


def _first_rung_hours(prices: Mapping, names: Sequence[str]) -> float:
    labels = prices["labels"] * any(prices["candidates"][name]["labels"] for name in names)
    needed = labels + sum(rung_seconds(prices, name, 0) for name in names)
    return math.ceil((prices["measured"] + needed + prices["end"]) / 36) / 100  # rounded up: it must suffice


def run_race(prices: Mapping, seconds: float, score: Callable[[str, int, int], np.ndarray]) -> dict:
    """Race the candidates of the prices and return who won, how, and what happened to all others.

    `score(name, updates, seed)` trains one student and returns its scores, one per validation document; seed 0 is the
    race's, 1 the finalists' second. Only what a 95 % interval separates from the best of its rung is "worse"; what the
    time does not pay for is "dropped for time". It ends when the time does, or when nobody gained from more updates.
    """
    check_hours(prices, seconds)
    scores: dict[str, dict[int, np.ndarray]] = {name: {} for name in prices["candidates"]}
    ranked, spent, rung, rows, fates = list(scores), prices["measured"], 0, [], {}
    ended = "the time was used up"
    while kept := next_rung(prices, ranked, rung, spent, seconds):
        updates = updates_at(prices, rung)
        fates |= {name: f"dropped for time before {updates} updates" for name in ranked if name not in kept}
        if rung == 0 and any(prices["candidates"][name]["labels"] for name in kept):
            spent += prices["labels"]
        for name in kept:
            scores[name][updates] = score(name, updates, 0)
            spent += rung_seconds(prices, name, rung)
        ranked = sorted(kept, key=lambda name: -scores[name][updates].mean())
        for name in ranked:
            test = statistics.compare(scores[name][updates], scores[ranked[0]][updates])
            rows.append({"rung": rung + 1, "updates": updates, "name": name, "score": scores[name][updates].mean(), **test})
            if statistics.effect_sign(test) < 0:
                fates[name] = f"worse after {updates} updates"
        ranked = [name for name in ranked if name not in fates]
        gained = [name for name in ranked if rung == 0 or scores[name][updates].mean() > scores[name][updates // 2].mean()]
        if not gained:
            ended = "no student gained from twice the updates"
            break
        rung += 1

    best = {name: max(scores[name], key=lambda updates: scores[name][updates].mean()) for name in ranked}
    ranked = sorted(ranked, key=lambda name: -scores[name][best[name]].mean())
    finalists = {name: [scores[name][best[name]]] for name in ranked[:2]}
    again = sum(seed_seconds(prices, name, best[name]) for name in finalists)
    if len(finalists) > 1 and spent + again + prices["end"] <= seconds:
        spent += again
        for name, found in finalists.items():
            found.append(score(name, best[name], 1))
    winner = max(finalists, key=lambda name: np.mean(finalists[name]))
    seeds = [values.mean() for values in finalists[winner]]
    simplest = _simplest(prices, winner, {name: np.array(finalists.get(name, [scores[name][best[name]]])) for name in ranked})
    fates |= {name: "not separated from the winner" for name in ranked} | {winner: "winner"}
    return {
        "winner": winner, "updates": best[winner], "seed": int(np.argmax(seeds)), "seed_scores": seeds,
        "finalists": list(finalists), "simplest": simplest, "rows": rows, "fates": fates, "ended": ended,
        "seconds": spent + prices["end"],
    }  # fmt: skip


def _simplest(prices: Mapping, winner: str, scores: Mapping[str, np.ndarray]) -> str:
    """Return the smallest of the last candidates that no interval separates from the winner, which may be that itself."""
    near = [name for name in scores if statistics.effect_sign(statistics.compare(scores[name], scores[winner])) == 0]
    return min(near, key=lambda name: (prices["candidates"][name]["parameters"], name != winner))


# ------------------------------------------------------------------------------------------------------- what was asked


@dataclass
class Request:
    """What a race was asked for, loaded and checked: parameters of notebooks/distill.ipynb, models, data."""

    given: dict
    limits: budget.Budget
    teacher: torch.nn.Module
    tokenizer: object
    splits: dict[str, Dataset]
    base: runs.StudentRun
    decoding: dict

    @property
    def options(self) -> dict:
        """How documents are read, by every decoding of this race."""
        return {"max_source_length": self.base.max_source_length, "prefix": self.base.prefix}


def prepare(given: dict) -> Request:
    """Load what a race needs and reject what cannot work, before anything is computed; `given` are the parameters."""
    limits = budget.parse_budget(*(given[name] for name in ("latency", "speedup", "parameters", "memory")))
    if not given["student_shapes"] and not any(asdict(limits).values()):
        raise InputError("no budget: give latency, speedup, parameters or memory, or fix student_shapes")
    if not given["hours"] > 0:
        raise InputError(f"hours {given['hours']:g} is not positive: give for example 1")
    if given["metric"] not in METRICS:
        raise InputError(f"metric {given['metric']!r} is unknown: use one of {', '.join(METRICS)}")
    if unpriced := set(given["methods"]) & set(UNPRICED):
        raise InputError(f"method {min(unpriced)!r} cannot race, its price is not known before: leave it out")
    teacher, tokenizer = load_model(given["teacher"])
    teacher.to(device())
    decoding = ablations.parse_settings(given["decoding"])
    try:
        generation.decoding_settings(teacher.generation_config, **decoding)
    except TypeError as error:
        raise InputError(f"decoding: {error}") from error
    columns, splits = {name: given[name] for name in ("document_column", "summary_column")}, {}
    for split in loading.SPLITS:
        rows, wanted = loading.load_pairs(given["dataset"], split, **columns), given[f"num_{split}"]
        splits[split] = rows.select(range(min(wanted or len(rows), len(rows))))
    training = Training(
        max_steps=given["first_rung"], batch_size=given["batch_size"], warmup_steps=given["warmup_steps"],
        schedule="cooldown", checkpoint_every=200, seed=given["seed"],
    )  # fmt: skip
    base = runs.StudentRun(
        method="sft", shape="1-1", teacher=given["teacher"], training=training, prefix=given["prefix"],
        max_source_length=given["max_source_length"], max_target_length=given["max_target_length"],
        label_settings={"num_beams": given["label_beams"], "max_new_tokens": given["max_target_length"]},
    )  # fmt: skip
    shapes = given["student_shapes"] or ["1-1"]
    runs.check_runs([replace(base, method=method, shape=shape) for method in given["methods"] for shape in shapes], teacher)
    return Request(given, limits, teacher, tokenizer, splits, base, decoding)


def measured_shapes(asked: Request) -> Path:
    """Return the artifact of all shapes' speed and size (`budget.measure_shapes`)."""
    shapes = asked.given["student_shapes"] or budget.candidate_shapes(asked.teacher)
    return budget.measure_shapes(
        asked.given["teacher"], asked.teacher, asked.tokenizer, asked.splits["validation"], shapes, **asked.options,
        decoding=asked.decoding, int8=asked.given["int8"], num_timed=asked.given["num_timed"],
    )  # fmt: skip


def candidates(asked: Request, shapes: Sequence[str]) -> dict[str, runs.StudentRun]:
    """Return the candidates by printed name: methods x shapes x as many learning rates as MAX_CANDIDATES allow.

    In the order in which the time pays for them where it does not pay for all.
    """
    methods, rates = asked.given["methods"], asked.given["learning_rates"]
    fitting = MAX_CANDIDATES // (len(methods) * len(shapes))
    if not fitting or not rates:
        raise InputError(f"{len(methods)} methods of {len(shapes)} shapes are more than {MAX_CANDIDATES}: name fewer")
    found = {}
    for rate in rates[:fitting]:
        training = replace(asked.base.training, learning_rate=rate)
        for method in methods:
            for shape in shapes:
                run = replace(asked.base, method=method, shape=shape, training=training, variant=f"lr{rate:g}")
                found[f"{method_label(method, shape)}, {rate:g}"] = run
    runs.check_runs(list(found.values()), asked.teacher)
    return found


# --------------------------------------------------------------------------------------------------------------- prices


def measured_prices(asked: Request, plan: Mapping[str, runs.StudentRun]) -> Path:
    """Return the artifact of seconds that anything costs here: an update of each method and shape, a label, a load.

    Updates are those of real training, data and optimizer included, of students that are thrown away.
    """
    kinds = {(run.method, run.shape): replace(run, variant="") for run in plan.values()}
    train = asked.splits["train"].select(range(min(PRICE_ROWS, len(asked.splits["train"]))))
    machine = {"processor": processor_name(), "threads": torch.get_num_threads(), "device": device().type}
    settings = {"runs": [hashed(run) for run in kinds.values()], "data": loading.data_fingerprint(train), **machine}
    settings["teacher"] = model_fingerprint(asked.given["teacher"], asked.teacher)

    def build(folder: Path) -> dict:
        began = time.monotonic()
        load_model(asked.given["teacher"])
        loaded = time.monotonic()
        tokenize_pairs(train, asked.tokenizer, *asked.base.lengths)
        found = {"load": loaded - began, "row": (time.monotonic() - loaded) / len(train), "label": 0.0}
        if any(method in runs.ON_PSEUDO_LABELS for method, _ in kinds):
            few, more = (min(size, len(train)) for size in PRICE_LABELS)
            spent = [_label_seconds(asked, train.select(range(size))) for size in (few, more)]
            found["label"] = max(spent[1] - spent[0], 0.0) / (more - few) if more > few else spent[1] / more
        updates = {f"{run.method} {run.shape}": _update_seconds(asked, run, train) for run in kinds.values()}
        return found | {"update": updates}

    return artifact("prices", settings, build)


def _label_seconds(asked: Request, rows: Dataset) -> float:
    return read_json(runs.label(asked.base, asked.teacher, rows) / "results.json")["seconds"]


def _update_seconds(asked: Request, run: runs.StudentRun, train: Dataset) -> float:
    """Return the mean seconds of an update after the first two, over as many as PRICE_SECONDS allow."""
    batches, seconds = runs.batches_of(run, asked.tokenizer, train), 0.0
    for num in (2, 16):
        student, cut = runs.cut_student(run, asked.teacher)
        choose_attention(student.to(device()), run.max_source_length)
        objective = partial(runs.objective_of(run.method), **cut["options"])
        num = num if not seconds else int(np.clip(PRICE_SECONDS / seconds, 2, num))
        settings = Training(max_steps=2 + num, batch_size=run.training.batch_size, log_every=1, schedule="constant")
        with tempfile.TemporaryDirectory() as folder, students.frozen_in(amp_dtype(), student, asked.teacher):
            history = fit(student, lambda model, batch, objective=objective: objective(model, asked.teacher, batch),
                          batches, settings, Path(folder), stage=f"price of {run.group}")  # fmt: skip
        seconds = max((history[-1]["seconds"] - history[1]["seconds"]) / num, 1e-4)
    return seconds


def race_prices(asked: Request, plan: Mapping[str, runs.StudentRun], shapes: Path, priced: Path) -> dict:
    """Return what `run_race` takes: seconds an update and a score of every candidate, of labels, and of the end.

    Measuring is inside the hours: `measured` is what the two artifacts took when they were built.
    """
    results, paid = read_json(shapes / "results.json"), read_json(priced / "results.json")
    rows = {row["name"]: row for row in results["rows"]}
    num = {split: len(found) for split, found in asked.splits.items()}

    def decoding(row: Mapping, documents: int) -> float:
        return documents * row["decode_s"] + 16 * row["latency_ms"] / 1000  # a test times one document a few times

    found = {}
    for name, run in plan.items():
        row, update = rows[run.shape], paid["update"][f"{run.method} {run.shape}"]
        # Reading the data, its tokens; the loss on validation documents is a forward pass of student and teacher.
        start = 2 * paid["load"] + 2 * num["train"] * paid["row"]
        start += update * num["validation"] / run.training.batch_size
        found[name] = {"update": update, "score": start + decoding(row, num["validation"]),
                       "labels": run.method in runs.ON_PSEUDO_LABELS, "parameters": row["parameters_m"]}  # fmt: skip
    slowest = max((rows[run.shape] for run in plan.values()), key=lambda row: row["decode_s"])
    end = 4 * paid["load"] + sum(decoding(row, num["test"]) for row in (rows["teacher"], slowest))
    training = asked.base.training
    return {
        "candidates": found, "labels": paid["load"] + num["train"] * paid["label"], "end": end,
        "measured": results["build_seconds"] + paid["build_seconds"], "first_rung": training.max_steps,
        "cooldown_share": cooldown_steps(training) / training.max_steps,
    }  # fmt: skip
