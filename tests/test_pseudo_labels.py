"""Labels are the same after a kill, on both engines; filters, joins and halves are counted by hand."""

import json
import math
from functools import partial

import pytest
import torch
from datasets import Dataset
from test_generation import make_documents, save
from tiny_models import FAMILIES, tiny_bart, tiny_tokenizer

from distill_utils import artifacts
from distill_utils.artifacts import InputError
from distill_utils.distillation import pseudo_labels
from distill_utils.distillation.pseudo_labels import filter_labels, measure_labels
from distill_utils.evaluation import ctranslate, generation
from distill_utils.models.loading import load_model

COLUMNS = ["id", "document", "summary", "reference", "score"]
ONE = {"num_beams": 1}
SAMPLED = {"num_beams": None, "temperature": 1.0, "top_k": 20, "seed": 3}
each_engine = pytest.mark.parametrize("engine", ["ctranslate2", "transformers"])


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save(tiny_bart(), tiny_tokenizer(), tmp_path_factory.mktemp("teacher") / "model")


@pytest.fixture
def dataset():
    documents = make_documents(11)
    documents[4] = ""
    columns = {"id": [f"d{i}" for i in range(11)], "document": documents, "summary": [f"ref {i}" for i in range(11)]}
    return Dataset.from_dict(columns)


@pytest.fixture
def label(model_folder, dataset, tmp_path, monkeypatch):
    """Return a function (folder name, changed arguments) -> labels, in shards of 4 documents."""
    monkeypatch.setattr(pseudo_labels, "SHARD_SIZE", 4)

    def write(name, **changes):
        settings = {"max_source_length": 24, "num_beams": 2, "max_new_tokens": 8, "dataset": dataset} | changes
        return pseudo_labels.pseudo_labels(settings.pop("model", model_folder), folder=tmp_path / name, **settings)

    return write


@pytest.mark.parametrize("decoding", [{}, SAMPLED], ids=["beams", "sampled"])
@each_engine
def test_labels_resume_to_the_identical_file(engine, decoding, label, dataset, tmp_path, monkeypatch):
    label = partial(label, engine=engine, **decoding)
    whole = label("whole")
    assert whole.column_names == COLUMNS
    assert whole["id"] == dataset["id"] and whole["reference"] == dataset["summary"]
    assert whole[4]["summary"] == "" and whole[4]["score"] is None
    assert all(row["score"] < 0 and math.isfinite(row["score"]) for row in whole if row["id"] != "d4")
    kept = artifacts.read_json(tmp_path / "whole" / "settings.json")
    assert kept["engine"] == engine
    assert (kept["num_beams"], kept["temperature"], kept["seed"]) == ((1, 1.0, 3) if decoding else (2, None, None))

    calls, real = [], pseudo_labels._labeller

    def failing(*arguments):
        write = real(*arguments)

        def fail_at_second(documents, **options):
            calls.append(len(documents))
            if len(calls) == 2:
                raise KeyboardInterrupt
            return write(documents, **options)

        return fail_at_second

    def build(folder):  # as an artifact, which a run without results.json builds again in the same folder
        return {"num_labels": len(label(folder))}

    monkeypatch.setattr(pseudo_labels, "_labeller", failing)
    monkeypatch.setenv("DISTILL_RUNS", str(tmp_path / "runs"))
    with pytest.raises(KeyboardInterrupt):
        artifacts.artifact("killed", {}, build)
    (killed,) = (tmp_path / "runs").glob("killed-*")
    assert len(list((killed / "shards").glob("*.jsonl"))) == 1
    (killed / "shards" / ".000000004.jsonl.1.tmp").write_text("half")
    torch.manual_seed(len(calls))  # nothing of what this process drew before may matter
    assert artifacts.artifact("killed", {}, build) == killed
    assert calls == [4, 4, 4, 3]  # the first shard is not labelled again
    files = [(folder / "pseudo_labels.jsonl").read_bytes() for folder in (tmp_path / "whole", killed)]
    assert files[0] == files[1] and pseudo_labels.read_labels(killed).to_list() == whole.to_list()
    assert [list(json.loads(line)) for line in files[0].decode().splitlines()] == [COLUMNS] * 11
    progress = artifacts.read_json(killed / "progress.json")
    assert (progress["step"], progress["total"]) == (11, 11)
    assert len((killed / "seconds.txt").read_text().split()) == 3  # one for each shard, whoever wrote it

    monkeypatch.setattr(pseudo_labels, "_labeller", lambda *_: pytest.fail("labelled again"))
    assert label("whole").to_list() == whole.to_list()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (ONE, "num_beams 2, now 1"),
        ({"engine": "transformers"}, "engine 'ctranslate2', now 'transformers'"),
        ({"documents": 5}, "data '"),
        ({"documents": 0}, "empty"),
        ({"engine": "warp"}, "warp"),
        ({"max_source_length": 65}, "65 is beyond the model's 64 positions"),
        ({"max_new_tokens": 65}, "65 is beyond the model's 64 positions"),
        ({"min_length": 9}, "min_length 9 is beyond max_new_tokens 8"),
        ({"num_candidates": 3}, "num_candidates 3 of 2 beams"),
        ({"num_candidates": 0}, "num_candidates 0 of 2 beams"),
        ({"top_k": 5}, "top_k 5 .* give a temperature"),
        ({"temperature": 1.0}, "num_beams 2 with a temperature"),
        (ONE | {"temperature": 0}, "temperature 0 "),
        (ONE | {"temperature": 1.0, "num_candidates": 0}, "num_candidates 0"),
        (ONE | {"temperature": 1.0, "top_k": 5, "top_p": 0.9}, "give one"),
        (ONE | {"temperature": 1.0, "top_k": 97}, "top_k 97 is outside 1 to 96"),
        (ONE | {"temperature": 1.0, "top_p": 1.5}, "top_p 1.5"),
    ],
)
def test_impossible_input_and_a_folder_of_other_settings_are_rejected(changes, message, label, dataset, tmp_path):
    changes = dict(changes)
    if "documents" in changes:
        changes["dataset"] = dataset.select(range(changes.pop("documents")))
    if "now" in message or "data" in message:
        label("labels")
    with pytest.raises(InputError, match=message):
        label("labels" if (tmp_path / "labels").exists() else "new", **changes)
    assert not (tmp_path / "new" / "settings.json").exists()  # a corrected call must not be rejected


@each_engine
def test_candidates_of_beams_are_rows_in_score_order(engine, label, dataset, tmp_path):
    labels = label("labels", engine=engine, num_beams=4, length_penalty=1.0, num_candidates=3)
    assert labels["id"] == [f"{id_}#{place}" for id_ in dataset["id"] for place in range(3)]
    assert labels["document"] == [text for text in dataset["document"] for _ in range(3)]
    assert labels["reference"] == [text for text in dataset["summary"] for _ in range(3)]
    for start in range(0, 33, 3):
        rows = labels[start : start + 3]
        if start == 12:  # the empty document
            assert rows["summary"] == [""] * 3 and rows["score"] == [None] * 3
        else:
            assert rows["score"] == sorted(rows["score"], reverse=True) and len(set(rows["summary"])) == 3


@each_engine
def test_sampled_labels_differ_by_candidate_and_repeat_by_seed(engine, label, dataset):
    label = partial(label, engine=engine, num_beams=None, temperature=1.0, num_candidates=3)
    state = torch.get_rng_state()
    first, same, other = (label(name, seed=seed) for name, seed in (("first", 7), ("same", 7), ("other", 8)))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.to_list() == same.to_list()
    assert sum(a != b for a, b in zip(first["summary"], other["summary"], strict=True)) >= 28
    samples = [first[start : start + 3] for start in range(0, 33, 3) if start != 12]
    assert all(len(set(rows["summary"])) == 3 for rows in samples)
    assert all(rows["score"] == sorted(rows["score"], reverse=True) for rows in samples)
    # Shards draw differently: two shards of the same documents give different labels.
    labels = label("twice", dataset=dataset.select([0, 1, 2, 3, 0, 1, 2, 3]))
    assert labels["summary"][:12] != labels["summary"][12:]


def test_labels_of_a_model_known_by_name(label, model_folder, tmp_path, monkeypatch):
    def load(name, **options):
        return load_model(model_folder if name == "named" else name, **options)

    monkeypatch.setattr(pseudo_labels, "load_model", load)
    assert label("named", model="named").to_list() == label("folder").to_list()
    left = sorted(path.name for path in (tmp_path / "named").iterdir())
    assert left == ["progress.json", "pseudo_labels.jsonl", "seconds.txt", "settings.json"]


def test_engine_auto_falls_back_where_the_model_does_not_convert(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pseudo_labels._choose_engine(model_folder, "auto") == "ctranslate2"
    marian = save(FAMILIES["marian"](), tiny_tokenizer(), tmp_path / "marian")
    assert pseudo_labels._choose_engine(marian, "auto") == "transformers"
    with pytest.raises(ValueError, match="marian"):
        pseudo_labels._choose_engine(marian, "ctranslate2")


def test_labels_are_no_longer_than_the_model_has_positions(tmp_path):
    model, tokenizer = tiny_bart(1, 1), tiny_tokenizer()
    with torch.no_grad():
        model.final_logits_bias[0, :5] = -1000.0  # no special token, so that every text has its full length
    converted = ctranslate.to_ctranslate2(save(model, tokenizer, tmp_path / "model"), tmp_path / "converted")
    greedy = {"max_source_length": 16, "num_beams": 1, "min_length": 0, "no_repeat_ngram_size": 0}
    given = model.generation_config, model.config.to_dict()
    engines = (
        partial(generation.summarize, model, tokenizer, ["the list"]),
        lambda **given: ctranslate.summarize_ctranslate2(converted, tokenizer, ["the list"], **given)[0],
    )
    for write in engines:
        assert len(write(**greedy, max_new_tokens=64)[0].split()) == 64
        with pytest.raises((IndexError, RuntimeError)):
            write(**greedy, max_new_tokens=65)
    pseudo_labels.checked_decoding(*given, num_beams=1, max_new_tokens=64)
    with pytest.raises(InputError, match="max_new_tokens 65 is beyond the model's 64 positions"):
        pseudo_labels.checked_decoding(*given, num_beams=1, max_new_tokens=65)


# ------------------------------------------------------------------------------------------------------------ filters


def test_empty_and_repeating_labels_are_counted():
    texts = {
        "return the list of names": "kept",
        "": "empty",
        " ... ": "empty",
        "a b c a b c a b c": "repeating",  # "a b c" three times
        "a b c a b c": "kept",  # twice
        "list list list of": "repeating",  # one word in 3 of 4
        "list of list of": "kept",  # half is not over half
        "no no no": "kept",  # too short to judge
    }
    dataset = Dataset.from_dict({"id": [str(i) for i in range(8)], "summary": list(texts)})
    kept, counts = filter_labels(dataset, {"repeating": 0})
    assert kept["summary"] == [text for text, reason in texts.items() if reason == "kept"]
    assert counts == {"total": 8, "kept": 4, "empty": 2, "repeating": 2}


DOCUMENT = "the file read_rows opens a table of 12 rows and the function returns a list"  # 15 words
# label, reference and what stands beside them: (reference_rouge2, copy_rate, length_ratio, repeating, numbers, names)
CASES = [
    # copied as one fragment; 3 of 3 and 3 of 4 bigrams of the reference: F1 = 2 * 1 * 0.75 / 1.75
    ("returns a list of", "it returns a list of", (100 * 1.5 / 1.75, 1.0, 0.8, 0, 0, 0)),
    # "a table of" and "rows" stand in the document, "with", "99" and "big" do not; 1 of 6 and 1 of 1 bigrams shared
    ("a table of rows with 99 big", "table of", (100 * 2 / 7, 4 / 7, 3.5, 0, 1, 0)),
    # 12 is in the document, 7 is not; the name read_rows is, FastReader is not; no bigram shared
    ("read_rows 12 FastReader 7", "opens two tables now", (0.0, 0.5, 1.0, 0, 0.5, 0.5)),
    # three times the same three words: "the file" is copied, "x" is not
    ("the file x the file x the file x", "the file x", (100 * 2 * 0.25 / 1.25, 6 / 9, 3.0, 1, 0, 0)),
    ("", "a list", (0.0, 0.0, 0.0, 0, 0, 0)),
]


def make_labels(with_references: bool = True) -> Dataset:
    labels, references, _ = zip(*CASES, strict=True)
    columns = {"id": [f"d{i}" for i in range(len(CASES))], "document": [DOCUMENT] * len(CASES), "summary": list(labels)}
    return Dataset.from_dict(columns | ({"reference": list(references)} if with_references else {}))


def test_measures_by_hand():
    measured = measure_labels(make_labels())
    for (_, found), (label, _, expected) in zip(measured.iterrows(), CASES, strict=True):
        assert found.tolist() == pytest.approx(list(expected)), label


def test_without_references_the_document_gives_the_length_and_rouge_is_rejected():
    without = make_labels(with_references=False)
    assert measure_labels(without, ["length_ratio"])["length_ratio"].tolist()[:2] == pytest.approx([4 / 15, 7 / 15])
    for dataset, missing in (
        (without, 5),
        (make_labels().map(lambda row, i: {"reference": "x" * (i != 2)}, with_indices=True), 1),
    ):
        with pytest.raises(InputError, match=f"reference_rouge2 needs references, {missing} of 5"):
            filter_labels(dataset, {"reference_rouge2": 10})


@pytest.mark.parametrize(
    ("thresholds", "kept", "removed"),
    [
        ({"reference_rouge2": 10, "length_ratio": [0.5, 2.0]}, ["d0"], (1, 2)),
        ({"repeating": 0, "unsupported_numbers": 0.5}, ["d0", "d2"], (1, 1)),
        # What two filters would remove is counted by the first; bounds are allowed values.
        ({"length_ratio": [1.0, 3.0], "copy_rate": [0, 0.5], "repeating": 0}, ["d2"], (2, 1, 0)),
        ({}, ["d0", "d1", "d2", "d3"], ()),
    ],
)
def test_filters_count_what_each_removes_first(thresholds, kept, removed):
    rows, counts = filter_labels(make_labels(), thresholds)
    assert rows["id"] == kept
    expected = {"total": 5, "kept": len(kept), "empty": 1, **dict(zip(thresholds, removed, strict=True))}
    assert list(counts.items()) == list(expected.items())


def test_rows_for_a_histogram_tell_what_each_threshold_removes_alone():
    rows = pseudo_labels.threshold_rows(make_labels(), {"length_ratio": [0.5, 2.0], "copy_rate": 0.9})
    assert list(rows.columns) == ["measure", "value", "removed", "low", "high", "share_removed"]
    assert rows["measure"].tolist() == ["length_ratio"] * 4 + ["copy_rate"] * 4  # the empty label is left out
    assert rows["value"].tolist() == pytest.approx([0.8, 3.5, 1.0, 3.0, 1.0, 4 / 7, 0.5, 6 / 9])
    assert rows["removed"].tolist() == [False, True, False, True, True, False, False, False]
    assert rows["share_removed"].tolist() == [0.5] * 4 + [0.25] * 4
    assert (rows["low"].iloc[-1], rows["high"].iloc[-1]) == (float("-inf"), 0.9)


@pytest.mark.parametrize("value", [2.0, [2.0, 0.5], [0.5], "0.5", ["a", "b"], [float("nan"), 1]])
def test_a_threshold_that_is_no_range_is_rejected(value):
    with pytest.raises(InputError, match="of length_ratio is not a range"):
        filter_labels(make_labels(), {"length_ratio": value})


def test_unknown_measures_and_thresholds_that_leave_nothing_are_rejected():
    with pytest.raises(InputError, match="'rouge' is unknown"):
        filter_labels(make_labels(), {"rouge": 10})
    with pytest.raises(InputError, match="left, {'total': 5, 'kept': 0, 'empty': 1, 'copy_rate': 4}"):
        filter_labels(make_labels(), {"copy_rate": [0.1, 0.2]})


# ----------------------------------------------------------------------------------------------------- joins and halves


def labels_of(*rows):
    return Dataset.from_list([dict(zip(COLUMNS, row, strict=True)) for row in rows])


def test_join_labels_keeps_order_makes_ids_unique_and_drops_duplicates():
    first = labels_of(("a", "A", "one", "gold a", -1.0), ("b", "B", "two", "gold b", None))
    first = first.add_column("extra", [1, 2])
    second = ("a", "A", "uno", "gold a", -2.0), ("b", "B", "two", "gold b", -3.0), ("a@1", "D", "x", "y", 0.0)
    second = labels_of(*second)
    gold = Dataset.from_dict({"summary": ["gold a", "uno"], "id": ["a", "c"], "document": ["A", "A"]})
    joined, duplicates = pseudo_labels.join_labels([first, second, gold])
    assert [tuple(row.values()) for row in joined] == [
        ("a", "A", "one", "gold a", -1.0),
        ("b", "B", "two", "gold b", None),
        ("a@1", "A", "uno", "gold a", -2.0),
        ("a@1@1", "D", "x", "y", 0.0),  # its own id was taken meanwhile
        ("a@2", "A", "gold a", "gold a", None),
    ]
    assert joined.column_names == COLUMNS
    assert duplicates == 2  # "two" of the second teacher, "uno" of the references
    assert pseudo_labels.join_labels([joined])[0].to_list() == joined.to_list()
    with pytest.raises(InputError, match="at least one"):
        pseudo_labels.join_labels([])


def test_cross_fit_halves_depend_on_seed_and_id_alone():
    dataset = Dataset.from_dict({"id": [f"module:{i}" for i in range(400)], "value": list(range(400))})
    first, second = pseudo_labels.cross_fit_halves(dataset, 1)
    assert sorted([*first["value"], *second["value"]]) == list(range(400)) and 160 <= len(first) <= 240
    assert first["value"] == sorted(first["value"])  # the order stays
    shuffled = pseudo_labels.cross_fit_halves(dataset.shuffle(seed=5).select(range(300)), 1)
    assert set(shuffled[0]["id"]) <= set(first["id"]) and set(shuffled[1]["id"]) <= set(second["id"])
    assert set(pseudo_labels.cross_fit_halves(dataset, 2)[0]["id"]) != set(first["id"])
    candidates = dataset.map(lambda row: {"id": row["id"] + f"#{row['value'] % 3}" + "@1" * (row["value"] % 2)})
    assert pseudo_labels.cross_fit_halves(candidates, 1)[0]["value"] == first["value"]
    with pytest.raises(InputError, match="1 rows leave one half empty"):
        pseudo_labels.cross_fit_halves(dataset.select([0]), 1)
