"""Real steps beside their plan: the allocator's peak against the planned one, and what must be refused."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import tiny_models
import torch

from distill_utils.artifacts import InputError
from distill_utils.device import device
from distill_utils.distillation import objectives
from distill_utils.experiments import miniend
from distill_utils.models.loading import empty_model
from distill_utils.planning import measure, step

WIDE = {"d_model": 96, "d_kv": 24, "d_ff": 384, "num_heads": 4, "vocab_size": 1000}
TEXT = {"source_length": 96, "target_length": 48, "batch_size": 8, "precision": "float32"}


def objective(path):
    return partial(objectives.miniend, **miniend.SILENT | miniend.PATHS[path], num_relation_heads=8)


def t5(layers, **changes):
    return tiny_models._t5_config(layers, layers, WIDE | changes)


def bart(layers):
    sizes = {"d_model": 96, "encoder_ffn_dim": 384, "decoder_ffn_dim": 384, "vocab_size": 1000}
    return tiny_models.tiny_bart(layers, layers, max_position_embeddings=128, **sizes).config


@pytest.mark.parametrize(
    ("path", "family", "changes"),
    [
        ("miniend", t5, {"attention": "eager"}),
        ("miniend_logits", t5, {"micro_batch_size": 4, "checkpoint_activations": True}),
        ("logits", t5, {"padded": False, "optimizer": "muon"}),
        ("miniend_logits", t5, {"precision": "bfloat16"}),
        ("miniend_logits", bart, {"micro_batch_size": 2}),
        ("logits", bart, {"padded": False, "batch_size": 2, "source_length": 8, "target_length": 8}),  # weights decide
    ],
)
def test_planned_peak_is_the_allocators(path, family, changes):
    if device().type == "cuda":
        pytest.skip("the allocator's record is that of the CPU")
    student, teacher = family(1), family(2)
    plan = step.plan_step(objective(path), student, teacher, **TEXT | changes, on="cpu")
    torch.backends.cuda.enable_cudnn_sdp(True)
    found = measure._run_steps(objective(path), student, teacher, plan["settings"], 1, 0)
    assert found["peak_bytes"] > 2e6 and not torch.backends.cuda.cudnn_sdp_enabled()  # as in training
    assert plan["peak_bytes"] == pytest.approx(found["peak_bytes"], rel=0.05)  # promised: 0.15


def test_a_step_is_measured_in_a_process_of_its_own():
    given = {"batch_size": 4, "micro_batch_size": 2, "source_length": 32, "target_length": 16, "precision": "float32"}
    found = measure.measure_step(objective("logits"), t5(1), t5(1), repeats=2, threads=1, **given)
    assert found["threads"] == 1 and found["seconds"] <= found["seconds_median"]
    assert found["tokens_per_second"] == pytest.approx(4 * 48 / found["seconds"])
    assert found["flops_per_second"] == pytest.approx(found["flops"] / found["seconds"])
    assert 0 < found["utilization"] < 1 and found["roofline_efficiency"] > 0
    assert found["planned_over_measured"] == found["planned_peak_bytes"] / found["peak_bytes"]


def end_at_once(student, teacher, batch):
    os._exit(9)  # as the kernel ends a process that takes too much


def raise_error(student, teacher, batch):
    raise RuntimeError("shapes\ndo not match")


def fill_a_gpu(student, teacher, batch):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def test_what_a_measuring_process_cannot_do_is_one_line(monkeypatch):
    plan = step.plan_step(objectives.sft, t5(1), None, **TEXT, on="cpu")
    with pytest.raises(InputError, match="most likely out of memory"):
        measure.measure_step(end_at_once, t5(1), plan=plan, **TEXT)
    monkeypatch.setattr(measure, "new_processes", lambda: ThreadPoolExecutor(1))
    for objective, message in (
        (fill_a_gpu, "out of memory .*: lower micro_batch_size"),
        (raise_error, "shapes do not match"),
    ):
        with pytest.raises(InputError, match=message):
            measure.measure_step(objective, t5(1), plan=plan, **TEXT)
    with pytest.raises(InputError, match="devices 2"):
        measure.measure_step(objectives.sft, t5(1), devices=2, **TEXT)


def test_memory_is_what_lives_each_storage_once_and_what_is_freed_again():
    before = measure.living_bytes()
    held = torch.ones(1000)
    views = [held[:10], held.view(10, 100)]
    assert measure.living_bytes() - before == 4000 and len(views) == 2
    assert 1e6 <= measure.allocated_peak(lambda: torch.ones(250_000).sum()) < 1.1e6


def test_random_models_keep_ties_and_give_finite_losses():
    model = measure.random_model(t5(2), torch.float32, torch.device("cpu"))
    assert model.lm_head.weight is model.get_encoder().embed_tokens.weight
    assert all(weight.isfinite().all() for weight in model.parameters())
    batch = measure.random_batch(TEXT | {"micro_batch_size": 2, "padded": True}, 1000, torch.device("cpu"))
    assert batch["attention_mask"].sum() == 2 * 96 - 1 and (batch["labels"] == -100).sum() == 1
    assert torch.isfinite(objectives.sft(model, None, batch)["loss"])


def test_named_models_have_the_published_numbers_of_parameters_or_fewer_layers():
    published = {"t5-small": 60.5e6, "t5-base": 222.9e6, "t5-large": 737.7e6, "t5-3b": 2851.6e6}  # Raffel et al. 2020
    for name, parameters in published.items():
        model = empty_model(measure.model_config(name), torch.float32)
        assert model.num_parameters() == pytest.approx(parameters, rel=0.001)
    assert measure.model_config("t5-base:6").num_decoder_layers == 6
    assert measure.model_config("pydocs-t5:2").num_layers == 2
    for wrong in ("t5-base:13", "t5-base:0", "t5-base:x"):
        with pytest.raises(InputError, match="give 1 to 12"):
            measure.model_config(wrong)
    with pytest.raises(InputError, match="t5-huge-nowhere"):
        measure.model_config("t5-huge-nowhere")


def test_relation_heads_divide_every_width():
    # Inner widths of 4,096, 512, 192 and 48; 64 divides 4,096 and 192, yet 32 is enough.
    for *names, heads in (("t5-3b", "t5-small", 32), ("pydocs-t5", "pydocs-t5-tiny", 24), ("t5-3b", "pydocs-t5", 32)):
        assert measure.relation_heads(*map(measure.model_config, names)) == heads
