"""Command line: `python -m distill_utils` and distill, report, sweep, list, export, summarize or teachers."""

import argparse
import contextlib
import errno
import json
import os
import sys
from functools import partial
from pathlib import Path

from distill_utils.artifacts import InputError, config_hash, lock, read_json, runs_dir, write_json
from distill_utils.device import share_cores
from distill_utils.report import batch, settings
from distill_utils.workers import check_workers

SWEEP_EXAMPLE = """the grid, as YAML:
  notebook: 03
  profile: demo                  # optional: parameters to start from
  fixed: {num_train: 2000}       # optional: the same in every run
  grid:
    learning_rate: [0.0003, 0.001]
    methods: [[sft], [kd]]"""

# Errors of the system that are about a path or a disk which the user chose.
USERS_TO_FIX = (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG)


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all bad input here."""

    def error(self, message: str):
        self.exit(batch.BAD_INPUT, f"{message}: see `{self.prog} --help`\n")


def build_parser() -> argparse.ArgumentParser:
    """Describe the commands."""
    parser = OneLineParser(prog="python -m distill_utils", description="Make students, run notebooks, use students.")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="distill|report|sweep|list|export|summarize|teachers"
    )
    report = commands.add_parser(
        "report",
        help="execute notebooks and write reports/",
        description="Execute notebooks and write one HTML page each, reports/index.html and reports/results.csv.\n"
        "The default profile (demo) writes reports/NOTEBOOK.html, another one reports/PROFILE/NOTEBOOK.html.",
        epilog=batch.EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    report.add_argument("notebook", nargs="*", help="number (03), stem (03_kd_pl_sft) or path")
    report.add_argument("--all", action="store_true", help="every notebook in the profile")
    report.add_argument("--profile", default=settings.DEFAULT_PROFILE, metavar="NAME", help="use profiles/NAME.yaml")
    report.add_argument("-p", dest="overrides", action="append", default=[], metavar="name=value", help="one parameter")
    report.add_argument("--output", type=Path, default=batch.REPORTS, metavar="FOLDER", help="default: reports/")
    report.add_argument("--notebooks", type=Path, default=settings.NOTEBOOKS, metavar="FOLDER", help="their folder")
    several = "notebooks run at once (default 1); above 1 they distort each other's timings"
    report.add_argument("--workers", type=int, default=1, metavar="N", help=several)
    add_told(report)
    report.add_argument("--list", action="store_true", help="print the notebooks and their parameters, run nothing")
    swept = commands.add_parser(
        "sweep",
        help="run a notebook for every combination of parameter values",
        description="Run a notebook for every combination of a grid. Repeat the command to resume: finished "
        "combinations are skipped.",
        epilog=SWEEP_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    swept.add_argument("grid", type=Path, metavar="GRID.yaml")
    swept.add_argument("--output", type=Path, metavar="FOLDER", help="folder for the pages; default: the grid's name")
    swept.add_argument("--workers", type=int, default=1, metavar="N", help="combinations run at once (default 1)")
    swept.add_argument("--slurm", default="", metavar="PARTITION", help="run each as a Slurm job in this partition")
    add_told(swept)
    listing = commands.add_parser("list", help="show the trained students: name, score, speed, size, date")
    listing.add_argument("--json", action="store_true", help="as JSON")
    export = commands.add_parser("export", help="write a trained student and its model card to a folder to share")
    export.add_argument("name", metavar="NAME", help="name of a run (see list), its folder, or a folder with a model")
    export.add_argument("folder", type=Path, metavar="DIR", help="folder to write; it must not exist")
    export.add_argument("--push", default="", metavar="USER/NAME", help="upload it to the Hugging Face hub as well")
    summarize = commands.add_parser("summarize", help="write one summary per text of a file")
    summarize.add_argument("file", metavar="FILE", help="CSV, Parquet, JSON Lines, or one text per line; - reads stdin")
    summarize.add_argument("--model", required=True, metavar="NAME", help="exported folder, run, shipped or hub name")
    summarize.add_argument("--column", default="", metavar="NAME", help='in tables and JSON Lines; default "document"')
    summarize.add_argument("--output", type=Path, metavar="FILE", help="write here instead of stdout")
    summarize.add_argument("--json", action="store_true", help='write {"summary": ...} per line')
    add_distill(commands)
    commands.add_parser("teachers", help="train the embedded teachers from scratch")
    return parser


def add_told(parser) -> None:
    """Add the options for what is printed: everything, one line or one object."""
    told = parser.add_mutually_exclusive_group()
    words = {"action": "store_const", "dest": "told", "default": "all"}
    told.add_argument("--quiet", const="quiet", help="print one line at the end, apart from errors", **words)
    told.add_argument("--json", const="json", help="print one JSON object at the end, apart from errors", **words)


def add_distill(commands) -> None:
    """Describe `distill`."""
    parser = commands.add_parser(
        "distill",
        help="find and train the best student within a budget",
        description="Find the best student within a budget. Student shapes are timed before training; those that fit "
        "race, and the winner is tested once and written to --output with its page in report/distill.html. Repeat a "
        "killed command to resume it. -p sets other parameters; `report --list` shows them under distill.",
    )
    parser.add_argument("--teacher", default="pydocs-bart", metavar="NAME", help="shipped name, folder or hub name")
    parser.add_argument("--train-teacher", action="store_true", help="fine-tune the teacher on these pairs first")
    parser.add_argument("--dataset", default="pydocs", metavar="NAME", help="pydocs, hub name, folder or file")
    parser.add_argument("--latency", default="", metavar="TIME", help="longest time per summary: 30ms, 0.03s")
    parser.add_argument("--speedup", default="0", metavar="TIMES", help="smallest speed-up over the teacher")
    parser.add_argument("--parameters", default="", metavar="NUMBER", help="largest number of parameters: 100M")
    parser.add_argument("--memory", default="", metavar="SIZE", help="largest size of the weights: 500MB")
    parser.add_argument("--int8", action="store_true", help="apply the budget to the student in int8, on a CPU")
    parser.add_argument("--hours", default="1", help="hours in total, everything included (default 1)")
    parser.add_argument("--metric", default="rouge2", help="metric that decides the race (default rouge2)")
    parser.add_argument("--workers", default="1", metavar="N", help="students trained at once (default 1)")
    parser.add_argument("--slurm", default="", metavar="PARTITION", help="train each student as a Slurm job")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="folder for the student")
    add_told(parser)
    parser.add_argument("--dry-run", action="store_true", help="print what fits and what it costs, train nothing")
    parser.add_argument("-p", dest="overrides", action="append", default=[], metavar="name=value", help="one parameter")


def report(arguments: argparse.Namespace) -> int:
    """Check the request, then run it."""
    folder = arguments.notebooks.resolve()
    if not folder.is_dir():
        raise InputError(f"no folder {folder}: give --notebooks a folder of notebooks")
    if arguments.list:
        print(settings.list_notebooks(folder))
        return batch.OK
    if arguments.all and arguments.notebook:
        raise InputError(f"--all and {arguments.notebook[0]!r} exclude each other: leave one out")
    settings.check_writable(arguments.output)
    check_workers(arguments.workers)
    plans = settings.make_plans(arguments.notebook, arguments.profile, arguments.overrides, folder, every=arguments.all)
    return batch.run_reports(plans, arguments.output, arguments.told, arguments.workers)


def use_student(arguments: argparse.Namespace) -> int:
    """List, export or summarize."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars follow it, new processes too
    from distill_utils.experiments import use  # here: torch takes seconds to import

    if arguments.command == "list":
        rows = use.list_runs()
        print(json.dumps(rows, indent=1) if arguments.json else use.format_runs(rows))
    elif arguments.command == "summarize":
        use.summarize_file(arguments.file, arguments.model, arguments.column, arguments.output, arguments.json)
    else:
        from distill_utils.experiments.export import export

        export(arguments.name, arguments.folder, arguments.push)
    return batch.OK


def distill(arguments: argparse.Namespace) -> int:
    """Check the request, then print the plan of a race or run its notebook."""
    others = ("command", "told", "dry_run", "output", "overrides")
    given = {name: str(value) for name, value in vars(arguments).items() if name not in others}
    overrides = [*(f"{name}={value}" for name, value in given.items()), *arguments.overrides]
    (plan,) = settings.make_plans(["distill"], settings.DEFAULT_PROFILE, overrides)
    if arguments.dry_run:
        from distill_utils.experiments.distill import dry_run

        with batch.silence(arguments.told), contextlib.chdir(plan.path.parent):  # where the notebook counts paths from
            text = dry_run(plan.values)
        print({"quiet": text.splitlines()[-1], "json": json.dumps({"plan": text})}.get(arguments.told, text))
        return batch.OK
    if arguments.output is None:
        raise InputError("no --output: name the folder of the student, or use --dry-run")
    with output_folder(arguments.output.resolve(), plan.values) as output:
        shown = os.path.relpath(output, plan.path.parent)  # the page shows it: no home path
        (plan,) = settings.make_plans(["distill"], settings.DEFAULT_PROFILE, [*overrides, f"output={shown}"])
        return batch.run_reports([plan], output / "report", arguments.told)


@contextlib.contextmanager
def output_folder(output: Path, asked: dict):
    """Lock the folder that a student is written to; InputError when another race holds it or it has other contents.

    The request is kept in runs/, so that the same command finds its own folder again, with any number of workers.
    """
    asked = {name: value for name, value in asked.items() if name not in ("workers", "slurm")}
    kept = runs_dir() / f"distill-{config_hash(str(output))}"
    with lock(kept):
        mine = (kept / "config.json").exists() and read_json(kept / "config.json") == asked
        if output.exists() and not (output.is_dir() and (mine or not any(output.iterdir()))):
            raise InputError(f"--output {output.name} exists, not written by this command: name another, or remove it")
        write_json(kept / "config.json", asked)
        yield output


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    arguments = build_parser().parse_args(argv)
    share_cores()
    for name in ("DISTILL_RUNS", "DISTILL_CORPUS"):  # notebooks run in their own folder, where relative paths differ
        if os.environ.get(name):
            os.environ[name] = str(Path(os.environ[name]).absolute())
    try:
        if arguments.command == "report":
            return report(arguments)
        if arguments.command == "distill":
            return distill(arguments)
        if arguments.command == "sweep":
            plans = settings.read_grid(arguments.grid)
            output = arguments.output or Path(arguments.grid.stem)
            return batch.run_sweep(plans, output, arguments.told, arguments.workers, arguments.slurm)
        if arguments.command != "teachers":
            return use_student(arguments)
        from distill_utils.experiments import t5_teacher, teacher

        for build in (teacher.build, *(partial(t5_teacher.build, name) for name in t5_teacher.SHAPES)):
            print(f"wrote {build().name}", flush=True)
        return batch.OK
    except InputError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return batch.BAD_INPUT
    except BrokenPipeError:  # who reads has enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return batch.OK
    except OSError as error:
        if error.errno not in USERS_TO_FIX:
            raise
        fix = "name another place, or set DISTILL_RUNS to a writable folder with free space"
        print(f"{error.strerror}: {error.filename or 'the disk'}; {fix}", file=sys.stderr)
        return batch.BAD_INPUT
    except KeyboardInterrupt:
        print("stopped; repeat the command to resume an unfinished run", file=sys.stderr)
        return batch.INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
