"""Interpolated distillation: from a large teacher to a small student by way of an assistant of a size between them.

The paper names interpolated distillation and does not describe it (Zhang et al. 2023). One reading is here: the
assistants of MiniLM (Wang et al. 2020), which learn from the teacher and then teach. The other, a target
mixed of teacher and student, is `AgnosticRun.mix_start`. Both combine.

Not here: a single round, which is `miniend.distill`, and the mixture (objectives.grow_mix).
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from distill_utils.artifacts import InputError
from distill_utils.experiments import miniend, runs
from distill_utils.experiments.miniend import AgnosticRun
from distill_utils.models import students
from distill_utils.models.loading import load_model


def split_run(
    run: AgnosticRun, assistant_shape: str, assistant_width: int, teacher, share: float = 0.5
) -> tuple[AgnosticRun, AgnosticRun]:
    """Return the runs of an assistant and of its student, which together take as many updates as `run` takes directly.

    `share` of the updates and of the warm-up is the assistant's; all else, the path too, is that of `run`. The student
    starts from the weights that it has in the direct run. Its `teacher` is to be replaced by the assistant's folder.
    Both rounds read the text from its start. Width 0 is the teacher's. Raises InputError unless the assistant is
    smaller than the teacher and larger than the student, and for what either round refuses; nothing is trained by then.
    """
    steps = run.training.max_steps
    first = round(share * steps)
    if not 0 < first < steps:
        raise InputError(
            f"share {share} of {steps} updates leaves {first} to the assistant and {steps - first} to the student: "
            "give both at least one, for example by 0.5"
        )
    all_warmup = run.training.warmup_steps
    warmup = round(all_warmup * first / steps)
    middle_width = assistant_width or teacher.config.d_model
    assistant = replace(
        run, shape=assistant_shape, width=assistant_width, variant=f"{run.variant} assistant".strip(),
        training=replace(run.training, max_steps=first, warmup_steps=warmup),
    )  # fmt: skip
    student = replace(
        run, width=run.width or teacher.config.d_model,  # 0 would be the assistant's
        variant=f"{run.variant} by {assistant_shape}-w{middle_width}".strip(),
        training=replace(run.training, max_steps=steps - first, warmup_steps=all_warmup - warmup),
    )  # fmt: skip
    miniend.check_runs([assistant], teacher)
    with torch.device("meta"):
        middle = students.new_student(teacher, *runs.parse_shape(assistant_shape, teacher), assistant_width)
        miniend.check_runs([student], middle)
        small = students.new_student(middle, *runs.parse_shape(run.shape, middle), student.width)
    counts = [students.count_parameters(model)["total"] for model in (teacher, middle, small)]
    if not counts[0] > counts[1] > counts[2]:
        raise InputError(
            f"an assistant of shape {assistant_shape} and width {middle_width} has {counts[1]} parameters, "
            f"the teacher {counts[0]} and the student {counts[2]}: choose one that lies between them"
        )
    return assistant, student


def with_assistant(
    run: AgnosticRun, assistant_shape: str, assistant_width: int, teacher, tokenizer, tokens: np.ndarray,
    held_out: np.ndarray, share: float = 0.5,
) -> dict[str, Path]:  # fmt: skip
    """Return the artifacts {"assistant", "student"} of a student that learns from an assistant, which learns first.

    All is as in `miniend.distill(run, ...)`, in as many updates altogether (`split_run`, also for the errors).
    """
    assistant, student = split_run(run, assistant_shape, assistant_width, teacher, share)
    first = miniend.distill(assistant, teacher, tokenizer, tokens, held_out)
    middle, _ = load_model(first / "student")
    student = replace(student, teacher=str(first / "student"))
    second = miniend.distill(student, middle.to(teacher.device), tokenizer, tokens, held_out)
    return {"assistant": first, "student": second}


def parse_assistant(label: str) -> tuple[str, int]:
    """Return shape and width of an assistant written as "6-6-w96", or "6-6" for the teacher's width (0)."""
    found = re.fullmatch(r"(\d+-\d+)(?:-w(\d+))?", label)
    if not found:
        raise InputError(f"assistant {label!r} is not understood: write layers and width, as in 6-6-w96")
    return found[1], int(found[2] or 0)
