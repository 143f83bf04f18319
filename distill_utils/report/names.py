"""Names and colours of methods, and how intervals are written, on all pages; without matplotlib, which loads slowly."""

import re
from collections.abc import Mapping

# Okabe and Ito's colours, distinct with every common colour blindness; yellow is left out, too pale on white.
METHOD_COLORS = {
    "teacher": "#6b6b6b",
    "sft": "#0072b2",
    "kd": "#d55e00",
    "pl": "#009e73",
    "pl_kl": "#cc79a7",
    "pl_gold": "#00604a",
    "on_policy": "#a6761d",
    "kd_cached": "#8c3a00",
    "miniend": "#56b4e9",
    "reference": "#1c2127",
}
# Paths of task-agnostic distillation (miniend.PATHS), in no figure with the objectives above.
PATH_COLORS = {
    "scratch": "#8b949e",
    "logits": "#d55e00",
    "encoder": "#009e73",
    "decoder": "#cc79a7",
    "self": "#e69f00",
    "decoder_cross": "#a6761d",
    "miniend_logits": "#0072b2",
    "hidden": "#00604a",
    "none": "#1c2127",
}
BASELINE_COLOR = "#8b949e"
METHOD_LABELS = {"sft": "SFT", "kd": "KD", "pl": "PL", "pl_kl": "PL+KL", "pl_gold": "PL+references",
                 "on_policy": "on-policy KD", "kd_cached": "cached KD", "miniend": "MiniEnD",
                 "miniend_logits": "MiniEnD + logits"}  # fmt: skip
RUN_NAME = re.compile(r"(\w+)-(\d+-\d+)(?:-(.+?))??(?:-s(\d+))?")


def method_color(method: str) -> str:
    """Return the colour of a method or path in every figure; what is neither is a light grey baseline."""
    return (METHOD_COLORS | PATH_COLORS).get(method, BASELINE_COLOR)


def method_label(method: str, student: str | None = None) -> str:
    """Return the printed name of a method, with the student's shape, or of a run."""
    label = run_label(method)
    name = METHOD_LABELS.get(method, str(method).replace("_", " ")) if label == method else label
    return f"{name} {student}" if student else name


def run_label(name: str) -> str:
    """Return the printed name of a run, "SFT 6-3, seed 0" of sft-6-3-s0; what is no run's name stays as it is."""
    found = RUN_NAME.fullmatch(str(name))
    if not found or found[1] not in METHOD_COLORS | PATH_COLORS:
        return name
    label = " ".join(filter(None, (method_label(found[1]), found[2], found[3])))
    return label if found[4] is None else f"{label}, seed {found[4]}"


def with_interval(value: float, low: float, high: float, form: str = ".2f", unit: str = "") -> str:
    """Write a value with its interval as all pages do: "22.60 (21.90 to 23.30)", "97 % (94 to 101)"."""
    return f"{value:{form}}{unit} ({low:{form}} to {high:{form}})"


def row_with_interval(row: Mapping, key: str) -> str:
    """Write a figure of a results row with its interval."""
    return with_interval(row[key], row[f"{key}_low"], row[f"{key}_high"])
