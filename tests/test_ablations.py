"""Variants as text, what a change did, published claims: hand-made scores with known answers."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from tiny_models import tiny_bart

from distill_utils.artifacts import InputError
from distill_utils.evaluation import scoring, statistics
from distill_utils.evaluation.statistics import paired_test
from distill_utils.experiments import ablations, runs
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
    ],
)
def test_a_text_that_names_no_run_is_refused(text, parts):
    with pytest.raises(InputError) as error:
        ablations.parse_ablation(BASE, text)
    assert "\n" not in str(error.value) and all(part in str(error.value) for part in parts)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("kdd", ["'kdd'", "pl_gold"]),
        ("kd divergence=kl", ["'kl'", "reverse_kl", "tvd"]),
        ("kd match=middle", ["'middle'", "inputs"]),
        ("kd_cached top_k=1000", ["1000", "96"]),
        ("pl cross_fit=both", ["'both'", "own"]),
        ("pl cross_fit=other", ["cross_fit_base"]),
        ("pl label_filters={'copied':1}", ["copied", "copy_rate"]),
    ],
)
def test_an_impossible_variant_is_refused_before_training(text, parts):
    run = replace(ablations.parse_variant(BASE, text), shape="2-1")
    with pytest.raises(InputError) as error:
        runs.check_runs([run], tiny_bart(2, 2))
    assert "\n" not in str(error.value) and all(part in str(error.value) for part in parts)


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
    ours = [
        np.mean([scoring.read_scores(tested[f"{method}-6-3-s{seed}"])["rouge2"] for seed in (0, 1)], axis=0)
        for method in ("kd", "sft")
    ]
    assert row["difference"] == pytest.approx(np.mean(ours[0] - ours[1])) and 2.5 < row["low"] < row["high"] < 3.5
    assert row["p_value"] == paired_test(*ours)["p_value"]
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
    rows = {row["comparison"]: row["here"] for row in ablations.hypothesis_rows(BASE, tested, [0, 1])}
    assert rows["kd versus sft"] == rows["kd versus kd hidden_weight=0"] == "confirmed"
    assert rows["sft versus kd hidden_weight=0"] == "not confirmed" and rows["pl versus sft"] == "not tested here"
    swapped = {"kd-6-3-s0": tested["sft-6-3-s0"], "sft-6-3-s0": tested["kd-6-3-s0"]}
    rows = {row["comparison"]: row["here"] for row in ablations.hypothesis_rows(BASE, swapped, [0])}
    assert rows["kd versus sft"] == "contradicted"


def test_every_published_claim_names_possible_runs():
    teacher = tiny_bart(6, 6)
    for claim in ablations.claims():
        for run in ablations.parse_ablation(replace(BASE, cross_fit_base="base"), claim["comparison"]):
            runs.check_runs([run], teacher)


def test_holm_by_hand():
    assert statistics.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0] and statistics.holm([]) == []
