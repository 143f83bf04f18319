"""`distill`: a budget in, a student out. What a race was asked for, what it will cost, its training, its verdict.

All it makes are artifacts, so that a race that was killed and started again ends with the same winner and the same
weights. Out of scope: which shapes fit (budget.py), who is dropped when (race.py).
"""

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from transformers.utils.logging import disable_progress_bar

from distill_utils.artifacts import InputError, artifact, hashed, processor_name, read_json
from distill_utils.data import loading
from distill_utils.data.batches import tokenize_pairs
from distill_utils.device import amp_dtype, device, timed
from distill_utils.distillation.pseudo_labels import pseudo_labels
from distill_utils.evaluation import generation, scoring, statistics
from distill_utils.evaluation.metrics import METRICS
from distill_utils.experiments import ablations, budget, comparison, race, runs
from distill_utils.experiments.export import check_target
from distill_utils.models.frozen import frozen_in
from distill_utils.models.loading import load_model, model_fingerprint, model_folder, shipped_models
from distill_utils.report.style import HEADINGS, method_label
from distill_utils.training.loop import Training, choose_attention, fit

MAX_CANDIDATES = 9
COOLDOWN = 0.15  # share of a student's updates
UNPRICED = ("kd_cached",)  # the teacher's pass over all data, which nothing here measures
PRICE_SECONDS, PRICE_ROWS, PRICE_LABELS = 10.0, 512, (16, 80)  # what measuring one price may take
DISK_BYTES = 28  # per parameter and rung: the student, a checkpoint of its trunk, one of its cooldown; the moments too


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

    @property
    def options(self) -> dict:
        """How documents are read, by students and teacher alike."""
        return {"max_source_length": self.base.max_source_length, "prefix": self.base.prefix}


def prepare(given: dict) -> Request:
    """Load what a race needs and reject what cannot work before anything is computed; `given`: all parameters."""
    limits = budget.parse_budget(*(given[name] for name in ("latency", "speedup", "parameters", "memory")))
    if not given["student_shapes"] and not any(asdict(limits).values()):
        raise InputError("no budget: give latency, speedup, parameters or memory, or fix student_shapes")
    if given["output"]:
        check_target(Path(given["output"]).expanduser(), replace=True)
    if not given["hours"] > 0:
        raise InputError(f"hours {given['hours']:g} is not positive: give for example 1")
    if given["metric"] not in METRICS:
        raise InputError(f"metric {given['metric']!r} is unknown: use one of {', '.join(METRICS)}")
    if unpriced := set(given["methods"]) & set(UNPRICED):
        raise InputError(f"method {min(unpriced)!r} cannot race, as its price is not known before: leave it out")
    decoding = ablations.parse_settings(given["decoding"])
    teacher, tokenizer = load_model(given["teacher"])
    teacher.to(device())
    try:
        generation.decoding_settings(teacher.generation_config, **decoding)
    except TypeError as error:
        raise InputError(f"decoding: {error}") from error
    training = Training(
        max_steps=given["first_rung"], batch_size=given["batch_size"], warmup_steps=given["warmup_steps"],
        schedule="cooldown", cooldown_share=COOLDOWN, checkpoint_every=200, seed=given["seed"],
    )  # fmt: skip
    base = runs.StudentRun(
        method="sft", shape="1-1", teacher=given["teacher"], training=training, prefix=given["prefix"],
        max_source_length=given["max_source_length"], max_target_length=given["max_target_length"],
        label_settings={"num_beams": given["label_beams"], "max_new_tokens": given["max_target_length"]},
    )  # fmt: skip
    shapes = given["student_shapes"] or ["1-1"]
    runs.check_runs(runs.grid(base, given["methods"], shapes, [given["seed"]]), teacher)
    columns, splits = {name: given[name] for name in ("document_column", "summary_column")}, {}
    for split in loading.SPLITS:
        rows, wanted = loading.load_pairs(given["dataset"], split, **columns), given[f"num_{split}"]
        splits[split] = rows.select(range(min(wanted or len(rows), len(rows))))
    return Request(given, limits, teacher, tokenizer, splits, base, decoding)


# ---------------------------------------------------------------------------------------------- what is known before


def measured_shapes(asked: Request) -> Path:
    """Return the artifact of the speed and size of every shape (`budget.measure_shapes`)."""
    shapes = asked.given["student_shapes"] or budget.candidate_shapes(asked.teacher)
    return budget.measure_shapes(
        asked.given["teacher"], asked.teacher, asked.tokenizer, asked.splits["validation"], shapes,
        **asked.options, decoding=asked.decoding, int8=asked.given["int8"], num_timed=asked.given["num_timed"],
    )  # fmt: skip


def chosen_shapes(asked: Request, rows: Sequence[Mapping]) -> list[str]:
    """Return the shapes that start, as of `budget.choose_shapes`; of those fixed by hand all that fit."""
    return budget.choose_shapes(rows, asked.limits, every=bool(asked.given["student_shapes"]))


def candidates(asked: Request, shapes: Sequence[str]) -> dict[str, runs.StudentRun]:
    """Return the candidates by printed name: methods x shapes x as many learning rates as MAX_CANDIDATES allow.

    They are in the order in which the time pays for them where it does not pay for all.
    """
    methods, rates = asked.given["methods"], asked.given["learning_rates"]
    fitting = MAX_CANDIDATES // (len(methods) * len(shapes))
    if not fitting or not rates:
        raise InputError(f"{len(methods)} methods of {len(shapes)} shapes are not 1 to {MAX_CANDIDATES} candidates: "
                         "name fewer, and at least one of learning_rates")  # fmt: skip
    found = {}
    for rate in rates[:fitting]:
        base = replace(asked.base, training=replace(asked.base.training, learning_rate=rate), variant=f"lr{rate:g}")
        for method in methods:
            for shape in shapes:
                found[f"{method_label(method, shape)}, {rate:g}"] = replace(base, method=method, shape=shape)
    runs.check_runs(list(found.values()), asked.teacher)
    return found


def measured_prices(asked: Request, plan: Mapping[str, runs.StudentRun]) -> Path:
    """Return the artifact of what things cost here, in seconds: an update of each method and shape, a label, a load.

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
            spent = [_label_seconds(asked, train.select(range(size)), folder / str(size)) for size in (few, more)]
            # The difference, because each begins with a conversion.
            found["label"] = max(spent[1] - spent[0], 0.0) / (more - few) if more > few else spent[1] / more
        return found | {"update": {_kind(run): _update_seconds(asked, run, train) for run in kinds.values()}}

    return artifact("prices", settings, build)


def _kind(run: runs.StudentRun) -> str:
    return f"{run.method} {run.shape}"


def _label_seconds(asked: Request, rows: Dataset, folder: Path) -> float:
    name, decoding = asked.given["teacher"], asked.base.label_settings
    source = model_folder(name) if name in shipped_models() else name
    return timed(partial(pseudo_labels, source, rows, folder, **asked.options, **decoding))


def _update_seconds(asked: Request, run: runs.StudentRun, train: Dataset) -> float:
    """Return the mean seconds of an update after the first two, of 16 or as many as PRICE_SECONDS allow."""
    batches, seconds = runs.batches_of(run, asked.tokenizer, train), PRICE_SECONDS
    for most in (2, 16):
        num = int(np.clip(PRICE_SECONDS / seconds, 2, most))
        student, cut = runs.cut_student(run, asked.teacher)
        choose_attention(student.to(device()), run.max_source_length)
        objective = partial(runs.objective_of(run.method), teacher=asked.teacher, **cut["options"])
        settings = replace(run.training, max_steps=2 + num, log_every=1, schedule="constant", checkpoint_every=0)
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
        "measured": measured["build_seconds"] + costs["build_seconds"],
        "first_rung": asked.base.training.max_steps, "cooldown_share": COOLDOWN,
        "max_rungs": asked.given["max_rungs"],
    }  # fmt: skip


def candidate_rows(plan: Mapping[str, runs.StudentRun], prices: Mapping) -> list[dict]:
    """Return one row for every candidate: what an update, the first rung and its files cost."""
    rows = []
    for name, run in plan.items():
        price = prices["candidates"][name]
        row = {"name": name, "method": run.method, "student": run.shape, "ms/update": 1000 * price["update"]}
        row |= {"first rung (s)": race.rung_seconds(prices, name, 0), "labels": "yes" if price["labels"] else "no"}
        rows.append(row | {"disk per rung (MB)": DISK_BYTES * price["parameters"] * 1e6 / 2**20})
    return rows


def dry_run(given: dict) -> str:
    """Return the tables of a race as text, after all that is measured before and nothing that is trained."""
    disable_progress_bar()
    asked = prepare(given)
    shapes = measured_shapes(asked)
    rows = read_json(shapes / "results.json")["rows"]
    chosen = chosen_shapes(asked, rows)
    plan = candidates(asked, chosen)
    prices = race_prices(asked, plan, shapes, measured_prices(asked, plan))
    race.check_hours(prices, 3600 * given["hours"])
    rungs = race.planned_rungs(prices, 3600 * given["hours"])
    shown = ["name", "parameters_m", "latency_ms", "speedup", "memory_mb", "rouge2"]
    tables = [
        pd.DataFrame(rows)[shown].assign(budget=budget.fit_column(rows, asked.limits, chosen)),
        pd.DataFrame(candidate_rows(plan, prices)).drop(columns=["method", "student"]),
        pd.DataFrame(rungs),
    ]
    largest = max(price["parameters"] for price in prices["candidates"].values())
    disk = sum(row["candidates"] for row in rungs) * DISK_BYTES * largest * 1e6 / 2**20
    last = (
        f"Labels {prices['labels']:.0f} s, test and export {prices['end']:.0f} s, measuring {prices['measured']:.0f} s "
        f"of {3600 * given['hours']:.0f} s; at most {disk:.0f} MB of disk. Nothing was trained."
    )
    return "\n\n".join([*(table.to_string(index=False, na_rep="", float_format="%.2f") for table in tables), last])


# ------------------------------------------------------------------------------------------------------ race and choice


def trained_and_scored(
    asked: Request, plan: Mapping[str, runs.StudentRun], name: str, updates: int, seed: int
) -> np.ndarray:
    """Train one student as a branch of its candidate's trunk and return its scores, one per validation document."""
    run = student_run(asked, plan, name, updates, seed)
    trained = runs.train_student(run, asked.teacher, asked.tokenizer, asked.splits["train"], asked.splits["validation"])
    tested = tested_on(asked, "validation", f"{run.name}-{updates}", trained)
    asked.made[name, updates, seed] = trained, tested
    return scoring.read_scores(tested)[asked.given["metric"]]


def student_run(
    asked: Request, plan: Mapping[str, runs.StudentRun], name: str, updates: int, seed: int
) -> runs.StudentRun:
    """Return the description of a candidate after so many updates; seeds count from the race's own."""
    training = replace(plan[name].training, max_steps=updates, seed=asked.given["seed"] + seed)
    return replace(plan[name], training=training)


def tested_on(asked: Request, split: str, name: str = "teacher", trained: Path | None = None, baseline=None) -> Path:
    """Return the artifact of a student's or the teacher's summaries of a split and their scores."""
    model = load_model(trained / "student")[0].to(device()) if trained else asked.teacher
    fingerprint = trained.name if trained else model_fingerprint(asked.given["teacher"], model)
    return scoring.evaluate_model(
        name, model, asked.tokenizer, fingerprint, asked.splits[split], baseline=baseline, num_speed=0, **asked.options,
        **(asked.decoding if trained else {}),
    )  # fmt: skip


def time_winner(asked: Request, trained: Path, num_new_tokens: int) -> list[dict]:
    """Return latency and speed-up of teacher and winner, timed again in turns.

    Both for as many tokens as were written before training, which the budget is about, and for what they write.
    """
    documents = list(asked.splits["test"]["document"][: asked.given["num_timed"]])
    student = load_model(trained / "student")[0].to(device())
    decoders = {
        name: partial(generation.summarize, model, asked.tokenizer, **asked.options, **changes)
        for name, model, changes in (("teacher", asked.teacher, {}), ("student", student, asked.decoding))
    }
    with tempfile.TemporaryDirectory() as temporary:
        if asked.given["int8"]:
            fast = budget.int8_decoder(student, asked.tokenizer, Path(temporary))[0]
            decoders["student"] = partial(fast, **asked.options, **asked.decoding)
        ways = {"tokens as before": budget.exactly(num_new_tokens), "own summaries": {}}
        turns = {(way, name): partial(decode, **settings) for way, settings in ways.items()
                 for name, decode in decoders.items()}  # fmt: skip
        times = scoring.interleaved_latency_ms(turns, documents, device())
    rows = []
    for way in ways:
        teacher, own = times[way, "teacher"], times[way, "student"]
        rows.append({"written": way, "teacher (ms)": teacher, "latency_ms": own, "speedup": teacher / own})
    return rows


def front_rows(
    asked: Request, plan: Mapping[str, runs.StudentRun], found: Mapping, shapes: Sequence[Mapping], teacher_test: Path
) -> list[dict]:
    """Return rows for quality against speed: the teacher, the winner, and of each other shape the best scored."""
    latency, metric = {row["name"]: row["latency_ms"] for row in shapes}, asked.given["metric"]
    ends = statistics.bootstrap_interval(scoring.read_scores(teacher_test)[metric])
    named = (metric, f"{metric}_low", f"{metric}_high")
    teacher = {"method": "teacher", "student": "", "latency_ms": latency["teacher"]}
    best: dict[str, dict] = {}
    won = (found["winner"], found["updates"])
    for row in sorted(found["rows"], key=lambda row: ((row["name"], row["updates"]) != won, -row["score"])):
        run = plan[row["name"]]
        values = dict(zip(named, (row["score"], row["score_low"], row["score_high"]), strict=True))
        point = {"name": row["name"], "method": run.method, "student": run.shape, "latency_ms": latency[run.shape]}
        best.setdefault(run.shape, point | values)
    return [teacher | dict(zip(named, ends, strict=True)), *best.values()]


def fate_rows(plan: Mapping[str, runs.StudentRun], found: Mapping) -> list[dict]:
    """Return one row for every candidate: the score it stands for, that minus the best of its rung, its fate."""
    last = {row["name"]: row for row in found["rows"] if row["updates"] <= found["best"].get(row["name"], math.inf)}
    keys = ("updates", "score", "difference", "low", "high")
    rows = [{"name": name, **{key: last.get(name, {}).get(key) for key in keys}, "fate": found["fates"][name]}
            for name in plan]  # fmt: skip
    return sorted(rows, key=lambda row: (-(row["updates"] or 0), -(row["score"] or 0)))


def time_rows(asked: Request, prices: Mapping, found: Mapping, tests: Sequence[Path]) -> list[dict]:
    """Return where the time went, priced beside measured seconds; labels and scores measured when they were made."""
    made = {key: [read_json(folder / "results.json") for folder in folders] for key, folders in asked.made.items()}
    labelled = [name for name, _, _ in made if prices["candidates"][name]["labels"]]
    labels = runs.label(asked.base, asked.teacher, asked.splits["train"]) if labelled else None
    priced = {"measuring": prices["measured"], "labels": race.labels_seconds(prices, labelled), "end": prices["end"]}
    students_s = found["seconds"] - sum(priced.values())
    scored = sum(results["build_seconds"] for _, results in made.values())
    rows = [
        ("measuring shapes and prices", priced["measuring"], prices["measured"]),
        ("pseudo-labels", priced["labels"], read_json(labels / "results.json")["seconds"] if labels else 0.0),
        ("training and scoring students", students_s, sum(results["seconds"] for results, _ in made.values()) + scored),
        ("tests and export", priced["end"], sum(read_json(path / "results.json")["build_seconds"] for path in tests)),
    ]
    return [dict(zip(("part", "priced (s)", "measured (s)"), row, strict=True)) for row in rows]


def verdict(
    asked: Request, found: Mapping, shapes: Sequence[Mapping], student: Mapping, teacher: Mapping, speed: Mapping
) -> str:  # fmt: skip
    """Return what meets the budget, how good it is and what limits that, as one paragraph of Markdown."""
    metric, lines, num_test = asked.given["metric"], [], len(asked.splits["test"])
    if num_test < comparison.FEW_DOCUMENTS:
        return comparison.smoke_note(num_test)
    wanted = {name: limit for name, limit in asdict(asked.limits).items() if limit}
    cheaper = [row for row in shapes if not row["student"] and wanted and not budget.excesses(row, asked.limits)]
    if cheaper:
        named = [f"{row['name']} ({row['latency_ms']:.1f} ms, {row['rouge2']:.2f} ROUGE-2)" for row in cheaper]
        lines.append(f"**No student is needed for this budget**: on validation documents {', '.join(named)} meet it.")
    label = method_label(student["method"], student["student"])
    side = "worse" if student[metric] < teacher[metric] else "better"
    sure = f"that it is {side} is real" if student[f"{metric}_p_value"] < 0.05 else f"whether it is {side} is open"
    lines.append(
        f"**Take {label}**: {speed['speedup']:.2f} times as fast per summary ({speed['latency_ms']:.1f} ms) and "
        f"{statistics.format_share(student)[0]} of the teacher's ROUGE-2; {sure} (p = "
        f"{student[f'{metric}_p_value']:.3f}, {student[metric]:.2f} against {teacher[metric]:.2f} {HEADINGS[metric]})."
    )
    again = {"name": label, "student": student["student"], "parameters_m": student["parameters_m"]}
    again |= {"latency_ms": speed["latency_ms"], "speedup": speed["speedup"]}
    memory = next(row["memory_mb"] for row in shapes if row["student"] == student["student"])
    if missed := budget.excesses(again | {"memory_mb": memory}, asked.limits):
        lines.append(f"**Timed again it misses {', '.join(missed)}**: the budget lies within this machine's noise.")
    if found["simplest"] != found["winner"]:
        lines.append(f"{found['simplest']} is smaller and cannot be separated from it on validation documents.")
    seeds = max(found["finalists"].values())
    reach = statistics.budget_in_words(found["updates"], seeds, f"{num_test:,} test documents")
    return " ".join([*lines, f"{reach}; {found['ended']}."])
