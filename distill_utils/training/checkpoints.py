"""Checkpoints and the history of a training run: written atomically, and restored exactly."""

from __future__ import annotations

import csv
import io
import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from distill_utils.artifacts import InputError, folder_atomic, read_json, write_atomic, write_json
from distill_utils.device import device
from distill_utils.training.distributed import gather, part_like, rank_and_world_size
from distill_utils.training.optimizers import Training, learning_rate_at

if TYPE_CHECKING:
    from distill_utils.training.loop import TrainingState

CHECKPOINT_FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
KEPT = "keep"  # a file that marks a checkpoint which a later one does not replace
# What a longer or shorter run of the same kind may change: the learning rates so far tell whether it is the same.
FREE_SETTINGS = ("max_steps", "schedule", "cooldown_share", "patience", "stop_metric")


def save_checkpoint(state: TrainingState, keep: bool = False) -> None:
    """Write checkpoint-NNNNNN/ with whole tensors, for any number of processes, and remove those not to keep.

    All processes call this together.
    """
    moments = {}
    for name, parameter in state.parameters.items():
        for key, value in _moments_of(parameter, state.optimizers).items():
            moments[f"{name}|{key}"] = torch.as_tensor(value)  # Adafactor counts in plain numbers
    # named_parameters lists a tied matrix once, which is what safetensors wants.
    weights = gather({name: p.detach() for name, p in state.model.named_parameters()})
    moments = gather(moments)
    if rank_and_world_size()[0] > 0:
        return
    target = state.folder / f"checkpoint-{state.step:06d}"
    with folder_atomic(target) as temporary:
        save_file(weights, temporary / "model.safetensors")
        save_file(moments, temporary / "optimizer.safetensors")
        kept = {name: getattr(state, name) for name in ("step", "seconds", "history", "window", "memory")}
        write_json(temporary / "state.json", kept | {"settings": asdict(state.settings), "data": state.data})
        if keep:
            (temporary / KEPT).touch()
    for old in (*state.folder.glob("checkpoint-*"), *state.folder.glob(".checkpoint-*")):  # the latter by killed runs
        if old.name < target.name and not (old / KEPT).exists():
            shutil.rmtree(old, ignore_errors=True)


def restore_checkpoint(state: TrainingState, at_most: int) -> None:
    """Put a run back to the newest checkpoint up to a step: weights, moments and progress; without one it is fresh.

    The settings may differ from the checkpoint's where that changes nothing of what was done so far, as a longer run
    does with a constant learning rate. Raises InputError when a file is missing, when settings, data or model are
    others, or when processes see different folders.
    """
    folder, model = state.folder, state.model
    folder.mkdir(parents=True, exist_ok=True)
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    found = [path for path in found if int(path.name.split("-")[1]) <= at_most]
    rank, world = rank_and_world_size()
    if world > 1:
        mine = int(found[-1].name.split("-")[1]) if found else 0
        seen = torch.tensor([mine, -mine], device=device())
        dist.all_reduce(seen, dist.ReduceOp.MAX)
        if seen[0] != -seen[1]:
            raise InputError(
                f"processes see different checkpoints in {folder.name}, the newest of steps {-seen[1]} and {seen[0]}: "
                "set DISTILL_RUNS to a folder that all machines share"
            )
    if not found:
        return
    newest = found[-1]
    lacking = [name for name in CHECKPOINT_FILES if not (newest / name).exists()]
    if lacking:
        raise InputError(f"{newest.name} lacks {lacking[0]}: put it back, or remove the folder to go without it")
    kept = read_json(newest / "state.json")
    _check_settings(newest.name, state.settings, kept)
    if kept.get("data", state.data) != state.data:  # older checkpoints do not say
        raise InputError(f"{newest.name} was trained on other data: go on with that, or use another folder")
    with torch.no_grad(), safe_open(newest / "model.safetensors", "pt") as file:
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        theirs = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118, no dictionary
        other = [name for name in (*shapes, *theirs) if shapes.get(name) != theirs.get(name)]
        if other:
            raise InputError(
                f"{newest.name} is of another model, {other[0]} has shape {theirs.get(other[0])} there and "
                f"{shapes.get(other[0])} here: use the model it was made with, or another folder"
            )
        for name, parameter in model.named_parameters():
            parameter.copy_(part_like(file.get_tensor(name), parameter))
    with safe_open(newest / "optimizer.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118, a safetensors handle is no dictionary
            name, moment = key.rsplit("|", 1)
            like = state.parameters[name]
            # The fused optimizer keeps its step count beside the parameter, too.
            _moments_of(like, state.optimizers)[moment] = part_like(file.get_tensor(key), like)
    if rank == 0:
        print(f"continuing from {newest.name}", flush=True)
    state.step, state.history, state.window = kept["step"], kept["history"], kept["window"]
    state.memory |= kept.get("memory") or {}
    state.began = time.monotonic() - kept["seconds"]


def _check_settings(name: str, now: Training, kept: dict) -> None:
    """Raise InputError unless these settings would have trained as the checkpoint's did, up to its step."""
    before = kept.get("settings") or {}  # older checkpoints do not say
    differing = {key for key, value in asdict(now).items() if key in before and value != before[key]}
    differing.discard("checkpoint_every")  # changes nothing of what is trained
    if "max_steps" in before:
        old = Training(**before)
        same_rates = all(learning_rate_at(step, now) == learning_rate_at(step, old) for step in range(kept["step"]))
        differing = {key for key in differing if key not in FREE_SETTINGS or not same_rates}
    for key in sorted(differing):
        raise InputError(
            f"{name} was written with {key} {before[key]}, this run has {getattr(now, key)}: use that, or "
            "another folder"
        )


def save_best(state: TrainingState) -> None:
    """Write the weights to best/, where the history's best row is the last one; all processes call this together."""
    weights = gather({name: p.detach() for name, p in state.model.named_parameters()})
    if rank_and_world_size()[0] == 0:
        with folder_atomic(state.folder / "best") as temporary:
            save_file(weights, temporary / "model.safetensors")


def load_best(state: TrainingState) -> None:
    """Put the weights of best/ into the model."""
    with torch.no_grad(), safe_open(state.folder / "best" / "model.safetensors", "pt") as file:
        for name, parameter in state.model.named_parameters():
            parameter.copy_(part_like(file.get_tensor(name), parameter))


def _moments_of(parameter, optimizers) -> dict:
    """Return the state dictionary of a parameter in the optimizer that has it."""
    for optimizer in optimizers:
        if any(parameter is own for group in optimizer.param_groups for own in group["params"]):
            return optimizer.state[parameter]
    raise KeyError("a trainable parameter belongs to no optimizer")


def write_history(folder: Path, history: list[dict]) -> None:
    """Write the history as CSV; columns in order of first appearance."""
    columns = list(dict.fromkeys(key for row in history for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_atomic(folder / "history.csv", text.getvalue())


def read_history(folder: Path) -> list[dict]:
    """Read a history as rows of numbers; empty cells are left out."""
    with open(folder / "history.csv", newline="") as file:
        return [{k: json.loads(v) for k, v in row.items() if v != ""} for row in csv.DictReader(file)]
