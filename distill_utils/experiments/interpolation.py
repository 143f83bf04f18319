"""Interpolated distillation, which the paper mentions but does not describe (Zhang et al. 2023): two readings.

An assistant learns first and then teaches (Wang et al. 2020, MiniLM), or the target is mixed, `AgnosticRun.mix_start`.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from distill_utils.artifacts import InputError
from distill_utils.experiments import miniend
from distill_utils.models import students
from distill_utils.models.loading import load_model


def parse_assistant(label: str) -> tuple[str, int]:
    """Return shape and width of an assistant written as "6-6-w96", or "6-6" for the teacher's width (0)."""
    found = re.fullmatch(r"(\d+-\d+)(?:-w(\d+))?", label)
    if not found:
        raise InputError(f"assistant {label!r} is not understood: write layers and width, as in 6-6-w96")
    return found[1], int(found[2] or 0)


def split_run(
    run: miniend.AgnosticRun, assistant_shape: str, assistant_width: int, teacher, share: float = 0.5
) -> tuple[miniend.AgnosticRun, miniend.AgnosticRun]:
    """Return the runs of an assistant and of its student, which together take as many updates as `run` takes directly.

    `share` of the updates and of the warm-up is the assistant's, all else that of `run`; width 0 is the teacher's. The
    student's `teacher` is to be replaced by the assistant's folder. Raises InputError unless the assistant lies between
    teacher and student in size, and for what `check_runs` rejects.
    """
    steps, warmup = run.training.max_steps, run.training.warmup_steps
    first = round(share * steps)
    if not 0 < first < steps:
        raise InputError(f"share {share} of {steps} updates leaves none for one of the two rounds: use for example 0.5")
    first_warmup = round(warmup * first / steps)
    middle_width = assistant_width or teacher.config.d_model
    assistant = replace(
        run, shape=assistant_shape, width=assistant_width, variant=f"{run.variant} assistant".strip(),
        training=replace(run.training, max_steps=first, warmup_steps=first_warmup),
    )  # fmt: skip
    student = replace(
        run, width=run.width or teacher.config.d_model,  # 0 would be the assistant's
        variant=f"{run.variant} by {assistant_shape}-w{middle_width}".strip(),
        training=replace(run.training, max_steps=steps - first, warmup_steps=warmup - first_warmup),
    )  # fmt: skip

    miniend.check_runs([assistant], teacher)
    middle = miniend.without_weights(teacher, assistant_shape, assistant_width)
    miniend.check_runs([student], middle)
    small = miniend.without_weights(middle, run.shape, student.width)
    counts = [students.count_parameters(model)["total"] for model in (teacher, middle, small)]
    if not counts[0] > counts[1] > counts[2]:
        raise InputError(
            f"an assistant of shape {assistant_shape} and width {middle_width} has {counts[1]} parameters, "
            f"the teacher {counts[0]} and the student {counts[2]}: choose one that lies between them"
        )
    return assistant, student


def plan_assistants(
    run: miniend.AgnosticRun, labels: Sequence[str], teacher, share: float, mix_start: float, mix_rate: float
) -> dict[str, tuple[str, int]]:
    """Return {label: (shape, width)} of a run's assistants, and reject rounds or a mixed target that cannot work."""
    found = {label: parse_assistant(label) for label in labels}
    for place in found.values():
        split_run(run, *place, teacher, share)
    if mix_start < 1:
        miniend.check_runs([replace(run, mix_start=mix_start, mix_rate=mix_rate)], teacher)
    return found


def with_assistant(
    run: miniend.AgnosticRun, assistant_shape: str, assistant_width: int, teacher, tokenizer, tokens: np.ndarray,
    held_out: np.ndarray, share: float = 0.5,
) -> dict[str, Path]:  # fmt: skip
    """Return the artifacts {"assistant", "student"} of the two rounds of `split_run`; all else is as in `distill`."""
    assistant, student = split_run(run, assistant_shape, assistant_width, teacher, share)
    first = miniend.distill(assistant, teacher, tokenizer, tokens, held_out)
    middle, _ = load_model(first / "student")
    student = replace(student, teacher=str(first / "student"))
    second = miniend.distill(student, middle.to(teacher.device), tokenizer, tokens, held_out)
    return {"assistant": first, "student": second}
