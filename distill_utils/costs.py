"""What a run costs on machines that are not here: hours, money and energy, *simulated* from measured figures.

Not here: operations and memory of a step (sizing.py) and what a real step takes (scaling.py).
"""

from __future__ import annotations

import contextlib

import torch


def exchanged_bytes(student_bytes: float, teacher_bytes: float, num_devices: int, sharded: bool) -> float:
    """Return the bytes that each device sends in an update of data-parallel training by ring collectives.

    Unsharded, gradients are reduced and the sum is passed on: twice (n - 1) / n of them. Sharded (FSDP), the student's
    weights are gathered for the forward and again for the backward pass and its gradients are scattered, and the
    teacher's weights are gathered once: each (n - 1) / n of the whole. `student_bytes` are those of its weights, which
    its gradients equal; Zhao et al. 2023, PyTorch FSDP, and Rajbhandari et al. 2020, ZeRO, section 7.
    """
    share = (num_devices - 1) / num_devices
    return share * (3 * student_bytes + teacher_bytes if sharded else 2 * student_bytes)


def simulate(
    *, flops: float, steps: int, num_devices: int, flops_per_second: float, utilisation: float, bytes_sent: float,
    bandwidth: float, price: float, watts: float | None = None,
) -> dict:  # fmt: skip
    """Return the simulated cost of `steps` updates of `flops` floating-point operations over `num_devices` devices.

    A step lasts its arithmetic at `utilisation` of the ceiling `flops_per_second` of a device, plus `bytes_sent` over
    `bandwidth` (bytes a second for a device): nothing overlaps, which is the pessimistic end. `price` is that of a
    device-hour. Perfect division of the arithmetic is assumed, and that the global batch is large enough for it.
    """
    arithmetic = flops / num_devices / (flops_per_second * utilisation)
    sending = bytes_sent / bandwidth if num_devices > 1 else 0.0
    hours = steps * (arithmetic + sending) / 3600
    return {
        "devices": num_devices,
        "ms/step": 1000 * (arithmetic + sending),
        "sending (%)": 100 * sending / (arithmetic + sending),
        "hours": hours,
        "device-hours": hours * num_devices,
        "price": hours * num_devices * price,
        "energy (kWh)": hours * num_devices * watts / 1000 if watts else None,
    }


def watts_now() -> float | None:
    """Return the power that the accelerator draws now, in watts; None where no driver reports it."""
    if not torch.cuda.is_available():
        return None
    with contextlib.suppress(Exception):  # without the driver's library, or in a container that hides it
        return torch.cuda.power_draw() / 1000
    return None
