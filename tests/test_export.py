"""A student on its way to a user: found by name, exported with proof and card, summarizing files."""

import errno
import gzip
import io
import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from datasets import Dataset
from test_generation import make_documents
from tiny_models import FAMILIES, tiny_bart, tiny_t5, tiny_tokenizer
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import distill_utils
from distill_utils import __main__ as cli
from distill_utils import artifacts
from distill_utils.artifacts import InputError, read_json, write_json
from distill_utils.data.loading import data_fingerprint
from distill_utils.evaluation import generation, scoring
from distill_utils.evaluation.metrics import rouge_scores
from distill_utils.experiments import checks, export, use
from distill_utils.models.loading import load_model, save_model
from distill_utils.models.students import count_parameters

DOCUMENTS = make_documents(12)
TEST = {"id": [str(i) for i in range(12)], "document": DOCUMENTS, "summary": [text[:30] for text in DOCUMENTS]}
SPEED = {"latency_ms": 12.5, "ms_per_token": 1.25}
pytestmark = pytest.mark.filterwarnings("ignore:.*texts are longer")


@pytest.fixture(autouse=True)
def own_runs(tmp_path, monkeypatch):
    """Give every test runs of its own, and reload in this process: as strict, and without seconds of imports."""

    def observe(folder, model, documents, settings):
        reloaded, tokenizer = load_model(folder, dtype=model.dtype)
        return checks._observe(reloaded, tokenizer, documents, settings)

    monkeypatch.setenv("DISTILL_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(checks, "_observe_in_new_process", observe)
    monkeypatch.setattr(scoring, "measure_speed", lambda *_, **__: SPEED)
    monkeypatch.setattr(use, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))


def train(model, name="kd-3-1-s0", seed=0, **settings) -> Path:
    """Return the run folder of a student as `runs.train_student` leaves it."""
    settings = {"method": "kd", "max_source_length": 20, "max_target_length": 10, "seed": seed, **settings}

    def build(folder):
        save_model(model, tiny_tokenizer(), folder / "student")
        made_from = {"teacher": "pydocs-bart", "dataset": "some/news"}
        return {"name": name, "made_from": made_from, "parameters": count_parameters(model), "num_train": 7}

    return artifacts.artifact(name, settings, build)


def measure(run: Path, **options) -> Path:
    model, tokenizer = load_model(run / "student")
    options = {"max_source_length": 20, "num_speed": 1, **options}
    return scoring.evaluate_model(run.name, model, tokenizer, run.name, Dataset.from_dict(TEST), **options)


def run_cli(capsys, *arguments) -> SimpleNamespace:
    capsys.readouterr()
    code = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return SimpleNamespace(code=code, out=out, err=err)


# --------------------------------------------------------------------------------------------------------- the folder


@pytest.mark.parametrize("family", FAMILIES)
def test_export_of_every_family_writes_what_its_run_would(family, tmp_path):
    run = train(FAMILIES[family](decoder_layers=1))
    folder = export.export("kd-3-1-s0", tmp_path / "out" / "mine")
    assert {"README.md", "config.json", "generation_config.json", "model.safetensors"} <= set(os.listdir(folder))
    assert os.listdir(folder.parent) == ["mine"]  # nothing temporary left
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    original, _ = load_model(run / "student")
    for name, weight in original.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
    assert model.generation_config.to_diff_dict() == original.generation_config.to_diff_dict()
    assert tokenizer.model_max_length == 20 and len(tokenizer("the list " * 40)["input_ids"]) == 81  # no truncation
    assert (folder / "ctranslate2" / "model.bin").exists() == (family != "marian")

    expected = use.summarize(DOCUMENTS, run / "student", max_source_length=20, num_beams=1)
    found = use.summarize(DOCUMENTS, folder, num_beams=1)
    assert len(set(expected)) > 3
    assert rouge_scores(found, expected)["rougeL"].mean() > 80  # the other engine, and 8 bits


@pytest.mark.parametrize(("own", "trained"), [("summarize: ", ""), ("", "read: "), ("summarize: ", "read: ")])
def test_a_student_reads_as_it_was_trained_to(tmp_path, own, trained):
    model = tiny_t5()
    if own:
        model.config.task_specific_params = {"summarization": {"prefix": own}}
    run = train(model, prefix=trained)
    wanted = generation.summarize(*load_model(run / "student"), DOCUMENTS, max_source_length=20, prefix=trained)
    assert use.summarize(DOCUMENTS, run) == wanted
    folder = export.export(run, tmp_path / "mine")
    shutil.rmtree(folder / use.CONVERTED)
    assert use.summarize(DOCUMENTS, folder) == wanted
    if own:
        assert use.summarize(DOCUMENTS, run, prefix=own) != wanted


def test_the_cards_code_runs_as_it_stands(tmp_path, capsys, monkeypatch):
    train(tiny_t5(), prefix="read: ")
    export.export("kd-3-1-s0", tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (tmp_path / "mine" / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    capsys.readouterr()
    for block in blocks:
        exec(block, {})
    written = capsys.readouterr().out.strip()
    model, tokenizer = load_model("mine")
    inputs = tokenizer("read: a long text", return_tensors="pt")
    ids = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    assert written == str(tokenizer.batch_decode(ids, skip_special_tokens=True))


def test_card_gives_the_tests_figures_and_the_licences(tmp_path, monkeypatch):
    run = train(tiny_bart())
    teacher = measure(train(tiny_bart(seed=1), "kd-3-3-s0"))
    tested = read_json(measure(run, baseline=teacher) / "results.json")
    measure(run, num_beams=1)  # a sweep without the teacher does not count
    of_data = SimpleNamespace(card_data=SimpleNamespace(license="mit"))
    monkeypatch.setattr(huggingface_hub, "dataset_info", lambda name, **_: of_data if name == "some/news" else None)
    folder = export.export(run, tmp_path / "mine")
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert card.data.license == "other" and card.data.datasets == "some/news" and card.data.base_model is None
    (found,) = [result for result in card.data.eval_results if result.metric_type == "rouge2"]
    assert found.metric_value == round(tested["rouge2"], 2)
    for key in ("rouge2", "rouge2_low", "rouge2_high", "rouge2_difference_low", "latency_ms", "words"):
        assert f"{tested[key]:.2f}" in card.text, key
    assert "mit" in card.text and "apache-2.0" in card.text and tested["provenance"]["processor"] in card.text
    assert str(tmp_path) not in card.text


def test_card_says_in_which_numbers_a_student_was_tested(tmp_path):
    run = train(tiny_bart())
    measure(run)
    card = export.card("mine", tiny_bart(), *_card_of(run))
    assert "in int8" not in card.text
    measure(run, int8=True, baseline=measure(train(tiny_bart(seed=1), "kd-3-3-s0")))
    card = export.card("mine", tiny_bart(), *_card_of(run))
    assert "decoded with\nthe generation settings stored here, in int8 by CTranslate2." in card.text


def _card_of(run: Path) -> tuple[dict, dict, dict]:
    proof = {"same_summaries": 1, "logits_difference": 0.0, "quantization": None, "skipped": "no reason"}
    return export._facts(str(run / "student"), run), {"max_source_length": 20, "prefix": ""}, proof


def test_only_an_earlier_export_is_replaced_by_what_is_known_then(tmp_path):
    run, folder = train(tiny_bart()), tmp_path / "mine"
    for known in ("No test of this model", "12 test documents"):
        text = (export.export(run, folder, replace=True) / "README.md").read_text()
        assert known in text and "ms per document" not in text
        measure(run, num_speed=0)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "text.txt").write_text("Dear")
    save_model(tiny_bart(), tiny_tokenizer(), tmp_path / "teacher")
    for other in (tmp_path / "letters", tmp_path / "letters" / "text.txt", tmp_path / "teacher"):
        with pytest.raises(InputError, match="exists"):
            export.export(run, other, replace=True)
    assert (tmp_path / "letters" / "text.txt").read_text() == "Dear"


def test_a_card_names_a_local_teacher_without_the_folders_around_it(tmp_path):
    local = "../../models/mine", "~/a/mine", str(tmp_path / "teacher"), "runs/sft-6-6-s0-0123456789/student"
    names = (*local, "org/model")
    assert [*map(export._short, names)] == ["mine", "mine", "teacher", "sft-6-6-s0-0123456789", "org/model"]


def test_int8_that_changes_too_much_gives_way(tmp_path, monkeypatch):
    train(tiny_bart())
    monkeypatch.setitem(export.PARITY, "int8", (100.1, 0.0))
    folder = export.export("kd-3-1-s0", tmp_path / "mine")
    assert "bfloat16" in (folder / "README.md").read_text()
    monkeypatch.setattr(export, "PARITY", dict.fromkeys(export.PARITY, (100.1, 0.0)))
    with pytest.raises(ValueError, match="even in float32"):
        export.export("kd-3-1-s0", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def another_model(_, *rest):
    save_model(tiny_bart(seed=9), *rest)


@pytest.mark.parametrize(
    ("place", "name", "broken", "message"),
    [
        (export, "save_model", another_model, "differs"),
        (export.ctranslate, "to_ctranslate2", full_disk, "no space left while writing mine"),
    ],
)
def test_a_student_that_does_not_survive_leaves_no_folder(place, name, broken, message, tmp_path, monkeypatch):
    train(tiny_bart())
    monkeypatch.setattr(place, name, broken)
    with pytest.raises(ValueError, match=message):
        export.export("kd-3-1-s0", tmp_path / "mine")
    assert os.listdir(tmp_path) == ["runs"]


def test_push_uploads_the_whole_folder_and_fails_before_any_work(tmp_path, monkeypatch, capsys):
    train(tiny_bart())
    done = run_cli(capsys, "export", "kd-3-1-s0", tmp_path / "mine", "--push", "me/mine")  # the hub client is offline
    assert done.code == 2 and "me/mine" in done.err and len(done.err.splitlines()) == 1
    assert not (tmp_path / "mine").exists()
    calls = []
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda name, **_: calls.append(name))
    monkeypatch.setattr(
        huggingface_hub, "upload_folder", lambda repo_id, folder_path: calls.append((repo_id, folder_path))
    )
    assert run_cli(capsys, "export", "kd-3-1-s0", tmp_path / "mine", "--push", "me/mine").code == 0
    assert calls == ["me/mine", ("me/mine", tmp_path / "mine")]
    assert 'model="me/mine"' in (tmp_path / "mine" / "README.md").read_text()


# -------------------------------------------------------------------------------------------------------------- names


def test_a_student_is_known_by_name_folder_and_path(tmp_path):
    first, second = train(tiny_bart()), train(tiny_bart(seed=1), seed=1)
    saved = str(second / "student")
    assert use.find_model("kd-3-1-s0") == (saved, second)  # the last one asked for
    train(tiny_bart())
    assert use.find_model("kd-3-1-s0") == (str(first / "student"), first)  # reused
    for name in (second.name, second, second / "student", os.path.relpath(second)):
        assert use.find_model(name) == (saved, second)
    shutil.copytree(second, tmp_path / "copy")
    assert use.find_model(tmp_path / "copy") == (str(tmp_path / "copy" / "student"), tmp_path / "copy")
    assert use.find_model("pydocs-bart") == ("pydocs-bart", None)
    assert use.find_model("org/model") == ("org/model", None)
    shutil.rmtree(artifacts.runs_dir() / "students")  # runs from before names were written
    with pytest.raises(InputError, match=f"2 runs are called kd-3-1-s0: .*{first.name}"):
        use.find_model("kd-3-1-s0")
    shutil.rmtree(first)
    assert use.find_model("kd-3-1-s0") == (saved, second)


def test_what_cannot_be_exported_is_rejected_in_one_line(tmp_path, capsys, monkeypatch):
    run = train(tiny_bart())
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("")
    unfinished = artifacts.runs_dir() / "sft-3-1-s0-0123456789"
    unfinished.mkdir()
    write_json(unfinished / "config.json", {})
    artifacts.report_progress(unfinished, "training", 3, 3)
    other = artifacts.artifact("pseudo-labels", {}, lambda _: {})
    for name, folder, message in (
        (run, tmp_path / "there", "there exists"),
        (run, tmp_path / "file" / "x", "cannot write"),
        ("sft-3-1-s0", tmp_path / "new", r"unfinished \(training: 3 of 3 steps\)"),
        (unfinished / "student", tmp_path / "new", "no folder, run or shipped"),
        (unfinished, tmp_path / "new", "unfinished"),
        (other, tmp_path / "new", "has no model"),
        ("kd-9-9-s0", tmp_path / "new", "no folder, run or shipped model kd-9-9-s0"),
        ("./nowhere", tmp_path / "new", "no folder, run or shipped"),
        ("x" * 300, tmp_path / "new", "File name too long: xxx"),
    ):
        done = run_cli(capsys, "export", name, folder)
        assert done.code == 2 and re.search(message, done.err) and len(done.err.splitlines()) == 1, done
    assert not (tmp_path / "new").exists()
    monkeypatch.setenv("DISTILL_RUNS", str(tmp_path / "file"))
    assert run_cli(capsys, "list").err.count("\n") == 1


def test_list_shows_finished_students_with_their_scores(capsys):
    assert "report 03" in run_cli(capsys, "list").out
    # What a race chose by is no test of its students.
    measure(train(tiny_bart(), "sft-3-1-s0", validation=data_fingerprint(Dataset.from_dict(TEST))))
    assert "None" not in run_cli(capsys, "list").out
    run = train(tiny_bart())
    tested = read_json(measure(run) / "results.json")
    notebook = artifacts.start_notebook("distill", {"__annotations__": {"hours": float}, "hours": 1.0})
    save_model(tiny_bart(), tiny_tokenizer(), notebook.folder / "student")  # where its student lies without `output`
    notebook.save([], "A verdict.")
    rows = {row["name"]: row for row in json.loads(run_cli(capsys, "list", "--json").out)}
    assert rows.keys() == {"kd-3-1-s0", "sft-3-1-s0"}
    row = rows["kd-3-1-s0"]
    assert row["rouge2"] == tested["rouge2"] and row["ms_per_token"] == tested["ms_per_token"]
    assert row["size_mb"] == pytest.approx(sum(p.stat().st_size for p in run.rglob("*.*")) / 1e6, abs=0.1)
    assert rows["sft-3-1-s0"]["rouge2"] is None
    lines = run_cli(capsys, "list").out.splitlines()
    assert len(lines) == 3 and all(row["folder"] in "".join(lines) for row in rows.values())


# -------------------------------------------------------------------------------------------------------- summarizing


def exported(tmp_path) -> Path:
    train(tiny_bart())
    return export.export("kd-3-1-s0", tmp_path / "mine")


def test_summarize_takes_any_form_of_file_and_keeps_the_order(tmp_path, capsys, monkeypatch):
    folder = exported(tmp_path)
    expected = distill_utils.summarize(DOCUMENTS, model=folder)
    assert len(set(expected)) > 3 and distill_utils.summarize(DOCUMENTS[0], model=folder) == expected[0]
    plain = "\n".join(DOCUMENTS) + "\n"
    rows = "".join(json.dumps({"article": text, "other": 1}) + "\n\n" for text in DOCUMENTS)
    (tmp_path / "plain.txt").write_text(plain.replace("\n", "\r\n"), newline="")
    (tmp_path / "plain.gz").write_bytes(gzip.compress(plain.encode()))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    table = Dataset.from_dict({"id": list(range(12)), "document": DOCUMENTS})
    table.to_csv(tmp_path / "rows.csv")
    table.rename_column("document", "article").to_parquet(tmp_path / "rows.parquet")
    named = ["--column", "article"]
    for arguments in (
        ["plain.txt"], ["plain.gz"], ["rows.jsonl.gz", *named], ["rows.csv"], ["rows.parquet", *named]
    ):  # fmt: skip
        done = run_cli(capsys, "summarize", tmp_path / arguments[0], "--model", folder, *arguments[1:])
        assert done.code == 0 and done.out.split("\n") == [*expected, ""] and "of 12 texts\n" not in done.err
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(rows.replace("article", "document").encode())))
    output = tmp_path / "out.jsonl"
    done = run_cli(capsys, "summarize", "-", "--model", folder, "--json", "--output", output)
    assert done.out == "" and [json.loads(line)["summary"] for line in output.read_text().splitlines()] == expected


def test_empty_and_long_texts_are_said_once(tmp_path, capsys):
    folder = exported(tmp_path)
    words = "the list of " * 34_000
    (tmp_path / "in.txt").write_text(f"{DOCUMENTS[0]}\n\n{words}\n{words}\n \n")
    done = run_cli(capsys, "summarize", tmp_path / "in.txt", "--model", folder)
    lines = done.out.split("\n")
    assert done.code == 0 and [bool(line) for line in lines] == [True, False, True, True, False, False]
    begun = " ".join(words.split()[:19])  # and the end token
    assert lines[2] == lines[3] == use.summarize(begun, folder)
    told = [line for line in done.err.splitlines() if line.startswith("warning")]
    assert len(told) == 2 and "2 of 5" in told[0] and "2 of 5" in told[1] and "20 tokens" in told[1]
    assert use.summarize([], folder) == []


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (b"", [], "no text"),
        (b"\n \n", [], "no text"),
        (b"\x7fELF\x00\x01", [], "not UTF-8"),
        ("Caf\u00e9".encode("latin-1"), [], "not UTF-8"),
        (b"\x1f\x8b\x08broken", [], "cannot be read"),
        (b'{"text": "the"}\n', [], "line 1 has no column 'document': .*text"),
        (b'{"document": "the"}\nthe list\n', [], "line 2 is not a JSON object"),
        (b'{"document": 3}\n', [], "is a int"),
        (b'{"document": "\\ud83d the"}\n', [], "text 0 has half a character"),
        (b"the\n", ["--column", "document"], "line 1 is not a JSON object"),
        (b"the\n", ["--output", "no/such/folder"], "cannot write"),
        (None, [], "cannot be read"),
    ],
)
def test_bad_files_are_rejected_in_one_line_before_a_model_is_loaded(content, arguments, message, tmp_path, capsys):
    if content is not None:
        (tmp_path / "in").write_bytes(content)
    done = run_cli(capsys, "summarize", tmp_path / "in", "--model", "./no-such-model", *arguments)
    assert done.code == 2 and re.search(message, done.err) and len(done.err.splitlines()) == 1, done.err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "id,text\n1,the list\n", "column 'document' is missing in a.csv: it has id, text; .* by --column"),
        ("a.csv", "document\n", "a.csv has no text"),
        ("A.CSV", "document\nthe\n", "'A.CSV' has an unknown ending"),
        ("a.csv.gz", "document\nthe\n", "'a.csv.gz' has an unknown ending"),
        ("a.csv", None, "'a.csv' does not exist"),
    ],
)
def test_bad_tables_are_rejected_in_one_line(name, content, message, tmp_path, capsys):
    if content:
        (tmp_path / name).write_text(content)
    done = run_cli(capsys, "summarize", tmp_path / name, "--model", "./no-such-model")
    assert done.code == 2 and re.search(message, done.err) and len(done.err.splitlines()) == 1, done.err


def test_bad_arguments_of_summarize_are_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InputError, match="cannot write"):  # before anything is read or written
        use.summarize_file("in.txt", "./nowhere", output=tmp_path / "out.txt")
    with pytest.raises(InputError, match="text 1 is nan, a float"):
        use.summarize(["the", float("nan")], "pydocs-bart")
    with pytest.raises(InputError, match="beyond the model's 128 positions"):
        use.summarize(["the"], "pydocs-bart", max_source_length=129)
    with pytest.raises(InputError, match="no folder, run or shipped model ./nowhere"):
        use.summarize(["the"], "./nowhere")


def test_a_hub_name_brings_its_int8_model(tmp_path, monkeypatch):
    folder = exported(tmp_path)
    monkeypatch.setattr(use, "snapshot_download", lambda name, allow_patterns: folder)
    monkeypatch.setattr(use, "load_model", lambda _: pytest.fail("loaded the slow model"))
    assert use._find_converted("me/mine") == folder / "ctranslate2"
    assert use.summarize(DOCUMENTS, folder)


@pytest.mark.parametrize(
    ("length", "positions", "read"),
    [(10**30, None, use.LONGEST_SOURCE), (512, None, 512), (512, 64, 64), (10**30, 128, 128)],
)
def test_what_a_text_model_reads_is_bounded(length, positions, read):
    assert use.longest_source(SimpleNamespace(model_max_length=length), positions) == read


def test_runs_of_an_installed_package_are_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("DISTILL_RUNS")
    assert artifacts.runs_dir() == artifacts.REPOSITORY / "runs"
    monkeypatch.setattr(artifacts, "REPOSITORY", tmp_path / "site-packages")
    monkeypatch.chdir(tmp_path)
    assert artifacts.runs_dir() == tmp_path / "runs"
