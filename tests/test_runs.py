"""A student from description to results row, for every method, on a tiny model and planted pairs."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny_models import FAMILIES, WORDS, tiny_bart, tiny_t5, tiny_tokenizer

from distill_utils.artifacts import InputError, config_hash, file_hash, read_json, write_json
from distill_utils.data.batches import batch_list, document_id, tokenize_pairs
from distill_utils.distillation.pseudo_labels import cross_fit_halves, measure_labels
from distill_utils.evaluation import scoring
from distill_utils.evaluation.generation import summarize
from distill_utils.experiments import checks, comparison, runs
from distill_utils.experiments.checks import forecast
from distill_utils.models import students
from distill_utils.models.loading import ASSETS, load_model, model_fingerprint, save_model
from distill_utils.training.loop import Training, read_history

TRAINING = Training(max_steps=4, batch_size=4, learning_rate=1e-3, log_every=2, seed=0)
BASE = runs.StudentRun(
    "sft", "3-1", "unset", 24, 10, TRAINING,
    label_settings={"num_beams": 1, "max_new_tokens": 8, "no_repeat_ngram_size": 1},  # a random model stutters
)  # fmt: skip


def planted(num: int, seed: int) -> Dataset:
    generator = random.Random(seed)
    documents = [" ".join(generator.choices(WORDS, k=generator.randint(5, 20))) for _ in range(num)]
    summaries = [" ".join(document.split()[:5]) for document in documents]
    return Dataset.from_dict({"id": [f"d{i}" for i in range(num)], "document": documents, "summary": summaries})


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_RUNS", str(tmp_path / "runs"))
    save_model(tiny_bart(), tiny_tokenizer(), tmp_path / "teacher")
    teacher, tokenizer = load_model(tmp_path / "teacher")
    return replace(BASE, teacher=str(tmp_path / "teacher")), teacher, tokenizer


@pytest.mark.parametrize(
    ("family", "changes", "own", "engine"),
    [
        (tiny_bart, {"num_beams": 1}, {}, "float32"),
        (tiny_bart, {}, {"early_stopping": True}, "float32"),
        (tiny_bart, {}, {"early_stopping": False}, ""),  # the engine always stops early
        (tiny_bart, {"num_beams": 1}, {"encoder_no_repeat_ngram_size": 3}, ""),
        (tiny_bart, {"num_beams": 1, "do_sample": True}, {}, ""),
        (tiny_bart, {"num_beams": 1}, {"guidance_scale": 1.5}, ""),
        (tiny_bart, {"num_beams": 1}, {"repetition_penalty": 1.5}, ""),  # its decoder starts with the end token
        (tiny_bart, {"num_beams": 1, "no_repeat_ngram_size": 1}, {}, ""),
        (FAMILIES["marian"], {"num_beams": 1}, {}, ""),
        (FAMILIES["t5"], {"num_beams": 1}, {}, "float32"),
    ],
)
def test_many_documents_are_decoded_by_the_engine_where_it_follows_the_same_rules(
    family, changes, own, engine, tmp_path, monkeypatch
):
    monkeypatch.setenv("DISTILL_RUNS", str(tmp_path))
    monkeypatch.setattr(scoring, "MANY_DOCUMENTS", 8)
    model, tokenizer, test = family(), tiny_tokenizer(), planted(8, 3)
    vars(model.generation_config).update(own)
    assert scoring.engine_type(model, 8, **changes) == engine and scoring.engine_type(model, 7, **changes) == ""
    if engine and changes:
        tested = scoring.evaluate_model("x", model, tokenizer, "f", test, max_source_length=24, num_speed=0, **changes)
        assert read_json(tested / "config.json")["quantization"] == engine
        written = [row["prediction"] for row in scoring.read_predictions(tested)]
        assert written == summarize(model, tokenizer, test["document"], max_source_length=24, **changes)
        assert len(set(written)) > 3 and not (tested / "engine").exists()


def test_every_method_from_description_to_row(place, capsys):
    base, teacher, tokenizer = place
    train, validation, test = planted(16, 1), planted(6, 2), planted(8, 3)
    before = {name: weight.clone() for name, weight in teacher.named_parameters()}
    plan = runs.grid(base, list(runs.METHODS), ["3-1"], [0, 1])
    checks.check_runs(plan, teacher)
    predicted = forecast(plan, teacher, tokenizer, train)
    trained = {run.name: runs.train_student(run, teacher, tokenizer, train, validation) for run in plan}
    options = {"max_source_length": base.max_source_length, "num_speed": 2}
    teacher_test = scoring.evaluate_model("teacher", teacher, tokenizer, "weights", test, **options)
    tested = {}
    for name, folder in trained.items():
        model, _ = load_model(folder / "student")
        given = (name, model, tokenizer, folder.name, test)
        tested[name] = scoring.evaluate_model(*given, **options, baseline=teacher_test)
    rows = [comparison.teacher_row(teacher, teacher_test), *comparison.rule_rows(train, test, named=False)]
    rows += [comparison.result_row(run, trained[run.name], tested[run.name], 1.5, teacher_test) for run in plan]
    timed = [run for run in plan if run.method != "pl"]
    options = {"max_source_length": base.max_source_length, "num_new_tokens": 4, "num_beams": 1}
    comparison.add_speed(rows, teacher, tokenizer, timed, trained, test["document"][:2], **options)
    means = comparison.mean_over_seeds(rows, tested, teacher_test)
    versus = comparison.compare_methods(plan, tested)

    teacher_row, lead, *students_rows = rows
    assert [(row["method"], row["seed"]) for row in students_rows] == [(m, s) for m in runs.METHODS for s in (0, 1)]
    assert [row["method"] for row in students_rows if not row["latency_ms"]] == ["pl", "pl"]
    assert "ms_per_token" not in lead and "latency_ms" not in lead
    assert teacher_row["speedup"] == 1 and len({row["ms_per_token"] for row in students_rows}) == 1
    assert {row["label_seconds"] for row in students_rows if row["method"] in ("sft", "kd")} == {0.0}
    assert len(means) == 2 + len(runs.METHODS)
    pairs = {frozenset((row["name"], row["versus"])) for row in versus}
    assert len(versus) == len(pairs) == len(runs.METHODS) * (len(runs.METHODS) - 1) / 2
    assert [(row["name"], row["versus"]) for row in versus[:2]] == [("KD 3-1", "SFT 3-1"), ("PL 3-1", "SFT 3-1")]
    assert all("not_worse_5_percent" in row for row in [*students_rows, *means[2:], *versus])
    sft = [row["rouge1"] for row in students_rows if row["method"] == "sft"]
    assert next(row for row in means if row["method"] == "sft")["rouge1"] == pytest.approx(np.mean(sft), abs=1e-3)
    assert {row["at least 95 %"] for row in (*means[2:], *versus)} == {"too few documents"}
    assert len(comparison.cost_table(plan, trained, 1.5, predicted)) == len(plan)
    histories = [read_history(trained[run.name]) for run in plan]
    budget = {"num_test": len(test), "whole_test": True, "seeds": 2, "max_steps": 4}
    assert "Smoke run" in comparison.verdict(means, versus, histories, **budget)
    taken = comparison.recommended(means, versus)[0]
    assert taken["run"] == f"{taken['method']}-{taken['student']}-s{plan[0].training.seed}"
    for name, weight in teacher.named_parameters():  # the teacher stays as it was
        assert torch.equal(weight, before[name])

    assert len(scoring.side_by_side(teacher_test, tested, num=3, seed=0)) == 3
    drawn = scoring.side_by_side(teacher_test, tested, num=8, seed=0, by_score=True)
    scores = np.mean([scoring.read_scores(path)["rouge2"] for path in [teacher_test, *tested.values()]], axis=0)
    assert len({row["document"] for row in drawn}) == 8 and all(set(row["marks"]) >= set(tested) for row in drawn)
    assert [row["drawn"].split(",")[0] for row in drawn] == ["hardest"] * 2 + ["easiest"] * 2 + ["random"] * 4
    assert drawn[0]["drawn"] == f"hardest, {min(scores):.0f}" and drawn[3]["drawn"] == f"easiest, {max(scores):.0f}"

    capsys.readouterr()
    assert runs.train_student(plan[0], teacher, tokenizer, train, validation) == trained[plan[0].name]
    assert "reusing" in capsys.readouterr().out
    config = read_json(trained["sft-3-1-s0"] / "config.json")
    assert config["method"] == "sft" and config["training"]["max_steps"] == 4 and "data" in config
    assert base.teacher not in str(config)  # a path of this machine would make the name of the run depend on it
    history = read_history(trained["kd-3-1-s0"])
    assert {"loss", "ce_loss", "kl_loss", "hidden_loss", "validation_ce", "validation_kl"} <= history[-1].keys()


def test_costs_hold_what_the_teacher_wrote_and_what_was_trained_before_a_resume(place):
    base, teacher, tokenizer = place
    train, validation, rows = planted(16, 1), planted(6, 2), {}
    for stored in (False, True):
        run = replace(base, method="kd", shape="3-1", cache_states=stored)
        made = runs.train_student(run, teacher, tokenizer, train, validation)
        whole = read_history(made)[-1]["seconds"]
        results = read_json(made / "results.json")
        write_json(made / "results.json", results | {"seconds": whole / 9})  # as after a resume
        expected = forecast([run], teacher, tokenizer, train)
        (rows[stored],) = comparison.cost_table([run], {run.name: made}, 0.0, expected)
        assert rows[stored]["train_seconds"] == whole > 0
    assert rows[True]["teacher passes"] == 0 < rows[False]["teacher passes"]
    assert rows[True]["states_seconds"] > 0 == rows[False]["states_seconds"]


def test_methods_start_equal_and_frozen_parts_stay_the_teachers(place):
    base, teacher, _ = place
    starts = [runs.cut_student(replace(base, method=method), teacher) for method in runs.METHODS]
    for student, cut in starts:
        assert cut["decoder_ids"] == [0] and cut["shared"]
        for name, weight in student.named_parameters():
            assert torch.equal(weight, dict(starts[0][0].named_parameters())[name])
    student, _ = runs.cut_student(replace(base, shape="2-1"), teacher)  # a cut encoder is trained
    assert all(weight.requires_grad for weight in students.encoder_layers(student).parameters())


def test_held_out_losses_of_the_teacher_itself(place):
    _, teacher, tokenizer = place
    batches = batch_list(tokenize_pairs(planted(6, 2), tokenizer, 24, 10), tokenizer.pad_token_id, 4)
    losses = runs.held_out_losses(teacher, teacher, batches)
    counts = [int((batch["labels"] >= 0).sum()) for batch in batches]
    own = [teacher(**{k: v for k, v in batch.items() if k != "ids"}).loss.item() for batch in batches]
    expected = sum(loss * count for loss, count in zip(own, counts, strict=True)) / sum(counts)
    assert losses["validation_ce"] == pytest.approx(expected, rel=1e-5)
    assert losses["validation_kl"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ({"method": "kdd"}, "'kdd'"),
        ({"shape": "3-0"}, "is 0"),
        ({"shape": "3-4"}, "is 4"),
        ({"shape": "3x1"}, "'3x1'"),
        ({"max_source_length": 65}, "65 exceeds the teacher's 64"),
        ({"max_source_length": 0}, "max_source_length 0"),
        ({"max_target_length": 1}, "max_target_length 1"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"method": "on_policy", "on_policy_share": 0.3, "training": {"batch_size": 3}}, "on_policy_share 0.3"),
        ({"label_settings": {"beams": 4}}, "label_beams is unknown"),
        ({"training": {"patience": 2, "eval_every": 1}}, "99 validation rows"),
        ({"training": {"patience": 2, "eval_every": 0}}, "patience 2"),
        ({"training": {"stop_metric": "rouge2"}}, "stop_metric 'rouge2'"),
        ({"training": {"schedule": "cooldown", "warmup_steps": 8, "max_steps": 8}}, "max_steps 8"),
    ],
)
def test_impossible_runs_are_rejected_in_one_line(change, value):
    training = replace(BASE.training, **change.get("training", {}))
    with pytest.raises(InputError, match=value) as error:
        checks.check_runs([replace(BASE, **change | {"training": training})], tiny_bart(), num_validation=99)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("methods", "message"), [(["sft", "sft"], "named twice"), ([], "nothing to train")])
def test_repeated_or_no_runs_are_rejected(methods, message):
    with pytest.raises(InputError, match=message):
        checks.check_runs(runs.grid(BASE, methods, ["3-1"], [0]), tiny_bart())


def test_fingerprint_is_of_the_files_or_of_a_hub_models_commit(tmp_path, monkeypatch):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        save_model(tiny_t5(seed=seed), tiny_tokenizer(), tmp_path / name)
    a, b, c = (model_fingerprint(str(tmp_path / name), None) for name in "abc")
    assert a == b != c
    settings = tmp_path / "b" / "generation_config.json"
    settings.write_text(settings.read_text().replace("14", "9"))  # another length of its summaries
    assert model_fingerprint(str(tmp_path / "b"), None) not in (a, c)
    ours = [model_fingerprint(name, None) for name in ("pydocs-bart", "pydocs-t5")]
    assert ours == [
        config_hash([file_hash(file) for file in ASSETS.glob(f"{name}/*.safetensors")])
        for name in ("pydocs-bart", "pydocs-t5")
    ]  # by weights alone, as runs of today are named

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository, found = tmp_path / "models--someone--summarizer", []
    for commit in ("a" * 40, "b" * 40):  # the same config, other weights
        tiny_t5().config.save_pretrained(repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
        found.append(model_fingerprint("someone/summarizer", tiny_t5()))
    assert found == ["a" * 10, "b" * 10]
    assert model_fingerprint("someone/else", tiny_t5()) not in found


@pytest.fixture
def based(place, tmp_path):
    """The place, with a base model of the teacher's tokenizer that teachers of halves start from."""
    base, teacher, tokenizer = place
    save_model(tiny_bart(seed=9), tokenizer, tmp_path / "base")
    base = replace(base, method="pl", cross_fit_base=str(tmp_path / "base"), cross_fit_steps=2)
    return base, teacher, tokenizer


def test_training_rows_of_each_way_to_label(based, tmp_path):
    base, teacher, tokenizer = based
    train = planted(24, 1)

    def rows_of(**changes) -> Dataset:
        return runs.training_rows(replace(base, **changes), teacher, tokenizer, train)

    assert rows_of(method="sft") is train
    labels, gold = rows_of(), rows_of(method="pl_gold")
    assert len(gold) == len(labels) + len(train) and list(gold["summary"])[-len(train) :] == list(train["summary"])
    assert len(labels) < len(rows_of(label_teachers=[base.cross_fit_base])) <= 2 * len(train)
    several = rows_of(label_settings={"num_candidates": 3, "temperature": 1.0, "max_new_tokens": 6})
    assert max(id_.rpartition("#")[2] for id_ in several["id"]) == "2"
    rates = sorted(measure_labels(labels)["copy_rate"])
    middle = rates[len(rates) // 2]
    filtered = rows_of(label_filters={"copy_rate": middle})
    assert len(filtered) == sum(rate <= middle for rate in rates) < len(labels)

    halves = cross_fit_halves(train)  # each is labelled by a teacher trained on the other, or on itself
    tuned = [load_model(runs.cross_fit_teacher(base, tokenizer, half) / "teacher")[0] for half in halves]
    options = {"max_source_length": base.max_source_length, **base.label_settings}
    for kind, models in (("own", tuned), ("other", tuned[::-1])):
        rows = rows_of(cross_fit=kind)
        texts = dict(zip(rows["id"], rows["summary"], strict=True))
        assert set(rows["reference"]) <= set(train["summary"])
        for half, model in zip(halves, models, strict=True):
            written = dict(zip(half["id"], summarize(model, tokenizer, list(half["document"]), **options), strict=True))
            same = [written[i] == text for i, text in texts.items() if i in written]
            assert same and sum(same) >= 0.9 * len(same)  # two engines, ties aside

    other, model = tiny_tokenizer(), tiny_bart()
    other.add_tokens(["unheard"])
    model.resize_token_embeddings(len(other))
    save_model(model, other, tmp_path / "other")
    path = str(tmp_path / "other")
    for change in ({"label_teachers": [path]}, {"cross_fit": "own", "cross_fit_base": path}):
        with pytest.raises(InputError, match="another tokenizer"):
            rows_of(**change)


def test_teachers_of_halves_decode_as_the_teacher_does_now(based):
    base, teacher, tokenizer = based
    made = []
    for penalty in (0.5, 2.0, 0.5):
        teacher.generation_config.length_penalty = penalty
        save_model(teacher, tokenizer, base.teacher)
        made.append(runs.cross_fit_teacher(base, tokenizer, planted(12, 1)))
        assert load_model(made[-1] / "teacher")[0].generation_config.length_penalty == penalty
    assert made[0] == made[2] != made[1]


@pytest.mark.parametrize("way", ["label_teachers", "cross_fit"])
def test_another_model_in_the_same_folder_makes_another_student(based, way):
    base, teacher, tokenizer = based
    path = base.cross_fit_base
    run = replace(base, **({"label_teachers": [path]} if way == "label_teachers" else {"cross_fit": "own"}))
    train, validation = planted(12, 1), planted(4, 2)
    first = runs.train_student(run, teacher, tokenizer, train, validation)
    assert runs.train_student(run, teacher, tokenizer, train, validation) == first
    save_model(tiny_bart(seed=10), tokenizer, path)
    assert runs.train_student(run, teacher, tokenizer, train, validation) != first


def test_every_method_sees_the_same_documents_in_every_update(based, monkeypatch):
    base, teacher, tokenizer = based
    train = planted(22, 1)

    usable = runs.labelled
    monkeypatch.setattr(runs, "labelled", lambda folder: usable(folder).select(range(2, 20)))  # four are no good

    def seen(method: str, **changes) -> list[list[str]]:
        run = replace(base, method=method, **changes)
        rows = runs.training_rows(run, teacher, tokenizer, train)
        batches = runs.batches_of(run, tokenizer, rows, train)
        return [[document_id(name) for batch in batches(step) for name in batch["ids"]] for step in range(13)]

    alone = seen("sft")
    assert all(seen(method) == alone for method in ("kd", "pl", "pl_kl", "pl_gold", "kd_cached"))
    assert seen("pl", label_teachers=[base.cross_fit_base]) == alone
    labels = runs.training_rows(base, teacher, tokenizer, train)
    references = dict(zip(train["id"], train["summary"], strict=True))
    kept = [summary == references[name] for name, summary in zip(labels["id"], labels["summary"], strict=True)]
    assert len(labels) == len(train) and sum(kept) == 4

    written = labels.select([i for i, reference in enumerate(kept) if not reference])
    filters = {"copy_rate": min(measure_labels(written)["copy_rate"])}
    filtered = seen("pl", label_filters=filters)
    same = [one == other for one, other in zip(sum(alone, []), sum(filtered, []), strict=True)]
    assert 0 < sum(same) < len(same)
    assert seen("pl_kl", label_filters=filters) == filtered


def test_cooldowns_of_a_method_share_a_trunk_and_results_name_where_it_stopped(place, tmp_path):
    base, teacher, tokenizer = place
    train, validation = planted(16, 1), planted(6, 2)
    cooled = replace(base.training, schedule="cooldown", cooldown_share=0.5, eval_every=1, max_steps=8)
    short, long = (replace(base, training=replace(cooled, max_steps=steps)) for steps in (4, 8))
    folders = [runs.train_student(run, teacher, tokenizer, train, validation) for run in (long, short)]
    (trunk,) = folders[0].parent.glob("*-trunk-*")
    assert sorted(path.name for path in trunk.glob("checkpoint-*")) == ["checkpoint-000002", "checkpoint-000004"]
    assert [read_json(folder / "results.json")["trained_steps"] for folder in folders] == [8, 4]
    rates = [[row["lr"] for row in read_history(folder)] for folder in folders]
    assert rates == [[1e-3] * 5 + [7.5e-4, 5e-4, 2.5e-4], [1e-3] * 3 + [5e-4]]

    # In float32, as the losses below are; and at such a rate rounding decides which update is the best.
    exact = replace(base.training, precision="float32")
    patient = replace(exact, learning_rate=10.0, eval_every=1, max_steps=9, patience=2)
    run = replace(base, training=patient)
    folder = runs.train_student(run, teacher, tokenizer, train, validation)
    results, history = read_json(folder / "results.json"), read_history(folder)
    losses = [row["validation_ce"] for row in history]
    assert results["best_step"] == 1 + losses.index(min(losses)) and results["stop_metric"] == "validation_ce"
    assert results["trained_steps"] == results["best_step"] + 2 < 9
    write_json(tmp_path / "results.json", {})
    write_json(tmp_path / "scores.json", {"rouge2": [1.0]})
    row = comparison.result_row(run, folder, tmp_path, 0.0)
    student, _ = load_model(folder / "student")  # the row's losses are those of the weights that were kept
    held_out = batch_list(tokenize_pairs(validation, tokenizer, *run.lengths), tokenizer.pad_token_id, 32)
    for name, loss in runs.held_out_losses(student, teacher, held_out).items():
        assert row[name] == pytest.approx(loss, rel=1e-4)
    assert row["validation_ce"] < losses[-1] and row["steps"] == results["trained_steps"]


def test_targets_of_another_teacher_are_not_reused(place):
    base, teacher, tokenizer = place
    train = planted(8, 1)
    first = runs.cache_targets(base, teacher, tokenizer, train)
    assert runs.cache_targets(base, teacher, tokenizer, train) == first
    others = [replace(base, top_k=3), replace(base, target_samples=5), replace(base, max_source_length=20)]
    assert len({runs.cache_targets(run, teacher, tokenizer, train) for run in [base, *others]}) == 4


def test_targets_are_of_the_dtype_that_a_run_is_trained_in(place, monkeypatch):
    base, teacher, tokenizer = place
    made = {}
    for dtype in (None, torch.bfloat16):  # machines that share a folder of runs
        for module in ("device", "experiments.runs"):
            monkeypatch.setattr(f"distill_utils.{module}.amp_dtype", lambda *_, dtype=dtype, **__: dtype)
        made[dtype] = runs.cache_targets(base, teacher, tokenizer, planted(8, 1)) / "targets"
    exact, rounded = ((folder / "probs.bin").read_bytes() for folder in made.values())
    assert exact != rounded
