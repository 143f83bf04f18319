from __future__ import annotations

import json
import math

import pytest
import torch
from datasets import Dataset
from test_generation import make_documents, save
from tiny_models import FAMILIES, tiny_bart, tiny_tokenizer

from distill_utils import artifacts, pseudo_labels, students


@pytest.fixture
def labelling(tmp_path):
    tokenizer = tiny_tokenizer()
    model_folder = save(tiny_bart(), tokenizer, tmp_path / "model")
    documents = make_documents(11)
    documents[4] = ""
    columns = {"id": [f"d{i}" for i in range(11)], "document": documents, "summary": [f"ref {i}" for i in range(11)]}
    settings = {"max_source_length": 24, "num_beams": 2, "max_new_tokens": 8, "shard_size": 4}
    return model_folder, Dataset.from_dict(columns), settings


@pytest.mark.parametrize("engine", ["ctranslate2", "transformers"])
def test_pseudo_labels_resume_to_the_identical_file(engine, labelling, tmp_path, monkeypatch):
    model_folder, dataset, settings = labelling
    whole = pseudo_labels.pseudo_labels(model_folder, dataset, tmp_path / "whole", engine=engine, **settings)
    assert whole.column_names == ["id", "document", "summary", "reference", "score"]
    assert whole["id"] == dataset["id"] and whole["reference"] == dataset["summary"]
    assert whole[4]["summary"] == "" and whole[4]["score"] is None
    assert all(row["score"] < 0 and math.isfinite(row["score"]) for row in whole if row["id"] != "d4")
    kept = artifacts.read_json(tmp_path / "whole" / "settings.json")
    assert kept["num_beams"] == 2 and kept["engine"] == engine

    calls, real = [], pseudo_labels._labeller

    def failing(*arguments):
        label = real(*arguments)

        def fail_at_second(documents, progress):
            calls.append(len(documents))
            if len(calls) == 2:
                raise KeyboardInterrupt
            return label(documents, progress=progress)

        return fail_at_second

    monkeypatch.setattr(pseudo_labels, "_labeller", failing)
    with pytest.raises(KeyboardInterrupt):
        pseudo_labels.pseudo_labels(model_folder, dataset, tmp_path / "killed", engine=engine, **settings)
    assert len(list((tmp_path / "killed" / "shards").glob("*.jsonl"))) == 1
    (tmp_path / "killed" / "shards" / ".000000004.jsonl.1.tmp").write_text("half")
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


def test_pseudo_labels_of_a_model_known_by_name(labelling, tmp_path, monkeypatch):
    model_folder, dataset, settings = labelling
    real = students.load_model
    monkeypatch.setattr(
        students,
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
