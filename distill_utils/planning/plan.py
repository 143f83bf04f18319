"""A training run before it starts: time, disk and memory from simulated steps, and what to change where it cannot fit.

Ceilings are measured: what this machine reaches at most in arithmetic and in memory traffic.

Out of scope: the simulated step itself (step.py), real steps (measure.py), and the speed of a whole model on documents
(evaluation/scoring.py).
"""

import math
import statistics
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cache

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from distill_utils.artifacts import InputError
from distill_utils.device import amp_dtype, device, timed
from distill_utils.models import students
from distill_utils.models.loading import empty_model
from distill_utils.planning.step import CAUSES, PHASES, Objective, plan_step

CPU_SIZE, CUDA_SIZE = 1024, 8192  # rows of the square matrices: large enough to be bound by arithmetic, not by memory
CPU_BYTES, CUDA_BYTES = 2**28, 2**31  # of the tensor that is copied: far above any cache
REPEATS = 8  # of which the best counts, for other load only slows
RESERVE = 0.1  # of memory that a plan may not use: the CUDA context, workspaces and fragmentation

# ---------------------------------------------------------------------------------------------------------- the machine


def run_times(run: Callable[[], object], repeats: int, device: torch.device | None = None) -> list[float]:
    """Return the seconds of each of `repeats` calls, after one call that is not counted."""
    return [timed(run, device) for _ in range(repeats + 1)][1:]


def matmul_ceiling() -> dict[str, float | None]:
    """Return the GFLOP/s (1e9) that a square matrix product reaches here: `float32` and `bfloat16`.

    `bfloat16` is None where the machine has none of its own.
    """
    on = device()
    size = CUDA_SIZE if on.type == "cuda" else CPU_SIZE
    ceiling: dict[str, float | None] = dict.fromkeys(("float32", "bfloat16"))
    for name, dtype in (("float32", torch.float32), ("bfloat16", amp_dtype(on))):
        if dtype is not None:
            # Random numbers: a GPU multiplies equal ones faster than it ever multiplies data.
            left, right = (torch.randn(size, size, device=on).to(dtype) for _ in range(2))
            ceiling[name] = 2 * size**3 / min(run_times(lambda a=left, b=right: a @ b, REPEATS, on)) / 1e9
    return ceiling


def inner_width(config: PreTrainedConfig) -> int:
    """Return the width of all heads together, which is not always that of the model."""
    return getattr(config, "d_kv", 0) * config.num_attention_heads or config.d_model


def encoder_flops(model: PreTrainedModel, num_tokens: int) -> float:
    """Return the floating-point operations of one encoder pass over one document of `num_tokens` tokens.

    Two for each weight (embeddings excepted) and token, four for each pair of tokens, layer and unit of width: scores
    and weighted sum. Norms, activations and softmax are left out.
    """
    pairs = len(students.encoder_layers(model)) * inner_width(model.config) * num_tokens**2
    return 2.0 * students.count_parameters(model)["encoder"] * num_tokens + 4.0 * pairs


def encoder_speed(model: PreTrainedModel, num_tokens: int, batch_size: int) -> dict[str, float]:
    """Time the encoder on documents of one length: `batch_size`, `ms` a pass (median of five), `gflops` a second."""
    ids = torch.full((batch_size, num_tokens), model.config.eos_token_id, device=model.device)
    with torch.inference_mode():
        seconds = statistics.median(run_times(lambda: model.get_encoder()(ids, torch.ones_like(ids)), 5, model.device))
    flops = batch_size * encoder_flops(model, num_tokens)
    return {"batch_size": batch_size, "ms": 1000 * seconds, "gflops": flops / seconds / 1e9}


def memory_bandwidth() -> float:
    """Return the GB/s (1e9 bytes, read and written both counted) that copying a large tensor reaches here."""
    on = device()
    source = torch.ones((CUDA_BYTES if on.type == "cuda" else CPU_BYTES) // 4, device=on)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(run_times(lambda: target.copy_(source), REPEATS, on)) / 1e9


def machine_ceilings() -> dict[str, float | None]:
    """Return `matmul_ceiling` (GFLOP/s) and `bandwidth` (GB/s) of this machine: what `step_seconds` divides by."""
    return matmul_ceiling() | {"bandwidth": memory_bandwidth()}


# --------------------------------------------------------------------------------------------------- time, disk, memory


def step_seconds(
    step: dict, ceilings: dict[str, float | None], utilization: float = 1.0, link_bandwidth: float | None = None
) -> dict[str, float]:
    """Return the seconds of a planned step by phase, and their sum as `total`.

    Every operation takes what its arithmetic or its bytes take at the ceiling, whichever is longer; the sum is divided
    by `utilization`, the share of this bound that real steps reach here: `measure.measure_step` measures it, as
    `roofline_efficiency`. Communication adds its bytes over `link_bandwidth` (GB/s of a device), without overlap.
    """
    if not 0 < utilization:
        raise InputError(f"utilization {utilization} is not positive: measure one, or use for example 0.5")
    found = dict.fromkeys(PHASES, 0.0)
    for row in step["work"]:
        arithmetic = row["flops"] / (1e9 * (ceilings.get(row["dtype"]) or ceilings["float32"]))
        bound = max(arithmetic, row["bytes"] / (1e9 * ceilings["bandwidth"]))
        found[row["phase"]] += row["times"] * bound / utilization
    if link_bandwidth:
        found["communication"] = step["communication_bytes"] / (1e9 * link_bandwidth)
    return found | {"total": sum(found.values())}


def label_seconds(
    teacher: PreTrainedConfig, num_documents: int, source_length: int, target_length: int, batch_size: int,
    ceilings: dict[str, float | None], num_beams: int = 1, utilization: float = 1.0,
) -> float:  # fmt: skip
    """Return the seconds of writing pseudo-labels in bfloat16 on one device, at the ceilings over `utilization`.

    The encoder is bound by arithmetic. Each further token of a batch reads the decoder's weights, the head and the
    cached keys and values once, and takes what these bytes or its arithmetic take.
    """
    model, width = empty_model(teacher, torch.bfloat16), torch.bfloat16.itemsize
    parts = students.count_parameters(model)
    head, rows = sum(weight.numel() for weight in model.get_output_embeddings().parameters()), batch_size * num_beams
    values = rows * inner_width(teacher) * len(students.decoder_layers(model)) * (source_length + target_length / 2)
    cached = 2 * values * width
    speed, bandwidth = 1e9 * (ceilings.get("bfloat16") or ceilings["float32"]), 1e9 * ceilings["bandwidth"]
    encoding = encoder_flops(model, source_length) * batch_size / speed
    weights = parts["decoder"] + head
    token = max((weights * width + cached) / bandwidth, 2 * weights * rows / speed)
    return math.ceil(num_documents / batch_size) * (encoding + target_length * token) / utilization


def target_cache_bytes(num_tokens: int, top_k: int, vocab_size: int) -> int:
    """Return the disk that `teacher_cache.write_targets` needs for k of the teacher's probabilities a target token."""
    return num_tokens * (4 + top_k * (2 + (2 if vocab_size <= 2**16 else 4)))  # a count; probabilities; ids


def plan(
    objective: Objective,
    runs: Sequence[dict],
    *,
    ceilings: dict[str, float | None],
    utilization: float = 0.5,
    link_bandwidth: float | None = None,
    **settings: object,
) -> list[dict]:
    """Return one row per training run, for a table: parameters, operations, memory by cause, time and disk.

    `runs` is a chain or a choice: each is {"run": name, "student": config, "teacher": config, "max_steps": updates} and
    whatever settings of `plan_step` differ from the common `settings`, `devices` for example. Sizes are in 1e6 weights
    and 1e9 bytes of one device, `device_hours` those of all. `utilization` is the share of the machine's ceilings that
    real steps reach; 0.5 is a guess until one is measured.
    """
    rows = []
    for run in runs:
        given = {"objective": objective, "max_steps": 1} | settings | run
        name, max_steps = given.pop("run"), given.pop("max_steps")
        step = plan_step(**given)
        seconds = step_seconds(step, ceilings, utilization, link_bandwidth)["total"]
        hours, devices = seconds * max_steps / 3600, step["settings"]["devices"]
        parts = step["parameters"]["student"]
        rows.append({
            "run": name,
            "devices": devices,
            **{f"{model} (M)": step["parameters"][model]["total"] / 1e6 for model in sorted(step["parameters"])},
            **{f"{part} (M)": parts[part] / 1e6 for part in ("embeddings", "encoder", "decoder")},
            "TFLOP/step": sum(step["flops"].values()) / 1e12,
            "peak_memory_gb": step["peak_bytes"] / 1e9,
            **{f"{cause} (GB)": step["memory"].get(cause, 0) / 1e9 for cause in CAUSES},
            "seconds/step": seconds,
            "hours": hours,
            "device_hours": hours * devices,
            "tokens": step["tokens"] * max_steps,
            "communication (GB/step)": step["communication_bytes"] / 1e9,
            "checkpoint (GB)": step["checkpoint_bytes"] / 1e9,
        })  # fmt: skip
    return rows


def check_fits(
    objective: Objective,
    student: PreTrainedConfig,
    teacher: PreTrainedConfig | None = None,
    *,
    memory: int,
    ceilings: dict[str, float | None],
    **settings: object,
) -> dict:
    """Return `plan_step` of the settings where it fits into `memory` bytes less RESERVE.

    Raises InputError otherwise, which names the three cheapest changes that make it fit, each planned anew: a smaller
    micro-batch, activation checkpointing, a bfloat16 teacher, shorter text or more devices, by the device time they add
    per token at the machine's `ceilings`.
    """
    room = (1 - RESERVE) * memory
    step = plan_step(objective, student, teacher, **settings)
    if step["peak_bytes"] <= room:
        return step

    @cache
    def again(*change: tuple[str, object]) -> dict:
        return plan_step(objective, student, teacher, **(settings | dict(change)))

    def cost(planned: dict) -> float:
        return step_seconds(planned, ceilings)["total"] * planned["settings"]["devices"] / planned["tokens"]

    planned = []
    for kind in _changes(step["settings"]):  # a milder change never needs less, so that halving finds the mildest
        at = bisect_left(kind, True, key=lambda change: again(*change.items())["peak_bytes"] <= room)
        planned += [(change, again(*change.items())) for change in kind[at : at + 1]]
    causes = sorted(step["memory"].items(), key=lambda item: -item[1])[:2]
    needs = (
        f"a step needs {step['peak_bytes'] / 1e9:.2f} GB ({', '.join(f'{c} {b / 1e9:.2f}' for c, b in causes)}), but "
        f"only {room / 1e9:.2f} of {memory / 1e9:.2f} GB may be used"
    )
    if not planned:
        raise InputError(f"{needs}; no single change of settings fits: combine some, or use a smaller model")
    planned.sort(key=lambda pair: cost(pair[1]))
    shown = [
        f"{' and '.join(f'{name}={value}' for name, value in change.items())} "
        f"({found['peak_bytes'] / 1e9:.2f} GB, {cost(found) / cost(step) - 1:+.0%} device time)"
        for change, found in planned[:3]
    ]
    raise InputError(f"{needs}: use {', or '.join(shown)}")


def _changes(settings: dict) -> list[list[dict]]:
    """Return the changes that save memory, by kind, each kind from the mildest to the hardest."""
    rows, devices = settings["micro_batch_size"], settings["devices"]
    share = settings["batch_size"] // devices
    kinds = [[{"micro_batch_size": n} for n in range(rows - 1, 0, -1) if share % n == 0]]
    if not settings["checkpoint_activations"]:
        kinds.append([{"checkpoint_activations": True}])
    if settings["teacher_dtype"] == "float32":
        kinds.append([{"teacher_dtype": "bfloat16"}])
    lengths = ("source_length", "target_length")
    kinds.append([{name: max(settings[name] // n, 1) for name in lengths} for n in (2, 4)])
    if settings["optimizer"] == "adamw":  # the others need whole matrices
        shares = {devices * n: settings["batch_size"] // (devices * n) for n in (2, 4, 8)}
        more = {n: own for n, own in shares.items() if own * n == settings["batch_size"]}
        fitting = {n: max(size for size in range(1, rows + 1) if own % size == 0) for n, own in more.items()}
        kinds.append([{"devices": n, "micro_batch_size": size} for n, size in fitting.items()])
    return kinds
