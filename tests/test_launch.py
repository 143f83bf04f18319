"""Several processes that share a run: they give what one process gives, die, and go on in another number."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_batch, tiny_t5, tiny_tokenizer
from torch import distributed as dist

from distill_utils.artifacts import REPOSITORY, InputError, read_json, write_json
from distill_utils.distillation import objectives
from distill_utils.experiments import launch, miniend
from distill_utils.experiments.miniend import AgnosticRun
from distill_utils.models import students
from distill_utils.models.loading import load_model, save_model
from distill_utils.training import checkpoints, distributed, optimizers
from distill_utils.training.loop import Training, read_history

TRAINING = Training(
    max_steps=5, batch_size=8, micro_batch_size=4, learning_rate=3e-3, weight_decay=0.01, max_grad_norm=0.5,
    log_every=1, eval_every=2, precision="float32",
)  # fmt: skip


LAUNCH = launch.launch  # by torchrun
READING = {"cross_weight": 0.0, "num_relation_heads": 4}


def take_part(rank: int, world: int, port: int, folder: str, work=launch.main) -> None:
    """Be one process of a run, as torchrun starts it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "CUDA_VISIBLE_DEVICES": ""}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    sys.argv = ["distributed", folder]
    work()


def take_gradients() -> None:
    """Save the gradients of a batch that processes share, and what their common norm was found to be.

    The decoder's last layer is left before its cross-attention, so nothing needs the end of the encoder's.
    """
    with launch.process_group():
        student, teacher = tiny_t5(2, 1, seed=1), tiny_t5(seed=2)
        launch.shard(student)
        launch.shard(teacher, frozen=True)
        batch = tiny_batch((9, 9, 9, 9), (6, 6, 6, 6))
        for _ in range(2):
            student.zero_grad()
            loss = objectives.miniend(student, teacher, distributed.local_rows(batch), **READING)["loss"]
            (loss / distributed.rank_and_world_size()[1]).backward()
            distributed.reset_fsdp_state(student)
            for model in (student, teacher):
                layers = [*students.encoder_layers(model), *students.decoder_layers(model)]
                assert all(hasattr(weight, "full_tensor") for layer in layers for weight in layer.parameters())
        parameters = {name: weight for name, weight in student.named_parameters() if weight.grad is not None}
        norm = distributed.clip_gradients(parameters.values(), 1e9)
        found = distributed.gather({name: weight.grad for name, weight in parameters.items()})
        if found:
            save_file(found | {"norm": norm}, sys.argv[1])


def start(processes, num_processes: int, *arguments) -> bool:
    """Run processes that know of each other and return whether all went well."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    started = [
        processes.Process(target=take_part, args=(rank, num_processes, port, *arguments))
        for rank in range(num_processes)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
    return not any(process.exitcode for process in started)


@pytest.fixture(scope="module")
def processes():
    """Start processes from a server that has the libraries loaded, so that a start costs little."""
    context = multiprocessing.get_context("forkserver")
    if hasattr(context, "set_forkserver_preload"):
        context.set_forkserver_preload(["distill_utils.experiments.launch", "transformers.models.t5.modeling_t5"])
    return context


@pytest.fixture
def forked(processes, monkeypatch):
    """Let `distill` start its processes without torchrun, in a fraction of the time."""

    def launch_here(folder: Path, num_processes: int) -> None:
        if not start(processes, num_processes, str(folder)):
            (folder / "processes" / "torchrun.log").touch()
            raise launch._failure(folder / "processes")

    monkeypatch.setattr(launch, "launch", launch_here)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    tokenizer = tiny_tokenizer(90)
    tokenizer.add_tokens([f"<extra_id_{i}>" for i in range(6)], special_tokens=True)
    save_model(tiny_t5(dropout_rate=0.0), tokenizer, folder / "teacher")
    teacher, tokenizer = load_model(folder / "teacher")
    generator = np.random.default_rng(0)
    tokens, held_out = (generator.integers(5, 60, size=size).astype(np.uint16) for size in (2000, 100))
    run = AgnosticRun(
        path="miniend_logits", shape="2-2", teacher=str(folder / "teacher"), training=TRAINING, source_length=16,
        num_relation_heads=4,
    )  # fmt: skip
    return run, teacher, tokenizer, tokens, held_out


@pytest.fixture
def distilled(monkeypatch, tmp_path):
    """Return a function that distils into a folder of runs, and returns the final weights and the history untimed."""

    def distilled(name: str, distill, *arguments, **options) -> tuple[dict, list[dict]]:
        monkeypatch.setenv("DISTILL_RUNS", str(tmp_path / name))
        folder = distill(*arguments, **options)
        times = ("seconds", "examples_per_second")
        history = [{k: v for k, v in row.items() if k not in times} for row in read_history(folder)]
        return load_model(folder / "student")[0].state_dict(), history

    return distilled


def assert_same(found, expected) -> None:
    """Compare weights and histories within the rounding of sums in another order."""
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4, abs=1e-6)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-3, atol=2e-4)


# ----------------------------------------------------------------------------------------------- as one process does it

WHERE = ("one", "several")
CASES = {  # changes of the run, processes, options
    "two": ({}, 2, {"sharded": True}),
    "four": ({"mix_start": 0.4, "mix_rate": 0.1}, 4, {"sharded": True}),
    "four, whole": ({}, 4, {"sharded": False}),
    "left early": ({"path": "miniend"}, 2, {"sharded": True}),
    "left early, recomputed": ({"path": "miniend"}, 2, {"sharded": True, "recompute": True}),
    "one layer, encoder alone": ({"path": "encoder", "shape": "1-1"}, 2, {"sharded": True, "recompute": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_run_in_any_number_of_processes(place, forked, distilled, tmp_path, case):
    run, *rest = place
    changes, num_processes, options = CASES[case]
    run = replace(run, **changes)
    one = distilled("one", miniend.distill, run, *rest)
    assert_same(distilled("several", launch.distill, run, *rest, num_processes=num_processes, **options), one)
    assert len(one[1]) == 5 and one[1][-1]["loss"] != one[1][0]["loss"]
    (folder,) = (path for path in (tmp_path / "several").iterdir() if path.name != "students")
    assert (tmp_path / "one" / folder.name).exists()
    assert read_json(folder / "results.json")["processes"] == num_processes
    assert not list(folder.glob("processes/*.npy"))
    keys = [load_file(tmp_path / name / folder.name / "student" / "model.safetensors").keys() for name in WHERE]
    assert keys[0] == keys[1]  # tied weights are written once


def test_no_more_processes_than_gpus_and_none_that_cannot_share_a_batch(monkeypatch):
    assert launch.usable_processes(TRAINING, 2) == 2 and launch.usable_processes(TRAINING, 1) == 1
    with pytest.raises(InputError, match="3 processes do not divide micro_batch_size 4"):
        launch.usable_processes(TRAINING, 3)
    monkeypatch.setattr(launch, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert launch.usable_processes(TRAINING, 2) == 1  # 05 then skips the section instead of ending in an error


@pytest.mark.parametrize("num_processes", [2, 4])
def test_gradients_and_their_norm_are_those_of_one_process(processes, tmp_path, num_processes):
    student, teacher = tiny_t5(2, 1, seed=1), tiny_t5(seed=2)
    objectives.miniend(student, teacher, tiny_batch((9, 9, 9, 9), (6, 6, 6, 6)), **READING)["loss"].backward()
    expected = {name: weight.grad for name, weight in student.named_parameters() if weight.grad is not None}
    norm = torch.nn.utils.get_total_norm(expected.values())
    assert start(processes, num_processes, str(tmp_path / "found"), take_gradients)
    found = load_file(tmp_path / "found")
    torch.testing.assert_close(found.pop("norm"), norm)
    same = {name: found.pop(name) for name in expected}
    torch.testing.assert_close(same, expected, rtol=1e-4, atol=1e-5 * float(norm))
    assert not any(gradient.any() for gradient in found.values())  # FSDP has zeros where one process has none


def test_a_teacher_in_bf16_stays_so_in_parts(place, forked, distilled):
    run, _, *rest = place
    run = replace(run, path="miniend")
    teacher, _ = load_model(run.teacher, torch.bfloat16)
    one = distilled("one", miniend.distill, run, teacher, *rest)
    assert_same(distilled("two", launch.distill, run, teacher, *rest, num_processes=2, sharded=True), one)
    assert one[1] != distilled("exact", miniend.distill, run, *place[1:])[1]


@pytest.mark.parametrize("world", range(1, 6))
@pytest.mark.parametrize("num_rows", (1, 2, 3, 5, 8))
def test_every_row_belongs_to_one_process(monkeypatch, world, num_rows):
    rows = torch.arange(num_rows)
    batch = {"input_ids": rows[:, None], "labels": rows[:, None], "ids": list(map(str, rows.tolist()))}
    trained, sizes = [], []
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank_and_world_size", lambda rank=rank: (rank, world))
        own = distributed.local_rows(batch | {"target_temperature": 2.0})
        assert own["target_temperature"] == 2.0
        sizes.append(len(own["ids"]))
        assert list(map(str, own["input_ids"].flatten().tolist())) == own["ids"]
        trained += own["labels"][own["labels"] != -100].tolist()
    assert sorted(trained) == rows.tolist()
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("changes", "num_processes", "said"),
    [
        ({}, 3, "micro_batch_size 4: use a multiple of 3"),
        ({"micro_batch_size": 0}, 5, "5 processes do not divide batch_size 8"),
        ({}, -2, "num_processes -2"),
        ({"learning_rate": 0.0}, 2, "learning_rate 0.0"),
    ],
)
def test_what_cannot_be_shared_is_refused_before_a_process_starts(place, monkeypatch, changes, num_processes, said):
    run, *rest = place
    monkeypatch.setattr(launch, "launch", lambda *_: pytest.fail("started"))
    run = replace(run, training=replace(run.training, **changes))
    with pytest.raises(InputError, match=said):
        launch.distill(run, *rest, num_processes=num_processes)


def test_a_pytorch_without_the_backend_is_refused(place, monkeypatch):
    run, *rest = place
    monkeypatch.setattr(dist, "is_gloo_available", lambda: False)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    with pytest.raises(InputError, match=r"this PyTorch has no (gloo|nccl): install a build that has it"):
        launch.distill(run, *rest, num_processes=2)


def test_optimizers_of_whole_matrices_refuse_parts(monkeypatch):
    monkeypatch.setattr(optimizers, "is_sharded", lambda weight: weight.ndim == 2)
    model = tiny_t5(1, 1)
    for name in ("adafactor", "muon"):
        with pytest.raises(InputError, match=f"optimizer {name} needs whole matrices"):
            optimizers.make_optimizers(model, dict(model.named_parameters()), Training(max_steps=1, optimizer=name))


def test_what_a_process_refuses_is_said_by_the_one_that_started_it(place, forked, monkeypatch, tmp_path):
    run, *rest = place
    monkeypatch.setenv("DISTILL_RUNS", str(tmp_path))
    run = replace(run, training=replace(run.training, optimizer="muon"))
    with pytest.raises(InputError, match="optimizer muon needs whole matrices") as error:
        launch.distill(run, *rest, num_processes=2, sharded=True)
    assert "\n" not in str(error.value)


def test_a_run_that_is_under_way_elsewhere_keeps_its_arrays(place, monkeypatch, tmp_path):
    run, *rest = place
    monkeypatch.setenv("DISTILL_RUNS", str(tmp_path))
    with pytest.raises(InputError, match="is prepared: start it"):
        launch.distill(run, *rest, num_processes=0)
    (array,) = tmp_path.glob("*/processes/tokens.npy")
    before = array.stat().st_mtime_ns
    hold = "import sys; from distill_utils.artifacts import lock\nwith lock(sys.argv[1]): print(flush=True), input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", hold, array.parent], cwd=REPOSITORY, **pipes) as rank_0:
        rank_0.stdout.readline()
        with pytest.raises(InputError, match=f"in use by process {rank_0.pid}"):
            launch.distill(run, *rest, num_processes=0)
        rank_0.kill()
    assert array.stat().st_mtime_ns == before


def test_a_refusal_is_told_although_nccl_then_aborts_the_others(tmp_path):
    (tmp_path / "torchrun.log").write_text("rank      : 0 (local_rank: 0)\n  exitcode  : -6 (pid: 7)\n")
    write_json(tmp_path / "failed-1.json", {"time": 1.0, "refused": "learning_rate 9.0: use 0.1"})
    assert isinstance(launch._failure(tmp_path), InputError)


# ----------------------------------------------------------------------------------------------------- started, killed


def processes_of(runs: Path) -> list[psutil.Process]:
    """Return the processes that torchrun has started for a run, not torchrun itself."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            command = process.cmdline()
            is_rank = "distill_utils.experiments.launch" in command and "--redirects=3" not in command
            if is_rank and str(runs) in command[-1]:
                found.append(process)
    return found


def kill_at_checkpoint(runs: Path, checkpoint: str, rank: int, killed: list[float]) -> None:
    """Kill one process of the run as soon as a checkpoint is there."""
    while not list(runs.glob(f"*/{checkpoint}")):
        time.sleep(0.01)
    for process in processes_of(runs):
        if process.environ()["RANK"] == str(rank):
            process.send_signal(signal.SIGKILL)
            killed.append(time.monotonic())


@pytest.mark.slow
def test_a_run_with_a_killed_process_stops_and_goes_on_in_another_number(place, forked, distilled, tmp_path, capsys):
    run, *rest = place
    training = replace(run.training, max_steps=24, micro_batch_size=0, checkpoint_every=4, eval_every=12)
    run = replace(run, training=training)
    straight = distilled("straight", miniend.distill, run, *rest)
    runs, killed = tmp_path / "runs", []
    killer = threading.Thread(target=kill_at_checkpoint, args=(runs, "checkpoint-000004", 1, killed))
    killer.start()
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError) as error:
        patch.setattr(launch, "launch", LAUNCH)
        distilled("runs", launch.distill, run, *rest, num_processes=2, sharded=True)
    assert time.monotonic() - killed[0] < 60
    killer.join()
    assert len(killed) == 1 and not processes_of(runs)
    assert str(error.value).startswith("process 1 was killed by signal 9, the others were stopped")
    (folder,) = runs.iterdir()
    assert f"building runs/{folder.name}" in capsys.readouterr().out
    assert not (folder / "results.json").exists()
    (checkpoint,) = folder.glob("checkpoint-*")
    assert {path.name for path in checkpoint.iterdir()} == set(checkpoints.CHECKPOINT_FILES)
    step = int(checkpoint.name.split("-")[1])
    assert 4 <= step < 24

    for num_processes, sharded in ((1, None), (2, True)):
        name = f"resumed-{num_processes}"
        shutil.copytree(runs, tmp_path / name)
        assert_same(distilled(name, launch.distill, run, *rest, num_processes=num_processes, sharded=sharded), straight)
