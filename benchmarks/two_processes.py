"""Measure one run in two processes against the same run in one, on the same two cores: is any work done twice?

    python benchmarks/two_processes.py

Two processes of one thread each share every batch; one process of two threads has it alone. The runs take turns, each
in fresh processes started by torchrun, so that a change of load meets all alike; the first steps of each are not
counted. `whole` processes hold both models, `sharded` ones their parts (FSDP2). The teacher is pydocs-t5, the path
miniend_logits, the text random tokens.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch

from distill_utils import artifacts
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--source-length", type=int, default=128)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "two_processes_cpu.json")
    arguments = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(2)  # distributed.launch divides them among the processes
    load, rates = os.getloadavg()[0], {name: [] for name in RUNS}
    sizes = {"steps": arguments.steps, "batch_size": arguments.batch_size, "source_length": arguments.source_length}
    for turn in range(arguments.turns):
        for name, (num_processes, sharded) in RUNS.items():
            with tempfile.TemporaryDirectory() as folder:
                rates[name].append(rate(Path(folder), num_processes, sharded, **sizes))
        print(turn, {name: found[-1] for name, found in rates.items()}, flush=True)
    ratios = {
        name: statistics.median(several / one for several, one in zip(rates[name], rates["one"], strict=True))
        for name in RUNS
        if name != "one"
    }
    result = {"sizes": sizes, "examples_per_second": rates, "ratio": ratios, "limit": LIMIT}
    # Above two other work ran beside this: measure again on a quiet machine.
    result |= {"load": {"before": load, "after": os.getloadavg()[0]}, "provenance": artifacts.provenance()}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    artifacts.write_json(arguments.output, result)
    print(ratios, {name: ratio >= LIMIT for name, ratio in ratios.items()})


if __name__ == "__main__":
    main()
