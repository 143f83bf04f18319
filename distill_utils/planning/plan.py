"""A training run before it starts: time, disk and memory from simulated steps, and what to change where it cannot fit.

Out of scope: the simulated step itself (step.py) and the machine's ceilings (machine.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from transformers import PreTrainedConfig

from distill_utils.artifacts import InputError
from distill_utils.models import students
from distill_utils.models.loading import empty_model
from distill_utils.planning import machine
from distill_utils.planning.step import CAUSES, PHASES, Objective, plan_step


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
    ceilings: dict[str, float | None], dtype: str = "bfloat16", num_beams: int = 1, utilization: float = 1.0,
) -> float:  # fmt: skip
    """Return the seconds of writing pseudo-labels on one device, at the machine's ceilings over `utilization`.

    The encoder is bound by arithmetic. Each further token of a batch reads the decoder's weights, the head and the
    cached keys and values once, and takes what these bytes or its arithmetic take.
    """
    model = empty_model(teacher, getattr(torch, dtype))
    parts, width = students.count_parameters(model), getattr(torch, dtype).itemsize
    head, rows = sum(weight.numel() for weight in model.get_output_embeddings().parameters()), batch_size * num_beams
    inner = getattr(teacher, "d_kv", 0) * getattr(teacher, "num_heads", 0) or teacher.d_model
    cached = 2 * rows * inner * len(students.decoder_layers(model)) * (source_length + target_length / 2) * width
    speed, bandwidth = 1e9 * (ceilings.get(dtype) or ceilings["float32"]), 1e9 * ceilings["bandwidth"]
    encoding = machine.encoder_flops(
        parts["encoder"], len(students.encoder_layers(model)), inner, source_length
    ) * batch_size / speed  # fmt: skip
    weights = parts["decoder"] + head
    token = max((weights * width + cached) / bandwidth, 2 * weights * rows / speed)
    return math.ceil(num_documents / batch_size) * (encoding + target_length * token) / utilization


def target_cache_bytes(num_tokens: int, top_k: int, vocab_size: int) -> int:
    """Return the disk that `targets.write_targets` needs for k of the teacher's probabilities a target token."""
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
    """Return one row a training run, for a table: parameters, operations, memory by cause, time and disk.

    `runs` is a chain or a choice: each is {"run": name, "student": config, "teacher": config, "max_steps": updates} and
    whatever settings of `plan_step` differ from the common `settings`, `devices` for example. Sizes are in 1e6 weights
    and 1e9 bytes of one device, `device_hours` those of all. `utilization` is the share of the machine's ceilings that
    real steps reach; 0.5 is a guess until one is measured.
    """
    rows = []
    for run in runs:
        changes = {name: value for name, value in run.items() if name not in ("run", "student", "teacher", "max_steps")}
        own = {"objective": objective} | settings | changes
        step = plan_step(student=run["student"], teacher=run.get("teacher"), **own)
        seconds = step_seconds(step, ceilings, utilization, link_bandwidth)["total"]
        devices, max_steps = step["settings"]["devices"], run.get("max_steps", 1)
        row = {"run": run["run"], "devices": devices}
        row |= {f"{name} (M)": step["parameters"][name]["total"] / 1e6 for name in sorted(step["parameters"])}
        own = step["parameters"]["student"]
        row |= {f"{part} (M)": own[part] / 1e6 for part in ("embeddings", "encoder", "decoder")}
        row["TFLOP/step"] = sum(step["flops"].values()) / 1e12
        row["peak_memory_gb"] = step["peak_bytes"] / 1e9
        row |= {f"{cause} (GB)": step["memory"].get(cause, 0) / 1e9 for cause in CAUSES}
        row |= {"seconds/step": seconds, "hours": seconds * max_steps / 3600}
        row |= {"device_hours": row["hours"] * devices, "tokens": step["tokens"] * max_steps}
        row |= {"communication (GB/step)": step["communication_bytes"] / 1e9}
        rows.append(row | {"checkpoint (GB)": step["checkpoint_bytes"] / 1e9})
    return rows


def check_fits(
    objective: Objective,
    student: PreTrainedConfig,
    teacher: PreTrainedConfig | None = None,
    *,
    memory: int | None = None,
    reserve: float = 0.1,
    ceilings: dict[str, float | None] | None = None,
    **settings: object,
) -> dict:
    """Return `plan_step` of the settings where it fits into `memory` bytes, `machine.device_memory` unless given.

    `reserve` is the share of memory that the plan may not use: the CUDA context, workspaces and fragmentation. Raises
    InputError otherwise, which names the three cheapest changes that make it fit, each planned anew: a smaller
    micro-batch, activation checkpointing, a bfloat16 teacher, shorter text or more devices, by the device time they add
    per token, at this machine's ceilings unless given.
    """
    memory = machine.device_memory() if memory is None else memory
    room = (1 - reserve) * memory
    step = plan_step(objective, student, teacher, **settings)
    if step["peak_bytes"] <= room:
        return step
    ceilings = ceilings or machine.machine_ceilings()
    again = partial(_plan_changed, objective, student, teacher, settings, step)

    def cost(planned: dict) -> float:
        return step_seconds(planned, ceilings)["total"] * planned["settings"]["devices"] / planned["tokens"]

    planned = [(change, again(change)) for change in _fitting(_changes(step["settings"]), again, room)]
    causes = sorted(step["memory"].items(), key=lambda item: -item[1])[:2]
    needs = (
        f"a step needs {step['peak_bytes'] / 1e9:.2f} GB ({', '.join(f'{c} {b / 1e9:.2f}' for c, b in causes)}), of "
        f"{memory / 1e9:.2f} GB {room / 1e9:.2f} may be used"
    )
    if not planned:
        raise InputError(
            f"{needs}; no single change of batch, text, precision or devices fits: combine them, or use a smaller model"
        )
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
    more = [devices * n for n in (2, 4, 8) if settings["batch_size"] % (devices * n) == 0]
    kinds.append([{"devices": n, "micro_batch_size": min(rows, settings["batch_size"] // n)} for n in more])
    return [kind for kind in kinds if kind]


def _fitting(kinds: list[list[dict]], again: Callable[[dict], dict], room: float) -> list[dict]:
    """Return of each kind of change the mildest that fits: halved in search, for a milder one never needs less."""
    found = []
    for kind in kinds:
        if again(kind[-1])["peak_bytes"] > room:
            continue
        low, high = 0, len(kind) - 1
        while low < high:
            middle = (low + high) // 2
            if again(kind[middle])["peak_bytes"] <= room:
                high = middle
            else:
                low = middle + 1
        found.append(kind[low])
    return found


def _plan_changed(objective, student, teacher, settings: dict, known: dict, change: dict) -> dict:
    """Return the plan with a change; each is made once."""
    plans = known.setdefault("changed", {})
    key = tuple(sorted(change.items()))
    if key not in plans:
        plans[key] = plan_step(objective, student, teacher, **(settings | change))
    return plans[key]
