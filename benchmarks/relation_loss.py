"""Measure memory and time of `losses.relation_loss` against the same loss by plain autograd and with recomputation.

    python benchmarks/relation_loss.py --batch 2

Forms take turns, so that a change of load meets all of them alike; memory is measured once a form. On a CPU it is the
growth of the process's peak in a process of its own, on a GPU the peak of the allocator, both above what inputs hold.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from distill_utils import artifacts
from distill_utils.device import device
from distill_utils.distillation import losses


def ours(student, teacher, mask, heads):
    return losses.relation_loss(student, teacher, mask, heads)


def scores(x, mask, heads):
    x = x.unflatten(-1, (heads, -1)).transpose(1, 2)  # (batch, heads, length, width of a head)
    return (x @ x.mT * x.shape[-1] ** -0.5).masked_fill(~mask[:, None, None], losses.MASKED)


def naive(student, teacher, mask, heads):
    with torch.no_grad():
        log_p = scores(teacher, mask, heads).log_softmax(-1)
    rows = F.kl_div(scores(student, mask, heads).log_softmax(-1), log_p, log_target=True, reduction="none").sum(-1)
    return (rows * mask[:, None]).sum() / (heads * mask.sum())


def checkpointed(student, teacher, mask, heads):
    """One head at a time, computed again in the backward pass."""
    pairs = zip(student.chunk(heads, -1), teacher.chunk(heads, -1), strict=True)
    return sum(checkpoint(naive, a, b, mask, 1, use_reentrant=False) for a, b in pairs) / heads


FORMS = {"ours": ours, "naive": naive, "checkpointed": checkpointed}


def inputs(arguments):
    torch.manual_seed(0)
    on = device()
    student, teacher = (torch.randn(arguments.batch, arguments.length, arguments.width, device=on) for _ in range(2))
    mask = torch.ones(arguments.batch, arguments.length, dtype=torch.bool, device=on)
    return student.requires_grad_(), teacher, mask, arguments.heads


def step(form, student, *others) -> float:
    student.grad = None
    FORMS[form](student, *others).backward()
    return (torch.cuda.synchronize() if student.is_cuda else None) or student.grad.norm().item()


def peak(arguments) -> int:
    """Return the bytes that one step of a form needs above its inputs; only true in a fresh process."""
    small = argparse.Namespace(**{**vars(arguments), "batch": 1, "length": 16})
    step(arguments.memory_of, *inputs(small))  # libraries and kernels are loaded before
    given = inputs(arguments)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before, read = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated
    else:
        before, read = resource_peak(), resource_peak
    step(arguments.memory_of, *given)
    return read() - before


def resource_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"batch": 2, "heads": 32, "length": 512, "width": 768, "repeats": 7}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "relation_loss.json")
    parser.add_argument("--memory-of", choices=FORMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(peak(arguments))
        return
    options = [f"--{name}={getattr(arguments, name)}" for name in sizes]
    command = [sys.executable, __file__, *options]
    run = partial(subprocess.run, check=True, capture_output=True, text=True)
    memory = {form: int(run([*command, "--memory-of", form]).stdout.split()[-1]) for form in FORMS}
    given, seconds = inputs(arguments), {form: [] for form in FORMS}
    for repeat in range(arguments.repeats + 1):
        for form in FORMS:
            began = time.perf_counter()
            step(form, *given)
            if repeat:  # the first warms up
                seconds[form].append(time.perf_counter() - began)
    forms = {
        form: {
            "seconds_median": statistics.median(seconds[form]),
            "seconds_min": min(seconds[form]),
            "peak_extra_mb": memory[form] / 1e6,
            "memory_over_naive": memory[form] / memory["naive"],
            "time_over_naive": statistics.median(a / b for a, b in zip(seconds[form], seconds["naive"], strict=True)),
        }
        for form in FORMS
    }
    shape = {name: getattr(arguments, name) for name in sizes}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    artifacts.write_json(arguments.output, {"shape": shape, "forms": forms, "provenance": artifacts.provenance()})
    print(json.dumps(forms, indent=1))


if __name__ == "__main__":
    main()
