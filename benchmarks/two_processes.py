"""Measure one run in two processes against the same run in one, on the same two cores: is any work done twice?

    python benchmarks/two_processes.py

Two processes of one thread each share every batch; one process of two threads has it alone. The runs take turns, each
in fresh processes started by torchrun, so that a change of load meets all alike; the first steps of each are not
counted. `whole` processes hold both models, `sharded` ones their parts (FSDP2). The teacher is pydocs-t5, the path
miniend_logits, the text random tokens.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from pathlib import Path

import numpy as np
import timing

from distill_utils.experiments import launch
from distill_utils.experiments.miniend import AgnosticRun
from distill_utils.models.loading import load_model
from distill_utils.training.loop import Training, read_history

LIMIT = 0.9  # of the throughput of one process
RUNS = {"one": (1, False), "whole": (2, False), "sharded": (2, True)}  # processes, and whether they hold parts
LOG_EVERY = 5  # steps of a history row; the first row warms up


def rate(folder: Path, num_processes: int, sharded: bool, steps: int, batch_size: int, source_length: int) -> float:
    """Return the examples a second of a run, the median over its history's rows."""
    teacher, tokenizer = load_model("pydocs-t5")
    tokens = np.random.default_rng(0).integers(0, 8000, size=batch_size * source_length * 20).astype(np.uint16)
    training = Training(
        max_steps=steps + LOG_EVERY, batch_size=batch_size, learning_rate=1e-3, log_every=LOG_EVERY, precision="float32"
    )
    run = AgnosticRun(
        path="miniend_logits", shape="3-3", teacher="pydocs-t5", training=training, source_length=source_length
    )
    launch.describe(folder, run, teacher, tokenizer, tokens, tokens[: source_length * 4], sharded=sharded)
    launch.launch(folder, num_processes)
    return statistics.median(row["examples_per_second"] for row in read_history(folder)[1:-1])  # the last one evaluates


def main() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    arguments = timing.parse(
        __doc__, "two_processes", 2, steps={"type": int, "default": 20}, batch_size={"type": int, "default": 32},
        source_length={"type": int, "default": 128},
    )  # fmt: skip
    rates: dict[str, list[float]] = {name: [] for name in RUNS}
    sizes = {name: getattr(arguments, name) for name in ("steps", "batch_size", "source_length")}
    for _ in range(arguments.rounds):
        for name, (num_processes, sharded) in RUNS.items():
            with tempfile.TemporaryDirectory() as folder:
                rates[name].append(rate(Path(folder), num_processes, sharded, **sizes))
    seconds = {name: {"laps": {"": [1 / each for each in found]}, "notes": []} for name, found in rates.items()}
    rows = []
    for name in ("whole", "sharded"):  # seconds are those of an example
        of = {name: seconds[name], "one process": seconds["one"]}
        rows += timing.rows_of(f"two processes, {name}", of, name, {"one process": LIMIT}, **sizes)
    timing.write(arguments, rows, examples_per_second=rates)


if __name__ == "__main__":
    main()
