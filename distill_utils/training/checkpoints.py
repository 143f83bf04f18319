"""Checkpoints of a training run: whole weights, optimizer moments and state, for any number of processes to continue.

Not here: students that are done (artifacts.py), and what a step needs besides, which its number and the seed give.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from distill_utils.artifacts import InputError, folder_atomic, read_json, write_json
from distill_utils.device import device
from distill_utils.training.distributed import gather, part_like, rank_and_world_size

CHECKPOINT_FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


def save_checkpoint(
    folder, model, parameters, optimizers, settings, step, history, window, seconds, memory=None
) -> None:
    """Write checkpoint-NNNNNN/ (weights, optimizer moments, state), then remove older ones.

    It holds whole tensors, so that any number of processes can go on from it. All processes call this together.
    """
    moments = {}
    for name, parameter in parameters.items():
        for key, value in _state_of(parameter, optimizers).items():
            moments[f"{name}|{key}"] = value
    # named_parameters lists a tied matrix once, which is what safetensors wants.
    weights = gather({name: p.detach() for name, p in model.named_parameters()})
    moments = gather(moments)
    if rank_and_world_size()[0] > 0:
        return
    target = folder / f"checkpoint-{step:06d}"
    with folder_atomic(target) as temporary:
        save_file(weights, temporary / "model.safetensors")
        save_file(moments, temporary / "optimizer.safetensors")
        state = {"step": step, "seconds": seconds, "history": history, "window": window, "memory": memory}
        write_json(temporary / "state.json", state | {"settings": asdict(settings)})
    for old in (*folder.glob("checkpoint-*"), *folder.glob(".checkpoint-*")):  # the latter left by killed processes
        if old != target:
            shutil.rmtree(old, ignore_errors=True)


def restore_checkpoint(folder, model, parameters, optimizers, settings) -> dict:
    """Load the newest checkpoint of a run folder into model and optimizers and return its state (fresh when none).

    Raises InputError for a checkpoint that lacks a file, or that other settings or another model have written, and
    when processes see different folders.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
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
        return {"step": 0, "seconds": 0.0, "history": [], "window": {}}
    newest = found[-1]
    lacking = [name for name in CHECKPOINT_FILES if not (newest / name).exists()]
    if lacking:
        raise InputError(f"{newest.name} lacks {lacking[0]}: put it back, or remove the folder to go without it")
    state = read_json(newest / "state.json")
    now, before = asdict(settings), state.pop("settings", None) or {}  # older checkpoints do not tell
    for name in now.keys() & before.keys():
        if now[name] != before[name]:
            raise InputError(
                f"{newest.name} was written with {name} {before[name]}, this run has {now[name]}: use that, or "
                "another folder"
            )
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
            like = parameters[name]
            # The fused optimizer keeps its step count beside the parameter, too.
            _state_of(like, optimizers)[moment] = part_like(file.get_tensor(key), like)
    if rank == 0:
        print(f"continuing from {newest.name}", flush=True)
    return state


def _state_of(parameter, optimizers) -> dict:
    """Return the state dictionary of a parameter in the optimizer that has it."""
    for optimizer in optimizers:
        if any(parameter is own for group in optimizer.param_groups for own in group["params"]):
            return optimizer.state[parameter]
    raise KeyError("a trainable parameter belongs to no optimizer")
