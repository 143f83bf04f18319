"""The device to compute on, its mixed precision and clock, seeds and eval mode; torch is imported on use."""

import contextlib
import ctypes
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path


def device():
    """Return the device to compute on: CUDA when torch sees one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def release_memory() -> None:
    """Give what was freed back to the system, which the C library of Linux keeps in part."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def amp_dtype(on=None, precision: str = "auto"):
    """Return torch.bfloat16 where the device multiplies it natively, else None (stay in float32, also on request)."""
    import torch

    on = on or device()
    if precision == "float32":
        return None
    if on.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    with contextlib.suppress(OSError):
        flags = Path("/proc/cpuinfo").read_text()
        if "avx512_bf16" in flags or "amx_bf16" in flags:
            return torch.bfloat16
    return None


def mixed_precision(on, dtype="auto"):
    """Return an autocast context for a device: its `amp_dtype`, or the given dtype; None and float32 switch it off."""
    import torch

    dtype = amp_dtype(on) if dtype == "auto" else dtype
    return torch.autocast(on.type, dtype, enabled=dtype not in (None, torch.float32))


def share_cores() -> None:
    """Let idle threads sleep instead of spin where others use half of the cores; call it before torch is imported.

    Two trainings of two threads on two cores are 2.6 times as fast so; one alone 10 % slower, its decoding up to 88 %.
    """
    with contextlib.suppress(OSError):  # no Linux
        for _ in range(20):  # what computes is there each time; short commands of the same moment leave gaps
            running = int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0]) - 1  # without this one
            if 2 * running < (os.cpu_count() or 1):
                return
            time.sleep(0.025)
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def to_device(batch: dict, on) -> dict:
    """Return a batch with its tensors on a device; ids and other values stay as they are."""
    import torch

    return {key: value.to(on, non_blocking=True) if torch.is_tensor(value) else value for key, value in batch.items()}


def timed(run: Callable[[], object], on=None) -> float:
    """Return the seconds of one call, with all that it started on the device."""
    import torch

    wait = torch.cuda.synchronize if (on or device()).type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


@contextlib.contextmanager
def eval_mode(*models) -> Iterator[None]:
    """Switch dropout off inside the block; every module gets its own mode back afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch; atomic GPU kernels may still differ in the last bits."""
    from transformers import set_seed

    set_seed(seed % 2**32)  # NumPy takes no larger one
