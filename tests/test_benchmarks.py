"""Each suite of benchmarks/ runs to its end at tiny sizes, or to an error in a row, in the format that all share.

Forms run in one process here, one after another: what is tested is that they work and agree, not their speed.
"""

import importlib
import json
import math
import os
import re
import runpy
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils import _python_dispatch

from distill_utils.artifacts import REPOSITORY, write_json
from distill_utils.training.loop import Training

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


@pytest.mark.slow
def test_kd_step_takes_the_same_gradient_in_every_form(tmp_path, monkeypatch):
    rows = run("kd_step", tmp_path, monkeypatch)
    assert [row["other"] for row in rows] == ["published", "expert", "trainer"]
    for row in rows:
        assert row["other_gradient_norm"] == pytest.approx(row["ours_gradient_norm"], rel=1e-2)
        assert row["ours_tflop"] < row["other_tflop"]  # one encoder instead of two


@pytest.mark.slow
def test_relations_equal_plain_autograd(tmp_path, monkeypatch):
    rows = {(row["case"].split(",")[0], row["other"]): row for row in run("relations", tmp_path, monkeypatch)}
    assert len(rows) == 5
    for (_, other), row in rows.items():
        if other in ("naive", "checkpointed"):
            assert row["other_value"] == pytest.approx(row["ours_value"], rel=1e-2)


@pytest.mark.slow
def test_losses_equal_dense_ones(tmp_path, monkeypatch):
    (row,) = run("loss_memory", tmp_path, monkeypatch)
    assert row["value_difference"] < row["value_goal"]
    assert row["other_gradient_norm"] == pytest.approx(row["ours_gradient_norm"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["student", "growth"])
def test_suite_runs_to_its_end(suite, tmp_path, monkeypatch):
    rows = run(suite, tmp_path, monkeypatch)
    assert len(rows) >= 2 and all(math.isfinite(row["ours_seconds"]) for row in rows)


# -------------------------------------------------------------------------------------------- without running a suite


@pytest.fixture
def imported(monkeypatch):
    """Import a suite as its command does."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    return importlib.import_module


def no_room(turns, case):
    for _ in turns:
        torch.backends.cuda.enable_cudnn_sdp(False)
        raise torch.OutOfMemoryError("no room")


def test_a_form_without_memory_changes_nothing_for_the_next_in_its_process(imported):
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert "no room" in imported("timing").work(no_room, {}, lambda: True, print, warm_up=1)["error"]
    assert not _python_dispatch._get_current_dispatch_mode_stack()
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize(("suite", "failing"), [("loss_memory", "dense"), ("student", "6-3 bf16")])
def test_a_form_without_memory_is_a_row(imported, tmp_path, monkeypatch, suite, failing):
    module = imported(suite)
    monkeypatch.setitem(module.FORMS, failing, no_room)
    if suite == "student":
        monkeypatch.setitem(module.FORMS, "", lambda turns, case: [turns.lap("batch 1, beam 1") for _ in turns] and {})
        monkeypatch.setattr(module, "make", lambda *_: dict.fromkeys(("6-6 float32", failing), "there"))
    options = "--documents 1 --target 3 --vocabulary 9 --width 4" if suite == "loss_memory" else ""
    options += f" --one-process --output {tmp_path / 'rows.json'}"
    monkeypatch.setattr(sys, "argv", [suite, *options.split()])
    module.main()
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row["ratio"] is None


def test_naive_relations_are_as_precise_as_ours(imported):
    with torch.autocast("cpu", torch.bfloat16):
        found = imported("relations").scores(torch.ones(1, 2, 4), torch.ones(1, 2, dtype=torch.bool), 2, False)
    assert found.dtype == torch.float32


def test_a_teacher_is_trained_again_where_an_earlier_try_has_left_its_folders(imported, tmp_path, monkeypatch):
    module = imported("timed_teachers")
    monkeypatch.setenv("DISTILL_RUNS", str(tmp_path))
    monkeypatch.setattr(module, "fit", lambda *_, **__: None)
    monkeypatch.setattr(module, "fit_from_trunk", lambda *_, folder, **__: os.makedirs(folder, exist_ok=True) or [{}])
    for _ in range(2):
        assert module.train_for(0, "again", None, Training(max_steps=1), {})["final"] == {}


def test_a_result_that_only_one_side_has_is_a_difference(imported, tmp_path, monkeypatch, capsys):
    module, rows = imported("same_numbers"), {"rows": [{"loss": 1.0, "seconds": 2.0}]}
    monkeypatch.setattr(module.argparse.ArgumentParser, "parse_args", lambda _: SimpleNamespace(
        before=tmp_path / "before", after=tmp_path / "after"))  # fmt: skip
    for side, more, files in (("before", {}, ("02", "03")), ("after", {"gap": 0.5}, ("02",))):
        (tmp_path / side).mkdir()
        for name in files:
            write_json(tmp_path / side / f"{name}.json", rows | more)
    assert module.main() == 1
    assert "03.json" in (said := capsys.readouterr().out) and "/gap: 'absent' before, 0.5 after" in said


def test_a_call_on_the_lent_gpu_ends_within_nine_minutes():
    limits = dict(re.findall(r"run (\w+) (\d+) \$PYTHON", (REPOSITORY / "benchmarks" / "gpu.sh").read_text()))
    del limits["prepare"]  # of the teachers, in a call of their own
    assert len(limits) == 7 and sum(map(int, limits.values())) <= 9 * 60
