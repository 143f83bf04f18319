"""Distillation on plain text: every path to a fine-tuned student, assistants, mixed targets and exact resume."""

import copy
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from test_runs import planted
from tiny_models import tiny_bart, tiny_batch, tiny_t5, tiny_tokenizer

from distill_utils.artifacts import InputError, read_json, write_json
from distill_utils.distillation import objectives
from distill_utils.evaluation import scoring, tasks
from distill_utils.evaluation.statistics import share_of_gap
from distill_utils.experiments import interpolation, miniend
from distill_utils.experiments.miniend import PATHS, AgnosticRun
from distill_utils.models import students
from distill_utils.models.loading import load_model, save_model
from distill_utils.training import loop
from distill_utils.training.loop import Training, read_history

TRAINING = Training(max_steps=3, batch_size=4, learning_rate=1e-3, log_every=1, seed=0)


def make_place(folder, teacher, **changes) -> tuple:
    """Return a run, its teacher, the tokenizer, and tokens of training and held-out text."""
    save_model(teacher, tiny_tokenizer(), folder / "teacher")
    teacher, tokenizer = load_model(folder / "teacher")
    generator = np.random.default_rng(0)
    tokens, held_out = (generator.integers(5, 60, size=size).astype(np.uint16) for size in (2000, 600))
    settings = {"path": "miniend", "training": TRAINING, "source_length": 16, "denoising": "text_infilling"} | changes
    return AgnosticRun(teacher=str(folder / "teacher"), **settings), teacher, tokenizer, tokens, held_out


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_RUNS", str(tmp_path / "runs"))
    return make_place(tmp_path, tiny_bart(), shape="2-1", num_relation_heads=4)


@pytest.fixture
def t5_place(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_RUNS", str(tmp_path / "runs"))
    training = replace(TRAINING, max_steps=6, warmup_steps=3)
    narrow = {"path": "miniend_logits", "shape": "1-1", "width": 8, "num_relation_heads": 2}
    return make_place(tmp_path, tiny_t5(3, 3), training=training, **narrow)


def equal_weights(one, other) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_every_path_from_description_to_a_tested_task(place, capsys):
    base, teacher, tokenizer, tokens, held_out = place
    before = copy.deepcopy(teacher)
    plan = [replace(base, path=path) for path in PATHS]
    miniend.check_runs(plan, teacher)
    starts = [miniend.new_student(run, teacher) for run in plan]
    floor = load_model(miniend.untrained(base, teacher, tokenizer))[0]
    assert all(equal_weights(start, floor) for start in starts)
    copied = students.encoder_layers(miniend.new_student(replace(base, init="copied"), teacher))
    theirs = [students.encoder_layers(teacher)[layer] for layer in students.layer_map(3, 2)]
    assert all(equal_weights(*layers) for layers in zip(copied, theirs, strict=True))
    for run in plan:
        folder = miniend.distill(run, teacher, tokenizer, tokens, held_out)
        final = read_json(folder / "results.json")["final"]
        terms = {name for name, weight in PATHS[run.path].items() if weight}
        assert {name.replace("_weight", "_loss") for name in terms} <= final.keys()
        assert ("validation_loss" in final) == (run.path in ("scratch", "logits", "miniend_logits"))
        assert {row["step"] for row in read_history(folder)} == {1, 2, 3}
        assert miniend.distill(run, teacher, tokenizer, tokens, held_out) == folder
    assert equal_weights(teacher, before)
    assert miniend.distill(base, teacher, tokenizer, tokens[:-1], held_out) != folder  # other text, other run

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
    monkeypatch.setitem(tasks.TASKS, "belongs", tasks.TASKS["belongs"]._replace(labels=words))
    labels = [words[i % 2] for i in range(10)]
    rows = planted(10, 4).remove_columns("summary").add_column("summary", labels).add_column("label", labels)
    tuned = miniend.fine_tune(
        "teacher", base.teacher, teacher, tokenizer, "belongs", rows, rows.select(range(4)), TRAINING, 24, 8
    )
    tested = miniend.test_task(tuned, "belongs", rows, 24)
    found, scores = read_json(tested / "results.json"), read_json(tested / "scores.json")
    assert np.mean(scores["correct"]) == pytest.approx(found["accuracy"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"path": "nothing"}, "path 'nothing' is unknown: use scratch, logits"),
        ({"source_length": 65}, "source_length 65 exceeds the model's 64 positions"),
        ({"init": "copy"}, "init 'copy' is unknown: use random or copied"),
        ({"init": "copied", "width": 8}, "a student of width 8 cannot copy layers"),
        ({"path": "hidden", "width": 8}, "path hidden compares hidden states of equal width"),
        ({"num_relation_heads": 7}, "num_relation_heads 7 does not divide the inner widths"),
        ({"shape": "9-1"}, "student_layers is 9"),
        ({"width": 17}, "width 17 leaves no whole"),
        ({"training": replace(TRAINING, max_steps=0)}, "max_steps 0 is too small"),
        ({"mix_start": 0.0}, "mix_start 0.0 with mix_rate 0.0005 is impossible: use a start above 0"),
        ({"mix_start": 0.4, "mix_rate": -1.0}, "mix_rate -1.0"),
        ({"mix_start": 0.4}, "path miniend imitates no distribution"),
    ],
)
def test_bad_runs_are_rejected_before_training(place, changes, said):
    base, teacher, *_ = place
    with pytest.raises(InputError, match=said):
        miniend.check_runs([replace(base, **changes)], teacher)
    with pytest.raises(InputError, match="nothing to distil"):
        miniend.check_runs([], teacher)
    with pytest.raises(InputError, match="named twice"):
        miniend.check_runs([base, base], teacher)


def test_embeddings_of_another_tokenizer_are_rejected_before_training(place, tmp_path):
    base, teacher, *_ = place
    more = tiny_tokenizer()
    more.add_tokens(["another"])  # one vocabulary holds the other, and the widths agree
    save_model(tiny_bart(vocab_size=len(more)), more, tmp_path / "other")
    run = replace(base, embeddings=str(tmp_path / "other"))
    for start in (lambda: miniend.check_runs([run], teacher), lambda: miniend.new_student(run, teacher)):
        with pytest.raises(InputError, match="another tokenizer"):
            start()
    miniend.check_runs([replace(run, embeddings=base.teacher)], teacher)


def test_other_embeddings_in_the_same_folder_make_another_student(place, tmp_path):
    base, teacher, tokenizer, *_ = place
    run, made = replace(base, embeddings=str(tmp_path / "start")), []
    for seed in (5, 5, 6):
        save_model(tiny_bart(seed=seed), tokenizer, tmp_path / "start")
        made.append(miniend.untrained(run, teacher, tokenizer))
    assert made[0] == made[1] != made[2]


def test_held_out_loss_is_the_mean_over_tokens():
    model, total, tokens, batches = tiny_t5(), 0.0, 0, []
    for lengths in ((5, 2), (4, 2, 2)):
        batches.append(tiny_batch([6] * len(lengths), lengths, seed=len(lengths)))
        valid = batches[-1]["labels"] != objectives.IGNORED
        logits = model(**batches[-1]).logits.double().log_softmax(-1)[valid]
        total -= float(logits.gather(1, batches[-1]["labels"][valid][:, None]).sum().detach())
        tokens += int(valid.sum())
    assert miniend.held_out_loss(model, batches)["validation_loss"] == pytest.approx(total / tokens, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------- assistants


def test_teacher_to_assistant_to_student_in_the_direct_run_s_budget(t5_place, monkeypatch):
    run, teacher, *rest = t5_place
    before = copy.deepcopy(teacher)
    taught, distill = {}, miniend.distill

    def spy(run, teacher, *rest):
        folder = distill(run, teacher, *rest)
        taught[folder] = (run.teacher, teacher)
        return folder

    monkeypatch.setattr(miniend, "distill", spy)
    route = "3-3", 8, teacher, *rest  # MiniLM's rule: as deep as the teacher, as wide as the student
    found = interpolation.with_assistant(run, *route, share=1 / 3)
    name, model = taught[found["student"]]
    assert name == str(found["assistant"] / "student") and taught[found["assistant"]] == (run.teacher, teacher)
    assert equal_weights(model, load_model(found["assistant"] / "student")[0]) and equal_weights(teacher, before)

    straight = read_json(distill(run, teacher, *rest) / "results.json")
    results = [read_json(found[name] / "results.json") for name in ("assistant", "student")]
    assert [result["final"]["step"] for result in results] == [2, 4]
    assert sum(result["target_tokens"] for result in results) == straight["target_tokens"]
    assert results[1]["parameters"] == straight["parameters"]
    sizes = [students.count_parameters(teacher)["total"], *(result["parameters"]["total"] for result in results)]
    assert sizes[0] > sizes[1] > sizes[2]
    assert interpolation.with_assistant(run, *route, share=1 / 3) == found  # reused


@pytest.mark.parametrize(("width", "middle", "share"), [(0, 0, 0.5), (0, 16, 0.2), (8, 0, 0.7), (8, 8, 0.5)])
def test_the_student_is_that_of_the_direct_run_and_updates_are_split(t5_place, width, middle, share):
    run, teacher, *_ = t5_place
    training = replace(run.training, max_steps=10, warmup_steps=5)
    run = replace(run, width=width, training=training, mix_start=0.4)
    assistant, student = interpolation.split_run(run, "2-2", middle, teacher, share)
    assistant_model = miniend.new_student(assistant, teacher)
    assert assistant_model.config.d_model == (middle or 16)
    assert equal_weights(miniend.new_student(student, assistant_model), miniend.new_student(run, teacher))
    assert assistant.training.max_steps == round(10 * share)
    for name in ("max_steps", "warmup_steps"):
        assert getattr(assistant.training, name) + getattr(student.training, name) == getattr(training, name)
    for part in (assistant, student):
        assert replace(part.training, max_steps=10, warmup_steps=5) == training
        assert (part.path, part.mix_start) == (run.path, 0.4)


@pytest.mark.parametrize(
    ("shape", "width", "share", "changes", "said"),
    [
        ("3-3", 0, 0.5, {}, "3-3 and width 16 has (\\d+) parameters, the teacher \\1 and the student \\d+: choose"),
        ("1-1", 8, 0.5, {}, "1-1 and width 8 has (\\d+) parameters, the teacher \\d+ and the student \\1: choose"),
        ("1-2", 8, 0.5, {"shape": "1-1", "width": 0}, "choose one that lies between them"),
        ("2-9", 0, 0.5, {}, "student_layers is 9"),
        ("2-1", 0, 0.5, {"shape": "2-2"}, "student_layers is 2: the teacher has 1 layers"),
        ("2-2", 7, 0.5, {}, "width 7 leaves no whole"),
        ("2-2", 8, 0.5, {"init": "copied", "width": 0}, "a student of width 8 cannot copy layers"),
        ("2-2", 0, 0.5, {"num_relation_heads": 16}, "num_relation_heads 16 does not divide"),
        ("2-2", 0, 0.0, {}, "share 0.0 of 6 updates leaves none"),
        ("2-2", 0, 1.0, {}, "share 1.0 of 6 updates leaves none"),
    ],
)
def test_what_is_no_assistant_is_rejected_before_training(t5_place, shape, width, share, changes, said):
    run, teacher, *rest = t5_place
    with pytest.raises(InputError, match=said):
        interpolation.with_assistant(replace(run, **changes), shape, width, teacher, *rest, share=share)


def test_assistants_are_written_as_layers_and_width():
    for label, expected in {"6-6-w96": ("6-6", 96), "4-12": ("4-12", 0)}.items():
        assert interpolation.parse_assistant(label) == expected
    for label in ("", "6", "6-6-96", "6-6-w", "a-6"):
        with pytest.raises(InputError, match=f"assistant '{label}' is not understood"):
            interpolation.parse_assistant(label)


# --------------------------------------------------------------------------------------------------------- mixed target


def test_the_share_of_the_teacher_grows_as_published():
    """Algorithm 1 of TAID by hand, and its bounds."""
    losses, rate, start, steps = [3.0, 2.0, 2.5, 1.0, 1.0], 0.5, 0.2, 6
    mixing, shares = {"mix": start}, []
    t, m, before = start, 0.0, None
    for n, loss in enumerate(losses):
        objectives.grow_mix(mixing, n + 1, {"kl_loss": loss, "loss": 9.0}, start=start, rate=rate, max_steps=steps)
        m = 0.99 * m + (0.01 * (before - loss) / before if before else 0.0)
        t = min(1.0, max(start + (1 - start) * (n + 1) / (steps - 1), t + rate / (1 + math.exp(-m)) * (1 - t)))
        before = loss
        shares.append(mixing["mix"])
        assert mixing["mix"] == pytest.approx(t, rel=1e-12) and mixing["momentum"] == pytest.approx(m, rel=1e-12)
    assert shares == sorted(shares) and shares[-1] == 1.0
    assert shares[0] > start + (1 - start) / (steps - 1)  # faster than the line
    hostile = {"mix": 0.3}
    for loss in (0.0, 1e30, 0.0, 5.0):  # no overflow, no division by zero
        objectives.grow_mix(hostile, 1, {"kl_loss": loss}, start=0.3, rate=1.0, max_steps=9)
    assert 0.3 <= hostile["mix"] <= 1


def test_a_run_with_mixing_shows_its_share_and_ends_with_the_teacher(t5_place):
    run, teacher, *rest = t5_place
    folders = {start: miniend.distill(replace(run, mix_start=start), teacher, *rest) for start in (1.0, 0.4)}
    assert "-mix0.4-s0" in folders[0.4].name and "mix" not in folders[1.0].name
    shares = [row["mix"] for row in read_history(folders[0.4])]
    assert shares == pytest.approx([0.4, 0.52, 0.64, 0.76, 0.88, 1.0])
    assert "mix" not in read_history(folders[1.0])[0]
    first = [read_history(folder)[0]["kl_loss"] for folder in folders.values()]
    assert first[1] < first[0]  # the same student and batch, a nearer target


def test_a_stopped_run_goes_on_with_the_same_mixture(t5_place, monkeypatch, tmp_path):
    run, teacher, *rest = t5_place
    # A rate at which the losses matter: the share is then no function of the step alone.
    run = replace(
        run, path="logits", mix_start=0.2, mix_rate=0.9,
        training=replace(run.training, max_steps=9, checkpoint_every=2, micro_batch_size=2),
    )  # fmt: skip
    straight = miniend.distill(run, teacher, *rest)
    shutil.move(straight, tmp_path / "straight")
    save = loop.save_checkpoint

    def stop(state):
        save(state)
        if state.step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        miniend.distill(run, teacher, *rest)
    monkeypatch.setattr(loop, "save_checkpoint", save)
    assert {"mix", "momentum", "kl_loss"} == read_json(straight / "checkpoint-000004" / "state.json")["memory"].keys()
    resumed = miniend.distill(run, teacher, *rest)
    assert equal_weights(*(load_model(folder / "student")[0] for folder in (tmp_path / "straight", resumed)))
    histories = [
        [{k: v for k, v in row.items() if k not in ("seconds", "examples_per_second")} for row in read_history(folder)]
        for folder in (tmp_path / "straight", resumed)
    ]
    assert histories[0] == histories[1]
    line = [0.2 + 0.8 * n / 8 for n in range(9)]
    assert any(row["mix"] > at + 0.01 for row, at in zip(histories[0], line, strict=True))


# --------------------------------------------------------------------------------------------------------- comparing


def test_result_row_averages_seeds_document_by_document(tmp_path):
    def a_test(name, scores):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "scores.json", {"rouge2": scores})
        write_json(tmp_path / name / "results.json", {"rouge2": float(np.mean(scores))})
        return tmp_path / name

    ours, theirs = [a_test("a", [10, 20, 30]), a_test("b", [20, 40, 30])], [a_test("c", [5, 20, 20])]
    assert miniend.document_scores(ours).tolist() == [[10, 20, 30], [20, 40, 30]]
    row = miniend.result_row("miniend", "summaries", ours, theirs)
    assert row["score"] == pytest.approx(25) and row["difference"] == pytest.approx(10) and row["seeds"] == 2
    assert row["score_low"] <= 25 <= row["score_high"] and row["metric"] == "ROUGE-2"


def test_rows_of_a_task_by_f1_have_the_interval_and_the_test_of_its_score(tmp_path):
    labels = ["equivalent"] * 70 + ["not_equivalent"] * 30
    found = {"one": ["equivalent"] * 100, "other": ["not_equivalent"] * 30 + ["equivalent"] * 40 + labels[70:]}
    for name, predictions in found.items():
        (tmp_path / name).mkdir()
        rows = Dataset.from_dict({"summary": labels, "label": labels})
        results = scoring.save_label_scores(tmp_path / name, "mrpc", predictions, rows)
        assert results["accuracy"] == 70  # of both: they differ in F1 alone
        write_json(tmp_path / name / "results.json", results)
    ours, theirs = ([tmp_path / name] for name in found)
    row = miniend.result_row("one", "mrpc", ours, theirs)
    gap = 50 * (140 / 170 - 80 / 110)
    assert row["difference"] == pytest.approx(gap) and row["low"] < gap < row["high"]
    assert row["score_low"] == pytest.approx(read_json(ours[0] / "results.json")["score_low"], abs=0.5)


def test_share_of_the_gap_leaves_out_tasks_without_one():
    generator = np.random.default_rng(0)
    low, high, ours = {}, {}, {}
    for task, gap in (("one", 40.0), ("two", 20.0), ("flat", 0.0)):
        noise = generator.normal(0, 1 if gap else 5, (3, 200))
        low[task], high[task], ours[task] = generator.uniform(0, 10, 200) + noise + [[0.0], [gap], [gap / 4]]
    found = share_of_gap(ours, low, high)
    assert found["tasks"] == ["one", "two"]
    assert found["low"] < found["share"] < found["high"] and found["share"] == pytest.approx(0.25, abs=0.02)
    gains = np.array([[-2.0], [0.0], [2.0]])  # of three seeds, the same on both tasks
    apart = {task: values + gains * (1 + (task == "one")) for task, values in ours.items()}
    wide = share_of_gap(
        apart, *({task: np.repeat(values[None], 3, 0) for task, values in s.items()} for s in (low, high))
    )
    # A seed's share is 0.1 away from the mean: t of two degrees of freedom, over the root of three.
    assert wide["share"] == pytest.approx(found["share"], abs=0.01)
    assert wide["high"] - wide["share"] == pytest.approx(4.303 * 0.1 / 3**0.5, rel=0.02)
    assert share_of_gap({"flat": ours["flat"]}, low, high) == {"share": None, "low": None, "high": None, "tasks": []}


def test_the_interval_of_a_share_holds_where_gaps_are_hardly_shown():
    inside, widths = [], []
    for seed in range(60):
        generator = np.random.default_rng(seed)
        low, high, ours = {}, {}, {}
        for task in range(8):  # gaps of two or three standard errors
            low[task], noise = generator.normal(size=200), generator.normal(0, 4, (2, 200))
            high[task], ours[task] = low[task] + 0.7 + noise[0], low[task] + 0.28 + noise[1]
        found = share_of_gap(ours, low, high)
        inside.append(found["low"] <= 0.4 <= found["high"])
        widths.append(found["high"] - found["low"])
    assert 0.9 <= np.mean(inside) <= 0.99 and max(widths) < 3


def test_paths_are_set_apart_by_their_paired_difference():
    generator = np.random.default_rng(0)
    low, hard = generator.uniform(0, 10, (1, 400)), generator.normal(0, 6, (1, 400))  # what is hard is so for both
    shares = {"logits": 0.6, "miniend": 0.5, "hidden": 0.59, "none": 0.7}
    noise = {path: generator.normal(0, 1, (1, 400)) for path in shares}
    scores = {path: {"one": low + 4 * share + hard + noise[path]} for path, share in shares.items()}
    rows = {row["path"]: row for row in miniend.gap_rows(scores, {"one": low}, {"one": low + 4.0})}
    assert rows["miniend"]["high"] > rows["logits"]["low"]  # although the intervals overlap
    assert {path: row["near"] for path, row in rows.items()} == {
        "logits": True, "miniend": False, "hidden": True, "none": True,
    }  # fmt: skip
    assert "near" not in miniend.gap_rows(scores, {"one": low}, {"one": low})[0]


def test_headline_names_the_winner_and_what_it_cannot_separate():
    def said(num_test=250, **shares):
        keys = ("share", "low", "high", "near")
        ways = [{"path": path, "tasks": ["one"], **dict(zip(keys, way, strict=False))} for path, way in shares.items()]
        return miniend.headline(ways, "miniend", 3, 100, 50, num_test)

    text = said(miniend=(0.3, 0.1, 0.39, False), logits=(0.6, 0.4, 0.8, True), none=(0.9, 0.8, 1.0, True))
    assert text.startswith("**Imitate logits**.") and "logits closes 60 % (40 to 80)" in text
    assert "not shown to be worse: none." in text
    assert "The proposed path, miniend, closes 30 % (10 to 39)." in text
    assert "100 updates, 50 of fine-tuning, 250 test rows and 3 seeds" in text and "demonstration" not in text
    assert "no path is shown to beat it" in said(miniend=(0.1, -0.1, 0.3))
    assert "there is no gap" in said(miniend=(None, None, None))
    assert "No path was compared" in said()
    assert said(49, miniend=(0.6, 0.4, 0.8)).startswith("**Smoke run:** 49 test rows")


def test_equal_tokens_by_counting(place):
    base, _, tokenizer, tokens, _ = place
    pairs, tuning = planted(40, 1), replace(TRAINING, max_steps=2)
    longer = replace(base, training=replace(TRAINING, max_steps=60))
    steps = miniend.equal_token_steps(longer, tuning, tokenizer, tokens, pairs, 24, 10)
    sizes = [
        min(len(tokenizer(row["document"]).input_ids), 24) + min(len(tokenizer(row["summary"]).input_ids), 10)
        for row in pairs
    ]
    target = base.source_length - 1  # the window's text and an end token
    # What text infilling leaves of a source is drawn: between half of it and all of it.
    low, high = (60 * (source + target) / np.mean(sizes) for source in (base.source_length / 2, base.source_length))
    assert 2 + low < steps < 2 + high
