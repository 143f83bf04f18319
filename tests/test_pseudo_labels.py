from __future__ import annotations

import json
import math

import pytest
import torch
from datasets import Dataset
from test_generation import make_documents, save
from tiny_models import FAMILIES, tiny_bart, tiny_tokenizer

from distill_utils import artifacts
from distill_utils.distillation import pseudo_labels
from distill_utils.models.loading import load_model


@pytest.fixture
def labelling(tmp_path):
    tokenizer = tiny_tokenizer()
    model_folder = save(tiny_bart(), tokenizer, tmp_path / "model")
    documents = make_documents(11)
    documents[4] = ""
    columns = {"id": [f"d{i}" for i in range(11)], "document": documents, "summary": [f"ref {i}" for i in range(11)]}
    settings = {"max_source_length": 24, "num_beams": 2, "max_new_tokens": 8, "shard_size": 4}
    return model_folder, Dataset.from_dict(columns), settings


SAMPLED = {"num_beams": None, "temperature": 1.0, "top_k": 20, "seed": 3}


@pytest.mark.parametrize("decoding", [{}, SAMPLED], ids=["beams", "sampled"])
@pytest.mark.parametrize("engine", ["ctranslate2", "transformers"])
def test_pseudo_labels_resume_to_the_identical_file(engine, decoding, labelling, tmp_path, monkeypatch):
    model_folder, dataset, settings = labelling
    settings |= decoding
    whole = pseudo_labels.pseudo_labels(model_folder, dataset, tmp_path / "whole", engine=engine, **settings)
    assert whole.column_names == ["id", "document", "summary", "reference", "score"]
    assert whole["id"] == dataset["id"] and whole["reference"] == dataset["summary"]
    assert whole[4]["summary"] == "" and whole[4]["score"] is None
    assert all(row["score"] < 0 and math.isfinite(row["score"]) for row in whole if row["id"] != "d4")
    kept = artifacts.read_json(tmp_path / "whole" / "settings.json")
    assert kept["engine"] == engine
    assert (kept["num_beams"], kept["temperature"], kept["seed"]) == ((1, 1.0, 3) if decoding else (2, None, None))

    calls, real = [], pseudo_labels._labeller

    def failing(*arguments):
        label = real(*arguments)

        def fail_at_second(documents, **options):
            calls.append(len(documents))
            if len(calls) == 2:
                raise KeyboardInterrupt
            return label(documents, **options)

        return fail_at_second

    monkeypatch.setattr(pseudo_labels, "_labeller", failing)
    with pytest.raises(KeyboardInterrupt):
        pseudo_labels.pseudo_labels(model_folder, dataset, tmp_path / "killed", engine=engine, **settings)
    assert len(list((tmp_path / "killed" / "shards").glob("*.jsonl"))) == 1
    (tmp_path / "killed" / "shards" / ".000000004.jsonl.1.tmp").write_text("half")
    torch.manual_seed(len(calls))  # nothing of what this process drew before may matter
    resumed = pseudo_labels.pseudo_labels(model_folder, dataset, tmp_path / "killed", engine=engine, **settings)
    assert calls == [4, 4, 4, 3]  # the first shard is not labelled again
    files = [(tmp_path / name / "pseudo_labels.jsonl").read_bytes() for name in ("whole", "killed")]
    assert files[0] == files[1] and resumed.to_list() == whole.to_list()
    rows = [json.loads(line) for line in files[0].decode().splitlines()]
    assert [list(row) for row in rows] == [["id", "document", "summary", "reference", "score"]] * 11

    monkeypatch.setattr(pseudo_labels, "_labeller", lambda *_: pytest.fail("labelled again"))
    again = pseudo_labels.pseudo_labels(model_folder, dataset, tmp_path / "whole", engine=engine, **settings)
    assert again.to_list() == whole.to_list()
    progress = artifacts.read_json(tmp_path / "killed" / "progress.json")
    assert (progress["step"], progress["total"]) == (11, 11)


def test_pseudo_labels_refuse_a_folder_with_other_settings_or_documents(labelling, tmp_path):
    model_folder, dataset, settings = labelling
    pseudo_labels.pseudo_labels(model_folder, dataset, tmp_path / "labels", **settings)
    for changed in (settings | {"num_beams": 1}, settings | {"prefix": "the "}):
        with pytest.raises(artifacts.InputError, match="num_beams 2, now 1|prefix"):
            pseudo_labels.pseudo_labels(model_folder, dataset, tmp_path / "labels", **changed)
    with pytest.raises(artifacts.InputError, match="documents"):
        pseudo_labels.pseudo_labels(model_folder, dataset.select(range(5)), tmp_path / "labels", **settings)
    with pytest.raises(artifacts.InputError, match="warp"):
        pseudo_labels.pseudo_labels(model_folder, dataset, tmp_path / "labels", engine="warp", **settings)
    with pytest.raises(artifacts.InputError, match="empty"):
        pseudo_labels.pseudo_labels(model_folder, dataset.select([]), tmp_path / "labels", **settings)
    with pytest.raises(artifacts.InputError, match="65 is beyond the model's 64 positions"):
        pseudo_labels.pseudo_labels(model_folder, dataset, tmp_path / "new", **settings | {"max_source_length": 65})
    assert not (tmp_path / "new" / "settings.json").exists()  # a mended call must not be refused
    with artifacts.lock(tmp_path / "new" / "shards"), pytest.raises(artifacts.InputError, match="in use by process"):
        pseudo_labels.pseudo_labels(model_folder, dataset, tmp_path / "new", **settings)


@pytest.mark.parametrize("engine", ["ctranslate2", "transformers"])
def test_candidates_of_beams_are_rows_in_score_order(engine, labelling, tmp_path):
    model_folder, dataset, settings = labelling
    settings |= {"engine": engine, "num_beams": 4, "length_penalty": 1.0}
    labels = pseudo_labels.pseudo_labels(model_folder, dataset, tmp_path / "labels", num_candidates=3, **settings)
    assert labels["id"] == [f"{id_}#{place}" for id_ in dataset["id"] for place in range(3)]
    assert labels["document"] == [text for text in dataset["document"] for _ in range(3)]
    assert labels["reference"] == [text for text in dataset["summary"] for _ in range(3)]
    lines = (tmp_path / "labels" / "pseudo_labels.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == labels.to_list()
    for start in range(0, 33, 3):
        rows = labels[start : start + 3]
        if start == 12:  # the empty document
            assert rows["summary"] == [""] * 3 and rows["score"] == [None] * 3
        else:
            assert rows["score"] == sorted(rows["score"], reverse=True) and len(set(rows["summary"])) == 3
    again = pseudo_labels.pseudo_labels(model_folder, dataset, tmp_path / "labels", num_candidates=3, **settings)
    assert again.to_list() == labels.to_list()


@pytest.mark.parametrize("engine", ["ctranslate2", "transformers"])
def test_sampled_labels_differ_by_candidate_and_repeat_by_seed(engine, labelling, tmp_path):
    model_folder, dataset, settings = labelling
    settings |= {"engine": engine, "num_beams": None, "temperature": 1.0, "num_candidates": 3}
    state = torch.get_rng_state()
    first, same, other = (
        pseudo_labels.pseudo_labels(model_folder, dataset, tmp_path / name, seed=seed, num_threads=threads, **settings)
        for name, seed, threads in (("first", 7, 1), ("same", 7, 8), ("other", 8, 1))
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert first.to_list() == same.to_list()
    assert sum(a != b for a, b in zip(first["summary"], other["summary"], strict=True)) >= 28
    samples = [first[start : start + 3] for start in range(0, 33, 3) if start != 12]
    assert all(len(set(rows["summary"])) == 3 for rows in samples)
    assert all(rows["score"] == sorted(rows["score"], reverse=True) for rows in samples)
    # Shards draw differently: two shards of the same documents give different labels.
    twice = dataset.select([0, 1, 2, 3, 0, 1, 2, 3])
    labels = pseudo_labels.pseudo_labels(model_folder, twice, tmp_path / "twice", **settings)
    assert labels["summary"][:12] != labels["summary"][12:]


def test_folders_know_how_their_labels_were_decoded(labelling, tmp_path):
    model_folder, dataset, settings = labelling
    folder = tmp_path / "labels"
    labels = pseudo_labels.pseudo_labels(model_folder, dataset, folder, **settings)
    kept = artifacts.read_json(folder / "settings.json")
    for name in pseudo_labels.OLD_SETTINGS:
        del kept[name]
    artifacts.write_json(folder / "settings.json", kept)  # as folders were before there was sampling
    assert pseudo_labels.pseudo_labels(model_folder, dataset, folder, seed=5, **settings).to_list() == labels.to_list()
    with pytest.raises(artifacts.InputError, match="num_candidates 1, now 2"):
        pseudo_labels.pseudo_labels(model_folder, dataset, folder, num_candidates=2, **settings)
    sampled = {"temperature": 0.5, "max_source_length": 24, "num_beams": 1, "max_new_tokens": 8, "shard_size": 4}
    pseudo_labels.pseudo_labels(model_folder, dataset, tmp_path / "sampled", **sampled)
    for changed, message in (({"seed": 1}, "seed 0, now 1"), ({"temperature": None}, "temperature 0.5, now None")):
        with pytest.raises(artifacts.InputError, match=message):
            pseudo_labels.pseudo_labels(model_folder, dataset, tmp_path / "sampled", **sampled | changed)


@pytest.mark.parametrize(
    ("decoding", "message"),
    [
        ({"num_candidates": 3}, "num_candidates 3 of 2 beams"),
        ({"num_candidates": 0}, "num_candidates 0 of 2 beams"),
        ({"top_k": 5}, "top_k 5 .* give a temperature"),
        ({"temperature": 1.0}, "num_beams 2 with a temperature"),
        ({"temperature": 0, "num_beams": 1}, "temperature 0 "),
        ({"temperature": 1.0, "num_beams": 1, "num_candidates": 0}, "num_candidates 0"),
        ({"temperature": 1.0, "num_beams": 1, "top_k": 5, "top_p": 0.9}, "give one"),
        ({"temperature": 1.0, "num_beams": 1, "top_k": 97}, "top_k 97 is outside 1 to 96"),
        ({"temperature": 1.0, "num_beams": 1, "top_p": 1.5}, "top_p 1.5"),
    ],
)
def test_decoding_that_contradicts_itself_is_refused(decoding, message, labelling, tmp_path):
    model_folder, dataset, settings = labelling
    with pytest.raises(artifacts.InputError, match=message):
        pseudo_labels.pseudo_labels(model_folder, dataset, tmp_path / "labels", **settings | decoding)
    assert not (tmp_path / "labels" / "settings.json").exists()


def test_pseudo_labels_of_a_model_known_by_name(labelling, tmp_path, monkeypatch):
    model_folder, dataset, settings = labelling
    real = load_model
    monkeypatch.setattr(
        pseudo_labels,
        "load_model",
        lambda name, **options: real(model_folder if name == "named" else name, **options),
    )
    found = pseudo_labels.pseudo_labels("named", dataset, tmp_path / "named", **settings)
    expected = pseudo_labels.pseudo_labels(model_folder, dataset, tmp_path / "folder", **settings)
    assert found.to_list() == expected.to_list()
    assert sorted(path.name for path in (tmp_path / "named").iterdir()) == [
        "progress.json",
        "pseudo_labels.jsonl",
        "settings.json",
    ]


def test_engine_auto_falls_back_where_the_model_does_not_convert(labelling, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pseudo_labels._choose_engine(labelling[0], "auto") == "ctranslate2"
    marian = save(FAMILIES["marian"](), tiny_tokenizer(), tmp_path / "marian")
    assert pseudo_labels._choose_engine(marian, "auto") == "transformers"
    with pytest.raises(ValueError, match="marian"):
        pseudo_labels._choose_engine(marian, "ctranslate2")


def test_filter_counts_by_reason():
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
    kept, counts = pseudo_labels.filter_pseudo_labels(dataset)
    assert kept["summary"] == [text for text, reason in texts.items() if reason == "kept"]
    assert counts == {"total": 8, "kept": 4, "empty": 2, "repeating": 2}
    with pytest.raises(artifacts.InputError, match="no pseudo-label of 2"):
        pseudo_labels.filter_pseudo_labels(dataset.select([1, 2]))


def labels_of(rows, **columns):
    names = ("id", "document", "summary", "reference", "score")
    return Dataset.from_dict(dict(zip(names, map(list, zip(*rows, strict=True)), strict=False)) | columns)


def test_join_labels_keeps_order_makes_ids_unique_and_drops_duplicates():
    first = labels_of([("a", "A", "one", "gold a", -1.0), ("b", "B", "two", "gold b", None)], extra=[1, 2])
    second = labels_of(
        [("a", "A", "uno", "gold a", -2.0), ("b", "B", "two", "gold b", -3.0), ("a@1", "D", "x", "y", 0.0)]
    )
    gold = Dataset.from_dict({"summary": ["gold a", "uno"], "id": ["a", "c"], "document": ["A", "A"]})
    joined, duplicates = pseudo_labels.join_labels([first, second, gold])
    assert [tuple(row.values()) for row in joined] == [
        ("a", "A", "one", "gold a", -1.0),
        ("b", "B", "two", "gold b", None),
        ("a@1", "A", "uno", "gold a", -2.0),
        ("a@1@1", "D", "x", "y", 0.0),  # its own id was taken meanwhile
        ("a@2", "A", "gold a", "gold a", None),
    ]
    assert joined.column_names == ["id", "document", "summary", "reference", "score"]
    assert duplicates == 2  # "two" of the second teacher, "uno" of the references
    assert pseudo_labels.join_labels([joined])[0].to_list() == joined.to_list()
    with pytest.raises(artifacts.InputError, match="at least one"):
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
    with pytest.raises(artifacts.InputError, match="1 rows leave one half empty"):
        pseudo_labels.cross_fit_halves(dataset.select([0]), 1)
