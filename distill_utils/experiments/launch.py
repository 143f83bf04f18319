"""One run in several processes: sharded models (FSDP2), what each process does, and its start from a notebook.

Out of scope: the loop, `loop.fit`, which is the same in one process and in many.

`distill` takes the description of a run as `miniend.distill` does, and starts `torchrun` on this machine. On a
cluster `distill(..., num_processes=0)` prepares the run and names its folder, which all machines must share. Then

    torchrun --standalone --nproc-per-node 8 -m distill_utils.experiments.launch FOLDER

starts it on one machine; for several, under Slurm, notebook 05 shows the line. A run that was stopped goes on from its
last checkpoint, on any number of processes. When it is done, `distill` called again takes over what it made.
"""

import contextlib
import copy
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import AutoTokenizer, PreTrainedModel

from distill_utils.artifacts import REPOSITORY, InputError, lock, read_json, write_json
from distill_utils.device import device
from distill_utils.experiments import miniend
from distill_utils.experiments.miniend import AgnosticRun
from distill_utils.models import students
from distill_utils.models.loading import load_model, save_model
from distill_utils.training import loop
from distill_utils.training.distributed import gather, rank_and_world_size
from distill_utils.training.loop import Training
from distill_utils.workers import end_with

WHOLE_BYTES = 2e9  # of weights; a smaller model is held whole by each process: its passes then wait for no other
STOP_SECONDS = 45  # torchrun gives its processes 30 to end by themselves
LOG_LINES = 12  # shown of a process that died
ARRAYS = ("tokens", "held_out")


# -------------------------------------------------------------------------------------------------- inside a process


def check_processes(settings: Training, num_processes: int) -> None:
    """Reject settings that these processes cannot share, before any is started."""
    if num_processes < 1:
        raise InputError(f"num_processes {num_processes} is too small: use at least 1")
    loop.check_training(settings, num_processes)
    check_backend()
    if device().type == "cuda" and num_processes > torch.cuda.device_count():
        raise InputError(f"num_processes {num_processes} is more than the GPUs here: use {torch.cuda.device_count()}")


def usable_processes(settings: Training, wanted: int) -> int:
    """Return how many of the wanted processes this machine has a device for, at least 1, after `check_processes`."""
    number = min(wanted, max(torch.cuda.device_count(), 1)) if device().type == "cuda" else wanted
    if number > 1:
        check_processes(settings, number)
    return number


def check_backend() -> str:
    """Return the backend, NCCL between GPUs and gloo between CPUs, or reject a PyTorch without it."""
    backend = "nccl" if device().type == "cuda" else "gloo"
    if not dist.is_available() or not getattr(dist, f"is_{backend}_available")():
        raise InputError(f"this PyTorch has no {backend}: install a build that has it, or use num_processes=1")
    return backend


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the other processes that torchrun started; each has a GPU of its own where there are any."""
    backend = check_backend()
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend)
    yield
    dist.destroy_process_group()  # not after an error: it would wait for processes that are gone


def shard(model: PreTrainedModel, frozen: bool = False) -> None:
    """Leave each process its part of both stacks (FSDP2), in place; layers are whole only while they compute.

    Embeddings and the head stay whole, as the objectives use them outside of the stacks. Gradients are added up, not
    averaged, because `fit` weighs each process's loss by its tokens. `frozen` is for a teacher, which runs without
    gradients. A pass may be left early: a student's layer then stays whole until its gradients are taken (`fit`
    resets it after that), and a teacher's is sharded again at once.
    """
    if not hasattr(FSDPModule, "reset_iter_state"):
        raise InputError(f"torch {torch.__version__} cannot shard models here: use 2.12 or newer")
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # T5's bias; nothing writes into it
    on = device()
    model.to(on)
    mesh = init_device_mesh(on.type, (rank_and_world_size()[1],))
    outer = {w for part in (model.get_input_embeddings(), model.get_output_embeddings()) for w in part.parameters()}
    stacks = {
        model.get_encoder(): students.encoder_layers(model),
        model.get_decoder(): students.decoder_layers(model),
    }
    for stack, layers in stacks.items():
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(stack, mesh=mesh, ignored_params=outer)
        for part in (*layers, stack):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo knows no other
        stack.register_forward_pre_hook(_mark_run)
        if frozen:
            stack.register_forward_hook(_settle_left, always_call=True)


def _mark_run(stack: nn.Module, inputs: tuple) -> None:
    stack.has_run = True  # for distributed.reset_fsdp_state; FSDP cannot reset what it never set up


def _settle_left(stack: nn.Module, inputs: tuple, output: object) -> None:
    if output is None:  # the pass was left early (hooks.py)
        stack.reset_iter_state()


def unshard(model: PreTrainedModel) -> PreTrainedModel | None:
    """Return a whole copy in rank 0's main memory, None elsewhere; all processes call this together."""
    weights = model.state_dict(keep_vars=True)
    found = gather({str(id(weight)): weight.detach() for weight in weights.values()})  # tied ones once
    if rank_and_world_size()[0] > 0:
        return None
    whole = type(model)(copy.deepcopy(model.config))  # which may tie what this model does not (T5 v1.1)
    whole.load_state_dict({name: found[str(id(weight))] for name, weight in weights.items()}, assign=True)
    whole.generation_config = copy.deepcopy(model.generation_config)
    return whole.eval()


def work(folder: Path) -> None:
    """Do this process's part of the run that `describe` wrote; rank 0 writes student/ and processes/results.json."""
    place = folder / "processes"
    described = read_json(place / "run.json")
    run = AgnosticRun(**described["run"] | {"training": Training(**described["run"]["training"])})
    with process_group(), lock(place) if rank_and_world_size()[0] == 0 else contextlib.nullcontext():
        tokens, held_out = (np.load(place / f"{name}.npy", mmap_mode="r") for name in ARRAYS)
        tokenizer = AutoTokenizer.from_pretrained(place / "tokenizer", local_files_only=True)
        teacher, _ = load_model(described["teacher"], getattr(torch, described["teacher_dtype"]))
        student = miniend.new_student(run, teacher)
        for model, frozen in ((teacher, True), (student, False)):
            size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
            sharded = size > WHOLE_BYTES if described["sharded"] is None else described["sharded"]
            shard(model, frozen) if sharded else model.to(device())
        text = (tokenizer, tokens, held_out)
        results = miniend.train_student(folder, run, student, teacher, *text, described["recompute"])
        whole = unshard(student)
        if whole is not None:
            save_model(whole, tokenizer, folder / "student")
            write_json(place / "results.json", results | {"processes": rank_and_world_size()[1]})


# ------------------------------------------------------------------------------------------------------ around them


def distill(
    run: AgnosticRun, teacher, tokenizer, tokens: np.ndarray, held_out: np.ndarray, num_processes: int = 1,
    recompute: bool = False, sharded: bool | None = None,
) -> Path:  # fmt: skip
    """Return `miniend.distill`'s artifact, made by several processes; it is the same for any number of them.

    `teacher` is only described here: the processes load it from `run.teacher` in the same dtype, so it may stay in main
    memory. `sharded` says whether both models are; None shards those above WHOLE_BYTES. With `num_processes=0` nothing
    is started: the error names the line to start the run with.
    Raises InputError as training does, and RuntimeError, with the end of its log, when a process died; the last
    checkpoint is kept, and another call goes on from it.
    """
    if num_processes == 1:
        return miniend.distill(run, teacher, tokenizer, tokens, held_out, recompute)
    if num_processes:
        check_processes(run.training, num_processes)

    def train(folder: Path) -> dict:
        place = folder / "processes"
        if not (place / "results.json").exists():
            with lock(place):  # arrays written anew would end a run that still reads them
                describe(folder, run, teacher, tokenizer, tokens, held_out, recompute, sharded)
            if not num_processes:
                raise InputError(
                    f"runs/{folder.name} is prepared: start it with `torchrun --standalone --nproc-per-node 8 -m "
                    f"distill_utils.experiments.launch {folder}`, then run this again"
                )
            launch(folder, num_processes)
        for name in ARRAYS:
            (place / f"{name}.npy").unlink(missing_ok=True)
        return read_json(place / "results.json")

    return miniend.distill(run, teacher, tokenizer, tokens, held_out, train=train)


def describe(
    folder: Path, run: AgnosticRun, teacher, tokenizer, tokens: np.ndarray, held_out: np.ndarray,
    recompute: bool = False, sharded: bool | None = None,
) -> None:  # fmt: skip
    """Write folder/processes/: all that a process needs to know to take part in the run."""
    place, local = folder / "processes", Path(run.teacher).expanduser()
    place.mkdir(parents=True, exist_ok=True)
    for name, array in zip(ARRAYS, (tokens, held_out), strict=True):
        np.save(place / f"{name}.npy", array)
    tokenizer.save_pretrained(place / "tokenizer")
    described = {"run": asdict(run), "teacher": str(local.resolve() if local.is_dir() else run.teacher)}
    described |= {"teacher_dtype": str(teacher.dtype).removeprefix("torch."), "recompute": recompute}
    write_json(place / "run.json", described | {"sharded": sharded})


def launch(folder: Path, num_processes: int) -> None:
    """Start the described run by torchrun on this machine, show what rank 0 prints, and wait for its end.

    When one process dies, the others are stopped. Raises InputError for what a process rejects, and RuntimeError that
    names the rank and shows the end of its log.
    """
    place = folder / "processes"
    for path in (place / "logs", *place.glob("failed-*.json")):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    command += ["--log-dir", str(place / "logs"), "--redirects=3"]
    command += ["-m", "distill_utils.experiments.launch", str(folder)]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // num_processes)),
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "DISTILL_LAUNCHER": str(os.getpid()),
    }
    with open(place / "torchrun.log", "wb") as log:
        # A session of its own, so that Ctrl-C reaches this process alone, which then stops the others in order.
        torchrun = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    shown = 0
    try:
        while torchrun.poll() is None:
            time.sleep(0.2)
            shown = _show(place, shown)
    finally:
        if torchrun.poll() is None:
            torchrun.terminate()
            try:
                torchrun.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                torchrun.kill()
    _show(place, shown)
    if torchrun.returncode:
        raise _failure(place)


def _log(place: Path, rank: int, stream: str) -> str:
    """Return what a process has written; torchrun puts it into a folder with a random name."""
    found = [*place.glob(f"logs/*/attempt_0/{rank}/{stream}.log")]
    return found[0].read_text(errors="replace") if found else ""


def _show(place: Path, shown: int) -> int:
    text = _log(place, 0, "stdout")
    end = text.rfind("\n") + 1
    if end > shown:
        print(text[shown:end], end="", flush=True)
    return max(end, shown)


def _failure(place: Path) -> Exception:
    """Return the error of the process that died first: others fail after it, because it is gone."""
    report = (place / "torchrun.log").read_text(errors="replace")
    codes = {int(rank): int(code) for rank, code in re.findall(r"rank\s*: (\d+).*\n\s*exitcode\s*: (-?\d+)", report)}
    failed = {int(path.stem.split("-")[1]): read_json(path) for path in place.glob("failed-*.json")}
    # One that a signal killed leaves no file; -15 is torchrun's own signal to the others.
    killed = [rank for rank, code in codes.items() if code < 0 and code != -15]
    in_time = sorted(failed, key=lambda rank: failed[rank]["time"])
    refused = [rank for rank in in_time if failed[rank]["refused"]]  # NCCL then aborts the others, with a signal
    rank = next(iter([*refused, *killed, *in_time, *codes]), None)
    if rank is None:
        return RuntimeError("\n".join(["torchrun failed", *report.splitlines()[-LOG_LINES:]]))
    if rank in failed and failed[rank]["refused"]:
        return InputError(failed[rank]["refused"])
    how = f"was killed by signal {-codes[rank]}" if rank in killed else "failed"
    lines = [line for line in _log(place, rank, "stderr").splitlines() if line.strip()][-LOG_LINES:]
    said = f"process {rank} {how}, the others were stopped; the last checkpoint is kept, run this again to resume"
    return RuntimeError("\n".join([f"{said}. The end of its log:", *(f"  {line}" for line in lines or ["(empty)"])]))


# ------------------------------------------------------------------------------------------------- started by torchrun


def main() -> None:
    """Do one process's part, and leave word of an error where the launching process looks for it."""
    folder = Path(sys.argv[1])
    if "DISTILL_LAUNCHER" in os.environ:
        threading.Thread(target=end_with, args=(int(os.environ["DISTILL_LAUNCHER"]),), daemon=True).start()
    try:
        work(folder)
    except BaseException as error:
        said = {"time": time.time(), "refused": str(error) if isinstance(error, InputError) else None}
        write_json(folder / "processes" / f"failed-{os.environ['RANK']}.json", said)
        raise


if __name__ == "__main__":
    main()
