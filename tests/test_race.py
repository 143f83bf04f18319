"""Budgets, shapes and the race: pure parts by hand-computed cases, and whole races of tiny models, killed and resumed."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_models import tiny_bart

from distill_utils.artifacts import InputError
from distill_utils.experiments import budget, race


def prices(updates: dict[str, float], **changes) -> dict:
    """Return prices without overhead: rungs of 100, 200, 400, ... updates, a tenth of them a cooldown."""
    each = {"score": 0.0, "labels": False, "parameters": 1.0}
    found = {name: {"update": seconds} | each for name, seconds in updates.items()}
    return {
        "candidates": found, "labels": 0.0, "end": 0.0, "measured": 0.0, "first_rung": 100, "cooldown_share": 0.1,
    } | changes  # fmt: skip


class Scores:
    """Made-up scores by name: mean after the first rung, gain a doubling; what was asked for is kept."""

    def __init__(self, means: dict[str, float], gain: float = 1.0, noise: float = 3.0):
        self.means, self.gain, self.noise, self.asked = means, gain, noise, []

    def __call__(self, name: str, updates: int, seed: int) -> np.ndarray:
        self.asked.append((name, updates, seed))
        drawn = np.random.default_rng([sorted(self.means).index(name), updates, seed])
        shared = np.random.default_rng(0).normal(0, 5, 200)  # documents are hard or easy for all alike
        values = drawn.normal(0, self.noise, 200)
        return shared + values - values.mean() + self.means[name] + self.gain * np.log2(updates / 100)


# -------------------------------------------------------------------------------------------------------------- budgets


def test_budgets_are_read_with_their_units():
    assert budget.parse_budget("0.03s", 2.0, "100M", "1GB") == budget.Budget(30.0, 2.0, 100.0, 1024.0)
    assert budget.parse_budget(" 30 MS ", parameters="1.5b") == budget.Budget(latency=30.0, parameters=1500.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"latency": "30"}, "latency '30' is no amount with its unit"),
        ({"latency": "30M"}, "30ms or 0.03s"),
        ({"parameters": "many"}, "parameters 'many'"),
        ({"memory": "0MB"}, "memory '0MB'"),
        ({"speedup": -1.0}, "speedup -1 is negative"),
    ],
)
def test_bad_budgets_are_rejected(given, message):
    with pytest.raises(InputError, match=message):
        budget.parse_budget(**given)


def test_candidate_shapes_halve_both_stacks():
    assert budget.candidate_shapes(tiny_bart(3, 2)) == ["3-1", "2-2", "2-1", "1-2", "1-1"]


def rows_of(**latencies: float) -> list[dict]:
    """Return measured rows of a teacher of 40 ms and of shapes named like s6_3."""
    row = {"parameters_m": 10.0, "memory_mb": 40.0}
    rows = [{"name": "teacher", "student": "", "latency_ms": 40.0, "speedup": 1.0, **row}]
    for name, value in latencies.items():
        shape = name[1:].replace("_", "-")
        rows.append({"name": shape, "student": shape, "latency_ms": value, "speedup": 40 / value, **row})
    return rows


def test_only_the_largest_shapes_that_fit_start():
    rows = rows_of(s6_3=30.0, s6_1=22.0, s3_6=36.0, s3_3=24.0, s3_1=15.0, s1_3=20.0, s1_1=10.0)
    assert budget.choose_shapes(rows, budget.Budget(latency=30.0)) == ["6-3"]
    assert budget.choose_shapes(rows, budget.Budget(latency=24.0)) == ["6-1", "3-3"]
    assert budget.choose_shapes(rows, budget.Budget(latency=21.0)) == ["3-1", "1-3"]
    assert budget.choose_shapes(rows, budget.Budget(latency=21.0, speedup=2.5)) == ["3-1"]
    why = budget.fit_column(rows, budget.Budget(latency=24.0), ["6-1", "3-3"])
    assert why[0].startswith("latency 1.67 times off") and why[2] == why[4] == "starts" and "larger" in why[5]


def test_at_most_three_shapes_start():
    rows = rows_of(s8_1=9.0, s4_2=9.0, s2_4=9.0, s1_8=9.0)
    assert budget.choose_shapes(rows, budget.Budget(latency=9.0)) == ["8-1", "4-2", "2-4"]


def test_a_budget_that_nobody_meets_names_the_nearest_one_that_can_be_met():
    rows = rows_of(s6_3=30.0, s1_1=10.04)
    with pytest.raises(InputError, match="nearest is 1-1, ask for --latency 10.1ms --speedup 3.98") as error:
        budget.choose_shapes(rows, budget.Budget(latency=5.0, speedup=8.0))
    assert "\n" not in str(error.value)
    assert budget.choose_shapes(rows, budget.Budget(latency=10.1, speedup=3.98)) == ["1-1"]


# ------------------------------------------------------------------------------------------------------------- the race


def test_prices_of_rungs_follow_the_trunk():
    made = prices({"a": 1.0}, end=7.0)
    made["candidates"]["a"]["score"] = 5.0
    # Trunks stand at 90, 180, 360 updates; a rung goes on from there.
    assert [race.rung_seconds(made, "a", rung) for rung in range(3)] == [105.0, 115.0, 225.0]
    assert race.seed_seconds(made, "a", 200) == 205.0


def test_rungs_halve_and_time_drops_the_last():
    made = prices(dict.fromkeys("abcd", 1.0), labels=50.0, end=10.0, measured=20.0)
    made["candidates"]["d"]["labels"] = True
    assert race.next_rung(made, "abcd", 0, 20.0, 480.0) == list("abcd")
    assert race.next_rung(made, "abcd", 0, 20.0, 479.0) == list("abc")  # labels are for d alone
    assert race.next_rung(made, "abc", 0, 20.0, 129.0) == []
    # 2 x 110 for the rung, 2 x 200 for second seeds, 10 for the end
    assert race.next_rung(made, "cab", 1, 100.0, 730.0) == ["c", "a"]
    assert race.next_rung(made, "cab", 1, 100.0, 729.0) == []
    assert race.next_rung(made, "c", 1, 100.0, 220.0) == ["c"]  # alone it needs no second seed
    planned = race.planned_rungs(made, 1150.0)
    assert [(row["updates"], row["candidates"], row["seconds"]) for row in planned] == [(100, 4, 450.0), (200, 2, 220.0)]


def test_hours_below_one_rung_name_what_is_needed():
    made = prices({"a": 30.0, "b": 6.0}, measured=300.0, end=300.0)
    with pytest.raises(InputError, match="one candidate needs 1.00, all 2 need 1.17"):
        race.check_hours(made, 3599.0)
    race.check_hours(made, 3600.0)


def test_worse_candidates_and_those_without_time_are_told_apart():
    means = {"a": 20.0, "b": 20.1, "c": 19.9, "d": 10.0}
    score = Scores(means)
    found = race.run_race(prices(dict.fromkeys("abcd", 1.0)), 400.0 + 220 + 400, score)
    assert found["fates"] == {
        "a": "not separated from the winner", "b": "winner", "c": "dropped for time before 200 updates",
        "d": "worse after 100 updates",
    }  # fmt: skip
    assert found["finalists"] == {"a": 2, "b": 2} or found["finalists"] == {"b": 2, "a": 2}
    assert score.asked[4:] == [("b", 200, 0), ("a", 200, 0), ("b", 200, 1), ("a", 200, 1)]
    assert found["seconds"] == 1020.0 and found["ended"] == "the time was used up"
    again = race.run_race(prices(dict.fromkeys("abcd", 1.0)), 1020.0, Scores(means))
    assert again["winner"] == found["winner"] and again["rows"] == found["rows"]


def test_a_race_ends_when_nobody_gains_and_the_best_rung_counts():
    score = Scores({"a": 20.0, "b": 10.0}, gain=-1.0)
    found = race.run_race(prices(dict.fromkeys("ab", 1.0)), 1e6, score)
    assert (found["winner"], found["updates"]) == ("a", 100) and "no student gained" in found["ended"]
    assert score.asked == [("a", 100, 0), ("b", 100, 0), ("a", 200, 0)]  # b is worse, so no second seed is needed


def test_the_simplest_that_is_not_separated_is_named():
    made = prices(dict.fromkeys("abc", 1.0))
    for name, size in (("a", 9.0), ("b", 3.0), ("c", 1.0)):
        made["candidates"][name]["parameters"] = size
    found = race.run_race(made, 300.0, Scores({"a": 20.1, "b": 20.0, "c": 10.0}))
    assert (found["winner"], found["simplest"]) == ("a", "b")
    assert found["finalists"] == {"a": 1, "b": 1}  # no time for a second seed
