"""What notebook 1 says of corpus and teacher: counted by hand."""

import json

import numpy as np
import pytest
import tiny_models
from datasets import Dataset

from distill_utils.evaluation import metrics
from distill_utils.experiments import comparison, teacher_facts
from distill_utils.models import students


def pairs(*rows: tuple[str, str, str]) -> Dataset:
    return Dataset.from_dict(dict(zip(("id", "document", "summary"), map(list, zip(*rows, strict=True)), strict=True)))


TRAIN = pairs(
    ("pandas.a:f", "one two three", "Add one."), ("pandas.a:g", "four", "Add them all up."), ("re:h", "four", "x y")
)
TEST = pairs(("pandas.b:DataFrame.drop_level", "four", "Drop it."), ("os:walk", "five six", "Walk on."))


def result(method: str, mean: float, half: float = 1.0) -> dict:
    row = {"method": method, "student": "", "parameters_m": 8.0, "latency_ms": 60.0, "ms_per_token": 2.5, "words": 9.0}
    for metric in metrics.METRICS:
        row |= {metric: mean, f"{metric}_low": mean - half, f"{metric}_high": mean + half}
    return row


def test_split_sizes_and_package_shares():
    splits = {"train": TRAIN, "test": TEST}
    assert [list(row.values())[1:] for row in teacher_facts.split_sizes(splits)] == [[3, 2, None], [2, 2, 1]]
    first = teacher_facts.package_shares(splits)[0]
    assert first == {"package": "pandas", "train (%)": pytest.approx(200 / 3), "test (%)": 50.0}


def test_rules_take_the_length_of_training_references():
    rules = comparison.rule_summaries(TRAIN, TEST, named=True)
    assert rules == {"lead_words": ["four", "five six"], "object_name": ["data frame drop level", "walk"]}
    named = {"a.b:Series.drop_none": "series drop none", "x:HTMLParser.feed2": "html parser feed 2", "x:__all__": "all"}
    named["plain"] = ""
    assert {identifier: comparison.object_name(identifier) for identifier in named} == named
    assert "object_name" not in comparison.rule_summaries(TRAIN, TEST, named=False)
    long = pairs(("a", "one two three four", "w"))
    assert comparison.rule_summaries(TRAIN, long, named=False)["lead_words"] == ["one two three"]  # 8 words over 3


def test_copying_of_a_copied_and_a_free_reference():
    coverage, density = teacher_facts.copying(
        pairs(("a", "one two three four", "one two three four"), ("b", "one", "five six"), ("c", "one", "!"))
    )
    assert coverage == [1.0, 0.0] and density == [4.0, 0.0]


def test_card_is_read_from_a_folder_and_may_be_missing(tmp_path):
    assert teacher_facts.read_card(str(tmp_path)) == {}
    stages = [{"stage": "denoising", "steps": 5, "settings": {"seed": 1}}]
    card = {"stages": stages, "command": "make teachers", "decoding": {"num_beams": 4}}
    card["rouge"] = {"rouge2": [10.5, 9.5, 11.5]}
    (tmp_path / "card.json").write_text(json.dumps(card))
    assert teacher_facts.stage_rows(card) == [{"stage": "denoising", "steps": 5}]
    rows = {row["card"]: row["value"] for row in teacher_facts.card_rows(teacher_facts.read_card(str(tmp_path)))}
    assert rows["scores"] == "ROUGE-2 10.50 (9.50 to 11.50)"
    assert rows["decoding"] == "num_beams 4" and rows["commit"] == "–"


def test_paired_table_takes_the_better_rule():
    rules = [result("lead_words", 10), result("object_name", 12)]
    scores = {
        name: dict.fromkeys(metrics.METRICS, np.full(20, mean))
        for name, mean in (("lead_words", 10.0), ("object_name", 12.0))
    }
    ahead = dict.fromkeys(metrics.METRICS, np.full(20, 15.0))
    rows = teacher_facts.against_rules(result("teacher", 15), ahead, rules, scores)
    assert [row["difference"] for row in rows] == [3.0] * 4 and rows[0]["object name"] == "12.00 (11.00 to 13.00)"


def test_beams_are_compared_document_by_document(tmp_path):
    folders = {}
    for beams, score, latency in ((1, 8.0, 30.0), (4, 9.0, 60.0)):
        folders[beams] = tmp_path / str(beams)
        folders[beams].mkdir()
        (folders[beams] / "scores.json").write_text(json.dumps({"rouge2": [score] * 10}))
        (folders[beams] / "results.json").write_text(json.dumps({"rouge2": score, "latency_ms": latency}))
    rows = teacher_facts.beam_rows(folders, folders[4])
    assert [row["change"] for row in rows] == [-1.0, None]


def test_passes_count_two_operations_a_weight():
    model = tiny_models.tiny_bart()
    weights = students.count_parameters(model)["decoder"] + tiny_models.VOCAB_SIZE * model.config.d_model
    passes = [{"batch_size": 1, "ms": 2.0, "gflops": 30.0}, {"batch_size": 8, "ms": 9.0, "gflops": 60.0}]
    ceiling = {"float32": 120.0, "bfloat16": None}
    rows = teacher_facts.pass_rows(model, passes, 0.5, ceiling)
    assert [row["share of ceiling (%)"] for row in rows[:2]] == [25.0, 50.0]
    assert rows[-1]["GFLOP/s"] == pytest.approx(2 * weights / 0.0005 / 1e9)


def test_verdict_follows_the_numbers():
    rules = [result("lead_words", 10), result("object_name", 9)]
    fine = {"different": 1.0, "empty": 0.0, "repeating": 0.0}
    texts = {"reference": fine, "teacher": fine}
    compared = [{"metric": metric, "difference": 0.7, "low": 0.1, "high": 1.0} for metric in ("ROUGE-1", "ROUGE-2")]
    text = teacher_facts.verdict(result("teacher", 20), rules, compared, texts, 400)
    assert "Distill" in text and "beats lead words and object name" in text and "stock" not in text
    assert "it is better than lead words by 0.7 (0.1 to 1.0)" in text
    unclear = [compared[0], compared[1] | {"low": -0.1}]
    assert "not shown to be better" in teacher_facts.verdict(result("teacher", 11), rules, unclear, texts, 400)
    below = [row | {"low": -2.0, "high": -1.0} for row in compared]
    texts["teacher"] = fine | {"different": 0.3, "empty": 0.2}
    text = teacher_facts.verdict(result("teacher", 5), rules, below, texts, 240)
    assert "worse than the better of lead words and object name" in text  # the only one that it was tested against
    assert "nothing to teach" in text and "stock sentences" in text and "20 % are empty" in text
    assert "Smoke run" in teacher_facts.verdict(result("teacher", 5), rules, below, texts, 24)


def test_text_rows_count_different_and_novel_texts():
    sources = ["a b c", "d e f", "g h i"]
    written = {"reference": ["Say a.", "Say d.", "Say g."], "teacher": ["The same."] * 3}
    rows, found = teacher_facts.text_rows(sources, written)
    assert found["teacher"]["different"] == pytest.approx(1 / 3)
    assert {row["of the texts"]: row["teacher"] for row in rows}["novel words (%)"] == 100.0
