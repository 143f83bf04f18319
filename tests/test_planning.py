"""Steps planned from configs: against real ones, torch's counter and counts by hand; time, disk and what must fit."""

import math
import re
from functools import cache, partial

import datasets
import pytest
import tiny_models
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5ForConditionalGeneration

from distill_utils.artifacts import InputError
from distill_utils.distillation import objectives, teacher_cache
from distill_utils.experiments import miniend
from distill_utils.planning import plan, step
from distill_utils.training import optimizers
from distill_utils.training.loop import set_attention

SIZES = {"d_model": 32, "d_kv": 16, "d_ff": 80, "num_heads": 4}
TEXT = {"source_length": 20, "target_length": 12, "batch_size": 8}
PLAIN = {"precision": "float32", "on": "cpu"}
CEILINGS = {"float32": 50.0, "bfloat16": 200.0, "bandwidth": 10.0}
RELATIONS = partial(objectives.miniend, **miniend.SILENT | miniend.PATHS["miniend"], num_relation_heads=4)
LOGITS = partial(objectives.miniend, **miniend.SILENT | miniend.PATHS["logits"])


def configs(teacher_layers=2, student_layers=1):
    teacher = tiny_models.tiny_t5(teacher_layers, teacher_layers, **SIZES).config
    return tiny_models.tiny_t5(student_layers, student_layers, **SIZES).config, teacher


@cache  # several tests read the same plan, none changes it
def planned(objective=LOGITS, layers=(2, 1), **changes):
    return step.plan_step(objective, *configs(*layers), **PLAIN | TEXT | changes)


def hand_count(layers: int, rows: int, source: int, target: int, vocabulary: int = tiny_models.VOCAB_SIZE) -> int:
    """Return the operations of one forward pass of T5 with SIZES: two for each weight and token, and attention."""
    inner, width, wide = SIZES["num_heads"] * SIZES["d_kv"], SIZES["d_model"], SIZES["d_ff"]
    encoder = 2 * source * (4 * width * inner + 2 * width * wide) + 4 * source**2 * inner
    decoder = 2 * target * (6 * width * inner + 2 * width * wide) + 4 * target * (target + source) * inner
    decoder += 2 * source * 2 * width * inner  # keys and values of the encoder's states
    return rows * (layers * (encoder + decoder) + 2 * target * width * vocabulary)


@pytest.mark.parametrize("on", ["cpu", "cuda"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_flops_agree_with_a_count_by_hand(on, attention):
    flops = planned(on=on, attention=attention, micro_batch_size=4)["flops"]
    assert flops["teacher"] == hand_count(2, 8, 20, 12)
    assert flops["student"] == hand_count(1, 8, 20, 12)
    # Twice the forward pass, or 2.5 times attention where the fused kernel computes the scores again.
    assert 2 * flops["student"] <= flops["backward"] < 2.3 * flops["student"]
    assert flops["recomputed"] == 0


@pytest.mark.parametrize("objective", [LOGITS, RELATIONS], ids=["logits", "relations"])
def test_flops_agree_with_those_of_a_real_step(objective):
    student, teacher = (T5ForConditionalGeneration(config) for config in configs())
    for model in (student.train(), teacher.eval()):
        set_attention(model, "eager")  # the counter knows no fused kernel of the CPU
    ids = torch.randint(5, tiny_models.VOCAB_SIZE, (8, 32))
    batch = {"input_ids": ids[:, :20], "labels": ids[:, 20:].contiguous()}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    counter = FlopCounterMode(display=False)
    with counter:
        objective(student, teacher, batch)["loss"].backward()
    flops = planned(objective, attention="eager")["flops"]
    assert flops["teacher"] + flops["student"] + flops["backward"] == counter.get_total_flops() > 0


def test_weights_gradients_and_moments_are_counted_to_the_byte():
    adamw, muon = (planned(batch_size=2, micro_batch_size=1, optimizer=name) for name in ("adamw", "muon"))
    student, teacher = (T5ForConditionalGeneration(config) for config in configs())
    sizes = {name: (parts["total"], parts["trainable"]) for name, parts in adamw["parameters"].items()}
    weights = student.num_parameters()
    assert sizes == {"student": (weights, weights), "teacher": (teacher.num_parameters(), 0)}
    memory, num_tensors = adamw["memory"], len(list(student.parameters()))
    assert memory["student weights"] == memory["gradients"] == 4 * weights
    assert memory["teacher weights"] == 2 * teacher.num_parameters()
    assert memory["optimizer"] == 8 * weights + 4 * num_tensors  # a float32 count of steps each
    assert adamw["checkpoint_bytes"] == 4 * weights + memory["optimizer"]
    assert adamw["peak_bytes"] == sum(memory.values())
    linear = [module for module in student.modules() if isinstance(module, torch.nn.Linear)]
    matrices = sum(module.weight.numel() for module in linear if module is not student.lm_head)
    assert 0 <= memory["optimizer"] - muon["memory"]["optimizer"] - 4 * matrices < 1000  # one moment; the counts


@pytest.mark.parametrize("native", [None, torch.bfloat16])
def test_a_plan_for_cuda_does_not_depend_on_what_this_processor_multiplies(native, monkeypatch):
    monkeypatch.setattr(optimizers, "amp_dtype", lambda *_: native)
    for on, dtype in {"cuda": "bfloat16", "cpu": "bfloat16" if native else "float32"}.items():
        work = step.plan_step(LOGITS, *configs(), **TEXT, optimizer="muon", on=on)["work"]
        assert {row["dtype"] for row in work if row["phase"] == "optimizer" and row["flops"]} == {dtype}


def test_causes_follow_the_objective():
    logits, relations = planned(LOGITS), planned(RELATIONS)
    assert logits["memory"]["logits"] >= 4 * 8 * 12 * tiny_models.VOCAB_SIZE and "relations" not in logits["memory"]
    assert relations["memory"].get("relations", 0) > 0 and relations["memory"].get("captured tensors", 0) > 0
    assert relations["memory"].get("logits", 0) == 0 < planned(LOGITS, precision="bfloat16")["memory"]["weight copies"]
    assert set(logits["memory"]) | set(relations["memory"]) <= set(step.CAUSES)


def test_recomputation_saves_activations_and_costs_one_forward_pass():
    kept, again = (planned(layers=(1, 4), checkpoint_activations=choice) for choice in (False, True))
    assert again["memory"]["activations"] < 0.6 * kept["memory"]["activations"]
    assert again["peak_bytes"] < kept["peak_bytes"]
    head = 8 * 2 * 12 * SIZES["d_model"] * tiny_models.VOCAB_SIZE
    assert 0.8 < again["flops"]["recomputed"] / (kept["flops"]["student"] - head) <= 1
    assert again["flops"]["backward"] == kept["flops"]["backward"]


def test_cuda_never_holds_all_scores_yet_the_cpu_does():
    long = {"source_length": 256, "batch_size": 2, "layers": (1, 2)}
    cpu, cuda = (planned(on=on, padded=False, **long)["memory"]["activations"] for on in ("cpu", "cuda"))
    scores = 4 * 2 * SIZES["num_heads"] * 256**2  # of one layer, with bytes
    assert cpu - cuda > 2 * scores
    assert planned(on="cuda", padded=True, **long)["memory"]["activations"] > cuda + scores  # masks


def test_accumulation_holds_one_micro_batch_and_devices_share_layers_but_not_embeddings():
    whole, one, four = planned(), planned(micro_batch_size=2), planned(micro_batch_size=2, devices=4)
    assert one["memory"]["activations"] < 0.35 * whole["memory"]["activations"]
    assert one["flops"]["teacher"] == whole["flops"]["teacher"]
    layers = {}
    for name, width in (("student", 4), ("teacher", 2)):
        parts = one["parameters"][name]
        layers[name] = width * (parts["encoder"] + parts["decoder"])
        assert four["memory"][f"{name} weights"] == width * parts["embeddings"] + layers[name] / 4
    embeddings = 4 * one["parameters"]["student"]["embeddings"]
    counts = one["memory"]["optimizer"] - 2 * (embeddings + layers["student"])
    assert four["memory"]["optimizer"] == pytest.approx(2 * embeddings + layers["student"] / 2, abs=counts)
    assert four["memory"]["gathered layers"] > 0 == one["communication_bytes"]
    assert four["flops"]["student"] == one["flops"]["student"] / 4
    sent = layers["teacher"] + 3 * layers["student"] + 2 * embeddings  # the student's layers twice and their gradients
    assert four["communication_bytes"] == pytest.approx(0.75 * sent, rel=0.05)


@pytest.mark.parametrize("family", ["bart", "pegasus", "t5_v1_1"])
def test_other_families_are_planned(family):
    config = tiny_models.FAMILIES[family]().config
    flops = step.plan_step(objectives.sft, config, None, **PLAIN | TEXT)["flops"]
    assert flops["student"] > 0 == flops["teacher"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 8, "micro_batch_size": 3}, "not a multiple of 3"),
        ({"source_length": 0}, "source_length 0"),
        ({"devices": 16}, "batch_size 8"),
        ({"optimizer": "sgd"}, "use adamw or adafactor or muon"),
        ({"optimizer": "muon", "devices": 2}, "muon .* 2 devices"),
        ({"optimizer": "adafactor", "devices": 2}, "adafactor .* 2 devices"),
        ({"teacher_dtype": "float16"}, "teacher_dtype 'float16'"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        planned(**changes)


# ----------------------------------------------------------------------------------------- time, disk, and what fits


def test_seconds_are_bound_by_arithmetic_or_by_bytes():
    step = planned()
    slow = plan.step_seconds(step, {"float32": 1e-3, "bfloat16": 1e-3, "bandwidth": 1e9})  # nothing but arithmetic
    phases = ("teacher", "student", "backward")
    assert slow["total"] == pytest.approx(sum(step["flops"][name] for name in phases) / 1e6, rel=1e-6)
    moved = plan.step_seconds(step, {"float32": 1e15, "bfloat16": None, "bandwidth": 1.0})
    # The update reads weights, gradients and two moments, and writes all but the gradients.
    assert moved["optimizer"] * 1e9 >= 7 * 4 * step["parameters"]["student"]["total"]
    assert plan.step_seconds(step, CEILINGS, 0.5)["total"] == 2 * plan.step_seconds(step, CEILINGS)["total"]
    with pytest.raises(InputError, match="utilization 0"):
        plan.step_seconds(step, CEILINGS, 0)


def test_plan_has_a_row_a_run():
    student, teacher = configs()
    runs = [
        {"run": "direct", "student": student, "teacher": teacher, "max_steps": 100},
        {"run": "two", "student": student, "teacher": teacher, "max_steps": 100, "devices": 2},
        {"run": "alone", "student": student, "max_steps": 100, "objective": objectives.sft},
    ]
    direct, two, alone = plan.plan(LOGITS, runs, ceilings=CEILINGS, link_bandwidth=1.0, **PLAIN | TEXT)
    assert direct["seconds/step"] * 100 / 3600 == direct["hours"] == direct["device_hours"]
    assert two["device_hours"] == 2 * two["hours"] and two["communication (GB/step)"] > 0
    assert alone["hours"] < direct["hours"] and "teacher (M)" not in alone and alone["teacher weights (GB)"] == 0
    causes = sum(value for name, value in direct.items() if name.removesuffix(" (GB)") in step.CAUSES)
    assert direct["peak_memory_gb"] == pytest.approx(causes)


def test_labels_are_bound_by_bytes_in_small_batches():
    teacher = configs()[1]
    given = {"source_length": 20, "target_length": 10, "ceilings": CEILINGS}
    one, many = (plan.label_seconds(teacher, 64, batch_size=size, **given) for size in (1, 64))
    parts = planned()["parameters"]["teacher"]
    read = 2 * (parts["decoder"] + parts["embeddings"])  # bfloat16, the tied head once
    assert one >= 64 * 10 * read / 1e10 and many < one / 4


def test_target_cache_is_what_the_writer_writes(tmp_path):
    teacher = tiny_models.tiny_t5()
    rows = [{"id": str(i), "input_ids": [5, 6, 7], "labels": [8, 9, 2]} for i in range(4)]
    teacher_cache.write_targets(
        tmp_path / "targets", teacher, datasets.Dataset.from_list(rows),
        pad_token_id=0, temperature=1.0, top_k=5, batch_size=2,
    )  # fmt: skip
    written = sum(path.stat().st_size for path in (tmp_path / "targets").glob("*.bin"))
    assert written == plan.target_cache_bytes(4 * 3, 5, tiny_models.VOCAB_SIZE)


def test_what_does_not_fit_is_refused_with_three_changes_that_do():
    given = PLAIN | TEXT | {"teacher_dtype": "float32", "batch_size": 2}
    pair = configs(1, 1)
    check = partial(plan.check_fits, LOGITS, *pair, ceilings=CEILINGS, **given)
    needed = step.plan_step(LOGITS, *pair, **given)["peak_bytes"]
    memory = math.ceil(needed / (1 - plan.RESERVE))
    assert check(memory=memory)["peak_bytes"] == needed
    with pytest.raises(InputError) as refused:
        check(memory=int(0.9 * memory))
    message = str(refused.value)
    assert "\n" not in message and message.startswith("a step needs 0.00 GB (")
    changes = [
        {name: yaml.safe_load(value) for name, value in re.findall(r"(\w+)=(\w+)", change)}
        for change in message.partition(": use ")[2].split(", or ")
    ]
    assert len(changes) == 3 and all(changes)
    added = [float(percent) for percent in re.findall(r"([+-]\d+)% device time", message)]
    assert added == sorted(added)
    for change in changes:
        assert step.plan_step(LOGITS, *pair, **given | change)["peak_bytes"] <= 0.9 * needed
    with pytest.raises(InputError, match="use a smaller model"):  # no change is enough
        check(memory=1000)


@pytest.mark.parametrize(
    "given",
    [{"batch_size": 24, "micro_batch_size": 8}, {"batch_size": 8, "optimizer": "muon"}, {"optimizer": "adafactor"}],
    ids=["eight do not divide a quarter", "muon", "adafactor"],
)
def test_every_change_that_is_proposed_can_be_planned(given):
    given = TEXT | PLAIN | given
    settings = step.plan_step(objectives.sft, configs()[0], **given)["settings"]
    kinds = plan._changes(settings)
    assert any("devices" in change for kind in kinds for change in kind) == (settings["optimizer"] == "adamw")
    for change in (change for kind in kinds for change in kind):
        assert step._check_step(settings | change) >= 1, change


def test_moments_of_adafactor_are_rows_and_columns():
    student = T5ForConditionalGeneration(configs()[0])
    sizes = [sum(weight.shape) if weight.ndim == 2 else weight.numel() for weight in student.parameters()]
    kept = planned(batch_size=2, micro_batch_size=1, optimizer="adafactor")["memory"]["optimizer"]
    assert 4 * sum(sizes) <= kept <= 4 * (sum(sizes) + 4 * len(sizes))  # and the size of each weight


# ------------------------------------------------------------------------------------------------------ the machine


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_ceilings_leave_out_what_the_machine_lacks(dtype, monkeypatch):
    monkeypatch.setattr(plan, "CPU_SIZE", 64)
    monkeypatch.setattr(plan, "CPU_BYTES", 2**16)
    monkeypatch.setattr(plan, "amp_dtype", lambda on: dtype)
    found = plan.machine_ceilings()
    assert set(found) == {"float32", "bfloat16", "bandwidth"} and (found["bfloat16"] is None) == (dtype is None)
    assert all(0 < value < math.inf for value in found.values() if value)


def test_first_call_is_not_timed():
    calls = []
    times = plan.run_times(lambda: calls.append(0), 3, torch.device("cpu"))
    assert len(calls) == 4 and len(times) == 3 and min(times) >= 0


def test_encoder_flops_agree_with_torch():
    num_tokens = 24
    model = tiny_models.tiny_bart(d_model=64, encoder_ffn_dim=256).eval()
    set_attention(model, "eager")  # plain products, which the counter sees
    ids = torch.full((1, num_tokens), 5)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.get_encoder()(ids, torch.ones_like(ids))
    # Biases and norms are counted as weights; in models this narrow they are a few per cent.
    assert 1 <= plan.encoder_flops(model, num_tokens) / counter.get_total_flops() <= 1.1
