"""Simulated costs, against cases counted by hand."""

from __future__ import annotations

import pytest
import torch

from distill_utils import costs

RUN = {"flops": 8e12, "steps": 3600, "flops_per_second": 2e12, "utilisation": 0.5, "bandwidth": 1e9, "price": 3.0}


def test_one_device_sends_nothing():
    found = costs.simulate(num_devices=1, bytes_sent=5e9, watts=500, **RUN)
    # 8e12 operations at half of 2e12 a second are 8 s an update, 3600 of them 8 hours.
    assert found["ms/step"] == pytest.approx(8000) and found["hours"] == pytest.approx(8)
    assert found["price"] == pytest.approx(24) and found["energy (kWh)"] == pytest.approx(4)
    assert found["sending (%)"] == 0


def test_many_devices_divide_the_arithmetic_and_add_what_they_send():
    found = costs.simulate(num_devices=8, bytes_sent=1e9, **RUN)
    assert found["ms/step"] == pytest.approx(1000 + 1000) and found["sending (%)"] == pytest.approx(50)
    assert found["hours"] == pytest.approx(2) and found["device-hours"] == pytest.approx(16)
    assert found["price"] == pytest.approx(48) and found["energy (kWh)"] is None


def test_bytes_sent_follow_the_ring():
    assert costs.exchanged_bytes(100, 1000, 1, sharded=False) == costs.exchanged_bytes(100, 1000, 1, sharded=True) == 0
    assert costs.exchanged_bytes(100, 1000, 4, sharded=False) == pytest.approx(2 * 75)
    # Student: gathered twice and scattered once; teacher: gathered once.
    assert costs.exchanged_bytes(100, 1000, 4, sharded=True) == pytest.approx(3 * 75 + 750)


def test_power_is_left_out_where_nothing_reports_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert costs.watts_now() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "power_draw", lambda: 350_000)  # milliwatts, as the driver says
    assert costs.watts_now() == 350
