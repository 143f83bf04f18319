"""Batch runs: execute notebooks by papermill with live progress, and make their report pages.

Importing this file is light: papermill, nbconvert and torch load only when something runs.
"""

import contextlib
import io
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from unittest import mock

from distill_utils import artifacts
from distill_utils.artifacts import REPOSITORY, InputError, config_hash, lock, read_json, runs_dir
from distill_utils.report import index, pages
from distill_utils.report.settings import Plan, as_text, check_writable
from distill_utils.workers import check_workers, share_out

REPORTS = REPOSITORY / "reports"
MAX_PAGE_BYTES = 2_000_000
OK, NOTEBOOK_RAISED, BAD_INPUT, NO_RESULTS, KERNEL_DIED, PAGE_REJECTED, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130
EXIT_CODES = """exit codes:
  0    every report was made
  1    a notebook raised an exception
  2    bad input: the one line on stderr names the value and the fix
  3    a notebook ended without writing results.json
  4    a kernel died (most often: out of memory)
  5    a page was rejected (above 2 MB)
  130  stopped by Ctrl-C
With several notebooks all are checked before the first one runs. One that fails does not stop the next, and the code
is that of the first failure."""


# --------------------------------------------------------------------------------------------------------- execution


class RunFailed(Exception):
    """A notebook that did not finish: exit code and the lines for stderr."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


@contextlib.contextmanager
def own_kernel(folder: Path):
    """Make `python3` this interpreter and this package, without bars or start-up files, bound to this run folder.

    The kernel's own output goes to a file: it is noise when all is well, and the last words of a kernel that died.
    """
    with tempfile.TemporaryDirectory(prefix="distill-kernel-") as temporary:
        launch = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        environment = {
            "IPYTHONDIR": temporary,  # no start-up files of the user
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TQDM_DISABLE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "DISTILL_NOTEBOOK_RUN": str(folder),
            "DISTILL_KERNEL_LOG": str(folder / "kernel.log"),
        }
        spec = {"display_name": "python3", "language": "python", "env": environment}
        spec["argv"] = ["/bin/sh", "-c", 'exec "$@" >"$DISTILL_KERNEL_LOG" 2>&1', "sh", *launch]
        spec["argv"].append("--HistoryManager.enabled=False")
        folder_of_spec = Path(temporary, "kernels", "python3")
        folder_of_spec.mkdir(parents=True)
        (folder_of_spec / "kernel.json").write_text(json.dumps(spec))
        # Searched first, so that no other kernelspec named python3 can win.
        with mock.patch.dict(os.environ, JUPYTER_PATH=temporary):
            yield


def execute(plan: Plan, folder: Path) -> float:
    """Run a notebook into folder/notebook.ipynb and return its wall time in seconds; RunFailed says how it failed."""
    executed, stem = folder / "notebook.ipynb", plan.path.stem
    for stale in (executed, folder / "results.json", folder / "progress.json"):
        stale.unlink(missing_ok=True)
    start = time.monotonic()
    with own_kernel(folder), live_progress(stem, folder):
        import papermill
        from nbclient.exceptions import DeadKernelError
        from papermill.exceptions import PapermillExecutionError

        logging.getLogger("papermill").setLevel(logging.CRITICAL)  # what it would log is raised as well
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # after Ctrl-C it may report the client's lost tasks
        try:
            papermill.execute_notebook(
                str(plan.path),
                str(executed),
                parameters=plan.changed,
                kernel_name="python3",
                progress_bar=False,
                start_timeout=180,  # seconds; a loaded machine starts kernels slowly
                cwd=str(plan.path.parent),
            )
        except PapermillExecutionError as error:
            raise _raised(error, stem, executed) from error
        except (DeadKernelError, RuntimeError) as error:
            if not isinstance(error, DeadKernelError) and "Kernel" not in str(error):
                raise
            raise RunFailed(KERNEL_DIED, _last_words(stem, folder)) from error
    if not (folder / "results.json").exists():
        raise RunFailed(NO_RESULTS, f"{stem} ended without results.json: its last cell must call run.save")
    return time.monotonic() - start


def _raised(error, stem: str, executed: Path) -> RunFailed:
    if error.ename == "InputError":
        return RunFailed(BAD_INPUT, " ".join(error.evalue.split()))
    # Without InputError's courtesy, show where it happened: the last frames, as they stand in the notebook.
    tail = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback)).rstrip().splitlines()[-12:]
    at = "{} of {}".format(*cell_position(executed) or (0, 0))
    lines = [f"{stem}: code cell {at} raised {error.ename}", f"executed so far: {os.path.relpath(executed)}"]
    return RunFailed(NOTEBOOK_RAISED, "\n".join([*lines, *(f"  {line}" for line in tail)]))


def _last_words(stem: str, folder: Path) -> str:
    at = "{} of {}".format(*cell_position(folder / "notebook.ipynb") or (0, 0))
    lines = [f"{stem}: the kernel died in code cell {at}; most often memory ran out: lower the batch size"]
    with contextlib.suppress(OSError):
        log = (folder / "kernel.log").read_text(errors="replace").splitlines()
        lines += [f"  {line}" for line in log if "TCP without encryption" not in line][-3:]  # ipykernel 7 always warns
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------ live progress


def cell_position(executed: Path) -> tuple[int, int] | None:
    """Return the number of the code cell that runs (or ran last) and how many there are, from papermill's output file.

    None while that file is missing or half written. Counted by start time: after a kernel's death papermill marks cells
    that never ran as completed. The cell that papermill adds for parameters is not counted.
    """
    try:
        cells = read_json(executed)["cells"]
    except (OSError, ValueError):
        return None
    added = "injected-parameters"
    code = [c["metadata"] for c in cells if c["cell_type"] == "code" and added not in c["metadata"].get("tags", [])]
    return sum(bool(metadata.get("papermill", {}).get("start_time")) for metadata in code), len(code)


def latest_progress(folder: Path, since: float) -> dict | None:
    """Return what the kernel last reported (artifacts.report_progress), unless before `since` (epoch seconds)."""
    with contextlib.suppress(OSError, ValueError):
        progress = read_json(folder / "progress.json")
        return progress if progress["time"] >= since else None
    return None


def status_line(stem: str, position: tuple[int, int] | None, progress: dict | None, elapsed: float) -> str:
    """Write one line: notebook, cell, and from inside the cell stage, step, rate and time left."""
    parts = [stem, f"cell {position[0]}/{position[1]}" if position else "starting"]
    if progress is None:
        parts.append(index.duration(elapsed))
    else:
        parts += [progress["stage"], f"{progress['unit']} {progress['step']}/{progress['total']}"]
        parts += [f"{progress['rate']:.1f}/s"] if progress["rate"] else []
        parts += [f"{index.duration(progress['seconds_left'])} left"] if progress["seconds_left"] is not None else []
    return "  ".join(parts)


@contextlib.contextmanager
def live_progress(stem: str, folder: Path):
    """Show status lines from a thread while the block runs.

    On a terminal one line is rewritten each second. Elsewhere a line is printed every ten seconds and when the stage
    changes.
    """
    out, done, start = sys.stdout, threading.Event(), time.time()
    terminal = out.isatty()

    def watch() -> None:
        position, cell_start, stage, printed = None, start, None, start
        while not done.wait(1.0):
            found = cell_position(folder / "notebook.ipynb") or position
            if found != position:
                position, cell_start = found, time.time() - 1.0
            progress = latest_progress(folder, cell_start)
            line = status_line(stem, position, progress, time.time() - start)
            before, stage = stage, progress["stage"] if progress else stage
            if terminal:
                out.write(f"\r\x1b[K{line[: shutil.get_terminal_size().columns - 1]}")
            elif time.time() - printed >= 10.0 or stage != before:
                out.write(line + "\n")
                printed = time.time()
            out.flush()
        if terminal:
            out.write("\r\x1b[K")
            out.flush()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=5)


# ----------------------------------------------------------------------------------------------------------- reports


def make_report(plan: Plan, reports: Path) -> Path:
    """Run one notebook and write its page, its entry, the index and results.csv."""
    settings = {"notebook": plan.path.stem, "parameters": plan.values}
    folder = runs_dir() / f"reports-{plan.path.stem}-{plan.profile}-{config_hash(settings)}"
    changed = ", ".join(f"{name} = {as_text(value)}" for name, value in plan.changed.items())
    print(f"{plan.path.stem}  profile {plan.profile}{f' ({changed})' if changed else ''}", flush=True)
    with lock(folder):
        seconds = execute(plan, folder)
        with lock(runs_dir() / "publishing", wait=True):  # workers of a sweep write one index
            page, warnings = publish(plan, folder, seconds, reports)
    for warning in warnings:
        print(f"{plan.path.stem}  note: {warning}")
    size = page.stat().st_size / 1000
    print(f"{plan.path.stem}  wrote {os.path.relpath(page)} ({size:.0f} kB) in {index.duration(seconds)}", flush=True)
    return page


def publish(plan: Plan, folder: Path, seconds: float, reports: Path) -> tuple[Path, list[str]]:
    """Make the page of an executed notebook from its run folder, then rebuild what gathers all pages."""
    import nbformat

    scrub = pages.scrubber(plan.path.parent)
    notebook = nbformat.from_dict(pages.cleaned(nbformat.read(folder / "notebook.ipynb", as_version=4), scrub))
    results = pages.cleaned(read_json(folder / "results.json"), scrub)
    title, question = pages.title_and_question(notebook)
    entry = {"headline": "", "rows": [], "provenance": {}, **results} | {
        "notebook": plan.path.stem,
        "title": title or plan.path.stem,
        "question": question,
        "profile": plan.profile,
        "changed": pages.cleaned(plan.changed, scrub),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "wall_seconds": round(seconds, 1),
    }
    report = {
        "title": entry["title"],
        "root": "../" * plan.name.count("/"),
        "folder": (reports / plan.name).parent,
        "facts": page_facts(entry),
        "results": (f"{plan.path.stem}-{plan.profile}.json", json.dumps(entry, indent=1)),
    }
    html, warnings = pages.export_page(notebook, report)
    if (size := len(html.encode())) > MAX_PAGE_BYTES:
        limit = f"{plan.name}.html would be {size / 1e6:.1f} MB, the limit is {MAX_PAGE_BYTES / 1e6:.0f} MB"
        fix = "print less, or draw figures with many marks as PNG (figures.show does)"
        raise RunFailed(PAGE_REJECTED, f"{limit}: {fix}")
    page = reports / f"{plan.name}.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    artifacts.write_atomic(page, html)
    artifacts.write_json(page.with_suffix(".json"), entry)
    index.append_history(reports, plan.name)
    index.write_index(reports)
    if reports.resolve() == REPORTS.resolve():
        index.update_readme()
    return page, warnings


def page_facts(entry: dict) -> list[tuple[str, str]]:
    """Return the footer's lines: what was run, on what, when."""
    made, commit = entry["provenance"], entry["provenance"].get("commit")
    facts = {
        "notebook": f"{entry['notebook']}.ipynb",
        "profile": entry["profile"],
        "parameters changed": ", ".join(f"{k} = {as_text(v)}" for k, v in entry["changed"].items()) or "none",
        "commit": f"{commit} with uncommitted changes" if made.get("dirty") else commit,
        "data": entry.get("fingerprint"),
        "device": made.get("gpu"),
        **{name: made.get(name) for name in ("processor", "threads", "platform", "python")},
        "packages": ", ".join(f"{name} {version}" for name, version in made.get("packages", {}).items()),
        "date": entry["date"],
        "duration": index.wall_time(entry),
    }
    return [(name, str(value)) for name, value in facts.items() if value]


def attempt(plan: Plan, reports: Path) -> tuple[Path | None, int, str]:
    """Make one report; return its page, or None with the exit code and the lines for stderr."""
    try:
        return make_report(plan, reports), OK, ""
    except (RunFailed, InputError) as error:
        return None, getattr(error, "code", BAD_INPUT), str(error)


def silence(told: str):
    """Return a context that prints nothing, unless `told` is "all"."""
    return contextlib.nullcontext() if told == "all" else contextlib.redirect_stdout(io.StringIO())


def run_reports(plans: Sequence[Plan], reports: Path, told: str = "all", workers: int = 1, slurm: str = "") -> int:
    """Make every report in order, or shared out to workers (workers.py); return the exit code of the first that failed.

    `told`: "all" prints progress and, with several reports, repeats the last line of each failure at the end;
    "quiet" prints one line at the end, "json" one object instead.
    """
    began, code, pages_made, failed, made = time.monotonic(), OK, [], {}, {}
    if plans and (workers > 1 or slurm):
        with silence(told):
            made = share_out(attempt, {plan.name: (plan, reports) for plan in plans}, workers, slurm)
    for plan in plans:
        with silence(told):
            page, failure, message = made.get(plan.name) or attempt(plan, reports)
        if page:
            pages_made.append(os.path.relpath(page))
        else:
            print(message, file=sys.stderr, flush=True)
            code, failed[plan.name] = code or failure, message.splitlines()[-1].strip()
    seconds = round(time.monotonic() - began, 1)
    if told == "json":
        heads = {page: read_json(Path(page).with_suffix(".json"))["headline"] for page in pages_made}
        made = [{"page": page, "headline": headline} for page, headline in heads.items()]
        print(json.dumps({"made": made, "failed": failed, "seconds": seconds, "exit_code": code}))
    elif told == "quiet":
        names = f": {', '.join(failed)}" if failed else ""
        print(f"{len(pages_made)} reports made, {len(failed)} failed{names}, in {index.duration(seconds)}")
    elif len(plans) > 1:
        for name, reason in failed.items():
            print(f"failed: {name}: {reason}", file=sys.stderr, flush=True)
    return code


def run_sweep(plans: Sequence[Plan], reports: Path, told: str = "all", workers: int = 1, slurm: str = "") -> int:
    """Make the report of every plan that has none yet; return the exit code of the first that failed."""
    check_workers(workers, slurm)
    check_writable(reports)
    left = [plan for plan in plans if not _is_finished(plan, reports)]
    if (finished := len(plans) - len(left)) and told == "all":
        print(f"{finished} of {len(plans)} are finished", flush=True)
    code = run_reports(left, reports, told, workers, slurm)
    made = sum(_is_finished(plan, reports) for plan in plans)
    if told == "all":
        print(f"{made} of {len(plans)} finished; compare them in {reports / 'index.html'}")
    return code


def _is_finished(plan: Plan, reports: Path) -> bool:
    page = reports / f"{plan.name}.html"
    try:
        found = read_json(page.with_suffix(".json"))["parameters"] if page.is_file() else None
    except (OSError, ValueError, LookupError, TypeError):  # damaged: made again
        return False
    return found == pages.cleaned(plan.values, pages.scrubber(plan.path.parent))
