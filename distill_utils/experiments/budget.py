"""Which shapes a budget allows, by the speed and size of every student before any is trained.

Out of scope: measuring them (pricing.py), training what fits (race.py).
"""

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from distill_utils.artifacts import InputError
from distill_utils.models import students

MAX_SHAPES = 3
# A budget is {limit: what a student may cost}, at most and for the speed-up at least, in the units of these columns:
# milliseconds per summary at batch 1, times as fast as the teacher as it is decoded, millions of parameters, and
# megabytes (2**20 bytes) of weights.
COLUMNS = {"latency": "latency_ms", "speedup": "speedup", "parameters": "parameters_m", "memory": "memory_mb"}
UNITS = {
    "latency": {"ms": 1.0, "s": 1000.0},
    "parameters": {"k": 1e-3, "M": 1.0, "B": 1000.0},
    "memory": {"MB": 1.0, "GB": 1024.0},
}
EXAMPLES = {"latency": "30ms or 0.03s", "parameters": "100M", "memory": "500MB"}
SUFFIXES = {"latency": "ms", "speedup": "", "parameters": "M", "memory": "MB"}


def parse_budget(latency: str = "", speedup: float = 0.0, parameters: str = "", memory: str = "") -> dict[str, float]:
    """Return the budget of texts like "30ms", "100M" and "500MB"; InputError names what is not such a text."""
    if speedup < 0:
        raise InputError(f"speedup {speedup:g} is negative: give for example 2, or 0 for no limit")
    written = {"latency": latency, "parameters": parameters, "memory": memory}
    limits = {name: _amount(name, text) if text.strip() else 0.0 for name, text in written.items()}
    limits["speedup"] = speedup
    return {name: limits[name] for name in COLUMNS if limits[name]}


def _amount(name: str, text: str) -> float:
    units = {unit.lower(): size for unit, size in UNITS[name].items()}
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-z]+)", text.strip().lower())
    if not found or found[2] not in units or not float(found[1]) > 0:
        raise InputError(f"{name} {text!r} is not an amount with a unit ({', '.join(UNITS[name])}): {EXAMPLES[name]}")
    return float(found[1]) * units[found[2]]


# ------------------------------------------------------------------------------------------------------------- choosing


def candidate_shapes(teacher) -> list[str]:
    """Return the shapes of both stacks halved down to one layer, largest first, without the teacher's own."""
    stacks = []
    for layers in (students.encoder_layers(teacher), students.decoder_layers(teacher)):
        depths = [len(layers)]
        while depths[-1] > 1:
            depths.append(-(-depths[-1] // 2))
        stacks.append(depths)
    return [f"{encoder}-{decoder}" for encoder in stacks[0] for decoder in stacks[1]][1:]


def excesses(row: Mapping, budget: Mapping[str, float]) -> dict[str, float]:
    """Return by which factor a measured row exceeds each limit; limits that it meets are left out."""
    values = {name: row[COLUMNS[name]] for name in budget}
    factors = {n: budget[n] / value if n == "speedup" else value / budget[n] for n, value in values.items()}
    return {name: factor for name, factor in factors.items() if factor > 1}


def choose_shapes(rows: Sequence[Mapping], budget: Mapping[str, float], every: bool = False) -> list[str]:
    """Return the shapes that fit a budget and lie inside no other that fits, at most MAX_SHAPES, or all that fit.

    If there are more, those with the deepest encoders: the published students keep the encoder and cut the decoder.
    InputError names the nearest budget that can be met.
    """
    fitting = [row["student"] for row in rows if row["student"] and not excesses(row, budget)]
    if not fitting:
        near = min((row for row in rows if row["student"]), key=lambda row: max(excesses(row, budget).values()))
        missed = excesses(near, budget)
        wanted = ", ".join(f"{name} {budget[name]:g}{SUFFIXES[name]}" for name in missed)
        # Rounded to the side on which the nearest shape lies inside.
        rounded = {name: math.ceil(10 * near[COLUMNS[name]]) / 10 for name in missed}
        if "speedup" in missed:
            rounded["speedup"] = math.floor(100 * near["speedup"]) / 100
        asked = " ".join(f"--{name} {value:g}{SUFFIXES[name]}" for name, value in rounded.items())
        raise InputError(f"no student meets {wanted}: the nearest, {near['student']}, needs {asked}")
    if every:
        return fitting
    layers = {shape: tuple(map(int, shape.split("-"))) for shape in fitting}
    larger = {a: [b for b in fitting if a != b and all(np.array(layers[b]) >= layers[a])] for a in fitting}
    largest = [shape for shape in fitting if not larger[shape]]
    return sorted(largest, key=layers.get, reverse=True)[:MAX_SHAPES]


def fit_column(rows: Sequence[Mapping], budget: Mapping[str, float], chosen: Sequence[str]) -> list[str]:
    """Return for every row whether it fits, and why it does not start."""
    texts = []
    for row in rows:
        outside = excesses(row, budget)
        late = ", ".join(f"{name} off by {100 * (factor - 1):.1f} %" for name, factor in outside.items())
        kept = "starts" if row["student"] in chosen else "fits; a larger one does too" if row["student"] else "fits"
        texts.append(late or kept)
    return texts
