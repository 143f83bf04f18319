"""Sweeps: a notebook once for every combination of parameter values, finished ones not again.

Out of scope: how one is run and published (batch.py).
"""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from distill_utils.artifacts import InputError, read_json
from distill_utils.report import batch
from distill_utils.report.settings import DEFAULT_PROFILE, NOTEBOOKS, Plan, as_text, make_plans
from distill_utils.workers import check_workers

KEYS = ("notebook", "profile", "fixed", "grid")
MAX_RUNS = 1000  # more is a mistake in the grid


def read_grid(path: Path, folder: Path = NOTEBOOKS) -> list[Plan]:
    """Return a plan for every combination of a grid, in the order of its lists; InputError before anything runs.

    The YAML file names a `notebook` as `report` does, a `profile` to start from (its defaults if not given), `fixed`
    parameters, and the `grid`: parameter names and lists of values.
    """
    import yaml

    try:
        asked = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        reason = type(error).__name__
        raise InputError(f"{path.name} is not a readable YAML file ({reason}): see `sweep --help`") from error
    if not isinstance(asked, dict) or not set(asked) <= set(KEYS) or "notebook" not in asked:
        raise InputError(f"{path.name} is no grid: give notebook, grid and perhaps {', '.join(KEYS[1:3])}")
    grid, fixed = asked.get("grid") or {}, asked.get("fixed") or {}
    if not isinstance(grid, dict) or not isinstance(fixed, dict):
        raise InputError(f"{path.name}: grid and fixed must map names of parameters to values")
    if not grid or not all(isinstance(values, list) and values for values in grid.values()):
        raise InputError(f"{path.name}: the grid is empty: give each of its parameters a list of at least one value")
    if twice := set(grid) & set(fixed):
        raise InputError(f"{path.name}: {min(twice)} is in the grid and fixed: leave one out")
    if (number := math.prod(len(values) for values in grid.values())) > MAX_RUNS:
        raise InputError(f"{path.name} has {number:,} combinations: give at most {MAX_RUNS:,}")
    named, plans = [str(asked["notebook"])], []
    for values in itertools.product(*grid.values()):
        chosen = {name: as_text(value) for name, value in zip(grid, values, strict=True)}
        given = [f"{name}={text}" for name, text in {**{k: as_text(v) for k, v in fixed.items()}, **chosen}.items()]
        (plan,) = make_plans(named, asked.get("profile", DEFAULT_PROFILE), given, folder)
        label = ",".join(f"{name}={text}" for name, text in chosen.items())
        plans.append(replace(plan, profile=re.sub(r"[^A-Za-z0-9.,=-]+", "_", label)[:120].strip("_")))
    if len({plan.name for plan in plans}) < number:
        raise InputError(f"{path.name}: two combinations are alike: give each value once")
    return plans


def run_sweep(plans: Sequence[Plan], reports: Path, told: str = "all", workers: int = 1, slurm: str = "") -> int:
    """Make the report of every plan that has none yet; return the exit code of the first that failed."""
    check_workers(workers, slurm)
    left = [plan for plan in plans if not _is_finished(plan, reports)]
    if (finished := len(plans) - len(left)) and told == "all":
        print(f"{finished} of {len(plans)} are finished", flush=True)
    code = batch.run_reports(left, reports, told, workers, slurm)
    made = sum(_is_finished(plan, reports) for plan in plans)
    if told == "all":
        print(f"{made} of {len(plans)} finished; compare them in {reports / 'index.html'}")
    return code


def _is_finished(plan: Plan, reports: Path) -> bool:
    entry = reports / f"{plan.name}.json"
    return entry.with_suffix(".html").is_file() and read_json(entry).get("parameters") == plan.values
