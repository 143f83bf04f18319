"""What every suite shares: forms in turns, each in a process of its own; medians, peaks, the machine, JSON and a table.

A form is a function `form(turns, case)`. It builds what it needs and then works in a loop `for _ in turns`: what
happens until the next turn is timed. On a CPU the forms of a case stand ready in processes of their own and take one
turn each, A B A B, so that a change of load meets all alike; the growth of a process's peak from before anything was
built is the form's memory. On a GPU the allocator knows that, so the forms run one after another in this process.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

from distill_utils import artifacts
from distill_utils.device import amp_dtype, device
from distill_utils.planning.measure import allocated_peak
from distill_utils.planning.plan import machine_ceilings
from distill_utils.planning.step import FORMULAS

HERE = Path(__file__).parent
WARM_UP = 2  # turns that are not timed
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16")
BUSY = 15.0  # percent of the machine that others may take; above it the figures are marked


class Finished(Exception):
    """No more turns: ends the loops of others that never end by themselves."""


class Turns:
    """Iterate once a turn; `ask` says whether another one follows, `tell` gets what the last one took.

    A turn is what happens from one `next` to the following one, or up to the last `lap`, if there was any.
    """

    def __init__(self, ask: Callable[[], bool], tell: Callable[[dict], None], warm_up: int = WARM_UP):
        self.ask, self.tell, self.warm_up, self.begun = ask, tell, warm_up, 0
        self.laps: dict[str, float] = {}
        self.notes: dict[str, float] = {}  # of the last turn: whatever a form finds worth telling
        self.counts = True  # operations, of the last turn that is not timed; many small ones take ten times as long
        self.facts: dict[str, float] = {}
        self.squares, self.hooks = [], []
        self.counter, self.counting = FlopCounterMode(display=False), ExitStack()
        self.on, self.last = device(), 0.0
        self.counter.flop_registry = FORMULAS  # with the attention kernels of a CPU

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        if self.begun:
            self._end()
        if not self.ask():
            raise StopIteration
        self.laps, self.notes = {}, {}
        if self.counts and self.begun == self.warm_up - 1 >= 0:
            self.counting.enter_context(self.counter)
        self.begun += 1
        self.last = time.perf_counter()
        return self.begun - 1

    def _end(self) -> None:
        if not self.laps:
            self.lap("")
        if self.counts and self.begun == self.warm_up:
            self.counting.close()
            self.facts["tflop"] = self.counter.get_total_flops() / 1e12
        if self.hooks:
            self.facts["gradient_norm"] = float(sum(self.squares)) ** 0.5
            while self.hooks:
                self.hooks.pop().remove()
        self.tell({"laps": self.laps, "notes": self.notes})

    def lap(self, name: str) -> None:
        """End a part of this turn; what follows is not timed unless another `lap` ends it."""
        if self.on.type == "cuda":
            torch.cuda.synchronize()
        self.laps[name] = time.perf_counter() - self.last
        self.last = time.perf_counter()

    def watch(self, model) -> None:
        """Tell the norm of the first turn's gradient: equal losses have equal ones, whoever computes them."""
        for weight in model.parameters():
            if weight.requires_grad:
                hook = weight.register_post_accumulate_grad_hook(
                    lambda w: self.squares.append(w.grad.float().norm() ** 2)
                )
                self.hooks.append(hook)


def resident(name: str) -> int:
    """Return the bytes this process holds (VmRSS), or the most it has held (VmHWM)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return psutil.Process().memory_info().rss
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", status.read_text())[1])


def work(form: Callable, case: dict, ask: Callable, tell: Callable, warm_up: int) -> dict:
    """Run a form to its end and return its facts: `peak_mb` from before it began, `tflop` of a turn, or its `error`."""
    turns, cudnn = Turns(ask, tell, warm_up), torch.backends.cuda.cudnn_sdp_enabled()
    on_cuda = turns.on.type == "cuda"
    if on_cuda:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):  # the peak of the imports is not the form's; Linux forgets it so
            Path("/proc/self/clear_refs").write_text("5")
    before = torch.cuda.memory_allocated() if on_cuda else resident("VmRSS")
    try:
        found = form(turns, case) or {}
    except (ImportError, MemoryError, torch.OutOfMemoryError) as error:  # a result, too
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    finally:  # on a GPU the next form runs in this process: uncounted, and with the kernel that our training leaves out
        turns.counting.close()
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
    peak = torch.cuda.max_memory_allocated() if on_cuda else resident("VmHWM")
    return {"peak_mb": (peak - before) / 1e6} | turns.facts | found


def step_peak_mb(step: Callable[[], object]) -> float:
    """Return what a step holds at most beyond what lived before it, by the allocator's record."""
    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    return allocated_peak(step) / 1e6


def take_gradients(turns: Turns, weights: list[torch.Tensor], loss_of: Callable[[], torch.Tensor]) -> dict:
    """Take value and gradient of a loss in every turn; return both and the memory of one more step as facts."""
    found = []

    def step() -> None:
        for weight in weights:
            weight.grad = None
        loss = loss_of()
        loss.backward()
        found[:] = [loss.item()]

    for _ in turns:
        step()
    norm = sum(weight.grad.float().norm() ** 2 for weight in weights if weight.grad is not None) ** 0.5
    for weight in weights:
        weight.grad = None
    return {"peak_mb": step_peak_mb(step), "value": found[0], "gradient_norm": float(norm)}


# ------------------------------------------------------------------------------------------------ forms that take turns


def serve(forms: dict[str, Callable], arguments) -> None:
    """Be the process of one form: a line on stdin asks for a turn, its end for the facts."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def say(value: dict) -> None:
        print(json.dumps(value), file=out, flush=True)

    name, case, warm_up = arguments.worker
    form = forms.get(name) or forms[""]
    say(work(form, json.loads(case), lambda: bool(sys.stdin.readline().strip()), say, int(warm_up)))


class _Process:
    """A form in a process of its own: `turn` asks for one turn, `end` for the facts."""

    def __init__(self, file: str, name: str, case: dict, arguments, warm_up: int):
        command = [sys.executable, file, "--threads", str(arguments.threads)]
        command += ["--worker", name, json.dumps(case), str(warm_up)]
        paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": ":".join(filter(None, paths)), "TOKENIZERS_PARALLELISM": "false"}
        self.log = open(os.devnull if not arguments.verbose else 2, "w", closefd=not arguments.verbose)
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.log, text=True, env=environment)
        self.error = None
        for _ in range(warm_up):
            self.turn()

    def _ask(self, line: str) -> dict:
        if self.error:
            return {"error": self.error}
        with suppress(BrokenPipeError):
            self.process.stdin.write(line)
            self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline() or "{}")
        if not answer:
            self.error = f"the process died with exit code {self.process.wait()}: try --verbose"
        self.error = self.error or answer.get("error")
        return answer

    def turn(self) -> dict:
        return self._ask("go\n")

    def end(self) -> dict:
        facts = self._ask("\n")
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()
        self.log.close()
        return facts if not self.error else {"error": self.error}


def in_turns(file: str, forms: dict[str, Callable], names: list[str], case: dict, arguments, warm_up: int = WARM_UP):
    """Return {form: {"laps": {lap: [seconds]}, "notes": [...], and its facts}}; a failed one has `error`."""
    found = {name: {"laps": {}, "notes": []} for name in names}

    def keep(name: str, told: dict) -> None:
        for lap, seconds in told.get("laps", {}).items():
            found[name]["laps"].setdefault(lap, []).append(seconds)
        found[name]["notes"].append(told.get("notes", {}))

    own = {name: {**case, "form": name} for name in names}
    if arguments.one_process:
        for name in names:
            asked = iter([True] * (warm_up + arguments.rounds) + [False])
            told: list[dict] = []
            form = forms.get(name) or forms[""]
            found[name] |= work(form, own[name], lambda asked=asked: next(asked), told.append, warm_up)
            for each in told[warm_up:]:
                keep(name, each)
        return found
    processes = {name: _Process(file, name, own[name], arguments, warm_up) for name in names}
    for _ in range(arguments.rounds):
        for name, process in processes.items():
            keep(name, process.turn())
    return {name: found[name] | process.end() for name, process in processes.items()}


def rows_of(
    case: str, found: dict[str, dict], ours: str = "ours", goals: dict | None = None, ceiling: float = 0, **facts
):
    """Return a row in the results' format for each form that is not ours, and for each lap."""
    rows, goals, mine = [], goals or {}, found[ours]
    for other, theirs in found.items():
        for lap in mine["laps"] or {"": []}:
            if other == ours:
                continue
            seconds = [each["laps"].get(lap) or [] for each in (mine, theirs)]
            medians = [statistics.median(times) if times else None for times in seconds]
            both = None not in medians
            share = mine.get("tflop", 0) * 1e3 / (medians[0] * ceiling) if medians[0] and ceiling and not lap else None
            rows.append(
                {
                    "case": ", ".join(filter(None, (case, lap))),
                    "other": other,
                    "ours_seconds": medians[0],
                    "other_seconds": medians[1],
                    "ratio": medians[1] / medians[0] if both else None,
                    "goal": goals.get(other),
                    "ours_peak_mb": mine.get("peak_mb"),
                    "other_peak_mb": theirs.get("peak_mb"),
                    "ceiling_share": share or None,
                    "ours_quartiles": quartiles(seconds[0]),
                    "other_quartiles": quartiles(seconds[1]),
                    "turns": len(seconds[0]),
                }
                | {f"{who}_{key}": each[key] for key in ("tflop", "gradient_norm", "value")
                   for who, each in (("ours", mine), ("other", theirs)) if key in each}
                | facts
                | ({"error": theirs["error"]} if "error" in theirs else {})
            )  # fmt: skip
    return rows


def row_alone(case: str, seconds: float | None, peak_mb: float | None, share: float | None = None, /, **facts):
    """Return a row in the results' format of something that is compared with nothing."""
    row = {"case": case, **dict.fromkeys(("other", "ours_seconds", "other_seconds", "ratio", "goal", "ours_peak_mb"))}
    row |= {"ours_seconds": seconds, "ours_peak_mb": peak_mb, "other_peak_mb": None, "ceiling_share": share}
    return row | facts


def quartiles(times: list[float]) -> list[float] | None:
    """Return the spread of times: their quartiles."""
    return [statistics.quantiles(times, n=4)[i] for i in (0, 2)] if len(times) > 1 else None


# ---------------------------------------------------------------------------------------------------- a suite's results


def parse(description: str, suite: str, rounds: int, forms: dict[str, Callable] | None = None, /, **options: dict):
    """Return a suite's arguments: those all have, and its own; a process of a form does its work and exits here."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="timed turns of each form")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    ending = "_cuda" if device().type == "cuda" else ""
    parser.add_argument("--output", type=Path, default=HERE / "results" / f"{suite}{ending}.json")
    parser.add_argument("--verbose", action="store_true", help="show what the forms' processes print")
    parser.add_argument(
        "--one-process", action="store_true", help="forms one after another here, as always on a GPU: a trial"
    )
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    for name, option in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **option)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.worker:
        serve(forms or {}, arguments)
        sys.exit()
    arguments.output = arguments.output.resolve()
    trial = arguments.one_process and device().type == "cpu"
    arguments.one_process |= device().type == "cuda"
    arguments.busy = others_busy()
    arguments.ceilings = dict.fromkeys(("float32", "bfloat16", "bandwidth")) if trial else machine_ceilings()
    return arguments


def others_busy() -> float:
    """Return how many percent of the machine other work takes while this process waits."""
    return psutil.cpu_percent(interval=1.0)


def machine(arguments) -> dict:
    """Return what figures depend on: cores, instructions, measured ceilings, and whether others worked meanwhile."""
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    busy = {"before": arguments.busy, "after": others_busy()}
    if max(busy.values()) > BUSY:
        print(f"others took {max(busy.values()):.0f} % of the machine: measure again on a quiet one", file=sys.stderr)
    return {
        "cores": os.cpu_count(), "threads": arguments.threads, "instructions": [i for i in INSTRUCTIONS if i in flags],
        "ceilings": arguments.ceilings, "native_bf16": amp_dtype() is not None, "others_busy_percent": busy,
    }  # fmt: skip


def dtype_name() -> str:
    """Return what forms compute in that would take bf16: float32 where the machine has none of its own."""
    return "bf16" if amp_dtype() is not None else "float32"


def ceiling(arguments) -> float:
    """Return the GFLOP/s that a product of our dtype reaches here."""
    return arguments.ceilings["bfloat16"] or arguments.ceilings["float32"]


def write(arguments, rows: list[dict], **facts) -> None:
    """Write a suite's results, and print its rows as a table."""
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    result = {"rows": rows, "machine": machine(arguments), **facts, "provenance": artifacts.provenance()}
    artifacts.write_json(arguments.output, result)
    print(table(rows), flush=True)


def table(rows: list[dict]) -> str:
    """Return rows as text."""

    def number(value: float | None, digits: int = 3) -> str:
        return "-" if value is None else f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:.0f}"

    keys = ("ours_seconds", "other_seconds", "ratio", "goal", "ours_peak_mb", "other_peak_mb", "ceiling_share")
    lines = [("case", "other", "ours s", "other s", "ratio", "goal", "ours MB", "other MB", "of ceiling")]
    lines += [(row["case"], row["other"] or "", *(number(row.get(key)) for key in keys)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(value.ljust(width) for value, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([*text, *(f"{row['case']}, {row['other']}: {row['error']}" for row in rows if row.get("error"))])
