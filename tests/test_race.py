"""Budgets, shapes and the race by hand-computed cases, and whole races of tiny models, killed and resumed."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import WORDS, tiny_bart, tiny_tokenizer
from transformers import GenerationConfig

from distill_utils.__main__ import main
from distill_utils.artifacts import InputError, read_json
from distill_utils.distillation import pseudo_labels
from distill_utils.evaluation import ctranslate, scoring
from distill_utils.experiments import budget, distill, fine_tuning, pricing, race, runs
from distill_utils.models.loading import load_model, save_model
from distill_utils.report import batch, settings


def prices(updates: dict[str, float], **changes) -> dict:
    """Return prices without overhead: rungs of 100, 200, 400, ... updates, a tenth of them a cooldown."""
    each = {"score": 0.0, "labels": False, "parameters": 1.0}
    found = {name: {"update": seconds} | each for name, seconds in updates.items()}
    return {
        "candidates": found, "labels": 0.0, "end": 0.0, "measured": 0.0, "states": 0.0, "first_rung": 100,
        "cooldown_share": 0.1, "max_rungs": 0,
    } | changes  # fmt: skip


class Scores:
    """Made-up scores by name: mean after the first rung, gain a doubling; what was asked for is kept, call by call."""

    def __init__(self, means: dict[str, float], gain: float = 1.0, noise: float = 3.0):
        self.means, self.gain, self.noise, self.asked = means, gain, noise, []

    def __call__(self, students: list[tuple[str, int, int]]) -> list[np.ndarray]:
        self.asked.append(students)
        return [self.scores_of(*student) for student in students]

    def scores_of(self, name: str, updates: int, seed: int) -> np.ndarray:
        drawn = np.random.default_rng([sorted(self.means).index(name), updates, seed])
        shared = np.random.default_rng(0).normal(0, 5, 200)  # documents are hard or easy for all alike
        values = drawn.normal(0, self.noise, 200)
        return shared + values - values.mean() + self.means[name] + self.gain * np.log2(updates / 100)


# -------------------------------------------------------------------------------------------------------------- budgets


def test_budgets_are_read_with_their_units():
    limits = {"latency": 30.0, "speedup": 2.0, "parameters": 100.0, "memory": 1024.0}
    assert budget.parse_budget("0.03s", 2.0, "100M", "1GB") == limits
    assert budget.parse_budget(" 30 MS ", parameters="1.5b") == {"latency": 30.0, "parameters": 1500.0}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"latency": "30"}, "latency '30' is not an amount with a unit"),
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


EIGHT = {"s6_3": 30.0, "s6_1": 22.0, "s3_6": 36.0, "s3_3": 24.0, "s3_1": 15.0, "s1_3": 20.0, "s1_1": 10.0}
FOUR = {"s8_1": 9.0, "s4_2": 9.0, "s2_4": 9.0, "s1_8": 9.0}


@pytest.mark.parametrize(
    ("latencies", "limits", "chosen"),
    [
        (EIGHT, {"latency": 30.0}, ["6-3"]),  # the largest that fit
        (EIGHT, {"latency": 24.0}, ["6-1", "3-3"]),
        (EIGHT, {"latency": 21.0}, ["3-1", "1-3"]),
        (EIGHT, {"latency": 21.0, "speedup": 2.5}, ["3-1"]),
        (FOUR, {"latency": 9.0}, ["8-1", "4-2", "2-4"]),  # three at most
    ],
)
def test_shapes_that_start(latencies, limits, chosen):
    assert budget.choose_shapes(rows_of(**latencies), limits) == chosen
    why = budget.fit_column(rows_of(**EIGHT), {"latency": 24.0}, ["6-1", "3-3"])
    assert why[0] == "latency off by 66.7 %" and why[2] == why[4] == "starts" and "larger" in why[5]


def test_a_budget_that_nobody_meets_names_the_nearest_one_that_can_be_met():
    rows = rows_of(s6_3=30.0, s1_1=10.04)
    with pytest.raises(InputError, match="nearest, 1-1, needs --latency 10.1ms --speedup 3.98"):
        budget.choose_shapes(rows, {"latency": 5.0, "speedup": 8.0})
    assert budget.choose_shapes(rows, {"latency": 10.1, "speedup": 3.98}) == ["1-1"]


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
    planned = [tuple(row.values()) for row in race.planned_rungs(made, 1150.0)]  # updates, candidates, seconds
    assert planned == [(100, 4, 450.0), (200, 2, 220.0)]


def test_hours_below_one_rung_name_what_is_needed():
    made = prices({"a": 30.0, "b": 6.0}, measured=300.0, end=300.0)
    assert len(race.planned_rungs(made, 1e6)) > len(race.planned_rungs(made | {"max_rungs": 2}, 1e6)) == 2
    with pytest.raises(InputError, match="one candidate needs 1.00 h, all 2 need 1.17 h"):
        race.check_hours(made, 3599.0)
    race.check_hours(made, 3600.0)


def test_hours_that_are_named_suffice_for_a_teacher_that_takes_its_share_of_them():
    made = prices({"a": 1.0}, end=20.0, measured=40.0 + 10.0, teacher=40.0)  # of 100 s
    with pytest.raises(InputError, match="one candidate needs 0.07 h"):  # 130 s would be less the teacher's 40 %
        race.check_hours(made, 100.0)
    race.check_hours(made | {"measured": 0.4 * 252.0 + 10.0}, 252.0)


def test_worse_candidates_and_those_without_time_are_told_apart():
    means = {"a": 20.0, "b": 20.1, "c": 19.9, "d": 10.0}
    score = Scores(means)
    found = race.run_race(prices(dict.fromkeys("abcd", 1.0)), 400.0 + 220 + 400, score)
    assert found["fates"] == {
        "a": "not separated from the winner", "b": "winner", "c": "dropped for time before 200 updates",
        "d": "worse after 100 updates",
    }  # fmt: skip
    assert found["finalists"] == {"a": 2, "b": 2}
    assert score.asked[1:] == [[("b", 200, 0), ("a", 200, 0)], [("b", 200, 1), ("a", 200, 1)]]
    assert found["seconds"] == 1020.0 and "used up" in found["ended"]
    again = race.run_race(prices(dict.fromkeys("abcd", 1.0)), 1020.0, Scores(means))
    assert again["winner"] == found["winner"] and again["rows"] == found["rows"]


def test_a_race_ends_when_nobody_gains_and_the_best_rung_counts():
    score = Scores({"a": 20.0, "b": 10.0}, gain=-1.0)
    found = race.run_race(prices(dict.fromkeys("ab", 1.0)), 1e6, score)
    assert (found["winner"], found["updates"]) == ("a", 100) and "no student gained" in found["ended"]
    assert score.asked == [[("a", 100, 0), ("b", 100, 0)], [("a", 200, 0)]]  # b is worse, so no second seed is needed


def test_the_simplest_that_is_not_separated_is_named():
    made = prices(dict.fromkeys("abc", 1.0))
    for name, size in (("a", 9.0), ("b", 3.0), ("c", 1.0)):
        made["candidates"][name]["parameters"] = size
    found = race.run_race(made, 300.0, Scores({"a": 20.1, "b": 20.0, "c": 10.0}))
    assert (found["winner"], found["simplest"]) == ("a", "b")
    assert found["finalists"] == {"a": 1, "b": 1}  # no time for a second seed
    del made["candidates"]["c"]
    for seconds, simplest, fate in ((300.0, "b", "not separated"), (800.0, "a", "worse")):
        found = race.run_race(made, seconds, Scores({"a": 20.5, "b": 20.0}))  # two seeds separate them, one does not
        assert (found["winner"], found["simplest"]) == ("a", simplest) and found["fates"]["b"].startswith(fate)


# ------------------------------------------------------------------------------------------------ a whole race, tiny

GIVEN = {
    "latency": "", "speedup": 0.0, "parameters": "1M", "memory": "", "hours": 1.0, "metric": "rouge1", "int8": False,
    "train_teacher": False,
    "dataset": "unset", "document_column": "document", "summary_column": "summary", "prefix": "", "num_train": 60,
    "num_validation": 24, "num_test": 16, "max_source_length": 24, "max_target_length": 10, "student_shapes": [],
    "methods": ["sft", "pl_kl"], "learning_rates": [0.003], "label_beams": 1, "decoding": ["num_beams=1"],
    "first_rung": 6, "batch_size": 8, "warmup_steps": 1, "seed": 0, "num_timed": 1, "max_rungs": 0,
    "cache_gb": 1.0, "workers": 1, "slurm": "",
}  # fmt: skip


@pytest.fixture
def given(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(distill, "decoder_maps", lambda *_: [None])  # half as many students to train
    save_model(tiny_bart(), tiny_tokenizer(), tmp_path / "teacher")
    generator, lines = random.Random(0), ["document,summary"]
    for _ in range(160):
        text = generator.choices(WORDS, k=generator.randint(6, 16))
        lines.append(f"{' '.join(text)},{' '.join(text[:5])}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n")
    return GIVEN | {"teacher": str(tmp_path / "teacher"), "dataset": str(tmp_path / "pairs.csv"), "output": ""}


def run_tiny_race(given: dict, killed_at: int = 0) -> tuple[dict, Path]:
    """Race two rungs and second seeds by fixed prices; `killed_at` raises inside the training of that student."""
    asked = distill.prepare(given)
    plan = distill.candidates(asked, ["3-1", "1-1"])
    made = prices(dict.fromkeys(plan, 1.0), first_rung=given["first_rung"], cooldown_share=distill.COOLDOWN)
    saved, real = [], runs.save_model

    def save(*arguments):
        saved.append(arguments)
        if len(saved) == killed_at:
            raise KeyboardInterrupt
        real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "save_model", save)
        found = race.run_race(made, 24.0 + 14 + 24, partial(distill.trained_and_scored, asked, plan))
    return found, asked.made[found["winner"], found["updates"], found["seed"]][0]


@pytest.mark.parametrize("num_train, batch_size, expected", [(60, 8, 30), (20, 8, 12), (60, 2, 120), (60, 1, 200)])
def test_the_first_rung_of_few_pairs_is_a_few_passes_over_them(given, num_train, batch_size, expected, monkeypatch):
    monkeypatch.setattr(distill, "FIRST_RUNG", 200)
    wanted = {"first_rung": 0, "num_train": num_train, "batch_size": batch_size, "warmup_steps": 6}
    asked = distill.prepare(given | wanted)
    assert (asked.base.training.max_steps, asked.given["first_rung"]) == (expected, expected)
    assert len(asked.splits["train"]) == num_train


def test_tables_of_a_race_whose_teacher_was_there(given):
    asked = distill.prepare(given | {"methods": ["sft"]})
    plan = distill.candidates(asked, ["3-1", "1-1"])
    made = prices(dict.fromkeys(plan, 1.0), first_rung=6, cooldown_share=distill.COOLDOWN, max_rungs=1, end=5.0)
    found = race.run_race(made, 20.0, partial(distill.trained_and_scored, asked, plan))
    teacher_test = distill.tested_on(asked, "validation")
    times = {row["part"]: row for row in distill.time_rows(asked, made, found, [teacher_test])}
    assert "fine-tuning the teacher" not in times
    assert times["training and scoring students"]["priced (s)"] == 12 and times["tests and export"]["priced (s)"] == 5
    fates = distill.fate_rows(plan, found)
    assert [row["updates"] for row in fates] == [6, 6] and fates[0]["fate"] == "winner"
    shapes = [{"name": name, "latency_ms": ms} for name, ms in (("teacher", 9.0), ("3-1", 5.0), ("1-1", 4.0))]
    front = distill.front_rows(asked, plan, found, shapes, teacher_test)
    assert {row["student"]: row["latency_ms"] for row in front} == {"": 9.0, "3-1": 5.0, "1-1": 4.0}


def test_a_winner_in_int8_is_tested_in_int8(given, tmp_path):
    asked = distill.prepare(given | {"methods": ["sft"], "int8": True})
    (run,) = distill.candidates(asked, ["3-1"]).values()
    trained, scored = distill._train_and_test(asked, run)
    assert "quantization" not in read_json(scored / "config.json")  # the race goes by the weights
    tested = distill.tested_on(asked, "test", run.name, trained)
    model, documents = load_model(trained / "student")[0], list(asked.splits["test"]["document"])
    decode, _ = ctranslate.converted_decoder(model, asked.tokenizer, tmp_path / "int8")
    assert [path.name for path in (tmp_path / "int8").iterdir()] == ["int8"]  # no copy in float32 beside it
    written = [row["prediction"] for row in scoring.read_predictions(tested)]
    assert written == decode(documents, **asked.options, **asked.decoding)
    assert read_json(tested / "config.json")["quantization"] == "int8"
    assert "quantization" not in read_json(distill.tested_on(asked, "test") / "config.json")  # the teacher's own


def test_the_verdict_says_what_was_tested_and_what_else_meets_the_budget():
    given = {"metric": "rouge1", "int8": True}
    asked = SimpleNamespace(given=given, limits={"latency": 30.0}, splits={"test": range(60)})
    found = {"winner": "a", "simplest": "b", "updates": 600, "finalists": {"a": 2, "b": 2}, "ended": "time was up"}
    rows = [row | {"rouge2": 8.0} for row in rows_of(s6_3=25.0)] + [{**rows_of()[0], "name": "int8", "rouge2": 7.5}]
    rows[-1]["latency_ms"] = 28.0
    student = {"method": "kd", "student": "6-3", "parameters_m": 10.0, "rouge1": 20.0, "rouge1_p_value": 0.01}
    student |= {"share": 0.9, "share_low": 0.85, "share_high": 0.93, "not_worse_5_percent": False}
    speed = {"latency_ms": 32.0, "speedup": 1.25}
    text = distill.verdict(asked, found, rows, student, {"rouge1": 22.0}, speed)
    # A second seed took part in the choice, not in the test.
    for said in ("int8 (28.0 ms", "KD 6-3 in int8", "it is worse", "it misses latency", "b is smaller", "one seed"):
        assert said in text
    assert "teacher (" not in text


@pytest.mark.slow
def test_a_killed_or_shared_race_ends_with_the_same_winner_and_weights(given, tmp_path, monkeypatch, capsys):
    whole, folder = run_tiny_race(given)
    assert len(whole["rows"]) == 4 + 2 and set(whole["finalists"].values()) <= {1, 2}
    monkeypatch.setenv("DISTILL_RUNS", str(tmp_path / "again"))
    for killed_at in (2, 4):  # in the first rung and, after two more students, in the second, whose trunks go on
        with pytest.raises(KeyboardInterrupt):
            run_tiny_race(given, killed_at)
    again = run_tiny_race(given)
    monkeypatch.setenv("DISTILL_RUNS", str(tmp_path / "shared"))
    monkeypatch.setenv("OMP_NUM_THREADS", str(2 * torch.get_num_threads()))  # shared by two: as many as here
    capsys.readouterr()
    shared = run_tiny_race(given | {"workers": 2})
    out = capsys.readouterr().out
    assert "4 of 4" in out and "building runs/sft" not in out and "building runs/pl_kl" not in out
    assert not list((tmp_path / "shared" / "workers").iterdir())
    weights = load_file(folder / "student" / "model.safetensors")
    for found, same in (again, shared):
        assert found == whole and same != folder and same.name == folder.name
        other = load_file(same / "student" / "model.safetensors")
        assert weights.keys() == other.keys() and all(torch.equal(weights[name], other[name]) for name in weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"workers": 0}, "workers 0 is too small"),
        ({"workers": 2, "slurm": "long"}, "exclude each other"),
        ({"parameters": ""}, "no budget: give latency"),
        ({"hours": 0.0}, "hours 0 is not positive"),
        ({"num_timed": 0}, "num_timed 0"),
        ({"max_rungs": -1}, "max_rungs -1"),
        ({"learning_rates": [0.1, -1.0]}, "learning_rate -1"),
        ({"num_test": -1}, "-1"),
        ({"metric": "bleu"}, "metric 'bleu' is unknown"),
        ({"methods": ["kd_cached"]}, "'kd_cached' cannot race"),
        ({"methods": ["kdd"]}, "method 'kdd' is unknown"),
        ({"student_shapes": ["3-9"]}, "is 9"),
        ({"decoding": ["top_p=0.5"]}, "decoding: top_p set nothing here"),
        ({"output": str(Path(__file__).parent)}, "tests exists: name a folder"),
        ({"train_teacher": True, "first_rung": 300, "num_train": 4}, "4 training pairs are too few"),
        ({"train_teacher": True, "first_rung": 6, "hours": 1e-6}, "hours 1e-06 are too few for 12 updates"),
    ],
)
def test_bad_requests_are_rejected_before_anything_is_trained(given, change, message):
    with pytest.raises(InputError, match=message):
        distill.prepare(given | change)


def test_a_teacher_without_a_length_may_write_as_much_as_targets(given):
    for length, changes in ((None, {}), (9, {"max_new_tokens": 9})):
        model, tokenizer = load_model(given["teacher"])
        model.generation_config = GenerationConfig(decoder_start_token_id=2, **changes)
        shutil.rmtree(given["teacher"])
        save_model(model, tokenizer, given["teacher"])
        assert fine_tuning.load_teacher(given["teacher"], 33)[0].generation_config.max_new_tokens == (length or 33)
        assert fine_tuning.load_teacher(given["teacher"], 0)[0].generation_config.max_new_tokens == length


@pytest.mark.parametrize("beams", [None, 2])  # as bart-base, which names beams and no length
def test_a_teacher_is_fine_tuned_on_the_pairs_before_anything_else_and_found_by_its_name(given, beams):
    model, tokenizer = load_model(given["teacher"])
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    kept = {key: getattr(model.config, key) for key in names}
    model.generation_config = GenerationConfig(**kept, num_beams=beams)
    shutil.rmtree(given["teacher"])
    save_model(model, tokenizer, given["teacher"])  # as a pre-trained model, it does not say how it summarizes
    # Fewer updates than a teacher needs are no fewer for it.
    asked = distill.prepare(given | {"train_teacher": True, "first_rung": 6, "num_train": 40, "hours": 0.5})
    own, name = asked.own_teacher, asked.given["teacher"]
    assert 12 <= own["updates"] <= fine_tuning.TEACHER_PASSES * 40 / 8 and own["priced_s"] > 0 < own["measured_s"]
    base, found = load_model(given["teacher"])[0], load_model(name)[0]
    assert name.startswith("sft-3-3-pairs-s0-")
    assert (found.generation_config.num_beams, found.generation_config.max_new_tokens) == (beams or 4, 10)
    for model in (found, load_model(own["name"])[0]):
        assert all(
            torch.equal(one, other) for one, other in zip(model.parameters(), asked.teacher.parameters(), strict=True)
        )
    moved = [not torch.equal(one, other) for one, other in zip(base.parameters(), found.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2  # nothing is frozen
    assert asked.base.teacher == name
    (before,) = Path(os.environ["DISTILL_RUNS"]).glob("shapes-*")  # of the base, which writes as much as it may
    references = asked.splits["validation"]["summary"]
    lengths = [len(ids) for ids in tokenizer(text_target=list(references))["input_ids"]]
    known = read_json(before / "results.json")
    assert known["num_new_tokens"] == int(np.median(np.minimum(lengths, asked.base.max_target_length)))
    assert "teacher, 1 beam" in [row["name"] for row in known["rows"]]  # the tuned one will have several
    plan = distill.candidates(asked, ["3-1"])
    costs = distill.race_prices(asked, plan, distill.measured_shapes(asked), distill.measured_prices(asked, plan))
    assert costs["measured"] > own["priced_s"]


def test_hours_that_pay_a_teacher_and_no_rung_are_rejected_before_the_teacher_is_trained(given, monkeypatch):
    dear = {"end": 3600.0}
    monkeypatch.setattr(distill, "race_prices", lambda *known, real=distill.race_prices: real(*known) | dear)
    monkeypatch.setattr(fine_tuning, "train_teacher", lambda *_: pytest.fail("trained a teacher"))
    wanted = given | {"train_teacher": True, "first_rung": 6, "methods": ["sft"], "student_shapes": ["1-1"]}
    with pytest.raises(InputError, match="hours 0.5 are too few for one rung of 6 updates: one candidate needs 1.0"):
        distill.prepare(wanted | {"hours": 0.5})
    with pytest.raises(pytest.fail.Exception, match="trained a teacher"):  # now the hours are enough
        distill.prepare(wanted | {"hours": 1.1})


def test_too_many_candidates_or_none_are_rejected_and_learning_rates_fill_the_rest(given):
    asked = distill.prepare(given | {"learning_rates": [0.1, 0.2, 0.3, 0.4, 0.5]})
    assert len(distill.candidates(asked, ["3-1"])) == 8
    assert len(distill.candidates(asked, ["3-1", "2-2", "1-1"])) == 6
    with pytest.raises(InputError, match="2 methods x 5 shapes"):
        distill.candidates(asked, budget.candidate_shapes(asked.teacher)[:5])
    shutil.rmtree(given["teacher"])
    save_model(tiny_bart(1, 1), tiny_tokenizer(), given["teacher"])
    with pytest.raises(InputError, match="nothing to cut"):
        distill.prepare(given)


DECODER_MAPS = distill.decoder_maps


def test_layer_maps_without_the_last_layer_race_against_one_with_it(given, monkeypatch):
    monkeypatch.setattr(distill, "decoder_maps", DECODER_MAPS)
    deep = tiny_bart(1, 12)
    found = {shape: distill.decoder_maps(deep, shape) for shape in ("1-1", "1-2", "1-3", "1-5", "1-12")}
    assert found == {"1-1": [[11], None], "1-2": [[0, 11], None], "1-3": [None], "1-5": [None], "1-12": [None]}
    asked = distill.prepare(given | {"learning_rates": [0.1, 0.2, 0.3]})  # of a teacher 3-3
    plan = distill.candidates(asked, ["3-1", "2-2"])
    tried = [(run.method, run.shape, run.decoder_layer_ids, run.training.learning_rate) for run in plan.values()]
    first = [(method, *place) for method in ("sft", "pl_kl") for place in (("3-1", [2]), ("2-2", None))]
    assert tried == [*((*each, 0.1) for each in first), ("sft", "3-1", None, 0.1), ("pl_kl", "3-1", None, 0.1)]
    assert len({run.name for run in plan.values()}) == 6 and next(iter(plan)) == "SFT 3-1 from layer 2, 0.1"
    names = ("SFT 3-1 from layer 2, 0.1", "SFT 3-1, 0.1")
    last, usual = (runs.cut_student(plan[name], asked.teacher)[0] for name in names)
    layers = asked.teacher.model.decoder.layers
    for student, layer in ((last, layers[2]), (usual, layers[0])):
        assert torch.equal(student.model.decoder.layers[0].fc1.weight, layer.fc1.weight)


def test_learning_rates_follow_the_cut_the_signal_and_the_width(given):
    asked = distill.prepare(given | {"learning_rates": [], "methods": ["sft", "kd"]})  # of a teacher 3-3
    unit = 5e-4 * 192 / asked.teacher.config.d_model
    plan = distill.candidates(asked, ["3-1", "2-2"])
    tried = [(run.method, run.shape, run.training.learning_rate) for run in plan.values()]
    first = [("sft", "3-1", 3 * unit), ("sft", "2-2", 1.5 * unit), ("kd", "3-1", 6 * unit), ("kd", "2-2", 3 * unit)]
    expected = [(*names, factor * rate) for factor in (1, 2) for *names, rate in first]
    assert [row[:2] for row in tried] == [row[:2] for row in expected]
    assert [row[2] for row in tried] == pytest.approx([row[2] for row in expected], rel=0.05)  # two digits
    assert len(distill.candidates(asked, ["1-1"])) == 2 * 3
    # A cut encoder is trained too: one decoder layer of three raises the rate to twice at most, the signal only KD's.
    usual = [fine_tuning.usual_learning_rate(asked.teacher, "1-1", method) for method in ("sft", "pl_kl", "kd")]
    assert usual == pytest.approx([2 * unit, 2 * unit, 4 * unit])


# -------------------------------------------------------------------------------------------------- the command line


def command_of(given: dict, *arguments: str) -> list[str]:
    """Return `distill` with the tiny race's settings, and further arguments."""
    named = ("teacher", "dataset", "parameters", "metric")
    left_out = (*named, "latency", "memory", "speedup", "hours", "output")
    overrides = [f"{name}={settings.as_text(value)}" for name, value in given.items() if name not in left_out]
    flags = [part for name in named for part in (f"--{name}", given[name])]
    return ["distill", *flags, *(part for text in overrides for part in ("-p", text)), *arguments]


def test_a_dry_run_by_the_command_prints_the_tables_and_trains_nothing(given, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given |= {"methods": ["sft"], "teacher": "teacher", "dataset": "pairs.csv"}
    command = command_of(given, "--dry-run")
    assert main(command) == 0
    out = capsys.readouterr().out
    assert all(text in out for text in ("teacher, int8", "3-2", "starts", "a larger one does too", "SFT 3-2, 0.003"))
    assert not list((tmp_path / "runs").glob("sft-*"))
    assert float(re.search(r"at most (\d+) MB", out)[1]) > 1000 * given["cache_gb"]  # of the teacher's states alone
    for told, read in (("--quiet", str.strip), ("--json", lambda said: json.loads(said)["plan"])):  # and nothing else
        assert main([*command, told]) == 0 and out.strip().endswith(read(capsys.readouterr().out))
    for change, message in (("--latency=0.001ms", "needs --latency"), ("--hours=0.0000001", "too few for one rung")):
        assert main([*command, change]) == 2
        said = capsys.readouterr()
        assert message in said.err and len(said.err.splitlines()) == 1
        assert "building" not in said.out and "reusing runs/shapes-" in said.out  # another budget, measured once


def test_the_output_folder_belongs_to_one_race(given, tmp_path, capsys, monkeypatch):
    assert main(command_of(given)) == 2 and "no --output" in capsys.readouterr().err
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    assert main(command_of(given, "--output", str(taken))) == 2
    assert "exists, not written by this command" in capsys.readouterr().err

    done = []
    monkeypatch.setattr(batch, "run_reports", lambda *given: done.append(given) or batch.OK)
    command = command_of(given, "--output", str(tmp_path / "student"))
    assert main(command) == 0 and done[0][1] == tmp_path / "student" / "report"
    (plan,) = done[0][0]  # as the notebook sees it, and without a home path
    assert (plan.path.parent / plan.values["output"]).resolve() == tmp_path / "student"
    assert not Path(plan.values["output"]).is_absolute()
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "config.json").touch()
    assert main(command) == 0  # the same race goes on in its own folder, another one does not
    assert main([*command, "--workers", "2"]) == 0  # by more workers it is the same race
    assert main([*command, "--hours", "2"]) == 2

    def second(plans, reports, told):  # while the first holds the folder
        return subprocess.run([sys.executable, "-m", "distill_utils", *command], stderr=subprocess.PIPE, text=True)

    monkeypatch.setattr(batch, "run_reports", second)
    other = main(command)
    assert other.returncode == 2 and "is in use by process" in other.stderr


@pytest.mark.slow
def test_the_command_killed_twenty_times_leaves_the_same_student(given, tmp_path):
    given |= {"student_shapes": ["3-1", "1-1"], "max_rungs": 2, "first_rung": 40}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    began = time.perf_counter()
    assert _start(given, tmp_path / "runs", whole).wait(timeout=600) == 0
    duration = time.perf_counter() - began
    assert (whole / "report" / "distill.html").exists() and len(load_model(whole)[0].get_decoder().layers) == 1
    for measured in ("prices", "shapes"):  # another measurement may be another race
        (folder,) = (tmp_path / "runs").glob(f"{measured}-*")
        shutil.copytree(folder, tmp_path / "again" / folder.name)
    drawn, kills = random.Random(0), 0
    while kills < 20:
        process = _start(given, tmp_path / "again", killed)
        try:
            assert process.wait(timeout=drawn.uniform(0.2, 1) * duration) == 0
            shutil.rmtree(killed)  # it came through: the kills left go to a race that begins again
            for made in (tmp_path / "again").iterdir():
                if not made.name.startswith(("prices-", "shapes-")):
                    shutil.rmtree(made) if made.is_dir() else made.unlink()
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the notebook's process too
            process.wait()
            kills += 1
    assert _start(given, tmp_path / "again", killed).wait(timeout=600) == 0
    assert (whole / "model.safetensors").read_bytes() == (killed / "model.safetensors").read_bytes()
    one, other = (read_json(folder / "report" / "distill.json")["race"] for folder in (whole, killed))
    assert one == other


def _start(given: dict, runs_folder: Path, output: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "distill_utils", *command_of(given, "--output", str(output), "--quiet")]
    environment = os.environ | {"DISTILL_RUNS": str(runs_folder)}
    return subprocess.Popen(command, env=environment, start_new_session=True)


def test_the_price_of_a_label_is_measured_anew_after_a_kill(given, monkeypatch):
    found, killed = [], []

    def label(_, rows, folder, **settings):
        found.extend(Path(folder).iterdir())
        (Path(folder) / "written").touch()
        if len(rows) > 16 and not killed:
            killed.append(True)
            raise KeyboardInterrupt
        return rows

    monkeypatch.setattr(pricing, "pseudo_labels", label)
    asked = distill.prepare(given)
    plan = distill.candidates(asked, ["1-1"])
    with pytest.raises(KeyboardInterrupt):
        distill.measured_prices(asked, plan)
    distill.measured_prices(asked, plan)
    assert not found


def test_an_update_on_pseudo_labels_is_priced_on_pseudo_labels(given, monkeypatch):
    trained_on = {}

    def seconds(asked, run, rows, states):
        trained_on[run.method] = rows["summary"]
        return 1.0

    monkeypatch.setattr(pricing, "_update_seconds", seconds)
    asked = distill.prepare(given | {"methods": ["kd", "pl_kl", "pl_gold"]})
    priced = distill.measured_prices(asked, distill.candidates(asked, ["1-1"]))
    labels = pseudo_labels.read_labels(runs.label(asked.base, asked.teacher, asked.splits["train"]))
    assert trained_on["kd"] == asked.splits["train"]["summary"]
    assert set(trained_on["pl_kl"]) <= set(labels["summary"]) and trained_on["pl_kl"] != trained_on["kd"]
    assert {*trained_on["pl_kl"]} < {*trained_on["pl_gold"]} <= {*trained_on["pl_kl"], *trained_on["kd"]}
    again = distill.prepare(given | {"methods": ["kd", "pl_kl", "pl_gold"], "seed": given["seed"] + 1})
    assert distill.measured_prices(again, distill.candidates(again, ["1-1"])) == priced  # no price depends on the seed


def test_a_full_disk_is_not_taken_for_a_teacher_without_int8(given, monkeypatch):
    def full(*_, **__):
        raise InputError("no space left")

    asked = distill.prepare(given)
    monkeypatch.setattr(ctranslate, "to_ctranslate2", full)
    with pytest.raises(InputError, match="no space left"):
        distill.measured_shapes(asked)
