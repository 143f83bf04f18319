"""Data by name or path, what is rejected, tokenising, and streams that are functions of the step."""

import gzip
import json
import random
import tracemalloc
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from tiny_models import BOS, EOS, PAD, WORDS, tiny_bart, tiny_tokenizer
from tokenizers import processors

from distill_utils.artifacts import InputError
from distill_utils.data import loading, pydocs
from distill_utils.data.batches import batch_list, collate, document_id, length_batches, pair_stream, tokenize_pairs
from distill_utils.models.loading import load_model, save_model

ROWS = [{"id": f"row{i}", "document": f"Document {i}, café.", "summary": f"Summary {i}."} for i in range(5)]
TEXTS = [f"Text {i} of café.\nSecond line." for i in range(40)]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Keep run folders and the library's cache out of the user's."""
    monkeypatch.setenv("DISTILL_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_rows(path: Path, rows: list[dict]) -> str:
    if path.suffix == ".csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    elif path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path, index=False)
    else:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return str(path)


def refusal(function, *arguments, **settings) -> str:
    """Return the message of the InputError that a call must raise: one line."""
    with pytest.raises(InputError) as error:
        function(*arguments, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------------------ loading


@pytest.mark.parametrize("ending", ["jsonl", "json", "jsonl.gz", "csv", "parquet"])
def test_pairs_from_a_folder_of_every_format(tmp_path, capsys, ending):
    rows = [*ROWS, {"id": "a", "document": "", "summary": "S."}, {"id": "b", "document": "D.", "summary": None}]
    tmp_path = tmp_path / "news [v2] *"  # no pattern
    tmp_path.mkdir()
    write_rows(tmp_path / f"train.{ending}", rows)
    loaded = loading.load_pairs(str(tmp_path), "train")
    assert loaded.column_names == ["id", "document", "summary"] and loaded.to_list() == ROWS
    out = capsys.readouterr().out
    assert "dropped 2 rows" in out and tmp_path.name in out
    assert loading.load_pairs(str(tmp_path), "train", num=2).to_list() == ROWS[:2]
    assert loading.load_pairs(str(tmp_path), "train", num=6).to_list() == ROWS
    assert "only 5 rows, 6 were requested" in capsys.readouterr().out
    assert "test.jsonl.gz" in refusal(loading.load_pairs, str(tmp_path), "test")


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "csv", "parquet", "txt"])
def test_text_from_a_folder_of_every_format(tmp_path, ending):
    if ending == "txt":  # two texts behind a byte order mark, with the line ends of another system, and blanks
        content = "\ufeff\n" + "\n \n\n".join(TEXTS).replace("\n", "\r\n") + "\n\n"
        (tmp_path / "train.txt").write_bytes(content.encode())
    else:
        write_rows(tmp_path / f"train.{ending}", [{"text": text} for text in [*TEXTS, "", " \n"]])
    assert loading.load_text(str(tmp_path)) == loading.load_text(str(tmp_path), "train", num=41) == TEXTS
    assert loading.load_text(str(tmp_path), num=3) == TEXTS[:3]
    assert "test.jsonl.gz" in refusal(loading.load_text, str(tmp_path), "test")


def test_names_of_files_and_columns(tmp_path):
    for name in ("validation.jsonl", "val.jsonl.gz", "valid.csv", "dev.parquet"):
        path = write_rows(tmp_path / name, ROWS[:3])
        assert loading.load_pairs(str(tmp_path), "validation").to_list() == ROWS[:3]
        Path(path).unlink()
    rows = [{"article": "A b.", "title": " C. ", "more": [1]}] * 2 + [{"article": "No title."}]
    write_rows(tmp_path / "test.jsonl", rows)
    loaded = loading.load_pairs(str(tmp_path), "test", document_column="article", summary_column="title")
    assert loaded.to_list() == [{"id": str(i), "document": "A b.", "summary": "C."} for i in range(2)]
    message = refusal(loading.load_pairs, str(tmp_path), "test")
    assert "'document'" in message and "article, title, more" in message and "document_column" in message
    message = refusal(loading.load_text, str(tmp_path), "test")
    assert "'text'" in message and "article, title, more" in message


PAIR = b'{"document": "a", "summary": "b"}\n'
CORRUPT = bytearray(gzip.compress(PAIR))
CORRUPT[10] = 0xFF  # behind the header of ten bytes: a block of a type that does not exist
BAD_FILES = {
    "empty.jsonl": (b"", "no rows"),
    "blank.jsonl": (b"\n\n", "no rows"),
    "empty.csv": (b"", "csv"),
    "header.csv": (b"document,summary\n", "header.csv"),
    "ragged.csv": (b"document,summary\na,b\na,b,c,d\n", "line 3"),
    "commas.csv": (b"document,summary\na, b,c\nd, e,f\n", "double quotes"),
    "open.csv": (b'document,summary\na,b\n"c,d\n', "double quotes"),
    "text.parquet": (b"no parquet", "parquet"),
    "rows.xlsx": (b"x", ".jsonl.gz, .json, .csv, .parquet"),
    "half.jsonl": (PAIR + b'{"document": "a \\ud83d", "summary": "b"}\n', "line 2 has half a character"),
    "broken.jsonl": (PAIR + b'\n{"document": "a", "summ\n', "line 3 is not JSON"),
    "list.jsonl": (PAIR + b'["a", "b"]\n', "line 2"),
    "plain.jsonl.gz": (PAIR, "plain.jsonl.gz"),
    "corrupt.jsonl.gz": (CORRUPT, "corrupt.jsonl.gz"),
    "cut.jsonl.gz": (gzip.compress(PAIR * 99)[:-20], "cut.jsonl.gz"),
    "nothing.jsonl": (PAIR.replace(b"b", b" ") + PAIR.replace(b'"a"', b"null"), "0 usable rows"),
}


def test_ids_that_repeat_or_look_like_those_of_labels_are_made_unique(tmp_path, capsys):
    for ids in (["a", "a", "b"], [None] * 3, ["page#0", "page#1", "page#2"], ["user@1", "x", "y"]):
        rows = [row | {"id": name} for row, name in zip(ROWS, ids, strict=False)]
        loaded = loading.load_pairs(write_rows(tmp_path / "rows.jsonl", rows), "train")
        found = loaded["id"]
        assert len(set(found)) == 3 and [document_id(f"{name}#1@2") for name in found] == list(found)
        assert "row number is appended" in capsys.readouterr().out
        rows = tokenize_pairs(loaded, tiny_tokenizer(), 16, 8)
        (batch,) = pair_stream(rows, PAD, 3, seed=0, order=rows)(0)
        assert sorted(batch["ids"]) == sorted(found)


def test_a_list_of_sentences_is_their_text_and_a_whole_surrogate_pair_a_character(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"document": ["One.", "Two."], "summary": "\\ud83d\\ude00 smiles"}\n')
    (row,) = loading.load_pairs(str(tmp_path / "rows.jsonl"), "train").to_list()
    assert (row["document"], row["summary"]) == ("One. Two.", "\N{GRINNING FACE} smiles")


def test_cells_of_csv_are_text_as_written(tmp_path):
    summaries = ["007", "None", "1e5", "NA", *map(str, range(11_000)), "text after numbers"]
    long = "a " * 70_000
    lines = [f'{i},"{long if i == 3 else "d"}, quoted",{summary}' for i, summary in enumerate(summaries)]
    (tmp_path / "train.csv").write_text("id,document,summary\n" + "\n".join([*lines, "x9,no summary"]) + "\n")
    rows = loading.load_pairs(str(tmp_path), "train")
    assert list(rows["summary"]) == summaries and rows["document"][3] == f"{long}, quoted"


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_cells_that_are_no_text_read_the_same_from_every_format(tmp_path, ending):
    cells = [["One.", "Two."], [], ["S."], None]
    path = write_rows(tmp_path / f"lists.{ending}", [{"document": ["D."], "summary": cell} for cell in cells])
    assert loading.read_files(Path(path), "train").num_rows == 4
    kept = [loading.load_pairs(path, split).to_list() for split in {loading._drawn_split("D.")}]
    assert [(row["document"], row["summary"]) for row in kept[0]] == [("D.", "One. Two."), ("D.", "S.")]
    assert loading.load_text(path, loading._drawn_split("One. Two."), "summary")[0] == "One. Two."
    numbers = write_rows(tmp_path / f"numbers.{ending}", [{"text": number} for number in (1.5, float("nan"), 7.0)])
    found = [text for split in loading.SPLITS for text in texts_of(numbers, split)]
    assert sorted(found) == ["1.5", "7.0"]


def texts_of(path: str, split: str) -> list[str]:
    try:
        return loading.load_text(path, split)
    except InputError:  # none drawn for it
        return []


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_rejected(tmp_path, name):
    content, part = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    message = refusal(loading.load_pairs, str(tmp_path / name), "train")
    assert name in message and part in message


@pytest.mark.parametrize("name", ["bad.txt", "bad.jsonl", "bad.jsonl.gz"])
def test_text_that_is_not_utf8_is_rejected_with_its_place(tmp_path, name):
    good = '{"text": "café"}\n'.encode() * 3000  # more than any buffer that a decoder reads at once
    content = good + '{"text": "é"}\n'.encode("latin-1")
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    message = refusal(loading.load_text, str(tmp_path / name))
    assert name in message and f"byte {len(good) + 10} (0xe9)" in message
    assert ("line 3001" in message) == (name != "bad.txt")


def test_impossible_requests_are_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load_dataset", None)  # no network is asked
    for path in (tmp_path / "none.jsonl", tmp_path / "none", "./none", "~/none-at-all.csv", "none.parquet"):
        for load in (loading.load_pairs, loading.load_text):
            assert "does not exist" in refusal(load, str(path), "train")
    assert "-1" in refusal(loading.load_pairs, str(tmp_path), "train", num=-1)
    monkeypatch.setenv("DISTILL_CORPUS", str(tmp_path))
    assert "holds no corpus" in refusal(loading.load_pairs, "pydocs", "train")
    for load, name in ((loading.load_pairs, str(tmp_path)), (loading.load_classification, "family"),
                       (loading.load_text, "pydocs")):  # fmt: skip
        message = refusal(load, name, "dev")
        assert "'dev'" in message and "train, validation, test" in message
    for load, name in ((loading.load_pairs, "pydoc"), (loading.load_pairs, "a/b/c"),
                       (loading.load_classification, "families")):  # fmt: skip
        assert repr(name) in refusal(load, name, "train")


def test_one_file_is_cut_by_a_hash_of_the_text(tmp_path):
    rows = [{"id": f"r{i}", "document": f"Text number {i % 190}.", "summary": "S."} for i in range(200)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "rows.txt").write_text("\n\n".join(row["document"] for row in rows[::-1]))
    splits = loading.load_splits(path, 0, 0, 0)
    assert sorted(i for loaded in splits.values() for i in loaded["id"]) == sorted(row["id"] for row in rows)
    documents = {split: set(loaded["document"]) for split, loaded in splits.items()}
    assert not documents["train"] & documents["test"] and not documents["train"] & documents["validation"]
    assert 130 < len(splits["train"]) < 185 and min(map(len, splits.values())) > 5
    for split, loaded in splits.items():  # whatever the order and the file
        texts = loading.load_text(str(tmp_path / "rows.txt"), split)
        assert sorted(texts) == sorted(loaded["document"])
        assert texts[::-1] == loading.load_text(path, split, column="document") == list(loaded["document"])
    one = write_rows(tmp_path / "one.jsonl", ROWS[:1])
    messages = [refusal(loading.load_pairs, one, split) for split in loading.SPLITS if split != "train"]
    assert "(validation) has 0 usable rows" in messages[0] and "(test) has 0 usable rows" in messages[1]
    assert "folder with a file for each" in messages[0]
    (tmp_path / "blank.txt").write_text("\n \n\n")
    assert "0 usable rows" in refusal(loading.load_text, str(tmp_path / "blank.txt"))


def test_hub_columns_and_configurations(monkeypatch):
    asked = []

    def load(name, config, streaming):
        asked.append((name, config, streaming))
        columns = ("article", "highlights") if "cnn" in name else ("document", "summary")
        rows = Dataset.from_dict({columns[0]: ["A b."], columns[1]: ["C."], "id": ["x"]})
        return {"train": rows, "test": rows}

    def fail(*_, **__):
        raise ConnectionError("Couldn't reach the server\nand a second line")

    monkeypatch.setattr(loading, "load_dataset", load)
    for name in ("abisee/cnn_dailymail", "EdinburghNLP/xsum"):
        assert loading.load_pairs(name, "test").to_list() == [{"id": "x", "document": "A b.", "summary": "C."}]
    assert asked == [("abisee/cnn_dailymail", "3.0.0", False), ("EdinburghNLP/xsum", None, False)]
    assert "it has train, test" in refusal(loading.load_pairs, "EdinburghNLP/xsum", "validation")
    monkeypatch.setattr(loading, "load_dataset", fail)
    message = refusal(loading.load_pairs, "EdinburghNLP/xsum", "test")
    assert "'EdinburghNLP/xsum'" in message and "Couldn't reach the server" in message and "second" not in message


def test_hub_text_is_fetched_only_as_far_as_it_is_needed(tmp_path, monkeypatch):
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(3):
        rows = [{"text": f"{i}: text {n}", "n": n} for n in range(1500)]
        write_rows(folder / f"train-0000{i}-of-00003.parquet", rows)
    load = datasets.load_dataset
    monkeypatch.setattr(loading, "load_dataset", lambda name, config, **options: load(str(folder), **options))
    whole = {split: loading.load_text("a/b", split) for split in loading.SPLITS}  # only train is there: cut by a hash
    assert len(set().union(*whole.values())) == sum(map(len, whole.values())) == 4500 and min(map(len, whole.values()))
    (folder / "train-00002-of-00003.parquet").write_bytes(b"a shard that cannot be read")
    for split, texts in whole.items():
        num = sum(not text.startswith("2") for text in texts)  # all that the other two hold
        assert loading.load_text("a/b", split, num=num) == texts[:num]
    message = refusal(loading.load_text, "a/b", "train", num=3000)  # of 2400 or so
    assert "a/b (train) cannot be loaded" in message
    assert "it has text, n" in refusal(loading.load_text, "a/b", "train", column="body", num=5)
    for path in folder.glob("*.parquet"):
        path.unlink()
    write_rows(folder / "train.jsonl", [{"body": text} for text in TEXTS])  # a stream that declares no columns
    assert "it has body" in refusal(loading.load_text, "a/b", "train", num=5)
    drawn = loading.load_text(str(folder / "train.jsonl"), "train", column="body")
    assert loading.load_text("a/b", "train", column="body", num=5) == drawn[:5]
    write_rows(folder / "test.jsonl", [{"body": "a"}])  # two splits are taken as they are
    assert loading.load_text("a/b", "train", column="body", num=50) == TEXTS
    assert "it has train, test" in refusal(loading.load_text, "a/b", "validation", column="body", num=5)


def test_the_corpus_is_built_once(monkeypatch):
    calls = []

    def build_corpus(progress):
        calls.append(1)
        progress("reading docstrings", 1, 1)
        row = {"module": "one.m", "name": "f", "package": "one", "family": "numerics"}
        made = [(i, {"document": f"function f() Text {i}.", "summary": f"Say {i}."}) for i in range(40)]
        pairs = {split: [row | text | {"id": f"{split}{i}"} for i, text in made] for split in loading.SPLITS}
        text = {split: [{"text": f"{split} text", "module": "one.m"}] for split in loading.SPLITS}
        return {"pairs": pairs, "text": text, "removed": {"x": 2}, "fingerprint": "abc"}

    monkeypatch.setattr(pydocs, "build_corpus", build_corpus)
    train = loading.load_pairs("pydocs", "train")
    assert sorted(train["id"]) == sorted(f"train{i}" for i in range(40))
    assert list(train["id"]) != [f"train{i}" for i in range(40)]  # shuffled, so that the first rows are a fair sample
    assert loading.load_pairs("pydocs", "train", num=7).to_list() == train.to_list()[:7]
    assert loading.load_text("pydocs", "test") == ["test text"]
    facts = loading.corpus_facts()
    assert facts["fingerprint"] == "abc" and facts["removed"] == {"x": 2}
    assert facts["pairs"] == dict.fromkeys(loading.SPLITS, 40)
    for task, labels in (("belongs", {"yes", "no"}), ("family", {"numerics"})):
        rows = loading.load_classification(task, "test")
        assert len(rows) == 40 and set(rows["label"]) == labels and {"sentence1", "sentence2"} <= set(rows.column_names)
    assert calls == [1]


def test_data_fingerprint_depends_on_every_text():
    tables = [ROWS, ROWS[::-1], ROWS[:4], *([*ROWS[:4], ROWS[4] | {key: "other"}] for key in ROWS[0])]
    assert len({loading.data_fingerprint(Dataset.from_list(rows)) for rows in tables}) == len(tables)
    assert loading.data_fingerprint(Dataset.from_list(ROWS)) == loading.data_fingerprint(Dataset.from_list(ROWS))


# --------------------------------------------------------------------------------------------------------- tokenising


def bart_like():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return tokenizer


def t5_like():
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    return tokenizer


def ids_of(text: str) -> list[int]:
    return [5 + WORDS.index(word) for word in text.split()]


@pytest.mark.parametrize(("make", "start"), [(bart_like, [BOS]), (t5_like, []), (tiny_tokenizer, [])])
def test_labels_have_no_start_token_and_end_with_the_end_token(make, start):
    documents = ["the list of a file", "read", "write the text to a file in time to read"]
    summaries = ["a list", "the the the the the the the", "error"]
    pairs = Dataset.from_dict({"id": ["a", "b", "c"], "document": documents, "summary": summaries})
    rows = tokenize_pairs(pairs, make(), max_source_length=64, max_target_length=64, prefix="read ")
    assert rows["id"][:] == ["a", "b", "c"]
    assert list(rows["input_ids"]) == [[*start, *ids_of("read " + text), EOS] for text in documents]
    assert list(rows["labels"]) == [[*ids_of(text), EOS] for text in summaries]
    short = tokenize_pairs(pairs, make(), max_source_length=6, max_target_length=4)
    assert all(len(ids) <= 6 and ids[-1] == EOS for ids in short["input_ids"])
    assert all(len(ids) <= 4 and ids[-1] == EOS and BOS not in ids for ids in short["labels"])
    assert len(short["input_ids"][2]) == 6 and len(short["labels"][1]) == 4 - len(start)


def test_collate_pads():
    rows = [
        {"id": "x", "input_ids": [7, 8, 2], "labels": [9, 2]},
        {"id": "y", "input_ids": [7, 2], "labels": [6, 5, 2]},
    ]
    batch = collate(rows, pad_token_id=1, pad_to_multiple=4)
    assert {name: value if name == "ids" else value.tolist() for name, value in batch.items()} == {
        "input_ids": [[7, 8, 2, 1], [7, 2, 1, 1]],
        "attention_mask": [[1, 1, 1, 0], [1, 1, 0, 0]],
        "labels": [[9, 2, -100, -100], [6, 5, 2, -100]],
        "ids": ["x", "y"],
    }
    assert all(batch[key].dtype == torch.int64 for key in ("input_ids", "attention_mask", "labels"))
    assert collate(rows, pad_token_id=1)["labels"].shape == (2, 8)


def test_line_breaks_of_a_summary_become_what_the_tokenizer_has():
    rows = Dataset.from_dict({"id": ["a"], "document": ["read the file"], "summary": ["the list \n of text"]})
    tokenizer = tiny_tokenizer()
    for expected in ("the list of text", "the list <n> of text"):
        (labels,) = tokenize_pairs(rows, tokenizer, 20, 20)["labels"]
        assert tokenizer.convert_ids_to_tokens(labels)[:-1] == expected.split()
        tokenizer.add_tokens(["<n>"])


# ------------------------------------------------------------------------------------------------------------- streams

LENGTHS = np.random.default_rng(0).integers(5, 120, size=203).tolist()


@pytest.mark.parametrize(("count", "batch_size"), [(203, 8), (200, 8), (3, 8), (1, 4)])
def test_length_batches_hold_every_row(count, batch_size):
    batches = length_batches(LENGTHS[:count], batch_size, seed=1, epoch=0)
    assert [len(batch) for batch in batches] == [batch_size] * -(-count // batch_size)
    times = Counter(row for batch in batches for row in batch)
    assert set(times) == set(range(count))
    fillers = -count % batch_size  # as few as fill the last batch, each in turn
    assert max(times.values()) <= 1 + -(-fillers // count)


def test_length_batches_follow_from_their_arguments_and_save_padding_without_sorting_the_epoch():
    def padding(batches: list[list[int]]) -> int:
        return sum(max(LENGTHS[i] for i in batch) * len(batch) - sum(LENGTHS[i] for i in batch) for batch in batches)

    batches = length_batches(LENGTHS, 8, seed=1, epoch=0)
    np.random.seed(1)
    assert length_batches(LENGTHS, 8, seed=1, epoch=0) == batches
    assert batches not in (length_batches(LENGTHS, 8, seed=1, epoch=1), length_batches(LENGTHS, 8, seed=2, epoch=0))
    order = random.Random(0).sample(range(200), 200)
    assert padding(batches) < 0.25 * padding([order[i : i + 8] for i in range(0, 200, 8)])
    longest = [max(LENGTHS[i] for i in batch) for batch in batches]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))


def make_rows(count: int = 21) -> Dataset:
    generator = np.random.default_rng(3)
    rows = {"id": [f"row{i}" for i in range(count)], "input_ids": [], "labels": []}
    for key, most in (("input_ids", 20), ("labels", 9)):
        rows[key] = [generator.integers(5, 90, size=n).tolist() for n in generator.integers(1, most, size=count)]
    return Dataset.from_dict(rows)


def unpadded(micro_batches: list[dict]) -> list[tuple]:
    return [
        (name, source[mask.bool()].tolist(), labels[labels != -100].tolist())
        for batch in micro_batches
        for name, source, mask, labels in zip(
            batch["ids"], batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
        )
    ]


def test_pair_stream_is_a_function_of_step_and_seed():
    rows = make_rows()
    in_order = pair_stream(rows, PAD, 4, seed=5)
    expected = [unpadded(in_order(step)) for step in range(14)]  # two epochs and more: six steps each
    fresh = pair_stream(rows, PAD, 4, seed=5)
    for step in (13, 0, 7, 7, 5, 6, 12, 1):
        assert unpadded(fresh(step)) == expected[step]
    originals = sorted((row["id"], row["input_ids"], row["labels"]) for row in rows)
    for epoch in (expected[:6], expected[6:12]):
        seen = [row for step in epoch for row in step]
        assert len(seen) == 24 and all(row in seen for row in originals) and all(row in originals for row in seen)
    assert expected[:6] != expected[6:12]
    assert [unpadded(pair_stream(rows, PAD, 4, seed=6)(step)) for step in range(6)] != expected[:6]
    for size in (1, 2):  # micro-batches have the rows of the batch, short targets together: less padding
        parts = pair_stream(rows, PAD, 4, 5, micro_batch_size=size)
        for step in range(8):
            assert [len(batch["ids"]) for batch in parts(step)] == [size] * (4 // size)
            found = unpadded(parts(step))
            assert sorted(found) == sorted(expected[step]) and len(in_order(step)) == 1
            targets = [len(labels) for _, _, labels in found]
            assert targets == sorted(targets)
    assert "no training rows" in refusal(pair_stream, rows.select([]), PAD, 4, 0)
    batches = batch_list(rows, PAD, 4)  # for evaluation: every row once, in order of length
    found = unpadded(batches)
    assert sorted(found) == originals
    lengths = [len(row[1]) for row in found]
    assert lengths == sorted(lengths) and [len(batch["ids"]) for batch in batches] == [4] * 5 + [1]


def test_pair_stream_holds_ids_in_four_bytes():
    """As lists of Python numbers they took 34, most of a machine's memory for a large corpus."""
    generator = np.random.default_rng(0)
    ids = {name: generator.integers(300, 50_000, (200, 500)).tolist() for name in ("input_ids", "labels")}
    rows = Dataset.from_dict({"id": [str(i) for i in range(200)]} | ids)
    del ids
    tracemalloc.start()
    batches = pair_stream(rows, PAD, 4, seed=0)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held / (200 * 1000) < 6 and len(unpadded(batches(0))) == 4


def test_rows_dropped_inside_a_fixed_order_leave_gaps_that_others_fill():
    rows = make_rows(20)
    whole = pair_stream(rows, PAD, 4, seed=5)
    kept = rows.select([i for i in range(20) if i % 3])
    some = pair_stream(kept.select(range(len(kept) - 1, -1, -1)), PAD, 4, seed=5, order=rows)  # whatever their order
    gaps = {f"row{i}" for i in range(0, 20, 3)}
    for epoch in range(3):
        fillers = []
        for step in range(5 * epoch, 5 * epoch + 5):
            for wanted, found in zip(unpadded(whole(step)), unpadded(some(step)), strict=True):
                assert (found == wanted) if wanted[0] not in gaps else found[0] not in gaps
                fillers += [found[0]] if wanted[0] in gaps else []
        assert len(fillers) == len(set(fillers)) == 7  # no document stands in twice before all others did


def test_several_targets_of_a_document_take_turns():
    rows = make_rows(20)
    second = rows.remove_columns("id").add_column("id", [f"row{i}@1" for i in range(20)])
    whole = pair_stream(rows, PAD, 4, seed=5)
    both = pair_stream(concatenate_datasets([rows, second]), PAD, 4, seed=5, order=rows)
    chosen = Counter()
    for step in range(20):  # four epochs
        names = [row[0] for row in unpadded(both(step))]
        assert [name.removesuffix("@1") for name in names] == [row[0] for row in unpadded(whole(step))]
        chosen.update(names)
    assert set(chosen.values()) == {2} and len(chosen) == 40


@pytest.mark.parametrize(
    ("forced", "bias", "kept"), [(BOS, 0.0, True), (5, 0.0, False), (None, 99.0, True), (None, -99.0, False)]
)
def test_labels_begin_with_the_start_token_where_the_model_writes_it(tmp_path, forced, bias, kept):
    tokenizer, model = bart_like(), tiny_bart()
    model.generation_config.forced_bos_token_id = forced
    model.final_logits_bias[0, BOS] = bias  # a model of the hub learned it, an embedded one the reverse
    save_model(model, tokenizer, tmp_path / "model")
    rows = Dataset.from_dict({"id": ["a"], "document": ["read the file"], "summary": ["read"]})
    (labels,) = tokenize_pairs(rows, load_model(tmp_path / "model")[1], 20, 20)["labels"]
    assert (labels[0] == BOS) == kept and labels[-1] == EOS and len(labels) == 2 + kept
