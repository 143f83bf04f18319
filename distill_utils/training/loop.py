"""One flat training loop: schedule, mixed precision, accumulation, checkpoints, exact resume, history rows.

Not here: losses (objectives.py) and data order (data.py), what checkpoints hold (checkpoints.py), how models are
sharded and processes started (distributed.py). Everything random in a step is a function of the seed and the step, so a
run that was killed and started again ends with the weights of one that was not.

The loop is the same in one process and in several that share a run: each takes its own rows of every micro-batch, and
what they add up, gradients, losses and the gradient's norm, is that of the whole. Only rank 0 writes and prints.
"""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from distill_utils.artifacts import InputError, report_progress, write_atomic
from distill_utils.device import amp_dtype, device
from distill_utils.training.checkpoints import restore_checkpoint, save_checkpoint
from distill_utils.training.distributed import (
    clip_gradients,
    is_sharded,
    local_rows,
    rank_and_world_size,
    reset_fsdp_state,
    sum_over_processes,
)

MUON_RATE = 2.0  # times the learning rate, for updates of root mean square 0.4 of it, an AdamW update's usual size
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
    number of processes. Where several share the run, all call `fit` with the same arguments, `batches(step)` is the
    same in all, and rows are weighted by their target tokens as micro-batches are.
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
    half = amp_dtype(on) if settings.precision == "auto" else None
    state = restore_checkpoint(folder, model, parameters, optimizers, settings)
    history, window = state["history"], state["window"]
    if memory is not None:
        memory |= state.get("memory") or {}
    began = time.monotonic() - state["seconds"]

    for step in range(state["step"], settings.max_steps):
        torch.manual_seed(settings.seed * 1_000_003 + step + (rank << 40))  # dropout: a function of seed and step
        micro_batches = batches(step)
        counts = [_count_targets(batch) for batch in micro_batches]
        sums: dict[str, torch.Tensor] = {}
        for batch in map(local_rows, micro_batches):
            moved = {k: v.to(on, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}
            with torch.autocast(on.type, half, enabled=half is not None):
                losses = loss_fn(model, moved)
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

        done = step + 1
        if after_step:
            after_step(done, values)
        for name, value in values.items():
            window[name] = window.get(name, 0.0) + value
        window["steps"] = window.get("steps", 0) + 1
        window["examples"] = window.get("examples", 0) + sum(len(batch["ids"]) for batch in micro_batches)
        cells = sum(batch["input_ids"].numel() + batch["labels"].numel() for batch in micro_batches)
        used = sum(int(batch["attention_mask"].sum()) for batch in micro_batches) + sum(counts)
        window["cells"], window["used"] = window.get("cells", 0) + cells, window.get("used", 0) + used
        seconds = time.monotonic() - began
        if rank == 0:
            report_progress(folder, stage, done, settings.max_steps, loss=round(values["loss"], 3))
        evaluates = evaluate and (
            done == settings.max_steps or (settings.eval_every and done % settings.eval_every == 0)
        )
        if done % settings.log_every == 0 or evaluates or done == settings.max_steps:
            row = {name: window[name] / window["steps"] for name in values}
            row = {"step": done, **row, "lr": learning_rate_at(step, settings), "seconds": round(seconds, 2)}
            row["padding"] = round(1 - window["used"] / max(window["cells"], 1), 4)
            row["examples_per_second"] = round(window["examples"] / max(seconds - window.get("began", 0.0), 1e-9), 2)
            window = {"began": seconds}
            if evaluates:
                model.eval()
                with torch.no_grad(), torch.autocast(on.type, half, enabled=half is not None):
                    row |= evaluate(model)
                reset_fsdp_state(model)
                train_mode(model)
                if rank == 0:
                    print(format_row(stage, row, settings.max_steps), flush=True)
            history.append(row)
        if settings.checkpoint_every and done % settings.checkpoint_every == 0 and done < settings.max_steps:
            seconds = time.monotonic() - began
            save_checkpoint(folder, model, parameters, optimizers, settings, done, history, window, seconds, memory)
            if rank == 0:
                write_history(folder, history)
    model.eval()
    if rank == 0:
        write_history(folder, history)
    return history


def check_training(settings: Training, num_processes: int = 1) -> None:
    """Refuse impossible settings before anything is computed."""
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
    if not settings.learning_rate > 0:
        raise InputError(f"learning_rate {settings.learning_rate} is not positive: use for example 0.0003")
    if not settings.max_grad_norm > 0:
        raise InputError(f"max_grad_norm {settings.max_grad_norm} is not positive: use for example 1.0")
    if settings.optimizer not in ("adamw", "muon"):
        raise InputError(f"optimizer {settings.optimizer!r} is unknown: use adamw or muon")
    if settings.precision not in ("auto", "float32"):
        raise InputError(f"precision {settings.precision!r} is unknown: use auto or float32")
    name = "micro_batch_size" if settings.micro_batch_size else "batch_size"
    if getattr(settings, name) % num_processes:
        raise InputError(
            f"{num_processes} processes do not divide {name} {getattr(settings, name)}: use a multiple of "
            f"{num_processes}, or another number of processes"
        )


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
    """Let training keep only what enters each layer and compute the rest again in the backward pass.

    Less memory for a third more arithmetic, and the same gradients: dropout is repeated, hooks that read attention see
    the first pass only.
    """
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
    """Return one line for the log of a batch run."""
    shown = {k: v for k, v in row.items() if k not in ("step", "seconds", "padding", "lr", "examples_per_second")}
    numbers = "  ".join(f"{name} {value:.3f}" for name, value in shown.items())
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
