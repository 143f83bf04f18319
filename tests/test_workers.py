"""Work shared out to real processes: order, replacement of what is killed, errors; bad input starts nothing."""

import contextlib
import os
import shutil
import signal
import sys
import threading
import time

import pytest

from distill_utils import workers
from distill_utils.artifacts import InputError, lock
from distill_utils.workers import check_workers, share_out


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def test_results_come_in_order_by_processes_that_share_the_threads(runs, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setenv("DISTILL_NOTEBOOK_RUN", str(runs))
    monkeypatch.setattr(workers, "_gpus", lambda: ["2"])

    def task(seconds: float) -> tuple:  # a closure travels whole: this file is not importable there
        time.sleep(seconds)
        found = [os.environ.get(name) for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "DISTILL_NOTEBOOK_RUN")]
        return seconds, os.getpid(), *found

    found = share_out(task, {"late": (1.5,), "soon": (0.0,), "then": (0.1,)}, workers=2)
    assert list(found) == ["late", "soon", "then"] and [value[0] for value in found.values()] == [1.5, 0.0, 0.1]
    assert len({value[1] for value in found.values()} | {os.getpid()}) == 4
    assert {value[2:] for value in found.values()} == {("2", "2", None)}
    assert not list((runs / "workers").iterdir())  # what worked leaves nothing


def test_a_process_that_was_killed_is_replaced(tmp_path, capsys):
    def task(mark) -> str:
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return mark.name

    assert share_out(task, {name: (tmp_path / name,) for name in "ab"}, workers=2) == {"a": "a", "b": "b"}
    assert "a: its process was killed and is replaced" in capsys.readouterr().out


def test_one_that_always_dies_is_named_with_the_end_of_its_log(tmp_path):
    def task(place) -> None:
        if not place:
            time.sleep(600)
        with open(place, "a") as file:
            file.write("tried ")
        print("the last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    began = time.monotonic()
    with pytest.raises(InputError, match="bad: its process was killed 3 times.*the last words$") as error:
        share_out(task, {"bad": (tmp_path / "tries",), "long": ("",)}, workers=2)
    assert "\n" not in str(error.value) and (tmp_path / "tries").read_text().split() == ["tried"] * workers.TRIES
    assert time.monotonic() - began < 60  # the other was stopped


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5d0b")
    assert workers._gpus() == ["3", "GPU-5d0b"]

    def task() -> str:
        time.sleep(1)
        return os.environ["CUDA_VISIBLE_DEVICES"]

    assert set(share_out(task, {"a": (), "b": ()}, workers=2).values()) == {"3", "GPU-5d0b"}


def test_errors_of_a_process_reach_the_caller():
    def task(bad_input: bool) -> None:
        raise InputError("seed 7 is bad: use 8") if bad_input else KeyError("a bug")

    with pytest.raises(InputError, match="^seed 7 is bad: use 8$"):
        share_out(task, {"one": (True,)}, workers=2)
    with pytest.raises(RuntimeError, match="(?s)^one: .*KeyError: 'a bug'"):
        share_out(task, {"one": (False,)}, workers=2)


def test_processes_end_with_the_one_that_started_them():
    """What a killed command leaves would hold the locks of its artifacts."""
    caller = os.fork()
    if not caller:
        time.sleep(1)
        os._exit(0)
    watcher = os.fork()
    if not watcher:
        workers.end_with(caller)
    os.waitpid(caller, 0)
    assert os.waitstatus_to_exitcode(os.waitpid(watcher, 0)[1]) == 1


def test_a_worker_waits_for_a_lock(tmp_path):
    held, released = contextlib.ExitStack(), []

    def release() -> None:
        while not (tmp_path / "waits").exists():
            time.sleep(0.05)
        time.sleep(1)
        released.append(time.time())
        held.close()

    def task(folder) -> float:
        (folder / "waits").touch()
        with lock(folder / "labels"):
            return time.time()

    held.enter_context(lock(tmp_path / "labels"))
    threading.Thread(target=release).start()
    assert share_out(task, {"a": (tmp_path,)}, workers=2)["a"] >= released[0]


@pytest.mark.parametrize(
    ("workers", "slurm", "message"),
    [
        (0, "", "workers 0 is too small"),
        (2, "long", "workers 2 and slurm 'long' exclude each other"),
        (1, "long", "slurm 'long': no sbatch here"),
    ],
)
def test_bad_input_starts_nothing(workers, slurm, message, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=message):
        check_workers(workers, slurm)


def test_a_missing_submitit_is_named_only_where_it_is_needed(monkeypatch):
    monkeypatch.setattr(workers.importlib.util, "find_spec", lambda name: None)
    check_workers(1)
    with pytest.raises(InputError, match="install it by `pip install submitit`"):
        check_workers(2)
