"""Processes of our own, and work shared out to them by submitit: `--workers N` here, `--slurm PARTITION` on a cluster.

What is shared out must be safe to repeat, as building an artifact is: a process that dies is replaced, and its
successor goes on from the last checkpoint. Out of scope: what is computed.
"""

import contextlib
import importlib.util
import io
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context, spawn
from pathlib import Path
from unittest import mock

from distill_utils.artifacts import REPOSITORY, InputError, report_progress, runs_dir

TRIES, LOG_LINES = 3, 3  # processes that one piece of work may lose, and lines shown of the last one's log
MAX_JOBS = 64  # in a cluster's queue at once
POLL_SECONDS, SLURM_SECONDS = 0.2, 5.0  # between looks at what runs here, and at the cluster's queue
LATE_SECONDS = 20.0  # a file from another machine may become visible so much later


@contextlib.contextmanager
def new_processes(number: int = 1, **options) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of processes with nothing of this one's memory, for functions of modules.

    Python's own would import the script that started them, which fails in one without `if __name__ == "__main__":`.
    """
    given = spawn.get_preparation_data

    def without_script(name: str) -> dict:
        return {key: value for key, value in given(name).items() if not key.startswith("init_main")}

    with mock.patch.object(spawn, "get_preparation_data", without_script):
        with ProcessPoolExecutor(number, get_context("spawn"), **options) as pool:
            yield pool


def check_workers(workers: int, slurm: str = "") -> None:
    """Reject what cannot start here, before anything is computed."""
    if workers < 1:
        raise InputError(f"workers {workers} is too small: give at least 1")
    if slurm and workers > 1:
        raise InputError(f"workers {workers} and slurm {slurm!r} exclude each other: leave one out")
    if (slurm or workers > 1) and not importlib.util.find_spec("submitit"):
        raise InputError("workers and slurm need submitit: install it by `pip install submitit`")
    if slurm and not shutil.which("sbatch"):
        raise InputError(f"slurm {slurm!r}: no sbatch here: start from a machine of the cluster, or use workers")


def share_out(function: Callable, items: Mapping[str, tuple], workers: int = 1, slurm: str = "") -> dict:
    """Return {name: function(*arguments)} of the items, in their order, each computed by a process of its own.

    At most `workers` run at once, each with its share of the threads (OMP_NUM_THREADS, else the processors) and one of
    the GPUs in turn. With `slurm`, a partition, jobs with all these threads wait in its queue; what else sbatch should
    know is in its environment, as SBATCH_TIMELIMIT and SBATCH_GPUS; runs/ must be on a disk that all machines share.
    A process that was killed is replaced, TRIES in all. Raises InputError as the first process that does, and for work
    whose processes all died; RuntimeError with the trace of any other exception. What still runs is stopped then.
    """
    check_workers(workers, slurm)
    # Setting up its logs would close those of others; rouge-score's absl then closes the stderr that it first saw.
    os.environ.setdefault("SUBMITIT_LOG_LEVEL", "NOCONFIG")
    import submitit
    from submitit.core.utils import FailedJobError

    (runs_dir() / "workers").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=runs_dir() / "workers", prefix=time.strftime("%m%d-%H%M%S-")))
    executor = submitit.SlurmExecutor(folder) if slurm else submitit.LocalExecutor(folder)
    threads = max(1, int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1) // workers)
    # Without srun, which would give its step one processor; the time limit is the partition's.
    cluster = {"partition": slurm, "cpus_per_task": threads, "time": None, "job_name": "distill", "use_srun": False}
    executor.update_parameters(**cluster if slurm else {"timeout_min": 60 * 24 * 365})
    gpus, free = ([], list(range(MAX_JOBS))) if slurm else (_gpus(), list(range(workers)))
    waiting, running, results, lost = list(items), {}, {}, Counter()
    try:
        while waiting or running:
            while waiting and free:
                name, slot = waiting.pop(0), free.pop(0)
                if gpus:  # not by update_parameters, which takes numbers alone
                    executor.parameters |= {"gpus_per_node": 1, "visible_gpus": [gpus[slot % len(gpus)]]}
                work = partial(_work, function, items[name], 0 if slurm else os.getpid())
                try:
                    running[name] = slot, _submit(executor, work, threads)
                except FailedJobError as error:
                    raise InputError(f"sbatch rejected the job: {' '.join(str(error).split())}") from error
            time.sleep(SLURM_SECONDS if slurm else POLL_SECONDS)
            for name in _ended({name: job for name, (_, job) in running.items()}, bool(slurm)):
                slot, job = running.pop(name)
                free.append(slot)
                if job.paths.result_pickle.exists():
                    try:
                        results[name], refused = job.result()
                    except FailedJobError as error:
                        raise RuntimeError(f"{name}: {error}") from error
                    if refused:
                        raise InputError(refused)
                    print(f"{name}: done, {len(results)} of {len(items)}", flush=True)
                    continue
                lost[name] += 1
                if lost[name] == TRIES:
                    log = " | ".join((job.stderr() or "(empty)").strip().splitlines()[-LOG_LINES:])
                    fix = "raise SBATCH_MEM_PER_NODE or SBATCH_TIMELIMIT" if slurm else "use fewer workers"
                    raise InputError(f"{name}: its process was killed {TRIES} times, most often because memory ran "
                                     f"out: {fix}; the end of its log: {log}")  # fmt: skip
                print(f"{name}: its process was killed and is replaced", flush=True)
                waiting.insert(0, name)
            report_progress(folder, "shared work", len(results), len(items), "parts")
    finally:
        for _, job in running.values():
            job.cancel(check=False)
    shutil.rmtree(folder)
    return {name: results[name] for name in items}


def _gpus() -> list[str]:
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else list(map(str, range(torch.cuda.device_count())))


def _submit(executor, work: Callable, threads: int):
    """Start a process, or queue it, with the environment of a worker."""
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    changes = {"PYTHONPATH": path, "DISTILL_WAIT": "1", "OMP_NUM_THREADS": str(threads)}
    with mock.patch.dict(os.environ, changes), contextlib.redirect_stderr(io.StringIO()):  # errors repeat what is there
        os.environ.pop("DISTILL_NOTEBOOK_RUN", None)  # several at once would overwrite one another's progress
        return executor.submit(work)


def _work(function: Callable, arguments: tuple, caller: int) -> tuple[object, str]:
    """Return what the function does and ""; or None and the line of its InputError. In the new process."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # Slurm's warning: until it kills there is time to train
    if caller:
        threading.Thread(target=end_with, args=(caller,), daemon=True).start()
    try:
        return function(*arguments), ""
    except InputError as error:
        return None, str(error)


def end_with(pid: int) -> None:
    """End this process when the one that wanted its work is gone: nobody would take over what it makes."""
    with contextlib.suppress(OSError):
        while True:
            os.kill(pid, 0)
            time.sleep(1.0)
    os._exit(1)


def _ended(jobs: dict, slurm: bool) -> list[str]:
    """Return the names of the jobs that left a result or are gone; by squeue, as sacct is not everywhere."""
    done = [name for name, job in jobs.items() if (job.paths.result_pickle.exists() if slurm else job.done())]
    if not slurm or len(done) == len(jobs):
        return done
    listed = subprocess.run(["squeue", "--me", "--noheader", "--format=%A"], capture_output=True, text=True)
    gone = [name for name, job in jobs.items() if name not in done and job.job_id not in listed.stdout.split()]
    if listed.returncode or not gone:
        return done
    time.sleep(LATE_SECONDS)
    return done + gone
