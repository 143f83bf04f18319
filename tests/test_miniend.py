"""Distillation on plain text: every path from description to a fine-tuned student, on tiny models."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_runs import planted
from tiny_models import VOCAB_SIZE, tiny_bart, tiny_t5, tiny_tokenizer

from distill_utils.artifacts import InputError, read_json, write_json
from distill_utils.distillation import objectives
from distill_utils.evaluation import tasks
from distill_utils.experiments import miniend
from distill_utils.experiments.miniend import PATHS, AgnosticRun
from distill_utils.models import students
from distill_utils.models.loading import load_model, save_model
from distill_utils.training.loop import Training, read_history

TRAINING = Training(max_steps=3, batch_size=4, learning_rate=1e-3, log_every=1, seed=0)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_RUNS", str(tmp_path / "runs"))
    save_model(tiny_bart(), tiny_tokenizer(), tmp_path / "teacher")
    teacher, tokenizer = load_model(tmp_path / "teacher")
    generator = np.random.default_rng(0)
    tokens, held_out = (generator.integers(5, 60, size=size).astype(np.uint16) for size in (2000, 600))
    run = AgnosticRun(
        path="miniend", shape="2-1", teacher=str(tmp_path / "teacher"), training=TRAINING, source_length=16,
        denoising="text_infilling", num_relation_heads=4,
    )  # fmt: skip
    return run, teacher, tokenizer, tokens, held_out


def test_every_path_from_description_to_a_tested_task(place, capsys):
    base, teacher, tokenizer, tokens, held_out = place
    before = {name: weight.clone() for name, weight in teacher.named_parameters()}
    plan = [replace(base, path=path) for path in PATHS]
    miniend.check_runs(plan, teacher)
    starts = [miniend.new_student(run, teacher).state_dict() for run in plan]
    for start in starts[1:]:
        assert all(torch.equal(start[name], starts[0][name]) for name in start)
    for run in plan:
        folder = miniend.distill(run, teacher, tokenizer, tokens, held_out)
        final = read_json(folder / "results.json")["final"]
        terms = {name for name, weight in PATHS[run.path].items() if weight}
        assert {name.replace("_weight", "_loss") for name in terms} <= final.keys()
        assert ("validation_loss" in final) == (run.path in ("scratch", "logits", "miniend_logits"))
        ids = {row["step"] for row in read_history(folder)}
        assert ids == {1, 2, 3}
    assert all(torch.equal(weight, before[name]) for name, weight in teacher.named_parameters())

    student, tokenizer = load_model(folder / "student")
    rows = {"train": planted(12, 1), "validation": planted(4, 2), "test": planted(6, 3)}
    tuned = miniend.fine_tune(
        "hidden", str(folder / "student"), student, tokenizer, "summaries", rows["train"], rows["validation"], TRAINING,
        24, 10,
    )  # fmt: skip
    moved, _ = load_model(tuned / "student")
    changed = [name for name, weight in moved.named_parameters() if not torch.equal(weight, student.state_dict()[name])]
    assert any("encoder" in name for name in changed) and "model.shared.weight" in changed
    tested = miniend.test_task(tuned, "summaries", rows["test"], 24, num_beams=1, max_new_tokens=6, num_speed=1)
    assert {"rouge1", "rouge2"} <= read_json(tested / "results.json").keys()


def test_classification_is_scored_row_by_row(place, monkeypatch):
    base, teacher, tokenizer, *_ = place
    words = ("list", "file")  # words that the tiny tokenizer has
    known = tasks.TASKS
    monkeypatch.setitem(known, "belongs", known["belongs"]._replace(labels=words))
    labels = [words[i % 2] for i in range(10)]
    rows = planted(10, 4).remove_columns("summary").add_column("summary", labels).add_column("label", labels)
    tuned = miniend.fine_tune(
        "teacher", base.teacher, teacher, tokenizer, "belongs", rows, rows.select(range(4)), TRAINING, 24, 8
    )
    tested = miniend.test_task(tuned, "belongs", rows, 24)
    found, scores = read_json(tested / "results.json"), read_json(tested / "scores.json")
    assert np.mean(scores["correct"]) == pytest.approx(found["accuracy"])


def test_same_text_for_every_path_and_exact_resume(place):
    base, teacher, tokenizer, tokens, held_out = place
    whole = miniend.distill(base, teacher, tokenizer, tokens, held_out)
    again = miniend.distill(base, teacher, tokenizer, tokens, held_out)
    assert whole == again
    other = miniend.distill(base, teacher, tokenizer, tokens[:-1], held_out)
    assert other != whole  # other text, other run


def test_narrow_student(place):
    base, teacher, tokenizer, tokens, held_out = place
    run = replace(base, width=teacher.config.d_model // 2)
    miniend.check_runs([run], teacher)
    folder = miniend.distill(run, teacher, tokenizer, tokens, held_out)
    assert load_model(folder / "student")[0].config.d_model * 2 == teacher.config.d_model


def test_copied_student_starts_from_the_teacher_s_layers(place):
    base, teacher, *_ = place
    student = miniend.new_student(replace(base, init="copied"), teacher)
    ids = students.layer_map(3, 2)
    for ours, layer in zip(students.encoder_layers(student), ids, strict=True):
        theirs = students.encoder_layers(teacher)[layer]
        assert torch.equal(ours.fc1.weight, theirs.fc1.weight)


def test_relations_alone_leave_the_last_decoder_block_s_end_untrained(place):
    base, teacher, tokenizer, tokens, held_out = place
    start = miniend.new_student(base, teacher).state_dict()
    folder = miniend.distill(base, teacher, tokenizer, tokens, held_out)
    end = load_model(folder / "student")[0].state_dict()
    assert torch.equal(start["model.decoder.layers.0.fc2.weight"], end["model.decoder.layers.0.fc2.weight"])
    assert not torch.equal(start["model.encoder.layers.1.fc2.weight"], end["model.encoder.layers.1.fc2.weight"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"path": "nothing"}, "path 'nothing' is unknown: use scratch, logits"),
        ({"init": "copy"}, "init 'copy' is unknown: use random or copied"),
        ({"init": "copied", "width": 8}, "a student of width 8 cannot copy layers"),
        ({"path": "hidden", "width": 8}, "path hidden compares hidden states of equal width"),
        ({"num_relation_heads": 7}, "num_relation_heads 7 does not divide the inner widths"),
        ({"shape": "9-1"}, "student_layers is 9"),
        ({"width": 17}, "width 17 leaves no whole"),
    ],
)
def test_bad_runs_are_refused_before_training(place, changes, said):
    base, teacher, *_ = place
    with pytest.raises(InputError, match=said):
        miniend.check_runs([replace(base, **changes)], teacher)


def test_nothing_and_twice_are_refused(place):
    base, teacher, *_ = place
    with pytest.raises(InputError, match="nothing to distil"):
        miniend.check_runs([], teacher)
    with pytest.raises(InputError, match="named twice"):
        miniend.check_runs([base, base], teacher)


def test_held_out_loss_is_the_mean_over_tokens(place):
    model = tiny_t5()
    generator = torch.Generator().manual_seed(0)
    batches = []
    for rows, length in ((2, 5), (3, 4)):
        labels = torch.randint(5, VOCAB_SIZE, (rows, length), generator=generator)
        labels[0, 2:] = -100
        ids = torch.randint(5, VOCAB_SIZE, (rows, 6), generator=generator)
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    total = tokens = 0.0
    for batch in batches:
        logits = model(**batch).logits.double()
        valid = batch["labels"] != objectives.IGNORED
        chosen = logits.log_softmax(-1)[valid].gather(1, batch["labels"][valid][:, None])
        total, tokens = total - float(chosen.sum().detach()), tokens + int(valid.sum())
    assert miniend.held_out_loss(model, batches)["validation_loss"] == pytest.approx(total / tokens, rel=1e-5)


# --------------------------------------------------------------------------------------------------------- comparing


def a_test(folder, **values):
    """Write a test artifact with one value a document."""
    folder.mkdir(parents=True)
    write_json(folder / "scores.json", {key: list(map(float, scores)) for key, scores in values.items()})
    (key, scores) = next(iter(values.items()))
    mean = float(np.mean(scores))
    write_json(folder / "results.json", {"rouge2" if key == "rouge2" else "score": mean})
    return folder


def test_result_row_averages_seeds_document_by_document(tmp_path):
    ours = [a_test(tmp_path / "a", rouge2=[10, 20, 30]), a_test(tmp_path / "b", rouge2=[20, 40, 30])]
    theirs = [a_test(tmp_path / "c", rouge2=[5, 20, 20])]
    row = miniend.result_row("miniend", "summaries", ours, theirs)
    assert miniend.mean_scores(ours).tolist() == [15, 30, 30]
    assert row["score"] == pytest.approx(25) and row["difference"] == pytest.approx(10) and row["seeds"] == 2
    assert row["score_low"] <= 25 <= row["score_high"] and row["metric"] == "ROUGE-2"


def test_gap_closed_is_the_share_of_the_way_and_leaves_out_tasks_without_one(tmp_path):
    generator = np.random.default_rng(0)
    tested = {}
    for task, way in (("one", 40.0), ("two", 20.0), ("flat", 0.0)):
        bottom = generator.uniform(0, 10, 200)
        for name, share in (("scratch", 0.0), ("teacher", 1.0), ("miniend", 0.25)):
            noise = generator.normal(0, 1, 200) if way else generator.normal(0, 5, 200)
            tested[name, task] = [a_test(tmp_path / f"{name}-{task}", correct=bottom + share * way + noise)]
    found = miniend.gap_closed(tested, "miniend", "scratch", "teacher")
    assert found["tasks"] == ["one", "two"]
    assert found["low"] < found["share"] < found["high"] and found["share"] == pytest.approx(0.25, abs=0.02)
    nothing = {key: value for key, value in tested.items() if key[1] == "flat"}
    assert miniend.gap_closed(nothing, "miniend", "scratch", "teacher")["share"] is None


def way(path, share, low, high, tasks=("one",)):
    return {"path": path, "share": share, "low": low, "high": high, "tasks": list(tasks)}


def test_headline_names_the_winner_and_what_it_cannot_tell():
    ways = [way("miniend", 0.3, 0.1, 0.5), way("logits", 0.6, 0.4, 0.8), way("self", -0.4, -0.6, -0.2)]
    text = miniend.headline([*ways, way("none", 0.9, 0.8, 1.0)], "miniend", 3, 100, 50, 250)
    assert text.startswith("**logits is the best path**: it closes 60 % (40 to 80)")
    assert "Its interval overlaps with that of miniend." in text
    assert "The untrained student closes 90 % (80 to 100): that text adds" in text.split("\n")[0]
    assert "The proposed path, miniend, does not win: it closes 30 % (10 to 50)." in text
    assert "Worse than scratch: self." in text and "3 seed(s), 100 updates on text, 50 of fine-tuning" in text
    others = [way("logits", 0.1, 0.0, 0.2), way("none", 0.1, 0.0, 0.2)]
    won = miniend.headline([way("miniend", 0.6, 0.4, 0.8), *others], "miniend", 1, 1, 1, 50)
    assert "does not win" not in won and "overlaps" not in won and "untrained" not in won
    nothing = miniend.headline([way("miniend", 0.1, -0.1, 0.3)], "miniend", 1, 1, 1, 50)
    assert nothing.startswith("**No path is shown to beat scratch**")
    assert "cannot tell" in miniend.headline([way("miniend", None, None, None, ())], "miniend", 1, 1, 1, 50)
    smoke = miniend.headline([way("miniend", 0.6, 0.4, 0.8)], "miniend", 1, 1, 1, 49)
    assert smoke.startswith("**Smoke run:** 49 test rows")


def test_the_floor_starts_where_the_paths_do(place):
    run, teacher, tokenizer, *_ = place
    floor = load_model(miniend.untrained(run, teacher, tokenizer))[0].state_dict()
    start = miniend.new_student(replace(run, path="scratch"), teacher).state_dict()
    assert all(torch.equal(floor[name], start[name]) for name in floor)


def test_the_learning_rate_is_the_one_that_fine_tunes_best(place, tmp_path):
    base, *_ = place
    tried = []

    def train(run):
        rate = run.training.learning_rate
        tried.append((run.path, rate))
        folders = [tmp_path / f"{rate}-{task}" for task in ("a", "b")]
        for folder, loss in zip(folders, (abs(rate - 0.02), 1.0), strict=True):
            folder.mkdir()
            write_json(folder / "results.json", {"final": {"validation_ce": loss}})
        return folders

    best, rows = miniend.search_learning_rate(base, [0.01, 0.025, 0.1], train)
    assert best == 0.025 and tried == [("miniend", rate) for rate in (0.01, 0.025, 0.1)]
    assert [row["validation_ce"] for row in rows] == pytest.approx([0.505, 0.5025, 0.54])
    assert miniend.search_learning_rate(base, [0.3], train) == (0.3, []) and len(tried) == 3


def test_equal_tokens_by_counting(place):
    base, _, tokenizer, tokens, _ = place
    pairs, tuning = planted(40, 1), replace(TRAINING, max_steps=2)
    steps = miniend.equal_token_steps(replace(base, training=replace(TRAINING, max_steps=60)), tuning, tokenizer,
                                            tokens, pairs, 24, 10)  # fmt: skip
    sizes = [
        min(len(tokenizer(row["document"]).input_ids), 24) + min(len(tokenizer(row["summary"]).input_ids), 10)
        for row in pairs
    ]
    target = base.source_length - 1  # the window's text and an end token
    # What text infilling leaves of a source is drawn: between half of it and all of it.
    low, high = (60 * (source + target) / np.mean(sizes) for source in (base.source_length / 2, base.source_length))
    assert 2 + low < steps < 2 + high


def test_a_task_specific_student_comes_from_the_fine_tuned_teacher(place):
    base, teacher, tokenizer, *_ = place
    train, validation = planted(12, 1), planted(4, 2)
    tuned = miniend.fine_tune(
        "teacher", base.teacher, teacher, tokenizer, "summaries", train, validation, TRAINING, 24, 10
    )
    still = replace(TRAINING, learning_rate=1e-12)
    folder = miniend.task_specific("kd", "2-1", tuned, tokenizer, train, validation, still, 24, 10)
    student, whole = (load_model(place / "student")[0] for place in (folder, tuned))
    kept = students.layer_map(len(students.decoder_layers(whole)), 1)
    weights = (students.decoder_layers(model)[i].fc1.weight for model, i in ((student, 0), (whole, kept[0])))
    torch.testing.assert_close(*weights, atol=1e-6, rtol=0)
    assert "kl_loss" in read_json(folder / "results.json")["final"]


@pytest.mark.parametrize(
    ("low", "high", "says"), [(0.1, 2, "beats"), (-2, -0.1, "loses to"), (-1, 1, "cannot be separated")]
)
def test_verdict(low, high, says):
    text = miniend.verdict({"name": "kd", "difference": 0.5, "low": low, "high": high}, "miniend")
    assert text == f"kd {says}{' from' if 'separated' in says else ''} miniend (+0.50, {low:.2f} to {high:.2f})"
