"""What students will cost, from a timed batch of each, before anything is trained.

Out of scope: what they did cost (comparison.py).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from datasets import Dataset

from distill_utils.data.batches import tokenize_pairs
from distill_utils.device import amp_dtype, device, to_device
from distill_utils.distillation.targets import with_targets, write_targets
from distill_utils.experiments import runs
from distill_utils.models import students
from distill_utils.training.loop import choose_attention, train_mode

TYPICAL = 256  # training pairs, sorted by length, from which a batch of typical length is taken


def forecast(plan: Sequence[runs.StudentRun], teacher, tokenizer, train: Dataset) -> list[dict]:
    """Predict time, memory and disk of each method, shape and variant.

    Seconds are the better of two forward and backward passes, after one that warms up, on a micro-batch of typical
    length. `memory (MB)` counts weights, gradients and the optimizer's two moments in float32, `activations (MB)` what
    the forward pass keeps for the backward pass, `disk (MB)` the student and one checkpoint.
    """
    rows = []
    for run in {run.group: run for run in plan}.values():
        student, cut = runs.cut_student(run, teacher)
        student.to(device())
        choose_attention(student, run.max_source_length)
        train_mode(student)
        batch, passes = typical_batch(run, teacher, tokenizer, train)
        objective = runs.objective_of(run.method)
        dtype = amp_dtype() if run.training.precision == "auto" else None
        kept: dict[int, int] = {}
        times = []
        for watch in (kept_for_backward(student, kept), nullcontext(), nullcontext()):
            began = time.perf_counter()
            with torch.autocast(student.device.type, dtype, enabled=dtype is not None), watch:
                loss = objective(student, teacher, batch, **cut["options"])["loss"]
            loss.backward()
            loss.item()  # waits for the device
            times.append(time.perf_counter() - began)
        seconds = passes * min(times[1:])
        counts = students.count_parameters(student)
        rows.append(
            {
                "student": run.group,
                "steps": run.training.max_steps,
                "ms/step": 1000 * seconds,
                "predicted_seconds": seconds * run.training.max_steps,
                "memory (MB)": (4 * counts["total"] + 12 * counts["trainable"]) / 2**20,
                "activations (MB)": sum(kept.values()) / 2**20,
                "disk (MB)": (8 * counts["total"] + 8 * counts["trainable"]) / 2**20,
            }
        )
    return rows


def typical_batch(run: runs.StudentRun, teacher, tokenizer, train: Dataset) -> tuple[dict, int]:
    """Return one micro-batch of the references on the device, with cached targets where needed, and how many a step."""
    sample = train.select(range(min(TYPICAL, len(train))))
    batches = runs.batches_of(runs.with_seed(run, 0), tokenizer, sample)
    if run.method == "kd_cached":
        with tempfile.TemporaryDirectory() as folder:
            targets = Path(folder) / "targets"
            write_targets(
                targets, teacher, tokenize_pairs(sample, tokenizer, *run.lengths),
                pad_token_id=tokenizer.pad_token_id, **runs.kept_targets(run),
                batch_size=run.training.micro_batch_size or run.training.batch_size,
            )  # fmt: skip
            micro_batches = with_targets(batches, targets)(0)
    else:
        micro_batches = batches(0)
    return to_device(micro_batches[0], device()), len(micro_batches)


def kept_for_backward(model, found: dict[int, int]):
    """Return a context that fills {address: bytes} of the storages a forward pass keeps, without the weights."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
