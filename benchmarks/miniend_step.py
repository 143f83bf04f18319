"""Measure a step of `objectives.miniend` against the plain passes below it: what do the relations cost?

    python benchmarks/miniend_step.py --threads 1

The plain step runs the same passes and stops at the same layers: the teacher forward without gradients, the student
forward and backward from the sum of the queries, keys and values that the relations would read. Steps take turns, so
that a change of load meets both alike; memory is measured once a step, as in relation_loss.py. Weights are random and
there is no dropout, which would only cost both the same.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from relation_loss import resource_peak
from transformers import T5Config, T5ForConditionalGeneration

from distill_utils import artifacts
from distill_utils.data import denoising
from distill_utils.device import amp_dtype, device
from distill_utils.distillation import objectives
from distill_utils.experiments.miniend import PATHS as WEIGHTS_OF_PATHS
from distill_utils.experiments.miniend import RELATIONS
from distill_utils.models import students
from distill_utils.training.loop import choose_attention

SHAPES = {  # of teacher and student, and the batch; source tokens by span corruption
    "pydocs-t5": {"width": 192, "heads": 4, "layers": 6, "kept": 3, "vocab": 8100, "source": 128, "batch": 32},
    "t5-base": {"width": 768, "heads": 12, "layers": 12, "kept": 6, "vocab": 32128, "source": 512, "batch": 2},
}
PATHS = ("miniend", "self", "encoder")
SILENT = dict.fromkeys(RELATIONS, 0.0)
LIMIT = 1.15  # what a step may cost over the plain one


def inputs(shape: str, on: torch.device):
    """Return student, teacher and one batch of random tokens, without padding."""
    torch.manual_seed(0)
    size = SHAPES[shape]
    width, heads = size["width"], size["heads"]
    config = T5Config(
        vocab_size=size["vocab"], d_model=width, d_kv=width // heads, num_heads=heads, d_ff=4 * width, dropout_rate=0.0,
        num_layers=size["layers"], num_decoder_layers=size["layers"], pad_token_id=0, decoder_start_token_id=0,
    )  # fmt: skip
    teacher = T5ForConditionalGeneration(config).eval()
    student = students.new_student(teacher, size["kept"], size["kept"]).train()
    choose_attention(student, size["source"])
    target = denoising.span_corruption_lengths(size["source"])[1]
    ids = torch.randint(2, size["vocab"], (size["batch"], size["source"] + target))
    input_ids, labels = ids.split([size["source"], target], dim=1)
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}
    return student.to(on), teacher.to(on), {name: value.to(on) for name, value in batch.items()}


def terms(path: str) -> list[str]:
    """Return the names of the relation terms of a path."""
    weights = SILENT | WEIGHTS_OF_PATHS[path]
    return [name for name in objectives.RELATION_TERMS if weights[name.replace("_loss", "_weight")]]


def read_both(path: str, student, teacher, batch):
    """Return queries, keys and values of student and teacher as `miniend` reads them."""
    sites = [objectives.RELATION_TERMS[name][0] for name in terms(path)]
    ours, _ = objectives.forward_with_attention(student, batch, sites, False)
    with objectives.teacher_mode(teacher):
        theirs, _ = objectives.forward_with_attention(teacher, batch, sites, False)
    return ours, theirs


def plain(path: str, student, teacher, batch) -> None:
    ours, _ = read_both(path, student, teacher, batch)
    sum(vector.float().sum() for vectors in ours.values() for vector in vectors.values()).backward()


def miniend(path: str, student, teacher, batch) -> None:
    objectives.miniend(student, teacher, batch, **SILENT | WEIGHTS_OF_PATHS[path])["loss"].backward()


STEPS = {"plain": plain, "miniend": miniend}


def relations(path: str, student, teacher, batch):
    """Return a function that takes the path's relations alone, value and gradient, of vectors read once."""
    ours, theirs = read_both(path, student, teacher, batch)
    ours = {site: {k: v.detach().requires_grad_() for k, v in found.items()} for site, found in ours.items()}
    masks = {"s": batch["attention_mask"].bool(), "t": batch["labels"] != objectives.IGNORED}

    def step() -> None:
        for name in terms(path):
            site, sides = objectives.RELATION_TERMS[name]
            objectives.match_relations(ours[site], theirs[site], sides, masks, 32).backward()

    return step


def seconds(step, on: torch.device) -> float:
    began = time.perf_counter()
    step()
    if on.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(shape: str, path: str, on: torch.device, repeats: int, max_seconds: float) -> dict:
    """Return times of both steps and of the relations alone; no turn begins after `max_seconds`."""
    student, teacher, batch = given = inputs(shape, on)
    dtype = amp_dtype(on)
    with torch.autocast(on.type, dtype, enabled=dtype is not None):
        steps = {name: partial(step, path, *given) for name, step in STEPS.items()}
        steps["relations"] = relations(path, *given)
        found, began = {name: [] for name in steps}, time.perf_counter()
        for repeat in range(-1, repeats):  # the first turn warms up
            if repeat > 2 and time.perf_counter() - began > max_seconds:
                break
            for name, step in steps.items():
                student.zero_grad(set_to_none=True)
                spent = seconds(step, on)
                if repeat >= 0:
                    found[name].append(spent)
    best = {name: min(times) for name, times in found.items()}
    row = {"shape": shape, "path": path, "turns": len(found["plain"])}
    row |= {f"{name}_ms": 1000 * value for name, value in best.items()}
    row |= {f"{name}_median_ms": 1000 * statistics.median(times) for name, times in found.items()}
    return row | {
        "ratio": best["miniend"] / best["plain"],
        "ratio_median": statistics.median(a / b for a, b in zip(found["miniend"], found["plain"], strict=True)),
        "share_of_relations": best["relations"] / best["miniend"],
    }


def peak(step: str, shape: str, path: str, on: torch.device) -> int:
    """Return the bytes that one step needs above models and batch, gradients included; only true in a fresh process."""
    student, teacher, batch = inputs("pydocs-t5", on)
    STEPS[step](path, student, teacher, {name: rows[:1, :16] for name, rows in batch.items()})  # loads the kernels
    given = inputs(shape, on)
    if on.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before, read = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated
    else:
        before, read = resource_peak(), resource_peak
    dtype = amp_dtype(on)
    with torch.autocast(on.type, dtype, enabled=dtype is not None):
        STEPS[step](path, *given)
    return read() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device().type)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=list(PATHS))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--max-seconds", type=float, default=60.0, help="of one shape and path")
    parser.add_argument("--output", type=Path, help="default: results/miniend_step_DEVICE.json")
    parser.add_argument("--memory-of", choices=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    on = torch.device(arguments.device)
    if arguments.memory_of:
        print(peak(arguments.memory_of, arguments.shapes[0], arguments.paths[0], on))
        return
    load, rows, memory = os.getloadavg()[0], [], {}
    cases = [(shape, path) for shape in arguments.shapes for path in arguments.paths]
    for shape, path in cases:  # first, as a process starts with the peak of the one that started it
        options = [f"--device={on.type}", f"--threads={arguments.threads}", "--shapes", shape, "--paths", path]
        for step in STEPS:
            command = [sys.executable, __file__, *options, "--memory-of", step]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            memory[shape, path, step] = int(done.stdout.split()[-1]) / 1e6
    for shape, path in cases:
        row = measure(shape, path, on, arguments.repeats, arguments.max_seconds)
        row |= {f"{step}_peak_mb": memory[shape, path, step] for step in STEPS}
        rows.append(row | {"within_limit": row["ratio"] <= LIMIT})
        print(json.dumps(rows[-1]), flush=True)
    output = arguments.output or Path(__file__).parent / "results" / f"miniend_step_{on.type}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    # Above the threads in use other work ran beside this: measure again on a quiet machine.
    load = {"before": load, "after": os.getloadavg()[0]}
    result = {"sizes": SHAPES, "limit": LIMIT, "rows": rows, "load": load, "provenance": artifacts.provenance()}
    artifacts.write_json(output, result)


if __name__ == "__main__":
    main()
