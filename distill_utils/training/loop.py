"""One flat training loop: schedule, mixed precision, accumulation, checkpoints, exact resume, history rows.

Out of scope: losses (objectives.py), data order (data/batches.py), how models are sharded and processes started
(distributed.py, experiments/launch.py). Everything random in a step is a function of the seed and the step, so a run
that was killed and started again ends with the weights of one that was not.

In several processes that share a run each takes its own rows of every micro-batch, and what they add up, gradients,
losses and the gradient's norm, is that of the whole. Only rank 0 writes and prints.
"""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from distill_utils.artifacts import InputError, folder_atomic, read_json, report_progress, write_atomic, write_json
from distill_utils.device import device, mixed_precision, to_device
from distill_utils.training.distributed import (
    clip_gradients,
    gather,
    is_sharded,
    local_rows,
    part_like,
    rank_and_world_size,
    reset_fsdp_state,
    sum_over_processes,
)

MUON_RATE = 2.0  # times the learning rate, for updates of root mean square 0.4 of it, an AdamW update's usual size
CHECKPOINT_FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
EAGER_LENGTH = 256  # tokens; up to here plain attention trains faster than the fused kernel on CPU (LOG.md)


@dataclass(frozen=True)
class Training:
    """What determines one training run besides model, objective and data; JSON-serialisable by `asdict`."""

    max_steps: int
    batch_size: int = 32  # examples an optimizer step
    micro_batch_size: int = 0  # examples a forward pass, 0 = batch_size
    optimizer: str = "adamw"  # or "muon": inner matrices by Muon, everything else by AdamW
    learning_rate: float = 3e-4  # peak
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    eval_every: int = 0  # steps, 0 = only at the end
    checkpoint_every: int = 0  # steps, 0 = never
    log_every: int = 10  # steps averaged in one history row
    seed: int = 0
    precision: str = "auto"  # "auto" = bf16 where the device has it, or "float32"


@dataclass
class TrainingState:
    """One training run under way: what is trained, by what, and how far it has come; a checkpoint holds all of it."""

    folder: Path
    settings: Training
    model: torch.nn.Module
    parameters: dict[str, torch.nn.Parameter]  # the trainable ones
    optimizers: list
    memory: dict  # what `after_step` keeps, plain JSON
    step: int = 0  # updates done
    history: list[dict] = field(default_factory=list)
    window: dict = field(default_factory=dict)  # sums since the last history row
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began


def fit(
    model: torch.nn.Module,
    loss_fn: Callable[[torch.nn.Module, dict], dict],
    batches: Callable[[int], list[dict]],
    settings: Training,
    folder: Path,
    evaluate: Callable[[torch.nn.Module], dict] | None = None,
    stage: str = "training",
    memory: dict | None = None,
    after_step: Callable[[int, dict], None] | None = None,
) -> list[dict]:
    """Train `model` in place and return the history, one row every `log_every` steps.

    `loss_fn(model, batch)` returns named scalars with "loss" among them, each a mean over the batch's valid target
    tokens; micro-batches are weighted by their tokens, so that accumulation does not change the loss. `batches(step)`
    returns the micro-batches of a step. `evaluate(model)` returns numbers for the history row at every `eval_every`.
    `after_step(done, losses)` sees the losses of every update; what it keeps for the next ones belongs in `memory`,
    plain JSON, which is saved in checkpoints and restored from them.
    The folder receives checkpoint-NNNNNN/, history.csv and progress.json; a checkpoint found there is continued, by any
    number of processes. Where several share the run, all call `fit` with the same arguments and batches.
    Raises InputError when the loss is not finite: names the step and the examples, keeps the last checkpoint.
    """
    rank, world = rank_and_world_size()
    check_training(settings, world)
    on = device()
    model.to(on)
    train_mode(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise InputError("every parameter of the student is frozen: unfreeze the decoder or the encoder")
    optimizers = make_optimizers(model, parameters, settings)
    dtype = "auto" if settings.precision == "auto" else None
    state = TrainingState(folder, settings, model, parameters, optimizers, {} if memory is None else memory)
    restore_checkpoint(state)

    for step in range(state.step, settings.max_steps):
        torch.manual_seed(settings.seed * 1_000_003 + step + (rank << 40))  # dropout: a function of seed and step
        micro_batches = batches(step)
        counts = [_count_targets(batch) for batch in micro_batches]
        sums: dict[str, torch.Tensor] = {}
        for batch in map(local_rows, micro_batches):
            with mixed_precision(on, dtype):
                losses = loss_fn(model, to_device(batch, on))
            share = _count_targets(batch) / max(sum(counts), 1)
            (losses["loss"] * share).backward()
            reset_fsdp_state(model)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.detach().float() * share
        norm = clip_gradients(parameters.values(), settings.max_grad_norm)
        totals = sum_over_processes(torch.stack([*sums.values()]))
        values = dict(zip(sums, totals.tolist(), strict=True))  # CPU-GPU sync point
        if not math.isfinite(values["loss"]) or not torch.isfinite(norm):
            ids = [i for batch in micro_batches for i in batch["ids"]]
            raise InputError(
                f"{stage}: the loss is {values['loss']} (gradient norm {norm.item()}) at step {step}, examples "
                f"{', '.join(map(str, ids[:4]))}, ...: lower learning_rate or remove them; the last checkpoint is kept"
            )
        for optimizer in optimizers:
            factor = MUON_RATE if isinstance(optimizer, torch.optim.Muon) else 1.0
            for group in optimizer.param_groups:
                group["lr"] = factor * learning_rate_at(step, settings)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        state.step = step + 1
        if after_step:
            after_step(state.step, values)
        _count(state.window, values, micro_batches, sum(counts))
        if rank == 0:
            report_progress(folder, stage, state.step, settings.max_steps, loss=round(values["loss"], 3))
        last = state.step == settings.max_steps
        evaluates = evaluate and (last or (settings.eval_every and state.step % settings.eval_every == 0))
        if state.step % settings.log_every == 0 or evaluates or last:
            row = _history_row(state, values)
            if evaluates:
                model.eval()
                with torch.no_grad(), mixed_precision(on, dtype):
                    row |= evaluate(model)
                reset_fsdp_state(model)
                train_mode(model)
                if rank == 0:
                    print(format_row(stage, row, settings.max_steps), flush=True)
            state.history.append(row)
        if settings.checkpoint_every and state.step % settings.checkpoint_every == 0 and not last:
            save_checkpoint(state)
            if rank == 0:
                write_history(folder, state.history)
    model.eval()
    if rank == 0:
        write_history(folder, state.history)
    return state.history


def _count(window: dict, values: dict[str, float], micro_batches: list[dict], targets: int) -> None:
    """Add one update to the sums that a history row averages."""
    for name, value in values.items():
        window[name] = window.get(name, 0.0) + value
    cells = sum(batch["input_ids"].numel() + batch["labels"].numel() for batch in micro_batches)
    used = sum(int(batch["attention_mask"].sum()) for batch in micro_batches) + targets
    examples = sum(len(batch["ids"]) for batch in micro_batches)
    for name, value in (("steps", 1), ("examples", examples), ("cells", cells), ("used", used)):
        window[name] = window.get(name, 0) + value


def _history_row(state: TrainingState, values: dict[str, float]) -> dict:
    """Return the means since the last row, and begin the next window."""
    window, seconds = state.window, state.seconds
    row = {"step": state.step, **{name: window[name] / window["steps"] for name in values}}
    row |= {"lr": learning_rate_at(state.step - 1, state.settings), "seconds": round(seconds, 2)}
    row["padding"] = round(1 - window["used"] / max(window["cells"], 1), 4)
    row["examples_per_second"] = round(window["examples"] / max(seconds - window.get("began", 0.0), 1e-9), 2)
    state.window = {"began": seconds}
    return row


def check_training(settings: Training, num_processes: int = 1) -> None:
    """Reject impossible settings before anything is computed."""
    for name in ("max_steps", "batch_size", "log_every"):
        if getattr(settings, name) < 1:
            raise InputError(f"{name} {getattr(settings, name)} is too small: use at least 1")
    for name in ("micro_batch_size", "warmup_steps", "weight_decay", "eval_every", "checkpoint_every"):
        if getattr(settings, name) < 0:
            raise InputError(f"{name} {getattr(settings, name)} is negative: use 0 or more")
    if settings.micro_batch_size and settings.batch_size % settings.micro_batch_size:
        raise InputError(
            f"micro_batch_size {settings.micro_batch_size} does not divide batch_size {settings.batch_size}: "
            "use one that does"
        )
    for name, usual in (("learning_rate", 0.0003), ("max_grad_norm", 1.0)):
        if not getattr(settings, name) > 0:
            raise InputError(f"{name} {getattr(settings, name)} is not positive: use for example {usual}")
    for name, known in (("optimizer", ("adamw", "muon")), ("precision", ("auto", "float32"))):
        if getattr(settings, name) not in known:
            raise InputError(f"{name} {getattr(settings, name)!r} is unknown: use {' or '.join(known)}")
    name = "micro_batch_size" if settings.micro_batch_size else "batch_size"
    if (rows := getattr(settings, name)) % num_processes:
        raise InputError(f"{num_processes} processes do not divide {name} {rows}: use a multiple of {num_processes}")


def make_optimizers(model, parameters: dict[str, torch.nn.Parameter], settings: Training) -> list:
    """Return the optimizers that share the trainable parameters: AdamW alone, or Muon for the layers' matrices as well.

    Muon (Jordan et al. 2024) orthogonalises a matrix's update; embeddings, the head, norms and biases stay with AdamW.
    """
    outer = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    outer += [model.lm_head] if hasattr(model, "lm_head") else []
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    linear -= {id(module.weight) for module in outer}
    matrices = [weight for weight in parameters.values() if settings.optimizer == "muon" and id(weight) in linear]
    inner = {id(weight) for weight in matrices}
    rest = [weight for weight in parameters.values() if id(weight) not in inner]
    rates = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if any(map(is_sharded, matrices)):  # its bf16 products come out differently, and small matrices not at all
        raise InputError("optimizer muon needs whole matrices, and processes hold parts: use adamw, or one process")
    # The fused update takes sharded and whole tensors, but not in one group.
    groups = [[weight for weight in rest if is_sharded(weight) == sharded] for sharded in (False, True)]
    groups = [{"params": group} for group in groups if group]
    found = [torch.optim.AdamW(groups, fused=True, **rates)] if rest else []
    return found + ([torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **rates)] if matrices else [])


def learning_rate_at(step: int, settings: Training) -> float:
    """Return the learning rate of a step: linear warm-up to the peak, then linear decay to zero."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    left = (settings.max_steps - step) / max(settings.max_steps - settings.warmup_steps, 1)
    return settings.learning_rate * left


def train_mode(model: torch.nn.Module) -> None:
    """Switch dropout on, except in parts without a trainable parameter: a frozen encoder must stay the teacher's."""
    model.train()
    for module in model.modules():
        own = list(module.parameters())
        if own and not any(p.requires_grad for p in own):
            module.eval()


def recompute_activations(model) -> None:
    """Keep only what enters each layer and compute the rest again in the backward pass: a third more arithmetic."""
    model.activation_checkpointing_enable({"use_reentrant": False})


def choose_attention(model, max_length: int) -> None:
    """Set the attention kernel that trains fastest here: plain for short sequences on CPU, fused elsewhere.

    Not cuDNN's: from torch 2.11 on, its backward pass gives NaN on Hopper where a mask has 64, 192, ... columns and
    scores are very negative (pytorch issue 196678; met here in a run of 600 updates).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    plain = device().type == "cpu" and max_length <= EAGER_LENGTH
    model.set_attn_implementation("eager" if plain else "sdpa")


def format_row(stage: str, row: dict, max_steps: int) -> str:
    """Return one line for the log."""
    left_out = ("step", "seconds", "padding", "lr", "examples_per_second")
    numbers = "  ".join(f"{name} {value:.3f}" for name, value in row.items() if name not in left_out)
    rate = f"{row['examples_per_second']:.1f} examples/s"
    return f"{stage}  step {row['step']:>5}/{max_steps}  {numbers}  lr {row['lr']:.1e}  {rate}"


def _count_targets(batch: dict) -> int:
    return int((batch["labels"] != -100).sum())


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


# -------------------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(state: TrainingState) -> None:
    """Write checkpoint-NNNNNN/ with whole tensors, for any number of processes, and remove older ones.

    All processes call this together.
    """
    moments = {}
    for name, parameter in state.parameters.items():
        for key, value in _moments_of(parameter, state.optimizers).items():
            moments[f"{name}|{key}"] = value
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
        write_json(temporary / "state.json", kept | {"settings": asdict(state.settings)})
    for old in (
        *state.folder.glob("checkpoint-*"),
        *state.folder.glob(".checkpoint-*"),
    ):  # the latter left by killed processes
        if old != target:
            shutil.rmtree(old, ignore_errors=True)


def restore_checkpoint(state: TrainingState) -> None:
    """Put a run back to the newest checkpoint of its folder: weights, moments and progress; without one it is fresh.

    Raises InputError when it lacks a file, is of other settings or another model, or processes see different folders.
    """
    folder, model = state.folder, state.model
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
        return
    newest = found[-1]
    lacking = [name for name in CHECKPOINT_FILES if not (newest / name).exists()]
    if lacking:
        raise InputError(f"{newest.name} lacks {lacking[0]}: put it back, or remove the folder to go without it")
    kept = read_json(newest / "state.json")
    now, before = asdict(state.settings), kept.get("settings") or {}  # older checkpoints do not say
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
            like = state.parameters[name]
            # The fused optimizer keeps its step count beside the parameter, too.
            _moments_of(like, state.optimizers)[moment] = part_like(file.get_tensor(key), like)
    if rank == 0:
        print(f"continuing from {newest.name}", flush=True)
    state.step, state.history, state.window = kept["step"], kept["history"], kept["window"]
    state.memory |= kept.get("memory") or {}
    state.began = time.monotonic() - kept["seconds"]


def _moments_of(parameter, optimizers) -> dict:
    """Return the state dictionary of a parameter in the optimizer that has it."""
    for optimizer in optimizers:
        if any(parameter is own for group in optimizer.param_groups for own in group["params"]):
            return optimizer.state[parameter]
    raise KeyError("a trainable parameter belongs to no optimizer")
