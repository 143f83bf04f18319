"""A ladder of teachers: what is measured and compared, what the words say, and what is refused before any training."""

import numpy as np
import pytest
import torch
from tiny_models import tiny_t5, tiny_tokenizer

from distill_utils.artifacts import InputError, read_json, write_json
from distill_utils.data import denoising
from distill_utils.experiments import scaling
from distill_utils.models import students
from distill_utils.models.loading import load_model, save_model


@pytest.fixture
def places(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_RUNS", str(tmp_path / "runs"))
    for name, depth in (("large", 3), ("small", 1)):
        save_model(tiny_t5(depth, depth, seed=depth), tiny_tokenizer(), tmp_path / name)
    return {name: str(tmp_path / name) for name in ("large", "small")}


def made(tmp_path, name: str, losses: list[float]):
    (tmp_path / name).mkdir()
    write_json(tmp_path / name / "scores.json", {"loss": losses})
    write_json(tmp_path / name / "results.json", {"parameters": 7})
    return tmp_path / name


def test_ladder_is_sorted_by_size(places):
    found = scaling.load_ladder(list(places.values()))
    assert list(found) == [places["small"], places["large"]]


def test_what_is_no_ladder_is_rejected(places, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["another"])
    save_model(tiny_t5(1, 1, vocab_size=len(tokenizer) + 8), tokenizer, tmp_path / "other")
    small, other = places["small"], str(tmp_path / "other")
    for names, message in (([], "not a ladder"), ([small] * 2, "not a ladder"), ([small, other], "another tokenizer")):
        with pytest.raises(InputError, match=message):
            scaling.load_ladder(names)


def test_text_is_tested_window_by_window_as_the_model_itself_counts(places):
    held_out = np.random.default_rng(0).integers(5, 60, size=600).astype(np.uint16)
    folder = scaling.test_text("small", places["small"], held_out, 4, 16, "text_infilling")
    losses = read_json(folder / "scores.json")["loss"]
    model, tokenizer = load_model(places["small"])
    stream = denoising.denoising_stream(held_out, tokenizer, "text_infilling", 16, 1, seed=0)
    for number, loss in enumerate(losses):
        (batch,) = stream(number)
        batch.pop("ids")
        with torch.no_grad():
            assert loss == pytest.approx(float(model(**batch).loss), rel=1e-5)
    results = read_json(folder / "results.json")
    assert results["loss"] == pytest.approx(np.mean(losses))
    assert results["parameters"] == students.count_parameters(model)["total"]
    assert scaling.test_text("small", places["small"], held_out, 4, 16, "text_infilling") == folder
    assert scaling.test_text("large", places["large"], held_out, 4, 16, "text_infilling") != folder


def test_row_is_the_mean_over_seeds_and_windows(tmp_path):
    seeds = [made(tmp_path, "a", [1.0, 3.0]), made(tmp_path, "b", [2.0, 6.0])]
    found = scaling.row("kd", seeds, updates=5)
    assert found["loss"] == 3.0 and found["seeds"] == 2 and found["updates"] == 5 and found["parameters"] == 7
    assert found["loss_low"] <= 3.0 <= found["loss_high"]


def test_the_lower_loss_is_the_better_one(tmp_path):
    noise = np.random.default_rng(0).normal(size=60)
    worse, better = made(tmp_path, "worse", list(4 + noise)), made(tmp_path, "better", list(3.9 + noise))
    test = scaling.compare("ours", [better], "theirs", [worse])
    assert test["difference"] == pytest.approx(-0.1) and "ours beats theirs: -0.100" in scaling.in_words(test)
    assert "loses to" in scaling.in_words(scaling.compare("ours", [worse], "theirs", [better]))
    assert "cannot be separated from" in scaling.in_words(scaling.compare("ours", [worse], "theirs", [worse]))
    split = scaling.compare("ours", [better, better, worse], "theirs", [worse, worse, better])
    assert split["low"] < 0 < split["high"] and not split["seeds_agree"]  # over windows alone it would be a difference
    assert "cannot be separated from theirs: -0.033 (" in scaling.in_words(split)


@pytest.mark.parametrize(
    ("intervals", "says"),
    [
        ([], "One teacher"),
        ([(0.1, 0.2), (-0.2, -0.1)], "Take a, a smaller teacher**: in one seed its student's loss is 0.150 (0.1"),
        ([(-0.3, -0.2), (-0.2, -0.1)], "Take the largest"),
        ([(-0.3, -0.2), (-0.1, 0.1)], "no capacity gap is shown"),
    ],
)
def test_gap_is_read_from_the_intervals(intervals, says):
    tests = [
        {"versus": f"by {name}", "difference": (low + high) / 2, "low": low, "high": high}
        for name, (low, high) in zip("ab", intervals, strict=False)
    ]
    assert says in scaling.gap_verdict(tests, 1)
    wide = [test | {"low": -1.0, "high": 1.0} for test in tests]
    assert not wide or scaling.gap_verdict(wide, 3).startswith("**Keep the largest teacher**")


@pytest.mark.parametrize(("scratch", "says"), [(4.5, "**One teacher shows no gap"), (3.5, "**Train on the text alone")])
def test_a_teacher_is_named_only_where_its_student_is_better_than_without(scratch, says):
    rows = [{"name": "scratch", "loss": scratch}, {"name": "by a", "loss": 4.0}, {"name": "a", "loss": 2.0}]
    assert scaling.verdict([], rows, [], [], 400, 1, 100).startswith(says)


def test_equal_cost_counts_both_rounds():
    # 100 updates: 40 of the assistant at 5, 60 of its student at 2, against direct ones at 4.
    assert scaling.equal_cost_steps(4.0, 5.0, 2.0, (40, 60)) == 80
    assert scaling.equal_cost_steps(1e9, 1.0, 1.0, (1, 1)) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": [1, 0]}, "plan_devices 0 is too small"),
        ({"devices": [3]}, "3 devices do not divide plan_batch_size 8"),
        ({"batch_size": 12, "micro_batch_size": 4}, "2 devices do not divide .* passes of plan_micro_batch_size 4"),
        ({"steps": 0}, "plan_steps 0"),
        ({"micro_batch_size": -1}, "plan_micro_batch_size -1"),
        ({"models": ["t5-3b"]}, "has no student"),
    ],
)
def test_an_impossible_plan_is_rejected_first(changes, message):
    fine = {"models": ["a", "b"], "devices": [1, 2], "batch_size": 8, "micro_batch_size": 2, "steps": 5}
    scaling.check_plan(**fine)
    with pytest.raises(InputError, match=message):
        scaling.check_plan(**fine | changes)


def test_rounds_of_a_chain_share_the_updates():
    rounds = scaling.plan_rounds(["a", "b", "c"], [1, 2, 3], 4, 8, 8, 100)
    assert [(row["run"], row["max_steps"]) for row in rounds] == [("a > c", 100), ("a > b", 50), ("b > c", 50)]
    assert {row["micro_batch_size"] for row in rounds} == {2} and rounds[1]["student"] == rounds[2]["teacher"] == 2
    assert [row["run"] for row in scaling.plan_rounds(["a", "b"], [1, 2], 1, 8, 8, 100)] == ["a > b"]
