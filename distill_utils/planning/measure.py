"""Real training steps of a given shape, with random weights: time, peak memory and utilization beside the plan.

Out of scope: the plan itself (plan.py) and training that is meant to learn something (training/). Speed and memory do
not depend on what the weights are; quality does, and nothing here says anything about it.
"""

import gc
import math
import os
import statistics
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel, T5Config

from distill_utils.artifacts import InputError
from distill_utils.device import device, mixed_precision
from distill_utils.models import students
from distill_utils.models.loading import empty_model, load_config
from distill_utils.planning.plan import inner_width, machine_ceilings, run_times, step_seconds
from distill_utils.planning.step import Objective, plan_step
from distill_utils.training import loop
from distill_utils.workers import new_processes

BLOCK = 2**20 + 7  # random numbers; no multiple of any width, so that rows differ
# T5 v1.0 (Raffel et al. 2020, section 3.7): width, width of a head, heads, feed-forward width, layers of each stack.
T5_SIZES = {
    "t5-small": (512, 64, 8, 2048, 6),
    "t5-base": (768, 64, 12, 3072, 12),
    "t5-large": (1024, 64, 16, 4096, 24),
    "t5-3b": (1024, 128, 32, 16384, 24),
}
T5_VOCABULARY = 32128  # as released, padded to a multiple of 128
NEEDED = ("teacher", "student", "backward")  # by the objective: neither what is computed again nor the update
MEMORY_EVENT = "[memory]"  # what the profiler calls a change of the allocator


def measure_step(
    objective: Objective,
    student: PreTrainedConfig,
    teacher: PreTrainedConfig | None = None,
    *,
    repeats: int = 3,
    threads: int = 0,
    plan: dict | None = None,
    **settings: object,
) -> dict:
    """Run real steps of what `step.plan_step` describes, on this machine's device, and return what they took.

    A new process makes both models with random weights, takes one step that is not counted, then `repeats` timed ones.
    Everything given must be picklable: name functions of modules, or partials of them. `threads` 0 leaves torch's own.
    `plan` is that of the same step, where there is one already.

    Returns `seconds` (best), `seconds_median`, `tokens_per_second` (at best), `peak_bytes` by the allocator's record
    (on CUDA its own maximum; on a CPU every change that the profiler saw in one more step, above what lived before it),
    `flops` of a step without what is computed again, `flops_per_second`; `utilization`, the share of the time that they
    take at the measured matmul ceilings, each operation at that of its precision; `roofline_efficiency`, what
    `plan.step_seconds` takes as its utilization, and which tensors that stay in a CPU's cache can bring above 1;
    `ceilings`; and the planned peak.

    Raises InputError where the plan would, and when the process dies, as it does out of memory.
    """
    plan = plan or plan_step(objective, student, teacher, **(settings | {"on": device().type}))
    if plan["settings"]["devices"] > 1:
        raise InputError(f"devices {plan['settings']['devices']} cannot be measured in one process: use devices=1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would tell a notebook when it starts and stops
    try:
        with new_processes() as pool:
            found = pool.submit(_run_steps, objective, student, teacher, plan["settings"], repeats, threads).result()
    except (BrokenProcessPool, torch.OutOfMemoryError):  # a CPU's process is killed, a GPU's raises
        raise InputError(
            f"the measuring process died, most likely out of memory (the plan: {plan['peak_bytes'] / 1e9:.2f} GB): "
            "lower micro_batch_size or use checkpoint_activations"
        ) from None
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the measured step failed: {' '.join(str(error).split())[:300]}") from error
    ceilings = found["ceilings"]
    bound = step_seconds(plan, ceilings)["total"]
    arithmetic = step_seconds(plan, ceilings | {"bandwidth": math.inf})
    flops = sum(plan["flops"][phase] for phase in NEEDED)
    return found | {
        "tokens_per_second": plan["tokens"] / found["seconds"],
        "flops": flops,
        "flops_per_second": flops / found["seconds"],
        "utilization": sum(arithmetic[phase] for phase in NEEDED) / found["seconds"],
        "roofline_efficiency": bound / found["seconds"],
        "planned_peak_bytes": plan["peak_bytes"],
        "planned_over_measured": plan["peak_bytes"] / found["peak_bytes"],
    }


def _run_steps(objective, student_config, teacher_config, settings, repeats: int, threads: int) -> dict:
    """Run in the new process and return what was found there."""
    if threads:
        torch.set_num_threads(threads)
    on = device()
    torch.manual_seed(0)
    student = random_model(student_config, torch.float32, on)
    loop.set_attention(student, settings["attention"])
    torch.backends.cuda.enable_cudnn_sdp(False)  # as in training (`loop.choose_attention`)
    teacher = None
    if teacher_config is not None:
        teacher = random_model(teacher_config, getattr(torch, settings["teacher_dtype"]), on).eval()
        teacher.requires_grad_(False)
    loop.train_mode(student)
    if settings["checkpoint_activations"]:
        loop.recompute_activations(student)
    weights = {name: weight for name, weight in student.named_parameters() if weight.requires_grad}
    mixed = "float32" if settings["precision"] == "float32" else "auto"
    options = loop.Training(1, settings["batch_size"], optimizer=settings["optimizer"], precision=mixed)
    optimizers = loop.make_optimizers(student, weights, options)
    batch = random_batch(settings, min(config.vocab_size for config in (student_config, teacher_config) if config), on)
    passes = settings["batch_size"] // settings["micro_batch_size"]

    def step() -> None:
        for _ in range(passes):
            with mixed_precision(on, getattr(torch, settings["precision"])):
                loss = objective(student, teacher, batch)["loss"]
            (loss / passes).backward()
            del loss
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    seconds = run_times(step, repeats, on)
    if on.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = living_bytes() + allocated_peak(step)
    found = {"device": on.type, "threads": torch.get_num_threads(), "repeats": repeats}
    found["ceilings"] = machine_ceilings()  # last, for it needs memory of its own
    return found | {"seconds": min(seconds), "seconds_median": statistics.median(seconds), "peak_bytes": peak}


def random_model(config: PreTrainedConfig, dtype: torch.dtype, on: torch.device) -> PreTrainedModel:
    """Return a model of the config, made on the device itself: norms of 1, all else from a narrow normal distribution.

    Matrices repeat one block of random numbers, for a CPU takes minutes to draw 3B of them.
    """
    model = empty_model(config, dtype)
    model.to_empty(device=on).tie_weights()
    block = (0.02 * torch.randn(BLOCK, device=on)).to(dtype)
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.zero_()
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.fill_(1.0)
                continue
            for part in weight.view(-1).split(BLOCK):
                part.copy_(block[: len(part)])
    return model


def random_batch(settings: dict, vocab_size: int, on: torch.device) -> dict[str, torch.Tensor]:
    """Return one micro-batch of random tokens; where it is `padded`, all rows but the first are one token shorter."""
    rows, source, target = (settings[name] for name in ("micro_batch_size", "source_length", "target_length"))
    ids = torch.randint(3, vocab_size, (rows, source + target), device=on)
    input_ids, labels = (part.contiguous() for part in ids.split([source, target], dim=1))
    mask = torch.ones_like(input_ids)
    if settings["padded"]:
        mask[1 if rows > 1 else 0 :, -1] = 0
        labels[1:, -1] = -100
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def living_bytes() -> int:
    """Return the bytes of all storages that tensors in this process hold now."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return sum(storages.values())


def allocated_peak(run: Callable[[], object]) -> int:
    """Return the most bytes that the CPU allocator gave out at a time while `run` ran, above what lived before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == MEMORY_EVENT]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def model_config(name: str) -> PreTrainedConfig:
    """Return the config of a model to plan for: a size of T5 such as "t5-3b", or what `load_config` knows.

    "t5-base:6" is the same with 6 layers in each stack. No weights are needed and, for T5's sizes, no network.
    """
    place, _, layers = name.partition(":") if not Path(name).exists() else (name, "", "")
    if place in T5_SIZES:
        width, head_width, heads, inner, depth = T5_SIZES[place]
        config = T5Config(
            vocab_size=T5_VOCABULARY, d_model=width, d_kv=head_width, num_heads=heads, d_ff=inner, num_layers=depth,
            num_decoder_layers=depth, pad_token_id=0, decoder_start_token_id=0,
        )  # fmt: skip
    else:
        config = load_config(place)
    if layers:
        if not layers.isdecimal() or not 0 < int(layers) <= config.num_hidden_layers:
            raise InputError(f"{name}: {layers!r} layers are impossible: give 1 to {config.num_hidden_layers}")
        students.set_depths(config, int(layers), int(layers))
    return config


def relation_heads(*configs: PreTrainedConfig) -> int:
    """Return the largest number of relation heads, at most 32, that divides the inner width of every model."""
    shared = math.gcd(*map(inner_width, configs))
    return next(heads for heads in range(32, 0, -1) if shared % heads == 0)
