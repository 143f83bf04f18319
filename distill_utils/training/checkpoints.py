"""Checkpoints and the history of a training run: written atomically, and restored exactly."""

import csv
import json
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pandas as pd
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from distill_utils.artifacts import InputError, folder_atomic, read_json, write_atomic, write_json
from distill_utils.device import device
from distill_utils.training.distributed import gather, part_like, rank_and_world_size
from distill_utils.training.optimizers import Training, learning_rate_at

CHECKPOINT_FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
KEPT = "keep"  # a file that marks a checkpoint which a later one does not replace
# What a longer or shorter run of the same kind may change: the learning rates so far tell whether it is the same.
FREE_SETTINGS = ("max_steps", "schedule", "cooldown_share", "patience", "stop_metric")


@dataclass
class TrainingState:
    """One training run under way: what is trained, by what, and how far it has come; a checkpoint holds all of it."""

    folder: Path
    settings: Training
    model: torch.nn.Module
    parameters: dict[str, torch.nn.Parameter]  # the trainable ones
    optimizers: list
    memory: dict  # what `after_step` keeps, plain JSON
    data: str  # hash of the first update's examples, which tells other data
    dtype: torch.dtype | None  # of mixed precision
    step: int = 0  # updates done
    history: list[dict] = field(default_factory=list)
    window: dict = field(default_factory=dict)  # sums since the last history row
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def moments(self) -> dict[str, dict]:
        """What the optimizers keep of each trainable parameter."""
        states = {p: each.state for each in self.optimizers for group in each.param_groups for p in group["params"]}
        return {name: states[parameter][parameter] for name, parameter in self.parameters.items()}


def save_checkpoint(state: TrainingState, keep: bool = False) -> None:
    """Write checkpoint-NNNNNN/ with whole tensors, for any number of processes, and the history; remove older ones.

    Weights are those that train. All processes call this together. `keep` is for one that later ones leave there.
    """
    moments = {}
    for name, kept in state.moments.items():
        for key, value in kept.items():
            moments[f"{name}|{key}"] = torch.as_tensor(value)  # Adafactor counts in plain numbers
    weights, moments = _gather_weights(state), gather(moments)
    if rank_and_world_size()[0] > 0:
        return
    target = state.folder / f"checkpoint-{state.step:06d}"
    with folder_atomic(target) as temporary:
        save_file(weights, temporary / "model.safetensors")
        save_file(moments, temporary / "optimizer.safetensors")
        kept = {name: getattr(state, name) for name in ("step", "seconds", "history", "window", "memory")}
        kept |= {"settings": asdict(state.settings), "data": state.data, "dtype": str(state.dtype)}
        write_json(temporary / "state.json", kept)
        if keep:
            (temporary / KEPT).touch()
    for old in (*state.folder.glob("checkpoint-*"), *state.folder.glob(".checkpoint-*")):  # the latter by killed runs
        if old.name < target.name and not (old / KEPT).exists():
            shutil.rmtree(old, ignore_errors=True)
    write_history(state.folder, state.history)


def restore_checkpoint(state: TrainingState, at_most: int) -> None:
    """Put a run back to the newest checkpoint up to a step: weights, moments and progress; without one it is fresh.

    The settings may differ from the checkpoint's where that changes nothing of what was done so far, as a longer run
    does with a constant learning rate. Raises InputError when a file is missing, when settings, data or model are
    others, or when processes see different folders.
    """
    state.folder.mkdir(parents=True, exist_ok=True)
    step = newest_step(state.folder, at_most)
    rank, world = rank_and_world_size()
    if world > 1:
        seen = torch.tensor([step, -step], device=device())
        dist.all_reduce(seen, dist.ReduceOp.MAX)
        if seen[0] != -seen[1]:
            raise InputError(
                f"processes see different checkpoints in {state.folder.name}, the newest of steps {-seen[1]} and "
                f"{seen[0]}: set DISTILL_RUNS to a folder that all machines share"
            )
    if not step:
        return
    newest = state.folder / f"checkpoint-{step:06d}"
    lacking = [name for name in CHECKPOINT_FILES if not (newest / name).exists()]
    if lacking:
        raise InputError(f"{newest.name} lacks {lacking[0]}: restore it, or remove the folder to resume without it")
    kept = read_json(newest / "state.json")
    _check_settings(newest.name, state.settings, kept)
    if kept.get("data", state.data) != state.data:  # older checkpoints do not say
        raise InputError(f"{newest.name} was trained on other data: use those, or another folder")
    if kept.get("dtype", str(state.dtype)) != str(state.dtype):
        raise InputError(
            f"{newest.name} was trained with mixed precision {kept['dtype']}, this machine has {state.dtype}: resume "
            "where it began, or use another folder"
        )
    load_weights(state.model, newest)
    moments = state.moments
    with safe_open(newest / "optimizer.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118, a safetensors handle is no dictionary
            name, moment = key.rsplit("|", 1)
            # The fused optimizer keeps its step count beside the parameter, too.
            moments[name][moment] = part_like(file.get_tensor(key), state.parameters[name])
    if rank == 0:
        print(f"continuing from {newest.name}", flush=True)
    state.step, state.history, state.window = kept["step"], kept["history"], kept["window"]
    state.memory |= kept.get("memory") or {}
    state.began = time.monotonic() - kept["seconds"]


def newest_history(folder: Path, at_most: int) -> list[dict]:
    """Return the history in the newest checkpoint up to a step; empty without one."""
    kept = folder / f"checkpoint-{newest_step(folder, at_most):06d}" / "state.json"
    return read_json(kept)["history"] if kept.exists() else []


def newest_step(folder: Path, at_most: int) -> int:
    """Return after how many updates the newest checkpoint up to a step was written, 0 without one."""
    return max((step for step in checkpoint_steps(folder) if step <= at_most), default=0)


def checkpoint_steps(folder: Path) -> list[int]:
    """Return after how many updates a run's checkpoints were written."""
    return [int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")]


def _check_settings(name: str, now: Training, kept: dict) -> None:
    """Raise InputError unless these settings would have trained as the checkpoint's did, up to its step."""
    before = kept.get("settings") or {}  # older checkpoints do not say
    differing = sorted(key for key, value in asdict(now).items() if before.get(key, value) != value)
    free = {"checkpoint_every"}  # changes nothing of what is trained
    if "max_steps" in before:
        old = Training(**before)
        if all(learning_rate_at(step, now) == learning_rate_at(step, old) for step in range(kept["step"])):
            free.update(FREE_SETTINGS)
    for key in differing:
        if key not in free:
            raise InputError(
                f"{name} was written with {key} {before[key]}, this run has {getattr(now, key)}: use that, or "
                "another folder"
            )


def save_best(state: TrainingState) -> None:
    """Write the weights to best/, where the history's best row is the last one; all processes call this together."""
    weights = _gather_weights(state)
    if rank_and_world_size()[0] == 0:
        with folder_atomic(state.folder / "best") as temporary:
            save_file(weights, temporary / "model.safetensors")


def _gather_weights(state: TrainingState) -> dict[str, torch.Tensor]:
    return gather({name: parameter.detach() for name, parameter in state.parameters.items()})


@torch.no_grad()
def load_weights(model: torch.nn.Module, folder: Path) -> None:
    """Put the trained weights of a checkpoint or of best/ into a model; InputError when they are another model's."""
    every = dict(model.named_parameters())
    own = {name: weight for name, weight in every.items() if weight.requires_grad}
    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = {name: tuple(parameter.shape) for name, parameter in own.items()}
        names = [name for name in file.keys() if name in own or name not in every]  # older ones hold the frozen, too
        theirs = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        other = [name for name in (*shapes, *theirs) if shapes.get(name) != theirs.get(name)]
        if other:
            raise InputError(
                f"{folder.name} is of another model, {other[0]} has shape {theirs.get(other[0])} there and "
                f"{shapes.get(other[0])} here: use the model it was made with, or another folder"
            )
        for name, parameter in own.items():
            parameter.copy_(part_like(file.get_tensor(name), parameter))


def write_history(folder: Path, history: list[dict]) -> None:
    """Write the history as CSV; columns in order of first appearance."""
    write_atomic(folder / "history.csv", pd.DataFrame(history, dtype=object).to_csv(index=False, lineterminator="\n"))


def read_history(folder: Path) -> list[dict]:
    """Read a history as rows of numbers; empty cells are left out."""
    with open(folder / "history.csv", newline="") as file:
        return [{k: json.loads(v) for k, v in row.items() if v != ""} for row in csv.DictReader(file)]
