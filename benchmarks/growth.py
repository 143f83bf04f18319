"""Measure how the cost of a step grows with each size alone, beside what the planner says before it runs.

    python benchmarks/growth.py --vary source target batch vocabulary depth documents

One KD step (cross-entropy and KL, the whole student trained) of the embedded shape, 6-6 layers of width 192, in a
process of its own for each point: time, the allocator's peak, and the planned arithmetic, peak and time at the
ceilings. `documents` is labelling: documents that `summarize` decodes at a time, 16 tokens each with four beams.
`exponents` are the slopes from the smallest to the largest point on logarithmic axes: time that grows faster than
arithmetic, by more than a tenth, is named. growth.svg shows each as a figure.
"""

from __future__ import annotations

import math
import statistics
import sys
from functools import partial
from pathlib import Path

import timing
from kd_step import shape_config
from pseudo_labels import make_documents
from torch.utils.flop_counter import FlopCounterMode
from transformers import BartConfig

from distill_utils.artifacts import InputError
from distill_utils.device import amp_dtype, device
from distill_utils.distillation import objectives
from distill_utils.evaluation.generation import summarize
from distill_utils.models import students
from distill_utils.models.loading import load_model
from distill_utils.planning.measure import measure_step
from distill_utils.planning.plan import run_times, step_seconds
from distill_utils.planning.step import FORMULAS, plan_step

BASE = {"source": 128, "target": 32, "batch": 8, "vocabulary": 8000, "depth": 6}
POINTS = {name: [value // 2, value, 2 * value, 4 * value] for name, value in BASE.items()} | {
    "depth": [1, 3, 6, 12],
    "documents": [4, 16, 64],
}
MEASURES = ("seconds", "tflop", "peak_mb", "planned_peak_mb")


def config(size: dict) -> BartConfig:
    """Return the embedded shape with another vocabulary and depth."""
    found = shape_config("embedded")
    found.vocab_size, found.max_position_embeddings = size["vocabulary"], 4096
    students.set_depths(found, size["depth"], size["depth"])
    return found


def step(size: dict, arguments) -> dict:
    """Return time and memory of a training step, measured and planned."""
    settings = {
        "source_length": size["source"], "target_length": size["target"], "batch_size": size["batch"],
        "precision": "bfloat16" if amp_dtype() is not None else "float32", "on": device().type,
        "teacher_dtype": "bfloat16" if amp_dtype() is not None else "float32",
    }  # fmt: skip
    models = config(size), config(size)
    plan = plan_step(objectives.pl_kl, *models, **settings)
    found = measure_step(
        objectives.pl_kl, *models, repeats=arguments.rounds, threads=arguments.threads, plan=plan, **settings
    )
    return {
        "seconds": found["seconds_median"], "tflop": sum(plan["flops"].values()) / 1e12,
        "peak_mb": found["peak_bytes"] / 1e6, "planned_peak_mb": plan["peak_bytes"] / 1e6,
        "planned_seconds": step_seconds(plan, arguments.ceilings)["total"] if arguments.ceilings["float32"] else None,
        "ceiling_share": found["utilization"],
    }  # fmt: skip


def labels(size: dict, arguments) -> dict:
    """Return time and memory of decoding so many documents at a time."""
    model, tokenizer = load_model("pydocs-bart")
    model.to(device())
    options = {"max_source_length": 120, "batch_size": size["documents"], "num_beams": 4, "max_new_tokens": 16}
    texts = make_documents(tokenizer, size["documents"], 120)
    run = partial(summarize, model, tokenizer, texts, min_length=17, **options)
    seconds = statistics.median(run_times(run, arguments.rounds, device()))
    counter = FlopCounterMode(display=False)
    counter.flop_registry = FORMULAS
    with counter:
        run()
    return {"seconds": seconds, "tflop": counter.get_total_flops() / 1e12, "peak_mb": timing.step_peak_mb(run)}


def draw(rows: list[dict], path: Path) -> None:
    """Draw time, arithmetic and memory against each size, all over their value at the smallest."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    varied = list(dict.fromkeys(row["varied"] for row in rows))
    figure, axes = plt.subplots(1, len(varied), figsize=(3 * len(varied), 3), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], varied, strict=True):
        points = [row for row in rows if row["varied"] == name]
        for measure in MEASURES:
            values = [row["found"].get(measure) for row in points]
            if all(values):
                axis.loglog(
                    [row["size"] for row in points], [value / values[0] for value in values], "o-", label=measure
                )
        axis.set(xlabel=name, xticks=[row["size"] for row in points], xticklabels=[row["size"] for row in points])
        axis.minorticks_off()
    axes[0][0].set_ylabel("times the smallest")
    axes[0][0].legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    arguments = timing.parse(
        __doc__, "growth", 5,
        vary={"nargs": "+", "choices": POINTS, "default": list(POINTS)},
        points={"type": int, "default": 4, "help": "of each size, the smallest first"},
    )  # fmt: skip
    rows, exponents = [], {}
    for varied in arguments.vary:
        own = []
        for size in POINTS[varied][: arguments.points]:
            try:
                found = (labels if varied == "documents" else step)(BASE | {varied: size}, arguments)
            except InputError as error:  # out of memory is a result, too
                found = {"error": str(error)}
            of = (found.get(name) for name in ("seconds", "peak_mb", "ceiling_share"))
            own.append(timing.row_alone(f"{varied} {size}", *of, varied=varied, size=size, found=found))
        first, last = own[0], own[-1]
        exponents[varied] = {
            measure: math.log(last["found"][measure] / first["found"][measure]) / math.log(last["size"] / first["size"])
            for measure in MEASURES
            if len(own) > 1 and first["found"].get(measure) and last["found"].get(measure)
        }
        slope = exponents[varied]
        if slope and slope["seconds"] > slope["tflop"] + 0.1:
            print(f"time grows faster than arithmetic with {varied}: {slope}", file=sys.stderr)
        rows += own
    timing.write(arguments, rows, base=BASE, exponents=exponents)
    draw(rows, arguments.output.with_suffix(".svg"))


if __name__ == "__main__":
    main()
