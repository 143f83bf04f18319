"""Run folders: hash, atomic write, lock, reuse, progress and provenance; they know nothing of models or data."""

import contextlib
import errno
import fcntl  # Linux and macOS
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from datetime import UTC, datetime
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES_NAMED = ("torch", "transformers", "datasets", "tokenizers", "ctranslate2", "rouge-score", "numpy", "papermill")


class InputError(ValueError):
    """Bad input from the user: one line that names the value and the fix; the runner exits with code 2."""


def runs_dir() -> Path:
    """Return the folder of all runs: DISTILL_RUNS, else `runs/` in the checkout, or where one types without one."""
    home = REPOSITORY if (REPOSITORY / "pyproject.toml").is_file() else Path.cwd()  # not beside an installed package
    folder = Path(os.environ.get("DISTILL_RUNS") or home / "runs")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def config_hash(settings: object) -> str:
    """Return 10 hex digits that depend on every value of a JSON-serialisable object and on nothing else."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def later(default, before: str = ""):
    """Return a dataclass field that came after first results: `hashed` leaves it out where it has its default.

    `before` is the name it had in results from before, which they are found by.
    """
    return field(default=default, metadata={"later": True, "before": before})


def hashed(description) -> dict:
    """Return a dataclass as a dictionary to be hashed, nested ones too, so that results from before are found again."""
    values = asdict(description)
    for each in fields(description):
        value = getattr(description, each.name)
        if each.metadata.get("later") and value == each.default:
            del values[each.name]
        elif is_dataclass(value):
            values[each.name] = hashed(value)
        elif each.metadata.get("before"):
            values[each.metadata["before"]] = values.pop(each.name)
    return values


def file_hash(path: Path) -> str:
    """Return 10 hex digits of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:10]


# ---------------------------------------------------------------------------------------------------------- writing


@contextlib.contextmanager
def disk_space_named(path: Path):
    """Turn "no space left" into one line that names the file and the fix."""
    try:
        yield
    except Exception as error:
        # safetensors wraps the system's error in a class of its own, and only the text is left of it.
        codes = (errno.ENOSPC, errno.EDQUOT)
        if getattr(error, "errno", None) not in codes and not any(os.strerror(code) in str(error) for code in codes):
            raise
        fix = "free some disk, or write to another one (DISTILL_RUNS moves runs/)"
        raise InputError(f"no space left while writing {path.name}: {fix}") from error


def write_atomic(path: Path | str, data: str | bytes) -> None:
    """Write a file so that others see the old or the new content, never a part."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with disk_space_named(path):
            with open(temporary, "wb") as file:
                file.write(data.encode("utf-8") if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path | str, value: object) -> None:
    """Write an object as indented JSON, atomically; ValueError for NaN, which is no JSON."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path | str):
    """Read a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


@contextlib.contextmanager
def folder_atomic(folder: Path | str):
    """Yield a temporary folder that replaces `folder` when the block ends without an error."""
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with disk_space_named(folder):
            yield temporary
        old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        shutil.rmtree(old, ignore_errors=True)  # left by a process of the same id that was killed right here
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# -------------------------------------------------------------------------------------------------------- run folders


@contextlib.contextmanager
def lock(folder: Path | str, wait: bool = False):
    """Hold a run folder; InputError when a live process holds it, while the lock of a dead one is free at once.

    With `wait`, or where DISTILL_WAIT is set (workers.py), it waits instead: workers need the same labels, say.
    """
    folder, wait = Path(folder), wait or bool(os.environ.get("DISTILL_WAIT"))
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+") as file:
        try:
            # Not flock: forked processes, such as those that prepare a GPU's batches, would hold it after a kill.
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise InputError(
                f"run folder {folder.name} is in use by process {holder}: wait for it, stop it, or change a parameter"
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


_built: set[str] = set()  # run folders that this process built
_reused: dict[str, float] = {}  # those that earlier processes built, and their seconds


def artifact(name: str, settings: dict, build: Callable[[Path], dict], quiet: bool = False) -> Path:
    """Return the folder runs/<name>-<hash of settings>, building it when it has no results.json.

    `build(folder)` runs under a lock, may continue from its own partial files, and returns the results, which are
    written last. A trained student is also known by the name alone: runs/students/<name> holds its folder's name.
    """
    folder = runs_dir() / f"{name}-{config_hash(settings)}"
    finished = folder / "results.json"
    if not finished.exists():
        with lock(folder):
            if not finished.exists():  # else another process finished it while we waited
                print(f"building runs/{folder.name}", flush=True)
                write_json(folder / "config.json", settings)
                start = time.time()
                results = {**build(folder), "build_seconds": round(time.time() - start, 2), "provenance": provenance()}
                write_json(finished, results)
                _built.add(folder.name)
    elif not quiet:
        print(f"reusing runs/{folder.name}", flush=True)
        if folder.name not in _built:
            _reused[folder.name] = read_json(finished).get("build_seconds", 0.0)
    if (folder / "student").is_dir():  # the last one asked for; a text file, as not every system has symbolic links
        (runs_dir() / "students").mkdir(exist_ok=True)
        write_atomic(runs_dir() / "students" / name, f"{folder.name}\n")
    return folder


@dataclass
class NotebookRun:
    """One execution of a notebook: its run folder, its parameters, and the seconds that its parts took."""

    name: str
    folder: Path
    parameters: dict
    seconds: dict[str, float] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def lap(self, part: str) -> None:
        """Book the time since the last call under `part`; call it at the end of a section."""
        now = time.monotonic()
        self.seconds[part] = round(self.seconds.get(part, 0.0) + now - self.began, 1)
        self.began = now

    def save(self, rows: list[dict], headline: str, **extra: object) -> None:
        """Write results.json, the completion marker: call it in the last executed cell.

        `reused_seconds` counts what earlier processes had computed, so that no report looks cheaper than it was.
        """
        results = {"notebook": self.name, "parameters": self.parameters, "headline": headline, "rows": rows, **extra}
        results |= {"seconds": self.seconds, "reused_seconds": round(sum(_reused.values()), 1)}
        write_json(self.folder / "results.json", results | {"provenance": provenance()})
        print(f"wrote runs/{self.folder.name}/results.json")


def start_notebook(name: str, variables: dict) -> NotebookRun:
    """Return the run of a notebook; call it with `globals()` in the first cell after the parameters.

    Parameters are the names that the notebook annotates, so annotate nothing else. The runner names the folder through
    DISTILL_NOTEBOOK_RUN.
    """
    parameters = {parameter: variables[parameter] for parameter in variables["__annotations__"]}
    named = os.environ.get("DISTILL_NOTEBOOK_RUN")
    folder = Path(named) if named else runs_dir() / f"{name}-{config_hash(parameters)}"
    folder.mkdir(parents=True, exist_ok=True)
    return NotebookRun(name, folder, parameters)


# ----------------------------------------------------------------------------------------------------------- progress

_progress: dict[str, tuple] = {}  # by folder: when the stage began, last row, first step, (stage, total)


def report_progress(folder: Path, stage: str, step: int, total: int, unit: str = "steps", **extra: object) -> None:
    """Write progress.json in a run folder, at most once per second and always at the end of a stage.

    In a batch run also in the notebook's folder, where the runner looks. `rate` is units per second since the stage
    began in this process, or went on towards another total, as a trunk does after a pause.
    """
    now = time.monotonic()
    start, last, first_step, before = _progress.get(str(folder), (now, 0.0, step, None))
    if before != (stage, total):
        start, last, first_step = now, 0.0, step
    if step < total and now - last < 1.0:
        return
    _progress[str(folder)] = (start, now, first_step, (stage, total))
    rate = (step - first_step) / (now - start) if now > start else 0.0
    row = {"stage": stage, "step": step, "total": total, "unit": unit, "rate": round(rate, 3)}
    row |= {"seconds_left": round((total - step) / rate) if rate > 0 else None, "time": time.time()}
    # Progress is a courtesy: it must never stop a run, so no fsync and no error.
    for place in {Path(folder), Path(os.environ.get("DISTILL_NOTEBOOK_RUN") or folder)}:
        with contextlib.suppress(OSError):
            temporary = place / f".progress.{os.getpid()}.tmp"
            temporary.write_text(json.dumps(row | extra))
            os.replace(temporary, place / "progress.json")


# --------------------------------------------------------------------------------------------------------- the machine


def provenance() -> dict:
    """Return what it takes to judge or repeat a result; no paths, names of users or environment values."""
    import torch

    return {
        **git_state(),
        "packages": {name: _version(name) for name in PACKAGES_NAMED},
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # one that only the CPU needs, such as ctranslate2
        return None


def git_state() -> dict:
    """Return the repository's commit and whether tracked files differ from it (None outside a checkout).

    What this project's own commands write is left out: reports, the README's tables, trained teachers.
    """
    written = [":!reports", ":!README.md", ":!distill_utils/assets/pydocs-*"]
    command = ["git", "-C", str(REPOSITORY), "status", "--porcelain=v2", "--branch", "-uno", "--", ".", *written]
    if (REPOSITORY / ".git").exists():  # an installed package may lie in a repository of something else
        with contextlib.suppress(OSError, ValueError, subprocess.CalledProcessError):  # ValueError: no commit yet
            found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            (commit,) = re.findall("^# branch.oid ([0-9a-f]{10})", found, re.MULTILINE)
            return {"commit": commit, "dirty": bool(re.search("^[^#]", found, re.MULTILINE))}
    return {"commit": None, "dirty": None}


def processor_name() -> str:
    """Return the processor's marketing name where the system knows it."""
    found = ""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        if sys.platform == "darwin":
            found = subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True)
        else:
            found = Path("/proc/cpuinfo").read_text().partition("model name")[2].partition(":")[2]
    return found.partition("\n")[0].strip() or platform.processor() or "unknown"
