"""Measure the memory of KL and cross-entropy beyond the models at Pegasus's vocabulary, against dense float32 logits.

    python benchmarks/loss_memory.py --documents 16

`dense` makes the logits of both models in float32 and takes the losses of them; `ours` is `losses.chunked_token_losses`
in float32, too. Value and gradient of the student's last hidden states are taken; the head is the teacher's and frozen.
Dense memory is proportional to the number of tokens (`per_token_mb`), so that a machine without the 20 GB that 64 x 142
targets need compares at fewer documents. `value` is the loss; `value_difference` is relative.
"""

from __future__ import annotations

from functools import partial

import timing
import torch
import torch.nn.functional as F

from distill_utils.device import device
from distill_utils.distillation.losses import IGNORED, chunked_token_losses

MEMORY_GOAL, VALUE_GOAL = 1 / 8, 1e-5
TEMPERATURE = 2.0


def dense(student, teacher, head, labels) -> torch.Tensor:
    valid = labels != IGNORED
    with torch.no_grad():
        p = (teacher @ head.mT / TEMPERATURE).softmax(-1)
    logits = student @ head.mT
    ce = F.cross_entropy(logits.transpose(1, 2), labels)
    log_q = (logits / TEMPERATURE).log_softmax(-1)
    return ce + (F.kl_div(log_q, p, reduction="none").sum(-1) * valid).sum() / valid.sum() * TEMPERATURE**2


def ours(student, teacher, head, labels) -> torch.Tensor:
    def project(hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ head.mT

    return chunked_token_losses(student, project, labels, teacher, project, TEMPERATURE, weights=(1.0, 1.0))["loss"]


LOSSES = {"ours": ours, "dense": dense}


def form(name: str, turns: timing.Turns, case: dict) -> dict:
    torch.manual_seed(0)
    size = case["documents"], case["target"]
    on = device()
    head = torch.randn(case["vocabulary"], case["width"], device=on) * case["width"] ** -0.5
    student, teacher = (torch.randn(*size, case["width"], device=on) for _ in range(2))
    labels = torch.randint(0, case["vocabulary"], size, device=on)
    labels[1::2, case["target"] * 7 // 8 :] = IGNORED
    return timing.take_gradients(
        turns, [student.requires_grad_()], partial(LOSSES[name], student, teacher, head, labels)
    )


FORMS = {name: partial(form, name) for name in LOSSES}


def main() -> None:
    arguments = timing.parse(
        __doc__, "loss_memory", 1, FORMS,
        documents={"nargs": "+", "type": int, "default": [4, 16]}, target={"type": int, "default": 142},
        vocabulary={"type": int, "default": 96103}, width={"type": int, "default": 1024},
    )  # fmt: skip
    rows = []
    for documents in arguments.documents:
        sizes = {name: getattr(arguments, name) for name in ("target", "vocabulary", "width")}
        case = sizes | {"documents": documents}
        found = timing.in_turns(__file__, FORMS, list(FORMS), case, arguments, warm_up=1)
        label = f"KL and cross-entropy, {documents} x {arguments.target} x {arguments.vocabulary}"
        (row,) = timing.rows_of(label, found, ceiling=arguments.ceilings["float32"] or 0, **case)
        if {"ours_value", "other_value"} <= row.keys():  # neither ran out of memory
            row["value_difference"] = abs(row["ours_value"] / row["other_value"] - 1)
            row["per_token_mb"] = row["other_peak_mb"] / (documents * arguments.target)
        rows.append(row | {"memory_goal": MEMORY_GOAL, "value_goal": VALUE_GOAL})
    timing.write(arguments, rows)


if __name__ == "__main__":
    main()
