"""What the machine can do at most: measured ceilings of arithmetic and of memory, how much memory, encoder speed.

Not here: what a training step needs (step.py) and the speed of a whole model on documents (evaluation/speed).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from distill_utils.device import amp_dtype, device

CPU_SIZE, CUDA_SIZE = 1024, 8192  # rows of the square matrices: large enough to be bound by arithmetic, not by memory
CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def run_times(run: Callable[[], object], repeats: int, device: torch.device | None = None) -> list[float]:
    """Return the seconds of each of `repeats` calls, after one call that is not counted."""
    on_cuda = (device or device()).type == "cuda"
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if on_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times[1:]


def matmul_ceiling(size: int = 0, repeats: int = 8) -> dict[str, float | None]:
    """Return the GFLOP/s (1e9) that a square matrix product reaches here: `float32` and `bfloat16`.

    The best of `repeats`, for other load only slows. `bfloat16` is None where the machine has none of its own.
    """
    on = device()
    size = size or (CUDA_SIZE if on.type == "cuda" else CPU_SIZE)
    ceiling: dict[str, float | None] = dict.fromkeys(("float32", "bfloat16"))
    for name, dtype in (("float32", torch.float32), ("bfloat16", amp_dtype(on))):
        if dtype is not None:
            # Random numbers: a GPU multiplies equal ones faster than it ever multiplies data.
            left, right = (torch.randn(size, size, device=on).to(dtype) for _ in range(2))
            ceiling[name] = 2 * size**3 / min(run_times(lambda a=left, b=right: a @ b, repeats, on)) / 1e9
    return ceiling


def encoder_flops(num_parameters: int, num_layers: int, width: int, num_tokens: int) -> float:
    """Return the floating-point operations of one encoder pass over one document of `num_tokens` tokens.

    Two for each weight (embeddings excepted) and token, four for each pair of tokens, layer and unit of width: scores
    and weighted sum. Norms, activations and softmax are left out.
    """
    return 2.0 * num_parameters * num_tokens + 4.0 * num_layers * width * num_tokens**2


def encoder_speed(model, num_parameters: int, num_layers: int, num_tokens: int, batch_size: int) -> dict[str, float]:
    """Time the encoder on documents of one length: `batch_size`, `ms` a pass (median of five), `gflops` a second."""
    ids = torch.full((batch_size, num_tokens), model.config.eos_token_id, device=model.device)
    with torch.inference_mode():
        seconds = statistics.median(run_times(lambda: model.get_encoder()(ids, torch.ones_like(ids)), 5, model.device))
    flops = batch_size * encoder_flops(num_parameters, num_layers, model.config.hidden_size, num_tokens)
    return {"batch_size": batch_size, "ms": 1000 * seconds, "gflops": flops / seconds / 1e9}


def memory_bandwidth(num_bytes: int = 0, repeats: int = 8) -> float:
    """Return the GB/s (1e9 bytes, read and written both counted) that copying a large tensor reaches here."""
    on = device()
    num_bytes = num_bytes or (2**31 if on.type == "cuda" else 2**28)  # far above any cache
    source = torch.ones(num_bytes // 4, device=on)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(run_times(lambda: target.copy_(source), repeats, on)) / 1e9


def machine_ceilings() -> dict[str, float | None]:
    """Return `matmul_ceiling` (GFLOP/s) and `bandwidth` (GB/s) of this machine: what `step_seconds` divides by."""
    return matmul_ceiling() | {"bandwidth": memory_bandwidth()}


def device_memory() -> int:
    """Return the bytes of the device to compute on: the GPU's memory, or of RAM what this process may use."""
    if device().type == "cuda":
        return torch.cuda.mem_get_info()[1]
    limits = [psutil.virtual_memory().total]
    for path in CONTAINER_LIMITS:
        with suppress(OSError, ValueError):  # absent outside of Linux; "max" without a limit
            limits.append(int(path.read_text()))
    return min(limits)
