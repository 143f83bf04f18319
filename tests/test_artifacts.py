"""Run folders: reuse, atomic writing, locks between real processes, progress, provenance."""

import errno
import importlib.metadata
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

from distill_utils import artifacts
from distill_utils.artifacts import InputError

REPOSITORY = Path(__file__).resolve().parents[1]
HOLD = """
import sys
from distill_utils import artifacts
def build(folder):
    (folder / "part").write_text("half")
    print("held", flush=True)
    sys.stdin.read()
artifacts.artifact("held", {"a": 1}, build, quiet=True)
"""


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.fixture
def holder(runs):
    """A live process inside the build of the artifact "held"."""
    command = [sys.executable, "-c", HOLD]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=REPOSITORY, **pipes) as process:
        while process.stdout.readline().strip() != "held":
            assert process.poll() is None
        yield process
        process.kill()


def message_of(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# ------------------------------------------------------------------------------------------------------------ hashing


def test_hashes(tmp_path):
    # printf '{"a":1,"b":[true,null,0.5],"c":"\u00e9"}' | sha256sum
    assert artifacts.config_hash({"c": "é", "b": [True, None, 0.5], "a": 1}) == "34f80fc51f"
    values = [1, 2, "1", [1, 2], [2, 1], {"c": 1}, {"c": 2}, None]
    assert len({artifacts.config_hash({"a": value}) for value in values}) == len(values)
    (tmp_path / "file").write_bytes(b"abc")
    assert artifacts.file_hash(tmp_path / "file") == "ba7816bf8f"  # FIPS 180-2, appendix B.1


# ------------------------------------------------------------------------------------------------------------ writing


class FullFile(io.FileIO):
    """A file on a disk that fills up in the middle of a write."""

    code = errno.ENOSPC

    def write(self, data):
        super().write(data[: len(data) // 2])
        raise OSError(self.code, os.strerror(self.code))


@pytest.mark.parametrize(
    ("code", "expected"), [(errno.ENOSPC, InputError), (errno.EDQUOT, InputError), (errno.EIO, OSError)]
)
@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch, call, code, expected):
    path = tmp_path / "file.txt"
    path.write_text("the old content")
    if call == "write":
        monkeypatch.setattr(artifacts, "open", type("Full", (FullFile,), {"code": code}), raising=False)
    else:
        monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(code, os.strerror(code))))
    with pytest.raises(expected) as error:
        artifacts.write_atomic(path, "the new content")
    if expected is InputError:
        message = message_of(error)
        assert "file.txt" in message and "DISTILL_RUNS" in message and str(tmp_path) not in message
    assert os.listdir(tmp_path) == ["file.txt"] and path.read_text() == "the old content"


def test_json_is_replaced_whole_and_rejects_what_json_lacks(tmp_path):
    for value in ("older", "é"):
        artifacts.write_json(tmp_path / "a.json", {"text": value, "value": 0.1})
    with pytest.raises(ValueError):
        artifacts.write_json(tmp_path / "a.json", {"value": float("nan")})
    assert artifacts.read_json(tmp_path / "a.json") == {"text": "é", "value": 0.1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_folder_atomic_replaces_the_whole_folder(tmp_path):
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "old").write_text("old")
    stale = tmp_path / f".student.{os.getpid()}.old"  # left by a killed process that had this process's id
    stale.mkdir()
    (stale / "older").write_text("older")
    with artifacts.folder_atomic(folder) as temporary:
        (temporary / "new").write_text("new")
        assert os.listdir(folder) == ["old"]  # others see the old folder until the end
    assert os.listdir(folder) == ["new"] and os.listdir(tmp_path) == ["student"]


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), InputError),
        # what safetensors raises on a full disk, word for word
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), InputError),
        (SafetensorError("Error while serializing: other"), SafetensorError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=["system", "safetensors", "other", "interrupt"],
)
def test_folder_atomic_keeps_the_old_folder_when_writing_fails(tmp_path, raised, expected):
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "weights").write_text("old")
    with pytest.raises(expected) as error, artifacts.folder_atomic(folder) as temporary:
        (temporary / "weights").write_text("ne")
        raise raised
    assert expected is not InputError or "student" in message_of(error)
    assert os.listdir(tmp_path) == ["student"] and (folder / "weights").read_text() == "old"


# -------------------------------------------------------------------------------------------------------- run folders


def test_an_artifact_is_built_once_found_again_and_goes_on_after_an_error(runs, capsys):
    found = []

    def build(folder):
        assert not (folder / "results.json").exists()  # results are written last
        assert artifacts.read_json(folder / "config.json") == {"a": 1}
        found.append((folder / "part").exists())
        (folder / "part").write_text("half")
        if len(found) == 1:
            raise RuntimeError("broken")
        return {"loss": 0.5}

    with pytest.raises(RuntimeError, match="broken"):
        artifacts.artifact("part", {"a": 1}, build)
    capsys.readouterr()
    for quiet, said in ((False, "building runs/"), (False, "reusing runs/"), (True, "")):
        folder = artifacts.artifact("part", {"a": 1}, build, quiet)
        assert capsys.readouterr().out == (f"{said}{folder.name}\n" if said else "")
    assert found == [False, True] and list(runs.iterdir()) == [folder]
    others = [artifacts.artifact(*key, lambda folder: {}) for key in (("part", {"a": 2}), ("other", {"a": 1}))]
    assert len({folder, *others}) == 3
    results = artifacts.read_json(folder / "results.json")
    assert results["loss"] == 0.5 and results["build_seconds"] >= 0
    assert results["provenance"]["packages"]["torch"] == importlib.metadata.version("torch")


def test_artifact_in_use_is_rejected_until_its_process_is_killed(holder, runs):
    built = []

    def build(folder):
        built.append((folder / "part").read_text())
        return {}

    with pytest.raises(InputError) as error:
        artifacts.artifact("held", {"a": 1}, build)
    message = message_of(error)
    assert str(holder.pid) in message and "held-" in message and str(runs) not in message
    assert not built
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    folder = artifacts.artifact("held", {"a": 1}, build)
    assert built == ["half"]  # the dead process's partial file, no results of its own
    assert (folder / "results.json").exists()


def test_a_lock_is_not_kept_by_what_its_killed_process_had_forked(tmp_path):
    """Such as the processes that prepare batches for a GPU."""
    holder = os.fork()
    if not holder:
        with artifacts.lock(tmp_path):
            if os.fork():
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(2)
            os._exit(0)
    os.waitpid(holder, 0)
    with artifacts.lock(tmp_path):
        pass


def start(name: str, **parameters) -> artifacts.NotebookRun:
    """Start a notebook whose globals are the given parameters, annotated, and something else."""
    return artifacts.start_notebook(name, parameters | {"__annotations__": dict.fromkeys(parameters, int), "other": 1})


def test_a_notebooks_run_has_its_parameters_seconds_and_results(runs, monkeypatch, capsys):
    run = start("03", seed=1)
    assert run.folder.parent == runs and run.folder.is_dir()
    assert run.folder != start("03", seed=2).folder
    monkeypatch.setattr(artifacts.time, "monotonic", itertools.count(run.began + 2, 2).__next__)
    for part in ("train", "test", "train"):
        run.lap(part)
    run.save([{"rouge1": 0.3}], "**It works**", means=[1])
    assert capsys.readouterr().out == f"wrote runs/{run.folder.name}/results.json\n"
    results = artifacts.read_json(run.folder / "results.json")
    assert {name: results[name] for name in ("notebook", "parameters", "headline", "rows", "means", "seconds")} == {
        "notebook": "03", "parameters": {"seed": 1}, "headline": "**It works**", "rows": [{"rouge1": 0.3}],
        "means": [1], "seconds": {"train": 4.0, "test": 2.0},
    }  # fmt: skip
    assert results["reused_seconds"] >= 0 and "packages" in results["provenance"]
    monkeypatch.setenv("DISTILL_NOTEBOOK_RUN", str(runs / "named"))
    assert start("03", seed=1).folder == runs / "named" and (runs / "named").is_dir()


def test_results_of_earlier_processes_are_counted_once(runs, monkeypatch, capsys):
    monkeypatch.setattr(artifacts, "_built", set())
    monkeypatch.setattr(artifacts, "_reused", {})

    def reused() -> float:
        run = start("03", seed=1)
        run.save([], "")
        return artifacts.read_json(run.folder / "results.json")["reused_seconds"]

    clock = itertools.count(0, 7)
    monkeypatch.setattr(artifacts.time, "time", lambda: next(clock))
    for _ in range(3):
        artifacts.artifact("long", {"a": 1}, lambda folder: {})
    assert reused() == 0.0  # this process built it
    monkeypatch.setattr(artifacts, "_built", set())  # as in another process
    for _ in range(3):
        artifacts.artifact("long", {"a": 1}, lambda folder: {})
    assert reused() == 7.0


# ----------------------------------------------------------------------------------------------------------- progress


def test_progress_is_throttled_and_final(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(artifacts, "time", SimpleNamespace(monotonic=lambda: now[0], time=lambda: 5.0))

    def report(seconds, stage, step, total=10, **extra):
        now[0] = 100.0 + seconds
        artifacts.report_progress(tmp_path, stage, step, total, **extra)
        return json.loads((tmp_path / "progress.json").read_text())

    first = report(0, "training", 1)
    assert first["step"] == 1 and first["seconds_left"] is None
    assert report(0.5, "training", 2) == first  # within a second
    third = report(1.25, "training", 3, loss=0.5)
    # two steps in 1.25 seconds: 1.6 a second, and seven steps left take 4.4 seconds
    expected = {"stage": "training", "step": 3, "total": 10, "unit": "steps", "rate": 1.6, "seconds_left": 4}
    assert third == expected | {"time": 5.0, "loss": 0.5}
    assert report(1.3, "training", 9)["step"] == 3
    last = report(1.4, "training", 10)
    assert last["step"] == 10 and last["seconds_left"] == 0
    # A trunk waits for others and goes on towards a later end: what it waited is not part of its rate.
    report(1000, "training", 10, total=20)
    assert report(1002, "training", 14, total=20)["rate"] == 2.0
    assert report(1002.5, "scoring", 1, unit="documents")["unit"] == "documents"  # a new stage shows at once
    assert os.listdir(tmp_path) == ["progress.json"]
    # A batch run sees it in the notebook's folder; a folder that is gone stops nothing.
    monkeypatch.setenv("DISTILL_NOTEBOOK_RUN", str(tmp_path))
    artifacts.report_progress(tmp_path / "missing", "training", 1, 1)
    assert artifacts.read_json(tmp_path / "progress.json")["total"] == 1 and os.listdir(tmp_path) == ["progress.json"]


# --------------------------------------------------------------------------------------------------------- provenance


def test_provenance_names_no_user_and_no_path(monkeypatch):
    for name in ("HOME", "USER", "LOGNAME", "SECRET_TOKEN"):
        monkeypatch.setenv(name, "/home/planted-person")
    facts = artifacts.provenance()
    assert {"commit", "dirty", "packages", "python", "platform", "processor", "threads", "gpu", "date"} <= set(facts)
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["threads"] == torch.get_num_threads()
    text = json.dumps(facts, allow_nan=False)
    assert "planted-person" not in text and str(REPOSITORY) not in text
    assert not re.search(r"[\s\"][/~]\w", text), f"looks like a path: {text}"


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_git_state(tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "REPOSITORY", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert artifacts.git_state() == {"commit": None, "dirty": None}  # a copy without its history

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)

    (tmp_path / "file").write_text("1")
    git("init", "-q")
    assert artifacts.git_state() == {"commit": None, "dirty": None}  # nothing committed yet
    git("add", "file")
    git("commit", "-q", "-m", "first")
    head = git("rev-parse", "HEAD").stdout[:10]
    (tmp_path / "untracked").write_text("")
    assert artifacts.git_state() == {"commit": head, "dirty": False}
    (tmp_path / "file").write_text("2")
    assert artifacts.git_state() == {"commit": head, "dirty": True}
