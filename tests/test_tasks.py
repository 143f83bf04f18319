"""Text-to-text understanding: formats and labels, predictions against plain losses, metrics against hand counts."""

import json
import random
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
from datasets import Dataset
from test_loading import bart_like, refusal, t5_like
from tiny_models import WORDS, tiny_bart, tiny_mbart, tiny_t5, tiny_t5_v1_1

from distill_utils.data import loading
from distill_utils.data.batches import tokenize_pairs
from distill_utils.evaluation.statistics import bootstrap_interval, compare
from distill_utils.evaluation.tasks import (
    TASKS,
    Task,
    document_values,
    label_scores,
    load_task,
    majority,
    predict_labels,
    scores,
    to_text,
)


@pytest.fixture(autouse=True)
def no_warnings():
    """A metric that is undefined, or a class never predicted, must not warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def write_folder(folder: Path, **splits) -> str:
    folder.mkdir(exist_ok=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder)


# --------------------------------------------------------------------------------------------------------------- tasks

FORMATS = [  # task, its texts, the hub's label; document and summary
    ("sst2", ("it works .",), 1, "sst2 sentence: it works .", "positive"),
    ("cola", ("He go.",), 0, "cola sentence: He go.", "unacceptable"),
    ("mrpc", ("A.", "B."), 0, "mrpc sentence1: A. sentence2: B.", "not_equivalent"),
    ("rte", ("A.", "B."), 1, "rte sentence1: A. sentence2: B.", "not_entailment"),
    ("qqp", ("A?", "B?"), 1, "qqp question1: A? question2: B?", "duplicate"),
    ("qnli", ("A?", "B."), 0, "qnli question: A? sentence: B.", "entailment"),
    ("mnli", ("A.", "B."), 2, "mnli hypothesis: B. premise: A.", "contradiction"),
    ("mnli_mismatched", ("A.", "B."), 1, "mnli hypothesis: B. premise: A.", "neutral"),
    ("stsb", ("A.", "B."), 4.75, "stsb sentence1: A. sentence2: B.", "4.8"),
    ("belongs", ("A.", "f()"), "no", "belongs sentence1: A. sentence2: f()", "no"),
    ("family", ("A.",), "tables", "family sentence: A.", "tables"),
]


@pytest.mark.parametrize(("task", "texts", "written", "document", "summary"), FORMATS)
def test_formats(task, texts, written, document, summary, tmp_path):
    label = 4.75 if task == "stsb" else summary
    expected = {"document": document, "summary": summary, "label": label}
    row = dict(zip(TASKS[task].columns, texts, strict=True)) | {"label": written}
    assert to_text(task, Dataset.from_list([row])).to_list() == [{"id": "0"} | expected]
    # A local file in the plain columns, with the label as the word; its row ids are kept.
    plain = {"id": "x7", "sentence1": texts[0], "sentence2": texts[1] if len(texts) > 1 else None, "label": label}
    path = write_folder(tmp_path, train=[plain], dev=[row])
    assert load_task(task, "train", path).to_list() == [{"id": "x7"} | expected]
    assert load_task(task, "validation", path).to_list() == [{"id": "0"} | expected]


def labelled(label: object) -> Dataset:
    return Dataset.from_list([{"id": "r9", "sentence1": "a", "sentence2": "b", "label": label}])


def test_labels_as_numbers_and_similarities_rounded_for_the_model_alone():
    assert {case[0] for case in FORMATS} == set(TASKS)
    for written, read in ((1, "equivalent"), ("0", "not_equivalent"), (1.0, "equivalent")):
        assert to_text("mrpc", labelled(written))["label"][:] == [read]
    values, rounded = (0, 0.1, "0.333", 2.5, 4.89, 4.9, 5), ("0.0", "0.0", "0.4", "2.4", "4.8", "4.8", "5.0")
    for value, summary in zip(values, rounded, strict=True):  # halves to the even fifth, as in T5
        (row,) = to_text("stsb", labelled(value))
        assert (row["label"], row["summary"]) == (float(value), summary) and summary in TASKS["stsb"].labels


@pytest.mark.parametrize(
    ("task", "labels", "known"),
    [
        ("rte", (2, -1, 0.5, "Entailment", None), "0 or 'entailment', 1 or 'not_entailment'"),
        ("mnli", ("nan",), "2 or 'contradiction'"),
        ("stsb", (5.1, "nan", "high"), "0 to 5"),
    ],
)
def test_labels_outside_of_the_set_are_rejected(task, labels, known):
    for label in labels:
        message = refusal(to_text, task, labelled(label))
        assert f"{label!r}" in message and "r9" in message and f"'{task}'" in message and known in message


ONE_ROW = Dataset.from_dict({"document": ["the file"]})


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda path: load_task("wnli", "train"), "'wnli'"),
        (lambda path: scores("wnli", [0], [0]), "'wnli'"),
        (lambda path: predict_labels(None, None, None, "wnli", 8), "'wnli'"),
        (lambda path: load_task("rte", "dev", path), "'dev'"),
        (lambda path: load_task("rte", "test", path), "'sentence2'"),
        (lambda path: load_task("sst2", "validation", path), "'label'"),
        (lambda path: load_task("mnli", "test", path), "premise, hypothesis"),
        (lambda path: load_task("rte", "test", f"{path}/train.jsonl"), "'train.jsonl'"),
        (lambda path: load_task("rte", "test", f"{path}/nowhere"), "'nowhere'"),
        (lambda path: scores("rte", [0], [0, 1]), "1 predictions for 2 labels"),
        (lambda path: scores("rte", [], []), "0 predictions for 0 labels"),
        (lambda path: scores("rte", ["entailment", "maybe"], [0, 0]), "'maybe' of row 1"),
        (lambda path: predict_labels(tiny_t5(), t5_like(), ONE_ROW, "rte", 32), "'rte'"),
        (lambda path: predict_labels(tiny_bart(), bart_like(), ONE_ROW, "tiny", 65), "65"),
    ],
)
def test_impossible_requests_are_rejected(call, named, tmp_path, tiny_task):
    """The last two: labels that the tokenizer writes alike, and sources beyond the model's positions."""
    row = {"sentence1": "a", "sentence2": "b", "label": 0}
    path = write_folder(tmp_path, train=[row] * 3, test=[{"sentence1": "a", "label": 0}], dev=[{"sentence": 1}])
    assert named in refusal(call, path)


def test_hub_splits(monkeypatch):
    """The hub's labelled parts: train is divided by the first text, test is its validation part."""
    asked = []
    columns = {"premise": [f"premise {i // 3}" for i in range(300)], "hypothesis": ["b"] * 300}
    columns["label"] = [0, 1, 2] * 100

    def load(name, config, streaming):
        asked.append((name, config))
        rows = Dataset.from_dict(columns | {"idx": list(range(300))})
        return dict.fromkeys(("train", "validation_matched", "validation_mismatched"), rows)

    monkeypatch.setattr(loading, "load_dataset", load)
    train, validation, test = (load_task("mnli", split) for split in ("train", "validation", "test"))
    assert load_task("mnli_mismatched", "test")["id"][0].startswith("validation_mismatched-")
    assert asked == [("nyu-mll/glue", "mnli")] * 4
    assert sorted(test["id"]) == sorted(f"validation_matched-{i}" for i in range(300))
    assert sorted([*train["id"], *validation["id"]]) == sorted(f"train-{i}" for i in range(300))
    assert not set(train["document"]) & set(validation["document"]) and 10 <= len(validation) <= 60
    assert train["id"][:] != sorted(train["id"], key=lambda name: int(name[6:]))
    assert load_task("mnli", "train", num=20).to_list() == train.to_list()[:20]
    assert {row["id"]: row["label"] for row in train}.items() <= {
        f"train-{i}": TASKS["mnli"].labels[i % 3] for i in range(300)
    }.items()


def test_embedded_tasks(monkeypatch):
    families = ("numerics", "deep learning")
    texts = [{"id": f"m.f{i}", "summary": f"Say {i}.", "document": f"function f{i}() Text {i}."} for i in range(40)]
    pairs = [row | {"module": "m", "package": "m", "family": families[i % 2]} for i, row in enumerate(texts)]
    monkeypatch.setattr(loading, "_corpus_table", lambda kind, split: Dataset.from_list(pairs))
    rows = load_task("belongs", "train")
    texts = {row["id"]: row for row in pairs}
    for row in rows:
        text, own = row["document"], texts[row["id"]]
        assert text.startswith("belongs sentence1: Say ") and text.endswith(f"sentence2: {own['document']}")
        assert row["label"] == row["summary"] == ("yes" if f"sentence1: {own['summary']} " in text else "no")
    assert set(rows["label"]) == {"yes", "no"}
    rows = load_task("family", "test", num=30)
    assert len(rows) == 30 and set(rows["label"]) == set(families)
    assert all(re.fullmatch(r"family sentence: Say \d+\. Text \d+\.", text) for text in rows["document"])


# --------------------------------------------------------------------------------------------------------- predictions

# Of unequal lengths, all known to the tiny tokenizer; every tiny model of seed 2 prefers several of them.
LABELS = ("read", "write the file", "list of", "error", "list", "of", "time", "a", "in", "object", "write", "the")


@pytest.fixture
def tiny_task(monkeypatch):
    monkeypatch.setitem(TASKS, "tiny", Task(("sentence",), LABELS))


def naive_scores(model, tokenizer, document: str) -> list[float]:
    """One row, one label, Hugging Face's own mean loss, made a sum."""
    found = []
    for label in LABELS:
        ids = tokenizer(document, return_tensors="pt")
        labels = torch.tensor([[5 + WORDS.index(word) for word in label.split()] + [tokenizer.eos_token_id]])
        loss = model(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"], labels=labels).loss
        found.append(-loss.item() * labels.numel())
    return found


@pytest.mark.parametrize(
    ("make", "make_tokenizer"),
    [(tiny_bart, bart_like), (tiny_t5, t5_like), (tiny_t5_v1_1, t5_like), (tiny_mbart, t5_like)],
)
def test_predictions_are_the_likeliest_labels(make, make_tokenizer, tiny_task):
    model, tokenizer = make(seed=2), make_tokenizer()
    generator = random.Random(0)
    documents = [" ".join(generator.choices(WORDS, k=generator.randint(1, 12))) for _ in range(8)]
    rows = Dataset.from_dict({"document": documents})
    with torch.no_grad():
        expected = np.array([naive_scores(model, tokenizer, text) for text in documents])
    done = []
    model.train()  # dropout must be off for the predictions, and on again after them
    found = predict_labels(model, tokenizer, rows, "tiny", 32, batch_size=3, progress=lambda *step: done.append(step))
    assert model.training and done == [(3, 8), (6, 8), (8, 8)]
    assert found == [LABELS[i] for i in expected.argmax(1)] and len(set(found)) > 1

    model.eval()
    encoded = tokenizer(documents, padding=True, return_tensors="pt")
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    table = Dataset.from_dict({"id": LABELS, "document": LABELS, "summary": LABELS})
    candidates = tokenize_pairs(table, tokenizer, 32, 32)["labels"]
    with torch.no_grad():
        values = label_scores(model, inputs, candidates).numpy()
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------------------------------------- scores


REFERENCES = {
    "accuracy": sklearn.metrics.accuracy_score,
    "f1": sklearn.metrics.f1_score,  # of the second label word
    "matthews": sklearn.metrics.matthews_corrcoef,
    "pearson": lambda labels, guesses: scipy.stats.pearsonr(labels, guesses).statistic,
    "spearman": lambda labels, guesses: scipy.stats.spearmanr(labels, guesses).statistic,
}


@pytest.mark.parametrize("task", ["qnli", "mrpc", "cola", "stsb"])
def test_scores_are_those_of_the_libraries_and_intervals_narrow_with_more_documents(task):
    generator, widths = np.random.default_rng(0), []
    for num in (100, 1600):
        truth = generator.uniform(1, 4, num) if task == "stsb" else generator.integers(0, 2, num)
        guess = truth + generator.normal(0, 0.5, num)
        guess = guess.clip(0, 5).round(1) if task == "stsb" else (guess > 0.5).astype(int)
        row = scores(task, guess, truth, num_samples=100)
        expected = {name: 100 * REFERENCES[name](truth, guess) for name in TASKS[task].metrics}
        expected |= {"num_documents": num, "score": np.mean(list(expected.values()))}
        assert {name: row[name] for name in expected} == pytest.approx(expected)
        assert row["score_low"] < row["score"] < row["score_high"] and row == scores(task, guess, truth, 100)
        widths.append(row["score_high"] - row["score_low"])
    assert 2.5 < widths[0] / widths[1] < 6.5  # 4 in the long run


def test_perfect_and_constant_predictions():
    for task in TASKS:
        labels = [*TASKS[task].labels, *TASKS[task].labels]
        assert scores(task, labels, labels, num_samples=20)["score"] == pytest.approx(100)
        for constant in (TASKS[task].labels[0], TASKS[task].labels[-1]):
            row = scores(task, [constant] * len(labels), labels, num_samples=20)
            assert all(np.isfinite(value) for value in row.values()) and row["score"] < 70
            if task in ("cola", "stsb"):
                assert row["score"] == row["score_low"] == row["score_high"] == 0
            scores(task, [constant], [constant], num_samples=5)  # one row, one class


@pytest.mark.parametrize("task", ["qnli", "mrpc", "cola", "stsb"])
def test_values_per_document_give_the_intervals_and_paired_tests_of_the_score(task):
    generator, found = np.random.default_rng(0), []
    truth = generator.uniform(0, 5, 200) if task == "stsb" else (generator.random(200) < 0.7).astype(int)
    for wrong in (0.1, 0.3):
        other = generator.uniform(0, 5, 200).round(1) if task == "stsb" else 1 - truth
        guess = np.where(generator.random(200) < wrong, other, truth if task != "stsb" else truth.round(1))
        row, values = scores(task, guess, truth), document_values(task, guess, truth)
        ends = (row["score"], row["score_low"], row["score_high"])
        assert bootstrap_interval(values) == pytest.approx(ends, abs=1.0)  # both are drawn
        found.append((guess, values))
    draws = generator.integers(200, size=(400, 200))
    direct = [np.subtract(*(scores(task, guess[drawn], truth[drawn], 1)["score"] for guess, _ in found))
              for drawn in draws]  # fmt: skip
    test = compare(found[0][1], found[1][1])
    assert test["high"] - test["low"] == pytest.approx(np.subtract(*np.quantile(direct, [0.975, 0.025])), rel=0.15)
    if task == "qnli":
        assert found[0][1].tolist() == (100.0 * (found[0][0] == truth)).tolist()
    assert document_values(task, truth[:1].round(), truth[:1].round()).shape == (1,)


def test_majority_is_that_of_training():
    train, labels = ["yes"] * 3 + ["no"] * 2, ["no", "no", "no", "yes"]
    assert majority("belongs", train, labels)["score"] == 25
    assert majority("mrpc", ["not_equivalent"], ["equivalent", "not_equivalent"])["f1"] == 0
