"""`distill`: from a budget to a student. The request of a race, what it will cost, its training, its verdict.

All it makes are artifacts, so that a race that was killed and started again ends with the same winner and the same
weights. Out of scope: which shapes fit (budget.py), who is dropped when (race.py).
"""

import itertools
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from transformers.utils.logging import disable_progress_bar

from distill_utils.artifacts import InputError, read_json, runs_dir
from distill_utils.data import loading
from distill_utils.device import device
from distill_utils.distillation.teacher_cache import fits_disk
from distill_utils.evaluation import generation, scoring, statistics
from distill_utils.evaluation.ctranslate import converted_decoder
from distill_utils.evaluation.metrics import METRICS
from distill_utils.experiments import ablations, budget, checks, comparison, fine_tuning, race, runs
from distill_utils.experiments.export import check_target
from distill_utils.experiments.pricing import (
    COOLDOWN,
    UNPRICED,
    Request,
    exactly,
    measured_prices,
    measured_shapes,
    race_prices,
)
from distill_utils.models import students
from distill_utils.models.loading import load_model, model_fingerprint
from distill_utils.report.names import method_label
from distill_utils.report.style import HEADINGS
from distill_utils.training.optimizers import Training, check_training
from distill_utils.workers import check_workers, share_out

MAX_CANDIDATES = 9
FIRST_RUNG, FIRST_PASSES = 300, 4  # updates, and over the training pairs: a first rung has the fewer
RATE_FACTORS = (1.0, 2.0, 0.5)  # of the usual learning rate, in the order in which they are tried
DISK_BYTES = 28  # per parameter and rung: the student, a checkpoint of its trunk, one of its cooldown; the moments too


def prepare(given: dict, train: bool = True) -> Request:
    """Load what a race needs and reject what cannot work before anything is computed; `given`: all parameters.

    With `train_teacher` the teacher is fine-tuned here, if the hours pay for a rung as well; `train` False only prices
    it.
    """
    check_workers(given["workers"], given["slurm"])
    limits = budget.parse_budget(*(given[name] for name in ("latency", "speedup", "parameters", "memory")))
    if not given["student_shapes"] and not limits:
        raise InputError("no budget: give latency, speedup, parameters or memory, or name student_shapes")
    if given["output"]:
        check_target(Path(given["output"]).expanduser(), replace=True)
    if not given["hours"] > 0:
        raise InputError(f"hours {given['hours']:g} is not positive: give for example 1")
    for name, least in (("num_timed", 1), ("max_rungs", 0)):
        if given[name] < least:
            raise InputError(f"{name} {given[name]} is too small: give at least {least}")
    if given["metric"] not in METRICS:
        raise InputError(f"metric {given['metric']!r} is unknown: use one of {', '.join(METRICS)}")
    if unpriced := set(given["methods"]) & set(UNPRICED):
        raise InputError(f"method {min(unpriced)!r} cannot race: its price is not known before training; leave it out")
    teacher, tokenizer = fine_tuning.load_teacher(
        given["teacher"], 0 if given["train_teacher"] else given["max_target_length"]
    )
    if not (given["student_shapes"] or budget.candidate_shapes(teacher)):
        raise InputError(f"teacher {given['teacher']} has one layer in each stack, nothing to cut: take a deeper one")
    decoding = ablations.parse_decoding(given["decoding"], teacher)
    training = Training(
        max_steps=given["first_rung"] or FIRST_RUNG, batch_size=given["batch_size"], warmup_steps=given["warmup_steps"],
        schedule="cooldown", cooldown_share=COOLDOWN, checkpoint_every=200, seed=given["seed"],
    )  # fmt: skip
    for rate in given["learning_rates"]:
        check_training(replace(training, learning_rate=rate))
    base = runs.StudentRun(
        method="sft", shape="1-1", teacher=given["teacher"], training=training, prefix=given["prefix"],
        max_source_length=given["max_source_length"], max_target_length=given["max_target_length"],
        label_settings={"num_beams": given["label_beams"], "max_new_tokens": given["max_target_length"]},
    )  # fmt: skip
    shapes = given["student_shapes"] or ["1-1"]
    checks.check_runs(runs.grid(base, given["methods"], shapes, [given["seed"]]), teacher)
    read = ("num_train", "num_validation", "num_test", "document_column", "summary_column")
    splits = loading.load_splits(given["dataset"], **{name: given[name] for name in read})
    if not given["first_rung"]:
        given = given | {"first_rung": _usual_first_rung(len(splits["train"]), training)}
        base = replace(base, training=replace(training, max_steps=given["first_rung"]))
    lengths = given["max_source_length"], given["max_target_length"]
    cached = len(splits["train"]) + len(splits["validation"])
    base = replace(base, cache_states=fits_disk(teacher, cached, *lengths, given["cache_gb"]))
    asked = Request(given, limits, teacher, tokenizer, splits, base, decoding)
    return fine_tuning.with_own_teacher(asked, known_before if train else None) if given["train_teacher"] else asked


def _usual_first_rung(num_train: int, training: Training) -> int:
    """Return the updates of a first rung: FIRST_RUNG, or fewer for few pairs, which a student would memorize."""
    least = max(2 * training.warmup_steps, 10)
    return min(FIRST_RUNG, max(least, math.ceil(FIRST_PASSES * num_train / training.batch_size)))


# ---------------------------------------------------------------------------------------------- what is known before


def decoder_maps(teacher, shape: str) -> list[list[int] | None]:
    """Return the layer maps of a shape's decoder that race, in the order in which they are tried; None: the usual one.

    Where the published map lacks the teacher's last layer, as of a single layer, it is tried with the last as well:
    which is better depends on model and data (LOG.md).
    """
    depth, layers = len(students.decoder_layers(teacher)), students.parse_shape(shape, teacher)[1]
    usual = students.layer_map(depth, layers)
    return [None] if depth - 1 in usual else [[*usual[:-1], depth - 1], None]


def candidates(asked: Request, shapes: Sequence[str]) -> dict[str, runs.StudentRun]:
    """Return the candidates by printed name: methods x shapes, x maps and learning rates as MAX_CANDIDATES allow.

    They are in order of priority, for when the time does not suffice for all. Without learning rates those
    around `fine_tuning.usual_learning_rate` are tried; other maps only at the first.
    """
    methods, rates = asked.given["methods"], asked.given["learning_rates"]
    maps = {shape: decoder_maps(asked.teacher, shape) for shape in shapes}
    further = [(number, 0) for number in range(1, len(rates or RATE_FACTORS))]
    found = {}
    for number, place in [(0, 0), (0, 1), *further]:  # of the rates and of the maps
        tried = itertools.product(methods, [shape for shape in shapes if place < len(maps[shape])])
        runs_of = [_candidate(asked, method, shape, maps[shape][place], number) for method, shape in tried]
        if len(found) + len(runs_of) > MAX_CANDIDATES:
            break
        found |= dict(runs_of)
    if not found:
        raise InputError(f"{len(methods)} methods x {len(shapes)} shapes give more than {MAX_CANDIDATES} candidates: "
                         "name fewer")  # fmt: skip
    checks.check_runs(list(found.values()), asked.teacher)
    return found


def _candidate(
    asked: Request, method: str, shape: str, ids: list[int] | None, number: int
) -> tuple[str, runs.StudentRun]:
    """Return the printed name and the run of a candidate; `number` is that of its learning rate."""
    usual, rates = fine_tuning.usual_learning_rate(asked.teacher, shape, method), asked.given["learning_rates"]
    rate = rates[number] if rates else float(f"{RATE_FACTORS[number] * usual:.2g}")
    layers = f" from layer{'s' * (len(ids) > 1)} {' '.join(map(str, ids))}" if ids else ""
    run = replace(
        asked.base, method=method, shape=shape, decoder_layer_ids=ids, variant=f"lr{rate:g}{layers}",
        training=replace(asked.base.training, learning_rate=rate),
    )  # fmt: skip
    return f"{method_label(method, shape)}{layers}, {rate:g}", run


def candidate_rows(prices: Mapping) -> list[dict]:
    """Return one row for every candidate: what an update, the first rung and its files cost."""
    rows = []
    for name, price in prices["candidates"].items():
        row = {"name": name, "ms/update": 1000 * price["update"], "first rung (s)": race.rung_seconds(prices, name, 0)}
        row |= {"labels": "yes" if price["labels"] else "no"}
        rows.append(row | {"disk per rung (MB)": DISK_BYTES * price["parameters"] * 1e6 / 2**20})
    return rows


def known_before(asked: Request) -> tuple[list[dict], list[str], dict]:
    """Return the measured rows of shapes, those that start and the prices; InputError where the hours are too few.

    Before a teacher is fine-tuned they are its base's, and all is measured once more afterwards.
    """
    shapes = measured_shapes(asked)
    rows = read_json(shapes / "results.json")["rows"]
    chosen = budget.choose_shapes(rows, asked.limits, every=bool(asked.given["student_shapes"]))
    plan = candidates(asked, chosen)
    costs = measured_prices(asked, plan)
    if asked.own_teacher:
        taken = [read_json(made / "results.json")["build_seconds"] for made in (shapes, costs)]
        asked.own_teacher["base_s"] = asked.own_teacher["price_s"] + sum(taken)
    prices = race_prices(asked, plan, shapes, costs)
    race.check_hours(prices, 3600 * asked.given["hours"])
    return rows, chosen, prices


def dry_run(given: dict) -> str:
    """Return the tables of a race as text: everything is measured as before a race, nothing is trained."""
    disable_progress_bar()
    asked = prepare(given, train=False)
    rows, chosen, prices = known_before(asked)
    rungs = race.planned_rungs(prices, 3600 * given["hours"])
    shown = ["name", "parameters_m", "latency_ms", "speedup", "memory_mb", "rouge2"]
    shown = pd.DataFrame(rows)[shown].assign(budget=budget.fit_column(rows, asked.limits, chosen))
    priced = pd.DataFrame(candidate_rows(prices))
    disk = (2 + sum(row["candidates"] for row in rungs)) * priced["disk per rung (MB)"].max()  # two for second seeds
    disk += 1000 * given["cache_gb"] * asked.base.cache_states  # what the teacher's states may take
    disk += given["workers"] * sum(weight.nbytes for weight in asked.teacher.parameters()) / 2**20  # frozen, put aside
    own = asked.own_teacher
    last = f"Teacher {own['priced_s']:.0f} s for {own['updates']} updates; shapes are its base's. " if own else ""
    last += (
        f"Labels {prices['labels']:.0f} s, test and export {prices['end']:.0f} s, measuring and teacher's states "
        f"{prices['measured'] - prices['teacher']:.0f} s of {3600 * given['hours']:.0f} s; at most {disk:.0f} MB of "
        "disk. Nothing was trained."
    )
    tables = [shown, priced, pd.DataFrame(rungs)]
    return "\n\n".join([*(table.to_string(index=False, na_rep="", float_format="%.2f") for table in tables), last])


# ------------------------------------------------------------------------------------------------------ race and choice


def trained_and_scored(
    asked: Request, plan: Mapping[str, runs.StudentRun], wanted: Sequence[tuple[str, int, int]]
) -> list[np.ndarray]:
    """Train students as branches of their candidates' trunks; return the scores of each, one per validation document.

    Several workers share them where requested. The weights equal those of one worker with as many threads; another
    number of threads sums in another order.
    """
    described = {each: student_run(asked, plan, *each) for each in wanted}
    workers, slurm = asked.given["workers"], asked.given["slurm"]
    if workers > 1 or slurm:
        given = asked.given | {"train_teacher": False, "output": "", "workers": 1, "slurm": ""}
        items = {f"{each[0]}, {each[1]} updates, seed {each[2]}": (given, run) for each, run in described.items()}
        share_out(_train_alone, items, workers, slurm)  # all is reused below
    asked.made |= {each: _train_and_test(asked, run) for each, run in described.items()}
    return [scoring.read_scores(asked.made[each][1])[asked.given["metric"]] for each in wanted]


def _train_alone(given: dict, run: runs.StudentRun) -> None:
    _train_and_test(prepare(given), run)


def _train_and_test(asked: Request, run: runs.StudentRun) -> tuple[Path, Path]:
    trained = runs.train_student(run, asked.teacher, asked.tokenizer, asked.splits["train"], asked.splits["validation"])
    return trained, tested_on(asked, "validation", f"{run.name}-{run.training.max_steps}", trained)


def student_run(
    asked: Request, plan: Mapping[str, runs.StudentRun], name: str, updates: int, seed: int
) -> runs.StudentRun:
    """Return the description of a candidate after so many updates; seeds count from the race's own."""
    training = replace(plan[name].training, max_steps=updates, seed=asked.given["seed"] + seed)
    return replace(plan[name], training=training)


def tested_on(asked: Request, split: str, name: str = "teacher", trained: Path | None = None, baseline=None) -> Path:
    """Return the artifact of a student's or the teacher's summaries of a split and their scores.

    With `int8` the student is tested in int8, as it is timed and exported.
    """
    model = load_model(trained / "student")[0].to(device()) if trained else asked.teacher
    fingerprint = trained.name if trained else model_fingerprint(asked.given["teacher"], model)
    return scoring.evaluate_model(
        name, model, asked.tokenizer, fingerprint, asked.splits[split], baseline=baseline, num_speed=0, **asked.options,
        int8=bool(trained and split == "test" and asked.given["int8"]), **(asked.decoding if trained else {}),
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
            fast = converted_decoder(student, asked.tokenizer, Path(temporary))[0]
            decoders["student"] = partial(fast, **asked.options, **asked.decoding)
        ways = {"tokens as before": exactly(num_new_tokens), "own summaries": {}}
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
    own = asked.own_teacher
    teacher_s = own.get("priced_s", 0.0)
    states_s, labels_s = prices["states"], race.labels_seconds(prices, labelled)
    measuring_s = prices["measured"] - teacher_s - states_s
    students_s = found["seconds"] - measuring_s - states_s - labels_s - teacher_s - prices["end"]
    states = {name for results, _ in made.values() for name in results.get("states", [])}
    trained = sum(results["seconds"] + results.get("prepare_seconds", 0.0) for results, _ in made.values())
    scored = sum(results["build_seconds"] for _, results in made.values())
    rows = [
        ("measuring shapes and prices", measuring_s, measuring_s),
        ("states of the teacher", states_s, sum(read_json(runs_dir() / n / "results.json")["seconds"] for n in states)),
        ("pseudo-labels", labels_s, read_json(labels / "results.json")["seconds"] if labels else 0.0),
        ("training and scoring students", students_s, trained + scored),
        ("tests and export", prices["end"], sum(read_json(path / "results.json")["build_seconds"] for path in tests)),
    ]
    rows = ([("fine-tuning the teacher", own["priced_s"], own["measured_s"])] if own else []) + rows
    return [dict(zip(("part", "priced (s)", "measured (s)"), row, strict=True)) for row in rows]


def verdict(
    asked: Request, found: Mapping, shapes: Sequence[Mapping], student: Mapping, teacher: Mapping, speed: Mapping
) -> str:  # fmt: skip
    """Return what meets the budget, how good it is and what limits that, as one paragraph of Markdown."""
    metric, lines, num_test = asked.given["metric"], [], len(asked.splits["test"])
    if num_test < comparison.FEW_DOCUMENTS:
        return comparison.smoke_note(num_test)
    cheaper = [row for row in shapes if not row["student"] and not budget.excesses(row, asked.limits)]
    if cheaper and asked.limits:
        named = [f"{row['name']} ({row['latency_ms']:.1f} ms, {row['rouge2']:.2f} ROUGE-2)" for row in cheaper]
        lines.append(f"**No student is needed for this budget**: on validation documents {', '.join(named)} meet it.")
    label = method_label(student["method"], student["student"]) + " in int8" * asked.given["int8"]
    side = "worse" if student[metric] < teacher[metric] else "better"
    sure = f"it is {side}" if student[f"{metric}_p_value"] < 0.05 else "it is not shown to be better or worse"
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
    reach = statistics.budget_in_words(found["updates"], 1, f"{num_test:,} test documents")  # one student is tested
    return " ".join([*lines, f"{reach}; the race ended because {found['ended']}."])
