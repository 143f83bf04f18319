"""Work shared out to real processes: order, replacement of what is killed, errors; bad input starts nothing."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import submitit

from distill_utils import workers
from distill_utils.artifacts import InputError, lock
from distill_utils.device import share_cores
from distill_utils.workers import check_workers, share_out


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def test_results_come_in_order_by_processes_that_are_replaced(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setenv("DISTILL_NOTEBOOK_RUN", str(runs))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5d0b")

    def task(seconds: float, mark=None) -> tuple:  # a closure travels whole: this file is not importable there
        if mark and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(seconds)
        names = ("OMP_NUM_THREADS", "DISTILL_NOTEBOOK_RUN", "CUDA_VISIBLE_DEVICES")
        return os.getpid(), seconds, *map(os.environ.get, names)

    items = {"late": (1.5,), "soon": (1.0, tmp_path / "mark"), "then": (0.1,)}
    found = share_out(task, items, workers=2)
    processes, seconds, threads, notebooks, gpus = zip(*found.values(), strict=True)
    assert list(found) == list(items) and seconds == (1.5, 1.0, 0.1)
    assert len({*processes, os.getpid()}) == 4
    assert set(threads) == {"2"} and set(notebooks) == {None} and set(gpus) == {"3", "GPU-5d0b"}
    assert "soon: its process was killed and is replaced" in capsys.readouterr().out
    assert not list((runs / "workers").iterdir())  # what worked leaves nothing


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


def test_on_a_cluster_the_fix_is_sbatchs(monkeypatch, tmp_path):
    job = SimpleNamespace(paths=SimpleNamespace(result_pickle=tmp_path / "none"), stderr=lambda: "killed")
    executor = SimpleNamespace(update_parameters=lambda **_: None)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(submitit, "SlurmExecutor", lambda folder: executor)
    monkeypatch.setattr(workers, "_submit", lambda *_: job)
    monkeypatch.setattr(workers, "_ended", lambda jobs, slurm: list(jobs))
    monkeypatch.setattr(workers, "SLURM_SECONDS", 0.0)
    with pytest.raises(InputError, match="SBATCH_MEM_PER_NODE"):  # there are no workers to use fewer of
        share_out(print, {"one": ()}, slurm="long")


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
    ("number", "slurm", "has_submitit", "message"),
    [
        (0, "", True, "workers 0"),
        (2, "long", True, "workers 2 and slurm 'long'"),
        (1, "long", True, "slurm 'long': no sbatch"),
        (2, "", False, "pip install submitit"),
    ],
)
def test_bad_input_starts_nothing(number, slurm, has_submitit, message, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(workers.importlib.util, "find_spec", lambda name: has_submitit or None)
    check_workers(1)
    with pytest.raises(InputError, match=message):
        check_workers(number, slurm)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how many threads run")
@pytest.mark.parametrize(
    ("processors", "given", "expected"), [(1, "", "PASSIVE"), (1, "ACTIVE", "ACTIVE"), (10**6, "", "")]
)
def test_threads_sleep_where_others_compute(monkeypatch, processors, given, expected):
    monkeypatch.setenv("OMP_WAIT_POLICY", given)
    if not given:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setattr(os, "cpu_count", lambda: processors)
    busy = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
    with subprocess.Popen(busy, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        share_cores()
        other.kill()
    assert os.environ.get("OMP_WAIT_POLICY", "") == expected


def test_a_thread_of_an_instant_does_not_count(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    looks = iter([2, 3, 1])
    monkeypatch.setattr(Path, "read_text", lambda path: f"0.1 0.1 0.1 {next(looks)}/99 1")
    share_cores()
    assert "OMP_WAIT_POLICY" not in os.environ and next(looks, None) is None


def test_a_script_needs_no_guard_against_its_own_processes(tmp_path):
    script = "import os\nfrom distill_utils import workers\nprint('once')\n"
    script += "with workers.new_processes() as pool:\n    assert pool.submit(os.getpid).result() != os.getpid()\n"
    (tmp_path / "script.py").write_text(script)
    ended = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "once\n"), ended.stderr
