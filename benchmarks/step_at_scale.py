"""Measure training steps of T5 shapes with random weights, beside what the planner says: memory, time, utilization.

    python benchmarks/step_at_scale.py --teachers t5-3b --students t5-base t5-small --lengths 512/114 --batch-size 8
    python benchmarks/step_at_scale.py --cases ladder --threads 1    # what two cores can hold: results/..._cpu.json

Speed and memory are real, quality is not: nothing is learned from random weights. `planned_over_measured` is the
planner's peak over the allocator's; the aim is within 15 % of 1 on every shape. Rows are added to the results as they
are done, so a stopped run loses only the step in hand.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import timing
import torch
from transformers import PreTrainedConfig

from distill_utils import artifacts
from distill_utils.device import amp_dtype, device
from distill_utils.distillation import objectives
from distill_utils.experiments import miniend
from distill_utils.planning import step
from distill_utils.planning.measure import measure_step, model_config

PATHS = {"logits": "logits", "relations": "miniend", "both": "miniend_logits"}  # names in miniend.PATHS
LIMIT = 0.15  # by how much the planned peak may miss the measured one
# Teacher, student (name:layers for fewer), lengths, batch, micro-batch, paths and what differs: what a CPU can hold.
LADDER = (
    ("pydocs-t5-tiny", "pydocs-t5-tiny:1", "128/29", 16, 16, PATHS, {}),
    ("pydocs-t5", "pydocs-t5:3", "128/29", 32, 32, PATHS, {"attention": "eager"}),
    ("pydocs-t5", "pydocs-t5:3", "256/58", 16, 8, ["both"], {"checkpoint_activations": True}),
    ("pydocs-t5", "pydocs-t5:3", "256/58", 16, 8, ["both"], {"optimizer": "muon", "precision": "bfloat16"}),
    ("t5-small", "t5-small:3", "256/58", 4, 4, ["both"], {}),
    ("t5-base", "t5-base:6", "256/58", 2, 2, ["logits"], {}),
    ("t5-base", "t5-base:6", "512/114", 2, 1, ["relations"], {"padded": False}),
    ("t5-3b", "t5-base:6", "128/29", 2, 1, ["both"], {}),
)


def student_config(name: str, teacher: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config of a student, over the teacher's vocabulary."""
    found = model_config(name)
    found.vocab_size = teacher.vocab_size
    return found


def cases(arguments: argparse.Namespace, on: torch.device) -> list[tuple]:
    """Return (teacher, student, lengths, path, settings) of every step to measure."""
    half = "bfloat16" if amp_dtype(on) and on.type == "cuda" else "float32"
    if arguments.cases == "ladder":
        found = LADDER
    else:
        options = {
            "checkpoint_activations": arguments.checkpoint_activations, "optimizer": arguments.optimizer,
            "padded": not arguments.packed,
        }  # fmt: skip
        sizes = (arguments.batch_size, arguments.micro_batch_size or arguments.batch_size, arguments.paths, options)
        shapes = [(teacher, student) for teacher in arguments.teachers for student in arguments.students]
        found = [(*shape, lengths, *sizes) for shape in shapes for lengths in arguments.lengths]
    rows = []
    for teacher, student, lengths, batch_size, micro_batch_size, paths, options in found:
        source, target = map(int, lengths.split("/"))
        settings = {
            "source_length": source, "target_length": target, "batch_size": batch_size,
            "micro_batch_size": micro_batch_size, "precision": arguments.precision or half,
            "teacher_dtype": arguments.teacher_dtype,
        }  # fmt: skip
        rows += [(teacher, student, lengths, path, settings | options) for path in paths]
    return rows


def measure(teacher: str, student: str, lengths: str, path: str, settings: dict, arguments) -> dict:
    """Return one row: what was asked, the plan and the measurement."""
    weights = miniend.SILENT | miniend.PATHS[PATHS[path]]
    objective = partial(objectives.miniend, **weights)
    teacher_config = model_config(teacher)
    ours = student_config(student, teacher_config)
    on, began = device().type, time.process_time()
    plan = step.plan_step(objective, ours, teacher_config, **settings, on=on)
    planning = time.process_time() - began
    found = measure_step(
        objective, ours, teacher_config, repeats=arguments.rounds, threads=arguments.threads, plan=plan, **settings
    )
    row = {"teacher": teacher, "student": student, "lengths": lengths, "path": path, **settings}
    row |= {f"{name}_parameters": parts["total"] for name, parts in plan["parameters"].items()}
    row |= {"planning_seconds": planning, "peak_phase": plan["peak_phase"], "planned_memory": plan["memory"]}
    row |= {"planned_flops": plan["flops"], **found}
    return row | {"within_limit": abs(found["planned_over_measured"] - 1) <= LIMIT}


def main() -> None:
    many = {"nargs": "+"}
    arguments = timing.parse(
        __doc__, "step_at_scale", 3,
        cases={"choices": ("ladder",), "help": "a fixed list that a CPU can hold, in place of the shapes"},
        teachers=many | {"default": ["t5-3b"]},
        students=many | {"default": ["t5-base", "t5-small"], "help": "such as t5-base:6"},
        lengths=many | {"default": ["512/114"], "help": "source/target tokens"},
        paths=many | {"choices": PATHS, "default": list(PATHS)},
        batch_size={"type": int, "default": 8},
        micro_batch_size={"type": int, "default": 0, "help": "default: the batch"},
        precision={"choices": ("bfloat16", "float32"), "help": "default: bfloat16 on a GPU"},
        teacher_dtype={"choices": ("bfloat16", "float32"), "default": "bfloat16"},
        optimizer={"choices": ("adamw", "muon"), "default": "adamw"},
        checkpoint_activations={"action": "store_true"},
        packed={"action": "store_true", "help": "batches without padding"},
    )  # fmt: skip
    rows = []
    for case in cases(arguments, device()):
        named = dict(zip(("teacher", "student", "lengths", "path"), case, strict=False))
        label = "step, {teacher} to {student}, {lengths}, {path}".format(**named)
        try:
            found = measure(*case, arguments)
            of = found["seconds_median"], found["peak_bytes"] / 1e6, found["utilization"]
            rows.append(timing.row_alone(label, *of, **found))
        except artifacts.InputError as error:  # out of memory is a result, too
            rows.append(timing.row_alone(label, None, None, **named, error=str(error)))
        timing.write(arguments, rows, limit=LIMIT)


if __name__ == "__main__":
    main()
