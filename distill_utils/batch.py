"""Batch runs: check parameters, execute notebooks by papermill with live progress, and make their report pages.

Importing this file is light: papermill, nbconvert and torch load only when something runs.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
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
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from distill_utils import pages
from distill_utils.artifacts import REPOSITORY, InputError, config_hash, lock, read_json, runs_dir

NOTEBOOKS = REPOSITORY / "notebooks"
REPORTS = REPOSITORY / "reports"
DEFAULT_PROFILE = "demo"
OK, NOTEBOOK_RAISED, BAD_INPUT, NO_RESULTS, KERNEL_DIED, PAGE_REFUSED, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130
EXIT_CODES = """exit codes:
  0    every report was made
  1    a notebook raised an exception
  2    bad input: the one line on stderr names the value and the mend
  3    a notebook ended without writing results.json
  4    a kernel died (most often: out of memory)
  5    a page was refused (above 2 MB)
  130  stopped by Ctrl-C
With several notebooks all are checked before the first one runs. One that fails does not stop the next, and the code
is that of the first failure."""


# -------------------------------------------------------------------------------------------------------- parameters


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell: `name: type = default  # help`."""

    name: str
    type: str
    default: object
    help: str


ELEMENTS = {"int": int, "float": float, "bool": bool, "str": str}
TYPES = (*ELEMENTS, "list[int]", "list[float]", "list[str]")


def notebook_parameters(path: Path) -> dict[str, Parameter]:
    """Read the parameters cell of a notebook without running it; InputError when it cannot be trusted."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path.name} is not a readable notebook ({type(error).__name__}): restore it from git"
        ) from error
    tagged = [cell for cell in cells if "parameters" in cell.get("metadata", {}).get("tags", [])]
    if len(tagged) != 1:
        raise InputError(f"{path.name} has {len(tagged)} cells tagged 'parameters': it needs exactly one")
    return parse_parameters("".join(tagged[0]["source"]), path.name)


def parse_parameters(source: str, where: str) -> dict[str, Parameter]:
    """Parse annotated literals with trailing comments; nothing is executed."""
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise InputError(f"{where}: the parameters cell does not parse, line {error.lineno}: {error.msg}") from error
    comments = {
        token.start[0]: token.string.lstrip("# ").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    parameters = {}
    for node in tree.body:
        wrong = f"{where}: parameters cell, line {node.lineno}: write `name: type = literal  # help`"
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name) or node.value is None:
            raise InputError(wrong)
        kind = ast.unparse(node.annotation)
        try:
            default = ast.literal_eval(node.value)
        except ValueError:
            raise InputError(f"{wrong}; {ast.unparse(node.value)!r} is no literal") from None
        if kind not in TYPES:
            raise InputError(f"{wrong}; type {kind!r} is not one of {', '.join(TYPES)}")
        name, help_text = node.target.id, comments.get(node.end_lineno, "")
        try:
            default = checked_value(Parameter(name, kind, default, help_text), default, where)
        except InputError:
            raise InputError(f"{wrong}; the default {default!r} is not {kind}") from None
        parameters[name] = Parameter(name, kind, default, help_text)
    return parameters


def checked_value(parameter: Parameter, value: object, where: str) -> object:
    """Return a YAML or Python value as the parameter's type; InputError when it does not fit.

    An int is taken for a float. So is a string that reads as a number: YAML 1.1 calls 1e-4 a string.
    """
    kind = parameter.type
    wrong = InputError(
        f"{where}: {parameter.name} must be {kind}, got {value!r} ({type(value).__name__}); "
        f"write for example {parameter.name}={as_text(parameter.default)}"
    )
    if kind.startswith("list["):
        if not isinstance(value, list):
            raise wrong
        element = Parameter(parameter.name, kind[5:-1], 0, "")
        try:
            return [checked_value(element, item, where) for item in value]
        except InputError:
            raise wrong from None
    if kind == "float" and isinstance(value, str | int) and not isinstance(value, bool):
        try:
            value = float(value)
        except (ValueError, OverflowError):
            raise wrong from None
    if type(value) is not ELEMENTS[kind]:
        raise wrong
    if kind == "float" and not (float("-inf") < value < float("inf")):
        raise wrong
    return value


def parsed_text(parameter: Parameter, text: str, where: str) -> object:
    """Read a command-line value as the parameter's type. Lists: `6,3` or `[6, 3]`."""
    kind = parameter.type
    if kind == "str":
        return text
    if kind.startswith("list["):
        stripped = text.strip().removeprefix("[").removesuffix("]")
        items = [item.strip().strip("'\"") for item in stripped.split(",")] if stripped.strip() else []
        element = Parameter(parameter.name, kind[5:-1], parameter.default[0] if parameter.default else 0, "")
        return [parsed_text(element, item, where) for item in items]
    value: object = text
    if kind == "bool":
        value = {"true": True, "false": False}.get(text.strip().lower(), text)
    else:
        with contextlib.suppress(ValueError):
            value = ELEMENTS[kind](text)
    return checked_value(parameter, value, where)


def as_text(value: object) -> str:
    """Write a value as the command line takes it."""
    return json.dumps(value) if isinstance(value, list | bool) else str(value)


def closest(name: str, known: Sequence[str]) -> str:
    """Return the mend for an unknown name: the nearest known one, else all of them."""
    near = difflib.get_close_matches(name, known, 1, 0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}"


# -------------------------------------------------------------------------------------------- what was asked, checked


@dataclass(frozen=True)
class Plan:
    """One notebook to run: every parameter's value, and those that differ from the defaults."""

    path: Path
    profile: str
    parameters: dict[str, Parameter]
    values: dict[str, object]
    changed: dict[str, object]

    @property
    def name(self) -> str:
        """Path of the page below the reports folder, without suffix."""
        return self.path.stem if self.profile == DEFAULT_PROFILE else f"{self.profile}/{self.path.stem}"


def find_notebook(name: str, folder: Path) -> Path:
    """Find a notebook by number (3 or 03), stem or path."""
    known = sorted(folder.glob("*.ipynb"))
    if name.isdigit():
        matches = [path for path in known if re.match(rf"0*{int(name)}_", path.name)]
        if len(matches) == 1:
            return matches[0]
    for path in (folder / f"{name}.ipynb", folder / name, Path(name)):
        if path.suffix == ".ipynb" and path.is_file():
            return path.resolve()
    raise InputError(f"unknown notebook {name!r}: {closest(Path(name).stem, [path.stem for path in known])}")


def read_profile(name: str, folder: Path) -> dict[str, dict]:
    """Read profiles/NAME.yaml: one mapping a notebook stem, and `common` for all that have the parameter."""
    import yaml

    path = folder / "profiles" / f"{name}.yaml"
    known = sorted({DEFAULT_PROFILE, *(file.stem for file in path.parent.glob("*.yaml"))})
    if name not in known:
        raise InputError(f"unknown profile {name!r}: {closest(name, known)}")
    if not path.exists():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", 0) + 1
        raise InputError(f"profiles/{path.name}, line {line}: not valid YAML; mend that line") from error
    if not isinstance(content, dict):
        raise InputError(f"profiles/{path.name} must map notebook stems to parameters, got {type(content).__name__}")
    stems = ["common", *(file.stem for file in sorted(folder.glob("*.ipynb")))]
    for stem, values in content.items():
        if stem not in stems:
            raise InputError(f"profiles/{path.name}: unknown notebook {stem!r}: {closest(str(stem), stems)}")
        if not isinstance(values, dict | None):
            raise InputError(f"profiles/{path.name}: {stem} must map parameter names to values, got {values!r}")
    return {stem: values or {} for stem, values in content.items()}


def make_plans(
    names: Sequence[str], profile: str, overrides: Sequence[str], folder: Path = NOTEBOOKS, every: bool = False
) -> list[Plan]:
    """Check notebooks, profile and `name=value` overrides; InputError before anything runs.

    An override must be a parameter of each notebook named. With `every`, all notebooks that the profile speaks of.
    """
    settings = read_profile(profile, folder)
    if every:
        names = [path.stem for path in sorted(folder.glob("*.ipynb"))]
        if profile != DEFAULT_PROFILE and "common" not in settings:
            names = [name for name in names if name in settings]
    paths = list(dict.fromkeys(find_notebook(name, folder) for name in names))
    if not paths:
        raise InputError("no notebook to run: name one (03), or use --all")
    parameters = {path: notebook_parameters(path) for path in paths}
    everywhere = {name for path in sorted(folder.glob("*.ipynb")) for name in _names_or_none(path)}
    for name in settings.get("common", {}):
        if name not in everywhere:
            raise InputError(f"profile {profile}: unknown parameter {name!r}: {closest(name, sorted(everywhere))}")
    plans = []
    for path, known in parameters.items():
        if profile != DEFAULT_PROFILE and path.stem not in settings and "common" not in settings:
            raise InputError(
                f"profile {profile!r} has no settings for {path.stem}: add them to profiles/{profile}.yaml"
            )
        values = {name: parameter.default for name, parameter in known.items()}
        common = {name: value for name, value in settings.get("common", {}).items() if name in known}
        for name, value in {**common, **settings.get(path.stem, {})}.items():
            values[name] = checked_value(_known(name, known, path), value, f"profile {profile}, {path.stem}")
        for override in overrides:
            name, equals, text = override.partition("=")
            if not equals:
                raise InputError(f"-p {override!r} has no value: write -p name=value")
            values[name] = parsed_text(_known(name, known, path), _seen_from(path.parent, text), path.stem)
        changed = {name: value for name, value in values.items() if value != known[name].default}
        plans.append(Plan(path, profile, known, values, changed))
    return plans


def _seen_from(folder: Path, text: str) -> str:
    """Return a relative path that exists where the user typed it as the notebook, run in its own folder, sees it."""
    relative = "/" in text and not Path(text).is_absolute() and Path(text).exists()
    return os.path.relpath(text, folder) if relative else text


def _known(name: str, known: dict[str, Parameter], path: Path) -> Parameter:
    if name not in known:
        raise InputError(f"unknown parameter {name!r} of {path.stem}: {closest(str(name), list(known))}")
    return known[name]


def _names_or_none(path: Path) -> list[str]:
    try:
        return list(notebook_parameters(path))
    except InputError:  # a broken notebook that nobody asked for
        return []


def list_notebooks(folder: Path = NOTEBOOKS) -> str:
    """Describe every notebook's parameters: name, type, default, help."""
    import nbformat

    blocks = []
    for path in sorted(folder.glob("*.ipynb")):
        title, _ = pages.title_and_question(nbformat.read(path, as_version=4))
        lines = [f"{path.stem}  {title}"]
        for parameter in notebook_parameters(path).values():
            lines.append(
                f"  {f'{parameter.name}: {parameter.type} = {parameter.default!r}':<46}  {parameter.help}".rstrip()
            )
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) or f"no notebooks in {folder}"


# --------------------------------------------------------------------------------------------------------- execution


class RunFailed(Exception):
    """A notebook that did not finish: exit code and the lines for stderr."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


# The kernel's own stderr goes to a file: it is noise when all is well, and the last words of a kernel that died.
KERNEL_START = """import os, runpy, sys
log = os.open({log!r}, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
os.dup2(log, 1)
os.dup2(log, 2)
runpy.run_module("ipykernel_launcher", run_name="__main__", alter_sys=True)
"""


@contextlib.contextmanager
def kernel_environment(folder: Path):
    """Set the environment of the kernel: this interpreter, this package, no bars, this run folder."""
    with tempfile.TemporaryDirectory(prefix="distill-kernel-") as temporary:
        spec = Path(temporary) / "kernels" / "python3"
        spec.mkdir(parents=True)
        start = KERNEL_START.format(log=str(folder / "kernel.log"))
        command = [sys.executable, "-c", start, "-f", "{connection_file}", "--HistoryManager.enabled=False"]
        (spec / "kernel.json").write_text(
            json.dumps({"argv": command, "display_name": "python3", "language": "python"})
        )
        paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        changes = {
            "JUPYTER_PATH": temporary,  # searched first, so no other kernelspec named python3 can win
            "IPYTHONDIR": temporary,  # no start-up files of the user
            "PYTHONPATH": os.pathsep.join(paths),
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TQDM_DISABLE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "DISTILL_NOTEBOOK_RUN": str(folder),
        }
        before = {name: os.environ.get(name) for name in changes}
        os.environ.update(changes)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def execute(plan: Plan, folder: Path) -> float:
    """Run a notebook into folder/notebook.ipynb and return its wall time in seconds; RunFailed says how it failed."""
    for stale in ("results.json", "progress.json"):
        (folder / stale).unlink(missing_ok=True)
    executed = folder / "notebook.ipynb"
    start = time.monotonic()
    state: dict = {}
    with kernel_environment(folder), live_progress(plan.path.stem, folder, state):
        import papermill
        from nbclient.exceptions import DeadKernelError
        from papermill.engines import NBClientEngine, papermill_engines
        from papermill.exceptions import PapermillExecutionError

        class Watched(NBClientEngine):
            """Papermill's engine, with its notebook in sight of the progress thread."""

            @classmethod
            def execute_managed_notebook(cls, nb_man, kernel_name, **options):
                state["cells"] = nb_man.nb.cells
                return super().execute_managed_notebook(nb_man, kernel_name, **options)

        papermill_engines.register("watched", Watched)
        logging.getLogger("papermill").setLevel(logging.CRITICAL)  # what it would log is raised as well
        try:
            papermill.execute_notebook(
                str(plan.path),
                str(executed),
                parameters=plan.changed,
                engine_name="watched",
                kernel_name="python3",
                progress_bar=False,
                start_timeout=180,  # seconds; a loaded machine starts kernels slowly
                cwd=str(plan.path.parent),
            )
        except PapermillExecutionError as error:
            raise _raised(error, plan.path.stem, state["cells"], executed) from error
        except (DeadKernelError, RuntimeError) as error:
            if not isinstance(error, DeadKernelError) and "Kernel" not in str(error):
                raise
            raise RunFailed(KERNEL_DIED, _last_words(plan.path.stem, state, folder)) from error
    if not (folder / "results.json").exists():
        message = f"{plan.path.stem} ended without results.json: its last cell must call save_notebook_results"
        raise RunFailed(NO_RESULTS, message)
    return time.monotonic() - start


def _raised(error, stem: str, cells, executed: Path) -> RunFailed:
    if error.ename == "InputError":
        return RunFailed(BAD_INPUT, " ".join(error.evalue.split()))
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in error.traceback]
    # Without InputError's courtesy, show where it happened: the last frames, as they stand in the notebook.
    tail = "\n".join(plain).rstrip().splitlines()[-12:]
    number, total = cell_position(cells)
    lines = [f"{stem}: code cell {number} of {total} raised {error.ename}", *(f"  {line}" for line in tail)]
    return RunFailed(NOTEBOOK_RAISED, "\n".join([*lines, f"executed so far: {_short(executed)}"]))


def _last_words(stem: str, state: dict, folder: Path) -> str:
    number, total = cell_position(state.get("cells", []))
    lines = [
        f"{stem}: the kernel died in code cell {number} of {total}; most often memory ran out: lower the batch size"
    ]
    with contextlib.suppress(OSError):
        log = (folder / "kernel.log").read_text(errors="replace").splitlines()
        lines += [f"  {line}" for line in log if "TCP without encryption" not in line][-3:]  # ipykernel 7 always warns
    return "\n".join(lines)


def _short(path: Path) -> str:
    """Name a path from the current folder when it lies in it."""
    with contextlib.suppress(ValueError):
        return str(path.resolve().relative_to(Path.cwd()))
    return str(path)


# ------------------------------------------------------------------------------------------------------ live progress


def cell_position(cells) -> tuple[int, int]:
    """Return the number of the code cell that runs (or ran last) and the number of code cells.

    Counted by start time: after a kernel's death papermill marks cells that never ran as completed.
    The cell that papermill adds for parameters is not counted, so the numbers are those of the source.
    """
    code = [
        cell
        for cell in cells
        if cell.cell_type == "code" and "injected-parameters" not in cell.metadata.get("tags", [])
    ]
    return sum(bool(cell.metadata.get("papermill", {}).get("start_time")) for cell in code), len(code)


def newest_progress(folder: Path, since: float) -> dict | None:
    """Return the latest progress.json of this notebook's processes, or None.

    Looks into the notebook's folder and every run folder, for files written after `since` (seconds since the epoch);
    other runs on the machine write there too, so the writer has to be a descendant of this process.
    """
    import psutil  # ipykernel needs it as well

    found = []
    for path in [folder / "progress.json", *runs_dir().glob("*/progress.json")]:
        with contextlib.suppress(OSError):
            modified = path.stat().st_mtime
            if modified >= since:
                found.append((modified, path))
    ours = {child.pid for child in psutil.Process().children(recursive=True)} if found else set()
    for _, path in sorted(found, reverse=True):
        with contextlib.suppress(OSError, ValueError):
            progress = read_json(path)
            if progress.get("pid") in ours:
                return progress
    return None


def status_line(stem: str, position: tuple[int, int], progress: dict | None, elapsed: float) -> str:
    """Write one line: notebook, cell, and from inside the cell stage, step, rate and time left."""
    parts = [stem, f"cell {position[0]}/{position[1]}" if position[1] else "starting"]
    if progress is None:
        return "  ".join([*parts, clock(elapsed)])
    unit = progress.get("unit") or "steps"
    unit = "step" if unit == "steps" else unit
    parts += [str(progress.get("stage", "")), f"{unit} {progress.get('step', '?')}/{progress.get('total', '?')}"]
    if progress.get("rate"):
        parts.append(f"{progress['rate']:.1f}/s")
    if progress.get("seconds_left") is not None:
        parts.append(f"{clock(progress['seconds_left'])} left")
    return "  ".join(part for part in parts if part)


def clock(seconds: float) -> str:
    """Format seconds as 0:22, 12:05 or 3:07:00."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextlib.contextmanager
def live_progress(stem: str, folder: Path, state: dict, every: float = 10.0):
    """Show status lines from a thread while the block runs.

    On a terminal one line is rewritten each second. Elsewhere a line is printed at most every `every` seconds, and
    when the stage changes.
    """
    out, done, start = sys.stdout, threading.Event(), time.time()
    terminal = out.isatty()

    def watch() -> None:
        printed, stage, cell, cell_start = start, None, 0, start
        while not done.wait(1.0):
            position = cell_position(state.get("cells", []))
            if position[0] != cell:
                cell, cell_start = position[0], time.time() - 1.0
            progress = newest_progress(folder, cell_start)
            line = status_line(stem, position, progress, time.time() - start)
            if terminal:
                width = shutil.get_terminal_size().columns - 1
                out.write(f"\r\x1b[K{line[:width]}")
            elif time.time() - printed >= every or (progress and progress.get("stage") != stage):
                out.write(line + "\n")
                printed = time.time()
            stage = progress.get("stage") if progress else stage
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
        page, warnings = publish(plan, folder, seconds, reports)
    for warning in warnings:
        print(f"{plan.path.stem}  note: {warning}")
    size = page.stat().st_size / 1000
    print(f"{plan.path.stem}  wrote {_short(page)} ({size:.0f} kB) in {pages.duration(seconds)}", flush=True)
    return page


def publish(plan: Plan, folder: Path, seconds: float, reports: Path) -> tuple[Path, list[str]]:
    """Make the page of an executed notebook from its run folder, then rebuild what gathers all pages."""
    import nbformat

    scrub = pages.scrubber(plan.path.parent)
    notebook = nbformat.read(folder / "notebook.ipynb", as_version=4)
    notebook = nbformat.from_dict(pages.scrub_all(notebook, scrub))
    results = pages.scrub_all(read_json(folder / "results.json"), scrub)
    title, question = pages.title_and_question(notebook)
    provenance = results.get("provenance") or {}
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    changed = pages.scrub_all(plan.changed, scrub)
    rows = [
        {
            "name": name,
            "value": scrub(as_text(value)),
            "default": scrub(as_text(plan.parameters[name].default)),
            "help": plan.parameters[name].help,
            "changed": name in plan.changed,
        }
        for name, value in plan.values.items()
    ]
    report = {
        "name": plan.name,
        "title": title or plan.path.stem,
        "root": "../" * plan.name.count("/"),
        "folder": (reports / plan.name).parent,
        "facts": page_facts(plan, changed, provenance, date, seconds),
        "parameters": rows,
    }
    html, warnings = pages.export_page(notebook, report)
    entry = {
        "notebook": plan.path.stem,
        "title": report["title"],
        "question": question,
        "headline": results.get("headline", ""),
        "profile": plan.profile,
        "changed": changed,
        "date": date,
        "wall_seconds": round(seconds, 1),
        "seconds": results.get("seconds") or {},
        "fingerprint": results.get("fingerprint"),
        "provenance": provenance,
        "rows": results.get("rows") or [],
    }
    page = pages.write_page(reports, plan.name, html, entry)
    pages.write_index(reports)
    pages.write_csv(reports)
    if reports.resolve() == REPORTS.resolve():
        pages.update_readme()
    return page, warnings


def page_facts(plan: Plan, changed: dict, provenance: dict, date: str, seconds: float) -> list[tuple[str, str]]:
    """Return the footer's lines: what was run, on what, when."""
    packages = provenance.get("packages") or {}
    commit = provenance.get("commit")
    facts = [
        ("notebook", f"{plan.path.stem}.ipynb"),
        ("profile", plan.profile),
        ("parameters changed", ", ".join(f"{name} = {as_text(value)}" for name, value in changed.items()) or "none"),
        ("commit", f"{commit} with uncommitted changes" if commit and provenance.get("dirty") else commit),
        ("device", provenance.get("gpu")),
        ("processor", provenance.get("processor")),
        ("threads", provenance.get("threads")),
        ("platform", provenance.get("platform")),
        ("python", provenance.get("python")),
        ("packages", ", ".join(f"{name} {version}" for name, version in packages.items() if version)),
        ("date", date),
        ("duration", pages.duration(seconds)),
    ]
    return [(name, str(value)) for name, value in facts if value]


def run_reports(plans: Sequence[Plan], reports: Path) -> int:
    """Make every report in order; return the exit code of the first that failed, 0 when none did."""
    code = OK
    for plan in plans:
        try:
            make_report(plan, reports)
        except RunFailed as error:
            print(error, file=sys.stderr, flush=True)
            code = code or error.code
        except pages.PageError as error:
            print(error, file=sys.stderr, flush=True)
            code = code or PAGE_REFUSED
        except InputError as error:
            print(error, file=sys.stderr, flush=True)
            code = code or BAD_INPUT
    return code
