"""Profiles fit the notebooks' parameters and the published models, and run; published figures agree with themselves."""

import ast
import csv
import functools
import importlib
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import tiny_hub
import torch
from transformers import BartConfig, BartForConditionalGeneration, PegasusConfig, PegasusForConditionalGeneration

from distill_utils.artifacts import read_json
from distill_utils.experiments import checks, runs
from distill_utils.models import loading, students
from distill_utils.report import settings
from distill_utils.training import loop

PROFILES = sorted(path.stem for path in (settings.NOTEBOOKS / "profiles").glob("*.yaml"))
XSUM, CNN = (204_045, 6), (287_113, 2)  # training pairs and published epochs
BART, PEGASUS = (12, {"12-6", "12-3", "6-6", "9-6", "12-1"}), (16, {"16-4"})  # depth of both stacks, shapes asked for
PUBLISHED = {  # profile: positions of the teacher, its depth and shapes, data
    "xsum": (1024, *BART, *XSUM),
    "cnn_dailymail": (1024, *BART, *CNN),
    "xsum_pegasus": (512, *PEGASUS, *XSUM),
    "cnn_dailymail_pegasus": (1024, *PEGASUS, *CNN),
}
COLUMNS = (
    "dataset", "teacher", "student", "method", "rouge1", "rouge2", "rougeL", "rougeLsum", "length", "ms_per_document",
    "speedup", "parameters_m", "source", "note",
)  # fmt: skip
TEXTS = ("dataset", "teacher", "student", "method", "source", "note")


@functools.cache
def large(layers: int, positions: int = 1024):
    """Return BART-large (12 layers) or Pegasus-large (16) with weights that have shapes and take no memory."""
    sizes = {"encoder_layers": layers, "decoder_layers": layers, "max_position_embeddings": positions}
    with torch.device("meta"):
        if layers == 12:
            return BartForConditionalGeneration(BartConfig(vocab_size=50_264, **sizes))
        return PegasusForConditionalGeneration(PegasusConfig(vocab_size=96_103, **sizes))


def published_rows() -> list[dict]:
    with open(loading.ASSETS / "published.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    numbers = [name for name in COLUMNS if name not in TEXTS]
    return [row | {name: float(row[name]) if row[name] else None for name in numbers} for row in rows]


def values_of(profile: str, notebook: str) -> dict:
    return settings.make_plans([notebook], profile, [])[0].values


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_names_known_parameters_of_the_right_type(profile):
    plans = settings.make_plans([], profile, [], every=True)
    assert plans and all(plan.changed for plan in plans if profile != settings.DEFAULT_PROFILE)


@pytest.mark.parametrize("profile", PUBLISHED)
def test_published_profile_can_run_on_the_real_shapes(profile):
    positions, layers, shapes, num_train, epochs = PUBLISHED[profile]
    first, values = values_of(profile, "01"), values_of(profile, "03")
    for name in ("teacher", "dataset", "max_source_length", "max_target_length", "num_test"):
        assert first[name] == values[name]  # one teacher, one test set: notebook 03 reuses what 01 measured
    assert set(values["student_shapes"]) == shapes
    assert values["max_steps"] == epochs * math.ceil(num_train / values["batch_size"])
    assert values["num_train"] == values["num_test"] == 0  # steps are counted for all pairs
    search = values_of(profile, "02")
    assert all(search[name] == values[name] for name in ("teacher", "dataset", "max_source_length", "freeze_encoder"))
    assert max(*search["encoder_depths"], *search["decoder_depths"], search["kept_layers"]) <= layers
    assert search["max_steps"] == search["num_train"] / search["batch_size"]
    training = {name: values[name] for name in ("max_steps", "batch_size", "micro_batch_size", "learning_rate")}
    training = loop.Training(**training, warmup_steps=values["warmup_steps"])
    loop.check_training(training)
    assert training.warmup_steps < training.max_steps
    lengths = {name: values[name] for name in ("max_source_length", "max_target_length")}
    base = runs.StudentRun(method="sft", shape="", teacher=values["teacher"], training=training, **lengths)
    plan = runs.grid(base, values["methods"], values["student_shapes"], values["seeds"])
    checks.check_runs(plan, large(layers, positions))
    rows = [r for r in published_rows() if (r["dataset"], r["teacher"]) == (values["dataset"], values["teacher"])]
    assert {"", *shapes} - {row["student"] for row in rows} <= {"9-6"}  # no 9-6 on CNN/DailyMail
    assert {row["method"] for row in rows} <= {"", "teacher", *runs.METHODS}


# Sizes of a run in which every cell is executed and nothing learned. What is not named here is the profile's own.
SMALL = {
    "num_train": 24, "num_validation": 6, "num_test": 2, "num_samples": 3, "num_calibration": 6, "num_generated": 2,
    "search_budget": 4, "num_maps": 2, "num_decoding": 1, "num_texts": 40, "num_windows": 4, "max_steps": 2,
    "distill_steps": 2, "tune_steps": 2, "control_steps": 2, "process_steps": 2, "warmup_steps": 1, "evaluations": 2,
    "batch_size": 2, "micro_batch_size": 1, "check_batch_size": 2, "source_length": 64,
}  # fmt: skip
# Of these lists the first and the last, of beams the first two, of paths three: the others go through the same cells.
ENDS = (
    "seeds", "learning_rates", "student_shapes", "length_penalties", "encoder_depths", "decoder_depths", "plan_devices",
)  # fmt: skip
NARROW = {"student_width": 32, "assistants": ["24-24-w32"]}  # as wide as the stand-ins
STEPS = "google-t5/t5-small > google-t5/t5-small:1"  # run for real in place of T5's own sizes
CASES = [
    (profile, plan.path.stem)
    for profile in PROFILES
    for plan in settings.make_plans([], profile, [], every=True)
    if profile != "smoke"  # test_smoke.py runs it
]


def small_values(profile: str, notebook: str) -> dict:
    """Return what is changed in a profile to run it in seconds."""
    values = values_of(profile, notebook)
    changes = {name: value for name, value in SMALL.items() if name in values}
    changes |= {name: [values[name][0], values[name][-1]] for name in ENDS if len(values.get(name, [])) > 2}
    changes |= {"beams": values["beams"][:2]} if values.get("beams") else {}
    changes |= {"paths": [*values["paths"][:2], values["paths"][-1]]} if len(values.get("paths", [])) > 3 else {}
    if values.get("num_processes", 1) > 1:  # they share a pass
        changes |= {"batch_size": 4, "micro_batch_size": 2}
    if notebook == "04_miniend":  # T5 writes to its limit
        changes |= {"max_target_length": 24}
    if profile == "3b":  # the one with a plan of its own; it takes a minute
        changes |= NARROW
    elif "plan_models" in values:
        changes |= {"plan_models": ["t5-small", "t5-small:3", "t5-small:1"]}
    return changes | ({"checked": [STEPS]} if values.get("checked") else {})


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The home of a hub cache that holds a stand-in of every model and data set that a profile names."""
    home = tmp_path_factory.mktemp("hub")
    tiny_hub.write_hub(home)
    return home


def test_commands_in_the_comments_of_profiles_name_what_exists():
    found = []
    for name in PROFILES:
        text = re.sub(r"\n# *", " ", (settings.NOTEBOOKS / "profiles" / f"{name}.yaml").read_text(encoding="utf-8"))
        for script in re.findall(r'python -c "(.*?)"', text):
            tree = ast.parse(script)
            modules = {a.asname: importlib.import_module(a.name) for n in tree.body if isinstance(n, ast.Import)
                       for a in n.names}  # fmt: skip
            used = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)]
            found += [n for n in used if n.value.id in modules and hasattr(modules[n.value.id], n.attr)]
            assert all(hasattr(modules[n.value.id], n.attr) for n in used if n.value.id in modules), script
        for command in re.findall(r"distill_utils report (.*?)(?=python -|  |$)", text):
            given = re.findall(r"-p (\w+)=", command)
            known = {each for path in settings.NOTEBOOKS.glob("*.ipynb") for each in settings.notebook_parameters(path)}
            assert set(given) <= known, command
    assert len(found) > 5


def test_no_profile_is_left_out():
    files = {path.stem for path in (settings.NOTEBOOKS / "profiles").iterdir()}
    assert files == {profile for profile, _ in CASES} | {"smoke"}
    for profile, notebook in CASES:
        values = values_of(profile, notebook)
        names = [value for name in ("teacher", "dataset", "text", "student_like") if (value := values.get(name))]
        names += [*values.get("teachers", []), *filter(None, values.get("task_paths", []))]
        hub_names = {name for name in names if "/" in name}
        assert hub_names <= {*tiny_hub.MODELS, *tiny_hub.DATA}, "a stand-in is missing in tiny_hub.py"


@pytest.mark.slow
@pytest.mark.parametrize(("profile", "notebook"), CASES)
def test_every_cell_of_every_profile_runs(profile, notebook, hub, corpus, tmp_path):
    changes = small_values(profile, notebook)
    command = [sys.executable, "-m", "distill_utils", "report", notebook, "--profile", profile, "--output", tmp_path]
    for name, value in changes.items():
        command += ["-p", f"{name}={settings.as_text(value)}"]
    done = subprocess.run(
        command, cwd=settings.REPOSITORY, env={**os.environ, "HF_HOME": str(hub)}, capture_output=True, text=True,
        timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    results = read_json(next(Path(tmp_path).rglob(f"{notebook}.json")))
    assert results["parameters"] == values_of(profile, notebook) | changes and results["rows"]


def test_published_figures_are_well_formed():
    rows = published_rows()
    assert tuple(rows[0]) == COLUMNS
    for row in rows:
        assert all(row[name] for name in ("dataset", "teacher", "source"))
        assert (row["student"] == "") == (row["method"] == "teacher") or row["note"].endswith("shape not known")
        scores = [row[name] for name in COLUMNS[4:8] if row[name] is not None]
        assert all(5 < score < 60 for score in scores) and (scores or row["ms_per_document"])
        if row["rouge1"] and row["rouge2"]:
            longest = [row[name] for name in ("rougeL", "rougeLsum") if row[name]]
            assert all(row["rouge2"] < score < row["rouge1"] for score in longest)
    keys = Counter(tuple(row[name] for name in ("teacher", "student", "method", "source", "note")) for row in rows)
    assert max(keys.values()) == 1
    cards = [row for row in rows if row["source"] == "card"]
    teacher_ms = {row["teacher"]: row["ms_per_document"] for row in cards if row["method"] == "teacher"}
    assert len(cards) == 10
    for row in cards:
        assert row["speedup"] == pytest.approx(teacher_ms[row["teacher"]] / row["ms_per_document"], abs=0.01)


def test_published_sizes_are_those_of_students_cut_here():
    sizes = {}
    for row in published_rows():
        depth = 16 if "pegasus" in row["teacher"] else 12
        sizes.setdefault((depth, row["student"]), set()).add(row["parameters_m"])
    assert len(sizes) >= 14
    for (layers, shape), published in sizes.items():
        teacher = large(layers, 512 if layers == 16 else 1024)
        student = students.init_student(teacher, *map(int, shape.split("-")))[0] if shape else teacher
        total = students.count_parameters(student)["total"] / 1e6
        assert all(total == pytest.approx(size, abs=0.6) for size in published - {None}), shape
