"""Variants as text, what a change did, published claims, the verdict: hand-made scores with known answers."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from tiny_models import tiny_bart

from distill_utils.artifacts import InputError
from distill_utils.evaluation import statistics
from distill_utils.experiments import ablations, checks, comparison, runs
from distill_utils.report import dashboard
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
        ("kd shape=6-1", ["shape is unknown"]),
        ("kd hidden_weight=big", ["hidden_weight", "'big'", "3.0"]),
        ("sft freeze_encoder=0", ["freeze_encoder", "0", "True"]),
        ("kd decoder_layer_ids=1", ["decoder_layer_ids", "1"]),
        ("kd hidden_weight", ["hidden_weight", "name=value"]),
        ("kd top_k=1.5", ["top_k", "1.5"]),
        (" versus kd", ["names no method"]),
        ("pl_gold", ["pl_gold", "changes nothing"]),
        ("kdd", ["'kdd'", "pl_gold"]),
        ("kd divergence=kl", ["'kl'", "reverse_kl", "tvd"]),
        ("kd match=middle", ["'middle'", "inputs"]),
        ("kd_cached top_k=1000", ["1000", "96"]),
        ("pl_kl kl_weight=0.5", ["pl_kl does not read kl_weight", "on_policy"]),
        ("kd label_smothing=0.1 versus kd", ["kd reads no pseudo-labels", "label_smothing"]),
        ("pl label_beams=4", ["label_beams", "num_beams"]),
        ("pl cross_fit=both", ["'both'", "own"]),
        ("pl cross_fit=other", ["cross_fit_base"]),
        ("pl label_filters={'copied':1}", ["copied", "copy_rate"]),
        ("pl label_num_beams=4 label_temperature=1.0", ["num_beams 4", "sampling has no beams"]),
        ("pl label_num_candidates=8", ["num_candidates 8"]),
    ],
)
def test_an_impossible_variant_is_rejected_before_training(text, parts):
    with pytest.raises(InputError) as error:
        changed, _ = ablations.parse_ablation(replace(BASE, shape="2-1"), text)
        checks.check_runs([changed], tiny_bart(2, 2))
    assert "\n" not in str(error.value) and all(part in str(error.value) for part in parts)


@pytest.mark.parametrize("method", ["sft", "kd", "pl_kl", "on_policy", "kd_cached"])
def test_a_method_reads_the_fields_that_it_is_said_to_read(method):
    run, teacher = replace(BASE, method=method, shape="3-1"), tiny_bart()
    values = {"ce_weight": 0.3, "kl_weight": 0.3, "temperature": 3.0, "divergence": "tvd", "jsd_beta": 0.3, "top_k": 3}
    values |= {"hidden_weight": 0.0, "match": "inputs", "normalize_hidden": False, "supervise_forward": False}
    values |= {"teacher_dropout": True, "target_samples": 5, "on_policy_share": 0.3}
    assert ablations.READERS.keys() - values.keys() == {"label_filters", "label_teachers", "cross_fit"}
    for name, value in values.items():
        pair = run, replace(run, **{name: value})
        cuts = [runs.cut_student(each, teacher)[1] for each in pair]
        targets = [runs.kept_targets(each) for each in pair]
        read = cuts[0] != cuts[1] or (method == "kd_cached" and targets[0] != targets[1])
        assert read == (method in ablations.READERS[name]), name


def test_shapes_and_methods_get_their_own_learning_rates():
    plan = runs.grid(BASE, ["sft", "kd"], ["6-3", "6-1"], [0, 1])
    plan.append(ablations.parse_variant(replace(BASE, shape="6-1"), "kd learning_rate=0.5"))
    found = ablations.with_learning_rates(plan, ["6-1=0.004", "kd 6-1=0.008", "sft=0.002"], None)
    rates = {run.group: run.training.learning_rate for run in found}
    own = {"sft-6-3": 0.002, "kd-6-3": 1e-3, "sft-6-1": 0.002, "kd-6-1": 0.008, "kd-6-1-learning_rate_0.5": 0.5}
    assert rates == own and [run.name for run in found] == [run.name for run in plan]
    assert ablations.with_learning_rates(plan, [], None) == plan
    changed = replace(BASE, method="sft", shape="6-1", freeze_encoder=False, variant="freeze_encoder=False")
    found = ablations.with_learning_rates([plan[0], changed], ["sft=0.1", "sft freeze_encoder=False=0.2"], None)
    assert [run.training.learning_rate for run in found] == [0.1, 0.2]
    teacher, unset = tiny_bart(2, 4), replace(BASE, training=replace(BASE.training, learning_rate=0.0))
    unset = runs.grid(unset, ["sft", "kd"], ["2-1", "2-2"], [0])
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
            (folders[run.name] / "history.csv").write_text("step,seconds\n10,2.0\n20,5.0\n")
    return folders


def test_what_a_change_did_and_which_claims_it_confirms(tested):
    row = ablations.ablation_row(BASE, "kd versus sft", tested, [0, 1])
    kd, sft = (
        comparison.scores_over_seeds([tested[f"{name}-6-3-s{seed}"] for seed in (0, 1)]) for name in ("kd", "sft")
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

    rows = {row["comparison"]: row["here"] for row in ablations.claim_rows(BASE, tested, [0, 1], "abstractive")}
    assert rows["kd versus sft"] == rows["kd versus kd hidden_weight=0"] == "confirmed"
    assert rows["sft versus kd hidden_weight=0"] == "not separable" and rows["pl versus sft"] == "not tested here"
    swapped = {"kd-6-3-s0": tested["sft-6-3-s0"], "sft-6-3-s0": tested["kd-6-3-s0"]}
    rows = {row["comparison"]: row["here"] for row in ablations.claim_rows(BASE, swapped, [0], "abstractive")}
    assert rows["kd versus sft"] == "contradicted"
    for claim in rows:  # of every one both runs are possible
        checks.check_runs(list(ablations.parse_ablation(replace(BASE, cross_fit_base="base"), claim)), tiny_bart(6, 6))


def test_claims_on_other_data_are_left_out(tested):
    claims = {
        kind: {row["claim"] for row in ablations.claim_rows(BASE, tested, [0], kind)}
        for kind in ("abstractive", "extractive")
    }
    assert "KD beats SFT on abstractive data" in claims["abstractive"] - claims["extractive"]
    assert "Hidden states are the decisive part of KD" in claims["abstractive"] & claims["extractive"]


def test_a_few_documents_test_no_claim(tested):
    for folder in tested.values():
        scores = json.loads((folder / "scores.json").read_text())["rouge2"][:2]
        (folder / "scores.json").write_text(json.dumps({"rouge2": scores}))
    assert {row["here"] for row in ablations.claim_rows(BASE, tested, [0], "abstractive")} == {"not tested here"}


def test_the_documents_that_a_verdict_asks_for_would_show_the_difference():
    """In four of five repetitions, as of `detectable_difference`."""
    difference, documents, spread = 0.45, 400, 12.0
    said = [
        comparison.verdict(MEANS, [versus("KD 6-3", small, 1.96 * spread / documents**0.5)], STOPPED,
                           **BUDGET | {"seeds": 1})
        for small in (difference, difference / 2)
    ]  # fmt: skip
    times = float(re.search(r"about ([\d.]+) times", said[0])[1])
    assert "over 20 times" in said[1]  # 56 times as many: nobody has these
    assert statistics.detectable_difference(times * documents, 1, spread) == pytest.approx(difference, rel=0.01)


def test_a_published_figure_keeps_its_note():
    ours = [row("teacher", "teacher", 20.0) | {"student": "", "rougeL": 35.0}]
    given = ours, "EdinburghNLP/xsum", "facebook/bart-large-xsum"
    (found,) = comparison.beside_published(*given).to_dict("records")
    assert found["ROUGE-2 (published)"] == 21.85 and "forced first token" in found["note"]


def test_what_ablations_and_decodings_cannot_be_is_rejected():
    with pytest.raises(InputError, match="ablation_seeds is empty"):
        ablations.ablation_runs(BASE, ["kd versus sft"], [])
    with pytest.raises(InputError, match="decoding: num_beam "):
        ablations.parse_decoding(["num_beam=2"], tiny_bart())
    assert ablations.parse_decoding(["num_beams=2"], tiny_bart()) == {"num_beams": 2}
    penalties = [ablations.parse_variant(BASE, f"pl label_length_penalty={value}") for value in (-1.0, 1.0)]
    assert penalties[0].name != penalties[1].name


# ------------------------------------------------------------------------------------------------ verdict and signals

BUDGET = {"num_test": 400, "whole_test": True, "seeds": 3, "max_steps": 100}
STOPPED, GAINING = (
    {"sft 6-3": [{"validation_ce": 2.0, "lr": 2.0}, {"validation_ce": last, "lr": 1.0}]} for last in (2.1, 1.9)
)


def row(name: str, method: str, rouge2: float, seconds: float = 0.0, speedup: float = 2.0) -> dict:
    found = {"name": name, "method": method, "student": name.partition(" ")[2], "rouge2": rouge2, "speedup": speedup}
    found |= {"difference": rouge2 - 12, "low": rouge2 - 13, "high": rouge2 - 11}
    return found | share(rouge2 / 12, 0.1) | {"train_seconds": seconds, "label_seconds": 0.0}


def share(value: float, half: float) -> dict:
    low = value - half
    return {"share": value, "share_low": low, "share_high": value + half, "not_worse_5_percent": low > 0.95}


def versus(name: str, difference: float, half: float, other: str = "SFT 6-3", base: float = 8.0) -> dict:
    """Return a row of `compare_methods`, of a student whose rival has `base` ROUGE-2."""
    found = {"name": name, "versus": other, "student": other.partition(" ")[2], "difference": difference}
    found |= {"low": difference - half, "high": difference + half}
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


SMALL = row("SFT 6-1", "sft", 7.9, speedup=3.0)
EQUAL = [MEANS[0], MEANS[1] | share(1.0, 0.02)]  # SFT keeps all of the teacher's ROUGE-2
WON = versus("KD 6-1", 0.8, 0.3, "SFT 6-1", 7.0)


@pytest.mark.parametrize(
    ("means", "tests", "said", "left_out"),
    [
        (
            MEANS, [versus("KD 6-3", 0.5, 1.0)],
            ["No other signal", "8.2 times as many test documents and seeds",
             "67 % (57 to 77) of the teacher's", "worse by 4.0 (3.0 to 5.0)", "3 seeds"],
            ["emonstration", "95 %", "\n"],
        ),
        ([*MEANS, row("object name", "object_name", 8.5)], [], ["below object name"], []),
        (
            [EQUAL[0], EQUAL[1] | {"low": -1.0, "high": 0.5}], [],
            ["not shown to be better or worse", "100 % (98 to 102)", "at least 95 %"], [],
        ),
        ([*MEANS, SMALL], [], ["Take SFT 6-3"], []),  # none is shown to be equal to the teacher: the best
        ([*EQUAL, SMALL | share(1.0, 0.02)], [], ["Take SFT 6-1"], []),  # the fastest that is equal
        ([*EQUAL, SMALL | share(0.96, 0.02)], [], ["Take SFT 6-3"], []),
        ([*MEANS, SMALL], [versus("KD 6-3", 0.5, 1.0), WON], ["Take SFT 6-3", "beat SFT 6-3", "SFT: KD 6-1"], []),
        ([*MEANS, SMALL], [KD, WON | {"low": -0.1}], ["SFT: KD 6-3"], ["KD 6-1"]),
    ],
)  # fmt: skip
def test_what_a_verdict_says(means, tests, said, left_out):
    means = [*means, row("KD 6-1", "kd", 7.0)] if any(test["student"] == "6-1" for test in tests) else means
    text = comparison.verdict(means, tests, STOPPED, **BUDGET)
    assert all(part in text for part in said) and not any(part in text for part in left_out), text


@pytest.mark.parametrize("change", [{"seeds": 1}, {"whole_test": False}, {"histories": GAINING}])
def test_a_verdict_names_what_makes_it_a_demonstration(change):
    assert "a demonstration" in comparison.verdict(MEANS, [], **{"histories": STOPPED} | BUDGET | change)


def test_a_cooldown_is_judged_before_its_rate_falls():
    def history(*losses):
        rates = (0.1, 0.2, 0.2, 0.2, 0.1)
        return [{"validation_ce": loss, "lr": rate} for loss, rate in zip(losses, rates, strict=True)]

    middles = (2.2, 2.1, 2.0), (2.0, 2.1, 2.1), (2.0, 2.1, 2.0)
    falling, flat, equal = (history(3.0, *losses, 1.5) for losses in middles)
    assert [comparison.still_gains(each) for each in (falling, flat, equal)] == [True, False, False]
    both = {"sft 6-3": flat, "sft 6-1": falling}  # of these 6-3 is the one to take
    assert "demonstration" not in comparison.verdict(MEANS, [], both, **BUDGET)


def test_signals():
    initial = [{"student": "6-3", "kl_loss": 1.0, "empty": 0.0}, {"student": "6-1", "kl_loss": 5.0, "empty": 0.9}]
    tested = np.tile([2.0, 42.0], 1500)  # 22 on average
    rows = comparison.signal_rows(0.8, initial, tested + 6, tested)
    assert [row["signal"].split()[0] for row in rows] == ["abstractiveness", "initial", "initial", "quality"]
    assert "XSum" in rows[0]["reading"] and "empty" in rows[2]["reading"] and "memorized" in rows[3]["reading"]
    for novel, kind in ((0.8, "abstractive"), (0.55, "extractive"), (None, "")):  # what claims are judged by
        assert dashboard.kind_of({"signals": comparison.signal_rows(novel, [], None, tested)}) == kind
    equal, few = (comparison.signal_rows(None, [], *pair)[0]["reading"]
                  for pair in ((tested, tested), (tested[:4] + 6, tested[:4])))  # fmt: skip
    assert "memorized" not in equal + few and equal != few  # a ratio from so few says neither
    nothing = comparison.signal_rows(None, [], tested, np.zeros(100))[0]  # a teacher that scores nothing has no ratio
    assert "memorized" not in nothing["reading"] + nothing["measured"]
