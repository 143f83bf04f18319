"""Ceilings and counts: against torch's own counter and by their behaviour, never against a clock."""

from __future__ import annotations

import math

import pytest
import tiny_models
import torch
from torch.utils.flop_counter import FlopCounterMode

from distill_utils.device import amp_dtype
from distill_utils.models import students
from distill_utils.planning import machine


def test_ceiling_is_positive_and_names_both_types():
    ceiling = machine.matmul_ceiling(size=64, repeats=2)
    assert set(ceiling) == {"float32", "bfloat16"}
    assert math.isfinite(ceiling["float32"]) and ceiling["float32"] > 0
    assert (ceiling["bfloat16"] is None) == (amp_dtype() is None)


def test_ceiling_leaves_out_what_the_machine_lacks(monkeypatch):
    monkeypatch.setattr(machine, "amp_dtype", lambda on=None: None)
    assert machine.matmul_ceiling(size=16, repeats=1)["bfloat16"] is None


def test_first_call_is_not_timed():
    calls = []
    times = machine.run_times(lambda: calls.append(0), 3, torch.device("cpu"))
    assert len(calls) == 4 and len(times) == 3 and min(times) >= 0


@pytest.mark.parametrize("num_tokens", [7, 24])
def test_encoder_flops_agree_with_torch(num_tokens):
    model = tiny_models.tiny_bart(d_model=64, encoder_ffn_dim=256).eval()
    model.set_attn_implementation("eager")  # plain products, which the counter sees
    ids = torch.full((1, num_tokens), 5)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.get_encoder()(ids, torch.ones_like(ids))
    layers = len(students.encoder_layers(model))
    count = machine.encoder_flops(students.count_parameters(model)["encoder"], layers, model.config.d_model, num_tokens)
    # Biases and norms are counted as weights; in models this narrow they are a few per cent.
    assert counter.get_total_flops() <= count <= 1.1 * counter.get_total_flops()


def test_bandwidth_is_positive():
    assert 0 < machine.memory_bandwidth(num_bytes=2**16, repeats=2) < math.inf


def test_device_memory_heeds_the_containers_limit(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "device", lambda: torch.device("cpu"))
    whole = machine.device_memory()
    (tmp_path / "limit").write_text("123456\n")
    (tmp_path / "none").write_text("max\n")
    monkeypatch.setattr(machine, "CONTAINER_LIMITS", (tmp_path / "none", tmp_path / "absent"))
    assert machine.device_memory() >= whole > 0
    monkeypatch.setattr(machine, "CONTAINER_LIMITS", (tmp_path / "limit",))
    assert machine.device_memory() == 123456
