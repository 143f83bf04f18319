"""Variants as text, what a change did, published claims, the verdict: hand-made scores with known answers."""

import json
from dataclasses import replace

import numpy as np
import pytest
from tiny_models import tiny_bart

from distill_utils.artifacts import InputError
from distill_utils.evaluation import scoring, statistics
from distill_utils.experiments import ablations, comparison, runs
from distill_utils.training.loop import Training

BASE = runs.StudentRun(
    method="sft", shape="6-3", teacher="t", max_source_length=24, max_target_length=10,
    training=Training(max_steps=4, learning_rate=1e-3), label_settings={"num_beams": 4},
)  # fmt: skip


def test_a_text_names_a_run():
    run = ablations.parse_variant(BASE, "kd hidden_weight=0 divergence=tvd learning_rate=2e-3 freeze_encoder=False")
    expected = replace(BASE, method="kd", hidden_weight=0, divergence="tvd", freeze_encoder=False)
    expected = replace(expected, training=replace(BASE.training, learning_rate=2e-3), variant=run.variant)
    assert run == expected and run.name.startswith("kd-6-3-hidden_weight_0_divergence_tvd")
    assert ablations.parse_variant(BASE, "pl") == replace(BASE, method="pl")
    labels = ablations.parse_variant(BASE, "pl label_num_beams=1 label_filters={'copy_rate':0.9}")
    assert labels.label_settings == {"num_beams": 1} and labels.label_filters == {"copy_rate": 0.9}
    assert BASE.label_settings == {"num_beams": 4}
    changed, against = ablations.parse_ablation(BASE, "kd ce_weight=0")
    assert (changed.ce_weight, against) == (0, replace(BASE, method="kd"))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("kd hidden=0", ["hidden", "hidden_weight", "learning_rate"]),
        ("kd shape=6-1", ["no shape"]),
        ("kd hidden_weight=big", ["hidden_weight", "'big'", "3.0"]),
        ("sft freeze_encoder=0", ["freeze_encoder", "'0'", "True"]),
        ("kd top_k=1.5", ["top_k", "1.5"]),
        (" versus kd", ["names no method"]),
        ("pl_gold", ["pl_gold", "changes nothing"]),
        ("kdd", ["'kdd'", "pl_gold"]),
        ("kd divergence=kl", ["'kl'", "reverse_kl", "tvd"]),
        ("kd match=middle", ["'middle'", "inputs"]),
        ("kd_cached top_k=1000", ["1000", "96"]),
        ("pl cross_fit=both", ["'both'", "own"]),
        ("pl cross_fit=other", ["cross_fit_base"]),
        ("pl label_filters={'copied':1}", ["copied", "copy_rate"]),
    ],
)
def test_an_impossible_variant_is_rejected_before_training(text, parts):
    with pytest.raises(InputError) as error:
        changed, _ = ablations.parse_ablation(replace(BASE, shape="2-1"), text)
        runs.check_runs([changed], tiny_bart(2, 2))
    assert "\n" not in str(error.value) and all(part in str(error.value) for part in parts)


def test_shapes_and_methods_get_their_own_learning_rates():
    plan = runs.grid(BASE, ["sft", "kd"], ["6-3", "6-1"], [0, 1])
    plan.append(ablations.parse_variant(replace(BASE, shape="6-1"), "kd learning_rate=0.5"))
    found = ablations.with_learning_rates(plan, ["6-1=0.004", "kd 6-1=0.008", "sft=0.002"], None)
    rates = {run.group: run.training.learning_rate for run in found}
    own = {"sft-6-3": 0.002, "kd-6-3": 1e-3, "sft-6-1": 0.002, "kd-6-1": 0.008, "kd-6-1-learning_rate_0.5": 0.5}
    assert rates == own and [run.name for run in found] == [run.name for run in plan]
    assert ablations.with_learning_rates(plan, [], None) == plan
    teacher = tiny_bart(2, 4)
    unset = runs.grid(
        replace(BASE, training=replace(BASE.training, learning_rate=0.0)), ["sft", "kd"], ["2-1", "2-2"], [0]
    )
    usual = [run.training.learning_rate for run in ablations.with_learning_rates(unset, ["kd 2-2=0.5"], teacher)]
    once = 0.0005 * 192 / teacher.config.d_model  # of the teacher's depth, from references
    assert usual == pytest.approx([4 * once, 8 * once, 2 * once, 0.5], rel=0.05)
    for text in ("6-2=0.1", "kdd=0.1", "kd=fast", "kd=True", "kd 6-1 s0=0.1"):
        with pytest.raises(InputError, match=text):
            ablations.with_learning_rates(plan, [text], None)


@pytest.fixture
def tested(tmp_path):
    """Test artifacts of sft, kd and logits-only KD for two seeds, with planted ROUGE-2 scores."""
    generator, folders = np.random.default_rng(0), {}
    easy = generator.uniform(0, 20, 200)
    for text, gain in (("sft", 0.0), ("kd", 3.0), ("kd hidden_weight=0", 0.01)):
        for seed in (0, 1):
            run = ablations.parse_variant(replace(BASE, training=replace(BASE.training, seed=seed)), text)
            folders[run.name] = tmp_path / run.name
            folders[run.name].mkdir()
            scores = easy + gain + generator.normal(0, 1, 200)
            (folders[run.name] / "scores.json").write_text(json.dumps({"rouge2": list(scores)}))
            (folders[run.name] / "results.json").write_text(json.dumps({"seconds": 5.0}))
    return folders


def test_what_a_change_did(tested):
    row = ablations.ablation_row(BASE, "kd versus sft", tested, [0, 1])
    kd, sft = (
        np.array([scoring.read_scores(tested[f"{method}-6-3-s{seed}"])["rouge2"] for seed in (0, 1)])
        for method in ("kd", "sft")
    )
    assert row["difference"] == pytest.approx(np.mean(kd - sft)) and 1.0 < row["low"] < row["high"] < 5.0
    assert row["p_value"] == statistics.compare(kd, sft)["p_value"] and row["seeds_agree"] and row["seeds"] == 2
    back = ablations.ablation_row(BASE, "sft versus kd", tested, [0, 1])
    assert back["difference"] == pytest.approx(-row["difference"])
    assert ablations.ablation_row(BASE, "pl versus sft", tested, [0, 1]) is None
    assert ablations.ablation_row(BASE, "kd versus sft", tested, [2]) is None
    assert ablations.ablation_row(BASE, "kd versus sft", tested, [1, 2])["seeds"] == 1  # the seeds that both have
    forecast = [{"student": "kd-6-3-hidden_weight_0", "ms/step": 7.0, "activations (MB)": 1.0}]
    texts = ["kd hidden_weight=0", "kd hidden_weight=0 versus sft"]
    first, second = ablations.ablation_rows(BASE, texts, tested, tested, [0, 1], forecast)
    assert first["high"] < 0 < second["high"] and first["ms/step"] == 7.0 and first["seconds"] == 5.0


def test_claims_are_judged_by_the_interval(tested):
    rows = {row["comparison"]: row["here"] for row in ablations.claim_rows(BASE, tested, [0, 1])}
    assert rows["kd versus sft"] == rows["kd versus kd hidden_weight=0"] == "confirmed"
    assert rows["sft versus kd hidden_weight=0"] == "not confirmed" and rows["pl versus sft"] == "not tested here"
    swapped = {"kd-6-3-s0": tested["sft-6-3-s0"], "sft-6-3-s0": tested["kd-6-3-s0"]}
    rows = {row["comparison"]: row["here"] for row in ablations.claim_rows(BASE, swapped, [0])}
    assert rows["kd versus sft"] == "contradicted"


def test_every_published_claim_names_possible_runs():
    teacher = tiny_bart(6, 6)
    for claim in ablations.claims():
        for run in ablations.parse_ablation(replace(BASE, cross_fit_base="base"), claim["comparison"]):
            runs.check_runs([run], teacher)


# ------------------------------------------------------------------------------------------------ verdict and signals

BUDGET = {"num_test": 400, "whole_test": True, "seeds": 3, "max_steps": 100}
STOPPED = [[{"validation_ce": 2.0}, {"validation_ce": 2.1}]]


def row(name: str, method: str, rouge2: float, seconds: float = 0.0) -> dict:
    found = {"name": name, "method": method, "student": name.partition(" ")[2], "rouge2": rouge2, "speedup": 2.0}
    found |= {"rouge2_low": rouge2 - 1, "rouge2_high": rouge2 + 1, "rouge2_p_value": 0.001}
    found |= {"difference": rouge2 - 12, "low": rouge2 - 13, "high": rouge2 - 11}
    return found | share(rouge2 / 12, 0.1) | {"train_seconds": seconds, "label_seconds": 0.0}


def share(value: float, half: float) -> dict:
    low = value - half
    return {"share": value, "share_low": low, "share_high": value + half, "not_worse_5_percent": low > 0.95}


def versus(name: str, difference: float, half: float, other: str = "SFT 6-3", base: float = 8.0) -> dict:
    """Return a row of `compare_methods`, of a student whose rival has `base` ROUGE-2."""
    low, high = difference - half, difference + half
    found = {"name": name, "versus": other, "student": "6-3", "difference": difference, "low": low, "high": high}
    return found | share(1 + difference / base, half / base)


MEANS = [row("teacher", "teacher", 12.0), row("SFT 6-3", "sft", 8.0, 10), row("KD 6-3", "kd", 9.0, 20)]
MEANS += [row("PL 6-3", "pl", 8.9, 12)]
KD = versus("KD 6-3", 1.0, 0.5)


@pytest.mark.parametrize(
    ("tests", "taken"),
    [
        ([KD, versus("PL 6-3", 0.9, 0.5), versus("PL 6-3", -0.1, 0.3, "KD 6-3")], "PL 6-3"),  # cheaper, not worse
        ([KD, versus("PL 6-3", 0.9, 0.5), versus("KD 6-3", 0.1, 0.3, "PL 6-3")], "PL 6-3"),  # the same the other way
        ([KD, versus("PL 6-3", 0.9, 0.5), versus("PL 6-3", -0.1, 0.6, "KD 6-3")], "KD 6-3"),  # not shown
        ([versus("KD 6-3", 1.0, 1.5), versus("PL 6-3", -0.9, 0.5)], "SFT 6-3"),  # nothing is shown to beat it
        ([versus("KD 6-3", 0.2, 0.1)], "SFT 6-3"),  # better by less than what would pay for it
    ],
)
def test_the_student_to_take(tests, taken):
    assert comparison.choose_student(MEANS, tests, "6-3")["name"] == taken
    assert f"Take {taken}" in comparison.verdict(MEANS, tests, STOPPED, **BUDGET)


def test_a_verdict_says_what_it_cannot_tell():
    text = comparison.verdict(MEANS, [versus("KD 6-3", 0.5, 1.0)], STOPPED, **BUDGET)
    assert "No other signal is shown to beat SFT" in text
    assert "4.0 times as many test documents and seeds" in text  # intervals narrow with the root
    assert "emonstration" not in text and "3 seeds" in text
    assert "67 % of the teacher's ROUGE-2" in text and "that it is worse is real (4.0, from 3.0 to 5.0)" in text
    assert "95 %" not in text and "\n" not in text
    rule = row("object name", "object_name", 8.5)
    other = row("KD 6-1", "kd", 7.0)
    assert "scores below object name" in comparison.verdict([*MEANS, rule, other], [], STOPPED, **BUDGET)
    open_one = [MEANS[0], MEANS[1] | {"low": -1.0, "high": 0.5} | share(1.0, 0.02)]
    text = comparison.verdict(open_one, [], STOPPED, **BUDGET)
    assert "whether it is worse is open" in text and "it keeps at least 95 % (98 to 102)" in text
    gaining = [[{"validation_ce": 2.0}, {"validation_ce": 1.9}]]
    for change, histories in ({"seeds": 1}, STOPPED), ({"whole_test": False}, STOPPED), ({}, gaining):
        assert "a demonstration" in comparison.verdict(MEANS, [], histories, **BUDGET | change)


def test_the_fastest_shape_that_is_not_worse_than_the_teacher_is_taken():
    small = row("SFT 6-1", "sft", 7.9) | {"speedup": 3.0}
    assert "Take SFT 6-3" in comparison.verdict([*MEANS, small], [], STOPPED, **BUDGET)  # none is: the best
    good = [row | share(1.0, 0.02) for row in (MEANS[1], small)]
    assert "Take SFT 6-1" in comparison.verdict([MEANS[0], *good], [], STOPPED, **BUDGET)
    open_one = [good[0], small | share(0.96, 0.02)]
    assert "Take SFT 6-3" in comparison.verdict([MEANS[0], *open_one], [], STOPPED, **BUDGET)


def test_what_beats_sft_is_said_of_every_shape():
    small = [row("SFT 6-1", "sft", 7.0), row("KD 6-1", "kd", 7.8)]
    won = versus("KD 6-1", 0.8, 0.3, "SFT 6-1", 7.0) | {"student": "6-1"}
    text = comparison.verdict([*MEANS, *small], [versus("KD 6-3", 0.5, 1.0), won], STOPPED, **BUDGET)
    assert "Take SFT 6-3" in text and "beat SFT 6-3" in text and text.count("KD 6-1") == 1
    open_one = won | {"low": -0.1}
    assert "KD 6-1" not in comparison.verdict([*MEANS, *small], [KD, open_one], STOPPED, **BUDGET)


def test_signals():
    initial = [{"student": "6-3", "kl_loss": 1.0, "empty": 0.0}, {"student": "6-1", "kl_loss": 5.0, "empty": 0.9}]
    rows = comparison.signal_rows(0.8, initial, {"rouge2": 28.0}, 22.0)
    assert [row["signal"].split()[0] for row in rows] == ["abstractiveness", "initial", "initial", "quality"]
    assert "XSum" in rows[0]["reading"] and "empty" in rows[2]["reading"] and "memorized" in rows[3]["reading"]
    assert "CNN" in comparison.signal_rows(0.55, [], None, 1.0)[0]["reading"]
    assert "memorized" not in comparison.signal_rows(None, [], {"rouge2": 22.0}, 22.0)[0]["reading"]
