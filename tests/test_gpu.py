"""What only a GPU can show; skipped without one, run there by benchmarks/gpu.sh.

bf16 objectives against float32, hooks beside fused attention, FSDP2 in one process, and a run that is killed and
continued.
"""

import multiprocessing
import os
import signal
from functools import partial

import pytest
import torch
from tiny_models import tiny_bart, tiny_batch, tiny_pegasus, tiny_t5
from torch.distributed.fsdp import FSDPModule

from distill_utils.artifacts import read_json
from distill_utils.device import mixed_precision
from distill_utils.distillation import objectives
from distill_utils.experiments import launch
from distill_utils.models import students
from distill_utils.training.loop import Training, fit, set_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
FAMILIES = {"bart": tiny_bart, "pegasus": tiny_pegasus, "t5": tiny_t5}
KD = {"encoder_layer_ids": [0, 2], "decoder_layer_ids": [0, 2]}
OBJECTIVES = {
    "sft": objectives.sft,
    "kd": partial(objectives.kd, **KD),
    "pl_kl": objectives.pl_kl,
    "miniend": partial(objectives.miniend, num_relation_heads=2),
}
CUDA = torch.device("cuda")


def models(family: str):
    """Return a teacher and a student of two of its three layers, without dropout."""
    off = {"dropout_rate": 0.0} if family == "t5" else {"dropout": 0.0}
    teacher = FAMILIES[family](3, 3, **off)
    return teacher, students.init_student(teacher, 2, 2)[0].train()


def batch_on(on: torch.device) -> dict:
    return {name: value.to(on) for name, value in tiny_batch(padding=2).items()}


def losses_and_gradients(family: str, objective: str, on: torch.device, dtype, attention: str):
    teacher, student = (model.to(on) for model in models(family))
    for model in (teacher, student):
        set_attention(model, attention)
    with mixed_precision(on, dtype):
        losses = OBJECTIVES[objective](student, teacher, batch_on(on))
    losses["loss"].backward()
    gradients = [p.grad.float().cpu().flatten() for p in student.parameters() if p.grad is not None]
    return {name: value.item() for name, value in losses.items()}, torch.cat(gradients)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_and_fused_attention_equal_float32_on_the_cpu(family, objective):
    expected, direction = losses_and_gradients(family, objective, torch.device("cpu"), None, "eager")
    exact, exact_direction = losses_and_gradients(family, objective, CUDA, None, "sdpa")
    assert exact == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert torch.cosine_similarity(exact_direction, direction, dim=0) > 0.9999
    rounded, rounded_direction = losses_and_gradients(family, objective, CUDA, torch.bfloat16, "sdpa")
    assert rounded == pytest.approx(expected, rel=0.05, abs=0.02)
    assert torch.cosine_similarity(rounded_direction, direction, dim=0) > 0.98


def train(folder, kill_at: int = 0) -> None:
    """Train 12 steps of KD with dropout, a checkpoint every four; kill the process at a step."""
    teacher = tiny_bart(3, 3).cuda()
    student, *_ = students.init_student(teacher, 3, 2)
    students.freeze(student, encoder=True, embeddings=True)

    def batches(step: int) -> list[dict]:
        return [tiny_batch(seed=step, padding=2) | {"ids": [f"row{step}-{i}" for i in range(3)]}]

    settings = Training(max_steps=12, batch_size=3, learning_rate=1e-3, log_every=1, checkpoint_every=4)
    objective = partial(objectives.kd, encoder_layer_ids=[], decoder_layer_ids=[0, 2], shared_encoder=True)

    def loss(model, batch: dict) -> dict:  # `batches` runs in processes of its own on a GPU
        if kill_at and batch["ids"][0] == f"row{kill_at}-0":
            os.kill(os.getpid(), signal.SIGKILL)
        return objective(model, teacher, batch)

    fit(student, loss, batches, settings, folder)
    torch.save(student.cpu().state_dict(), folder / "weights.pt")


def test_killed_run_ends_with_the_same_weights(tmp_path):
    for name, kills in (("whole", [0]), ("killed", [6, 9, 0])):
        (tmp_path / name).mkdir()
        for kill_at in kills:
            process = multiprocessing.get_context("spawn").Process(target=train, args=(tmp_path / name, kill_at))
            process.start()
            process.join()
            assert process.exitcode == (-signal.SIGKILL if kill_at else 0)
    whole, killed = (torch.load(tmp_path / name / "weights.pt") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def sharded_step(rank: int, folder) -> None:
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="29571")
    found = {}
    with launch.process_group():
        for sharded in (False, True):
            teacher, student = (model.cuda() for model in models("bart"))
            if sharded:
                launch.shard(teacher, frozen=True)
                launch.shard(student)
            objectives.miniend(student, teacher, batch_on(CUDA), num_relation_heads=2)["loss"].backward()
            norms = [p.grad.full_tensor() if sharded and hasattr(p.grad, "full_tensor") else p.grad
                     for p in student.parameters() if p.grad is not None]  # fmt: skip
            found[str(sharded)] = [float(gradient.float().norm()) for gradient in norms]
    (folder / "norms.json").write_text(str(found).replace("'", '"'))


@pytest.mark.skipif(not hasattr(FSDPModule, "reset_iter_state"), reason="sharding needs torch 2.12")
def test_sharded_gradients_in_one_process(tmp_path):
    torch.multiprocessing.spawn(sharded_step, args=(tmp_path,))
    found = read_json(tmp_path / "norms.json")
    assert found["True"] == pytest.approx(found["False"], rel=1e-4, abs=1e-6)
