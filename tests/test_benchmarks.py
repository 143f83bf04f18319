"""Each suite of benchmarks/ runs to its end at tiny sizes and writes rows in the format that all share.

Forms run in one process here, one after another: what is tested is that they work and agree, not their speed.
"""

import json
import math
import runpy
import sys

import pytest

from distill_utils.artifacts import REPOSITORY

pytestmark = pytest.mark.slow
COLUMNS = {
    "case", "other", "ours_seconds", "other_seconds", "ratio", "goal", "ours_peak_mb", "other_peak_mb", "ceiling_share",
}  # fmt: skip
TINY = {
    "kd_step": "--shapes embedded --batch 2 --forms ours published expert trainer",
    "relations": "--lengths 16 --tokens 32",
    "loss_memory": "--documents 2 --target 9 --vocabulary 500 --width 32",
    "student": "--shape embedded --batches 1 2 --source 16 --tokens 3",
    "growth": "--vary documents --points 2",
}


def run(suite: str, tmp_path, monkeypatch) -> list[dict]:
    """Run a suite in this process and return its rows."""
    output = tmp_path / f"{suite}.json"
    options = [*TINY[suite].split(), "--rounds", "1", "--threads", "1", "--one-process", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [suite, *options])
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    runpy.run_path(str(REPOSITORY / "benchmarks" / f"{suite}.py"), run_name="__main__")
    found = json.loads(output.read_text())
    assert found["provenance"]["processor"] and found["machine"]["cores"]
    for row in found["rows"]:
        assert COLUMNS <= row.keys() and row["ours_seconds"] > 0 and not row.get("error")
    return found["rows"]


def test_kd_step_takes_the_same_gradient_in_every_form(tmp_path, monkeypatch):
    rows = run("kd_step", tmp_path, monkeypatch)
    assert [row["other"] for row in rows] == ["published", "expert", "trainer"]
    for row in rows:
        assert row["other_gradient_norm"] == pytest.approx(row["ours_gradient_norm"], rel=1e-2)
        assert row["ours_tflop"] < row["other_tflop"]  # one encoder instead of two


def test_relations_equal_plain_autograd(tmp_path, monkeypatch):
    rows = {(row["case"].split(",")[0], row["other"]): row for row in run("relations", tmp_path, monkeypatch)}
    assert len(rows) == 5
    for (_, other), row in rows.items():
        if other in ("naive", "checkpointed"):
            assert row["other_value"] == pytest.approx(row["ours_value"], rel=1e-2)


def test_losses_equal_dense_ones(tmp_path, monkeypatch):
    (row,) = run("loss_memory", tmp_path, monkeypatch)
    assert row["value_difference"] < row["value_goal"]
    assert row["other_gradient_norm"] == pytest.approx(row["ours_gradient_norm"], rel=1e-5)


@pytest.mark.parametrize("suite", ["student", "growth"])
def test_suite_runs_to_its_end(suite, tmp_path, monkeypatch):
    rows = run(suite, tmp_path, monkeypatch)
    assert len(rows) >= 2 and all(math.isfinite(row["ours_seconds"]) for row in rows)
