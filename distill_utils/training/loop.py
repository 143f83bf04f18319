"""One flat training loop: schedule, mixed precision, accumulation, checkpoints, exact resume, history rows.

Out of scope: losses (objectives.py), data order (data/batches.py), how models are sharded and processes started
(distributed.py, experiments/launch.py). Everything random in a step is a function of the seed and the step, so a run
that was killed and started again ends with the weights of one that was not. In several processes each takes its own
rows of every micro-batch; gradients, losses and the gradient's norm are added up, and only rank 0 writes and prints.
"""

import contextlib
import hashlib
import math
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from distill_utils.artifacts import InputError, folder_atomic, lock, report_progress
from distill_utils.device import amp_dtype, device, eval_mode, mixed_precision, to_device
from distill_utils.training import checkpoints, distributed, optimizers
from distill_utils.training.checkpoints import TrainingState, read_history, save_checkpoint
from distill_utils.training.optimizers import Training, check_training, make_optimizers, stopped_at

__all__ = ["Training", "check_training", "fit", "fit_from_trunk", "read_history"]
MAX_WORKERS = 4  # processes that prepare batches for a GPU
EAGER_LENGTH = 256  # tokens; up to here plain attention trains faster than the fused kernel on CPU (LOG.md)


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
    until: int = 0,
) -> list[dict]:
    """Train `model` in place and return the history, one row every `log_every` steps.

    `loss_fn(model, batch)` returns named scalars with "loss" among them, each a mean over the batch's valid target
    tokens; micro-batches are weighted by their tokens, so that accumulation does not change the loss. `batches(step)`
    returns the micro-batches of a step. `evaluate(model)` returns numbers for the history row at every `eval_every`.
    `after_step(done, losses)` sees the losses of every update; what it keeps for the next ones belongs in `memory`,
    plain JSON, which checkpoints hold.
    The folder receives checkpoint-NNNNNN/, history.csv and progress.json; a checkpoint found there is continued, by any
    number of processes, which all call `fit` with the same arguments and batches.
    `until` pauses after that update, with its weights and a checkpoint that stays; the schedule does not know of it.
    With `patience` training stops when `stop_metric` no longer falls, and the model ends with its best weights; in a
    cooldown it never stops early. Ctrl-C or a notebook's stop button takes effect when the update is complete, and
    leaves a checkpoint; a second one at once.
    Raises InputError when the loss is not finite: names the step and the examples, keeps the last checkpoint.
    """
    rank, world = distributed.rank_and_world_size()
    check_training(settings, world)
    on = device()
    model.to(on)
    train_mode(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise InputError("every parameter of the student is frozen: unfreeze the decoder or the encoder")
    dtype = amp_dtype(on, settings.precision)
    memory = {} if memory is None else memory
    made = make_optimizers(model, parameters, settings)
    state = TrainingState(folder, settings, model, parameters, made, memory, _data_hash(batches(0)), dtype)
    end = min(until or settings.max_steps, settings.max_steps)
    can_stop = settings.patience and settings.schedule != "cooldown"
    if can_stop and (stopped := stopped_at(checkpoints.newest_history(folder, end), settings)):
        end = stopped  # a run that went on with more patience has passed it
    checkpoints.restore_checkpoint(state, end)

    with _delayed_interrupt() as interrupted:
        for step, micro_batches in _prefetched(batches, state.step, end, on):
            torch.manual_seed(settings.seed * 1_000_003 + step + (rank << 40))  # dropout: a function of seed and step
            counts = [_count_targets(batch) for batch in micro_batches]
            sums: dict[str, torch.Tensor] = {}
            for batch in map(distributed.local_rows, micro_batches):
                with mixed_precision(on, dtype):
                    losses = loss_fn(model, to_device(batch, on))
                share = _count_targets(batch) / max(sum(counts), 1)
                (losses["loss"] * share).backward()
                distributed.reset_fsdp_state(model)
                for name, value in losses.items():
                    sums[name] = sums.get(name, 0.0) + value.detach().float() * share
            norm = distributed.clip_gradients(parameters.values(), settings.max_grad_norm)
            totals = distributed.sum_over_processes(torch.stack([*sums.values()]))
            values = dict(zip(sums, totals.tolist(), strict=True))  # CPU-GPU sync point
            if not math.isfinite(values["loss"]) or not torch.isfinite(norm):
                ids = [i for batch in micro_batches for i in batch["ids"]]
                raise InputError(
                    f"{stage}: the loss is {values['loss']} (gradient norm {norm.item()}) at step {step}, examples "
                    f"{', '.join(map(str, ids[:4]))}, ...: lower learning_rate or remove them; the last checkpoint is "
                    "kept"
                )
            for optimizer in state.optimizers:
                factor = optimizers.MUON_RATE if isinstance(optimizer, torch.optim.Muon) else 1.0
                for group in optimizer.param_groups:
                    group["lr"] = factor * optimizers.learning_rate_at(step, settings)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            state.step = step + 1
            if after_step:
                after_step(state.step, values)
            _count(state.window, values, micro_batches, sum(counts))
            if rank == 0:
                report_progress(folder, stage, state.step, end, loss=round(values["loss"], 3))
            last = state.step == settings.max_steps
            evaluates = evaluate and (last or (settings.eval_every and state.step % settings.eval_every == 0))
            if state.step % settings.log_every == 0 or evaluates or last:
                row = _history_row(state, values)
                if evaluates:
                    with eval_mode(model), torch.no_grad(), mixed_precision(on, dtype):
                        found = evaluate(model)
                    distributed.reset_fsdp_state(model)
                    row |= found
                    if not all(math.isfinite(value) for value in found.values()):
                        raise InputError(f"{stage}: {found} at step {state.step}: lower learning_rate")
                    if rank == 0:
                        print(format_row(stage, row, settings.max_steps), flush=True)
                state.history.append(row)
                if evaluates and settings.patience:
                    optimizers.check_metric(settings, found)
                    if optimizers.best_row(state.history, settings) is row:
                        checkpoints.save_best(state)
            stops = bool(can_stop and stopped_at(state.history, settings))
            due = settings.checkpoint_every and state.step % settings.checkpoint_every == 0
            if interrupted or (due and state.step < end and not stops):
                save_checkpoint(state)
            if interrupted:
                raise KeyboardInterrupt
            if stops:
                break
    model.eval()
    if until:
        save_checkpoint(state, keep=True)
    elif settings.patience and optimizers.best_row(state.history, settings):
        if world > 1:
            torch.distributed.barrier()  # rank 0 may still write them
        checkpoints.load_weights(model, folder / "best")
    if rank == 0:
        checkpoints.write_history(folder, state.history)
    return state.history


@contextlib.contextmanager
def _delayed_interrupt() -> Iterator[list[int]]:
    """Yield a list that the first interrupt fills instead of raising; a second one raises where it finds us.

    Processes that share a run would stop at different updates: there, and outside of the main thread, nothing changes.
    """
    held, before = [], signal.getsignal(signal.SIGINT)
    on_main_thread = threading.current_thread() is threading.main_thread()
    # What a shell puts in the background ignores interrupts, and shall go on to.
    if distributed.rank_and_world_size()[1] > 1 or not on_main_thread or before is signal.SIG_IGN:
        yield held
        return

    def hold(number: int, _) -> None:
        held.append(number)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, hold)
    try:
        yield held
    finally:
        signal.signal(signal.SIGINT, before)


def fit_from_trunk(
    model: torch.nn.Module, loss_fn: Callable, batches: Callable, settings: Training, folder: Path, trunk: Path, **rest
) -> list[dict]:  # fmt: skip
    """Train with a cooldown as a branch of a trunk, which has a constant learning rate and can always go on.

    The trunk's folder is that of a run without an end: it is trained as far as this cooldown begins, from wherever it
    stands, and keeps that checkpoint. `patience` ends the trunk, and so brings the cooldown forward. The arguments are
    those of `fit`; weights and data are those of a single run, bit by bit.
    """
    if not checkpoints.checkpoint_steps(folder):
        begin = settings.max_steps - optimizers.cooldown_steps(settings)
        with lock(trunk):
            history = fit(model, loss_fn, batches, replace(settings, schedule="constant"), trunk, until=begin, **rest)
        reached = f"checkpoint-{stopped_at(history, settings) or begin:06d}"
        with folder_atomic(folder / reached) as temporary:
            shutil.copytree(trunk / reached, temporary, dirs_exist_ok=True)
    begin = min(checkpoints.checkpoint_steps(folder))
    if begin < settings.max_steps - optimizers.cooldown_steps(settings):  # patience ended the trunk
        shorter = max(begin + 1, round(begin / (1 - settings.cooldown_share)))  # a cooldown has one update or more
        settings = replace(settings, max_steps=shorter)
    return fit(model, loss_fn, batches, settings, folder, **rest)


def _data_hash(micro_batches: list[dict]) -> str:
    content = hashlib.sha256()
    for batch in micro_batches:
        content.update(repr(batch["ids"]).encode())
        content.update(batch["labels"].numpy().tobytes())
    return content.hexdigest()[:10]


def _prefetched(batches: Callable, begin: int, end: int, on: torch.device) -> Iterator[tuple[int, list[dict]]]:
    """Yield (step, its micro-batches); for a GPU, other processes prepare them ahead."""
    steps = range(begin, end)
    workers = min(MAX_WORKERS, (os.cpu_count() or 1) - 1) if on.type == "cuda" else 0
    if not workers:
        return zip(steps, map(batches, steps), strict=True)
    loader = DataLoader(
        steps, batch_size=None, collate_fn=batches, num_workers=workers, prefetch_factor=4,
        multiprocessing_context="fork",  # what makes a batch is a closure, which cannot be sent
    )  # fmt: skip
    return zip(steps, loader, strict=True)


def _count(window: dict, values: dict[str, float], micro_batches: list[dict], targets: int) -> None:
    """Add one update to the sums that a history row averages."""
    added = {
        "steps": 1,
        "examples": sum(len(batch["ids"]) for batch in micro_batches),
        "cells": sum(batch["input_ids"].numel() + batch["labels"].numel() for batch in micro_batches),
        "used": sum(int(batch["attention_mask"].sum()) for batch in micro_batches) + targets,
    }
    for name, value in (added | values).items():
        window[name] = window.get(name, 0) + value


def _history_row(state: TrainingState, values: dict[str, float]) -> dict:
    """Return the means since the last row, and begin the next window."""
    window, seconds = state.window, state.seconds
    row = {"step": state.step, **{name: window[name] / window["steps"] for name in values}}
    row |= {"lr": optimizers.learning_rate_at(state.step - 1, state.settings), "seconds": round(seconds, 2)}
    row["padding"] = round(1 - window["used"] / max(window["cells"], 1), 4)
    row["examples_per_second"] = round(window["examples"] / max(seconds - window.get("began", 0.0), 1e-9), 2)
    state.window = {"began": seconds}
    return row


def train_mode(model: torch.nn.Module) -> None:
    """Switch dropout on, except in parts without a trainable parameter: a frozen encoder must stay the teacher's."""
    model.train()
    for module in model.modules():
        own = list(module.parameters())
        if own and not any(p.requires_grad for p in own):
            module.eval()


def recompute_activations(model) -> None:
    """Keep only what enters each layer and compute the rest again in the backward pass: a third more arithmetic."""
    enable = getattr(model, "activation_checkpointing_enable", None)  # transformers 5.17 has only the old name
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def choose_attention(model, max_length: int) -> None:
    """Set the attention kernel that trains fastest here: plain for short sequences on CPU, fused elsewhere.

    Not cuDNN's: from torch 2.11 on, its backward pass gives NaN on Hopper where a mask has 64, 192, ... columns and
    scores are very negative (pytorch issue 196678; met here in a run of 600 updates).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    plain = device().type == "cpu" and max_length <= EAGER_LENGTH
    set_attention(model, "eager" if plain else "sdpa")


def set_attention(model, name: str) -> None:
    """Set the attention kernel of a model and its stacks: T5's have configs of their own, which 5.17 leaves as is."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.set_attn_implementation(name)


def format_row(stage: str, row: dict, max_steps: int) -> str:
    """Return one line for the log."""
    left_out = ("step", "seconds", "padding", "lr", "examples_per_second")
    numbers = "  ".join(f"{name} {value:.3f}" for name, value in row.items() if name not in left_out)
    rate = f"{row['examples_per_second']:.1f} examples/s"
    return f"{stage}  step {row['step']:>5}/{max_steps}  {numbers}  lr {row['lr']:.1e}  {rate}"


def _count_targets(batch: dict) -> int:
    return int((batch["labels"] != -100).sum())
