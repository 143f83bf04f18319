"""The shipped language model: its tokenizer, its shape, how it is made, and that its card tells what its files give."""

import math
import re
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from safetensors import safe_open

from distill_utils.__main__ import main
from distill_utils.artifacts import read_json
from distill_utils.data import denoising, loading
from distill_utils.evaluation import tasks
from distill_utils.experiments import miniend, t5_teacher, teacher
from distill_utils.models import loading as models_loading
from distill_utils.models import students
from distill_utils.models.loading import ASSETS, load_model

FACTS = {"fingerprint": "0123456789ab"}
TEXTS = [
    f"Return item {i} of the list.\n\nThe number {i * i} is read from file_{i}.txt; see also `read_{i % 7}`."
    for i in range(120)
]


def few_rows(task: str, split: str, num: int) -> Dataset:
    rows = [{"id": str(i), "document": text, "summary": f"Item {i} of all."} for i, text in enumerate(TEXTS[:num])]
    if task != "summaries":
        label = tasks.TASKS[task].labels
        rows = [row | {"summary": label[i % 2], "label": label[i % 2]} for i, row in enumerate(rows)]
    return Dataset.from_list(rows)


@pytest.fixture
def made(tmp_path_factory):
    """Return (folder of a tokenizer, the tokenizer) of a few texts, with every size patched to a tiny one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTILL_RUNS", str(tmp_path_factory.mktemp("runs")))
        patch.setattr(teacher, "load_text", lambda name, split: TEXTS if split == "train" else TEXTS[:40])
        patch.setattr(teacher, "corpus_facts", lambda: FACTS)
        patch.setattr(t5_teacher, "corpus_facts", lambda: FACTS)
        patch.setattr(teacher, "VOCABULARY", 320)
        patch.setattr(t5_teacher, "SHAPES", {"pydocs-t5": (16, 2), "pydocs-t5-tiny": (8, 1)})
        for name, size in {"HEAD_WIDTH": 8, "SOURCE_LENGTH": 32, "HELD_OUT": 32, "CHECKED": 2, "WINDOW": 24}.items():
            patch.setattr(t5_teacher, name, size)
        patch.setattr(t5_teacher, "base_embeddings", lambda width: torch.linspace(-1, 1, 320 * width).view(320, width))
        patch.setattr(t5_teacher, "TASK_ROWS", {"train": 12, "validation": 4, "test": 10})
        patch.setattr(miniend, "load_task", few_rows)
        for name in ("INFILLING", "SPAN_CORRUPTION", "TUNING"):
            tiny = replace(
                getattr(t5_teacher, name), max_steps=4, batch_size=4, warmup_steps=1, eval_every=2, checkpoint_every=2,
                log_every=1,
            )  # fmt: skip
            patch.setattr(t5_teacher, name, tiny)
        folder = t5_teacher.make_tokenizer()
        yield folder, teacher.load_tokenizer(folder)


def test_tokenizer_is_in_t5s_manner(made):
    _, tokenizer = made
    sentinels = tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(100)])
    assert denoising.find_sentinels(tokenizer) == sentinels and len(set(sentinels)) == 100
    assert sentinels == sorted(sentinels) and max(sentinels) == len(tokenizer) - 1
    assert tokenizer.unk_token_id not in sentinels and tokenizer.bos_token_id is None
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (1, 2)
    text = "".join(map(chr, range(32, 127))) + "\n\tcafé"
    ids = tokenizer(text)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids[:-1]) == text
    assert tokenizer("a <extra_id_7> b")["input_ids"].count(sentinels[7]) == 1  # one token wherever it stands


def test_model_has_the_shape_of_t5_with_tied_embeddings(made):
    _, tokenizer = made
    model = t5_teacher.new_model(len(tokenizer), 16, 2)
    assert model.config.d_kv * model.config.num_heads == 16
    assert model.lm_head.weight is model.shared.weight is model.encoder.embed_tokens.weight
    labels = torch.tensor([[7, 8, 2]])
    shifted = model.prepare_decoder_input_ids_from_labels(labels)
    assert shifted.tolist() == [[tokenizer.pad_token_id, 7, 8]]  # as T5: decoding starts with padding


def test_eased_start_looks_for_its_own_tokens_and_keeps_layers_small(made):
    _, tokenizer = made
    torch.manual_seed(0)
    plain = t5_teacher.new_model(len(tokenizer), 16, 2)
    torch.manual_seed(0)
    eased = t5_teacher.new_model(len(tokenizer), 16, 2)
    t5_teacher.ease_copying(eased)
    states = torch.randn(200, 16)
    for model, least, most in ((eased, 0.95, 1.0), (plain, 0.0, 0.9)):
        cross = model.decoder.block[1].layer[1].EncDecAttention
        scores = cross.q(states) @ cross.k(states).T
        assert least <= (scores.diagonal() > scores.median(-1).values).float().mean() <= most
    before, after = plain.state_dict(), eased.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all("EncDecAttention.q" in n or "bias" in n or n.endswith((".o.weight", ".wo.weight")) for n in changed)
    name = "encoder.block.0.layer.0.SelfAttention.o.weight"
    assert torch.allclose(after[name], 0.25 * before[name])


def test_build_writes_what_it_trained_with_its_card(made, tmp_path, monkeypatch, capsys):
    tokenizer_folder, tokenizer = made
    for module in (models_loading, t5_teacher):
        monkeypatch.setattr(module, "ASSETS", tmp_path)
    folder = t5_teacher.build()
    assert folder == tmp_path / "pydocs-t5" and t5_teacher.build("pydocs-t5-tiny") == tmp_path / "pydocs-t5-tiny"
    assert load_model(tmp_path / "pydocs-t5-tiny")[0].config.d_model == 8
    infilled, card = t5_teacher.infill(16, 2), read_json(folder / "card.json")
    trained = t5_teacher.corrupt(infilled)
    assert read_json(trained / "results.json")["final"]["step"] == 4
    assert len(list(trained.glob("checkpoint-*"))) <= 1 and (trained / "history.csv").exists()

    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}
    model, loaded = load_model(folder)
    before, _ = load_model(trained / "model")
    for name, weight in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight.bfloat16().float()), name
    assert loaded.get_vocab() == tokenizer.get_vocab() and loaded("a b")["input_ids"] == tokenizer("a b")["input_ids"]
    assert model.generation_config.decoder_start_token_id == 1 and model.generation_config.max_new_tokens == 40

    held_out = teacher.token_stream("validation", tokenizer, tokenizer_folder)
    losses = t5_teacher.held_out_losses(model, loaded, held_out)
    mean, low, high = card["loss"]
    assert mean == pytest.approx(losses.mean(), abs=1e-4) and low <= mean <= high
    assert card["loss_checked"] == pytest.approx(losses[: card["num_checked"]].mean(), abs=1e-4)
    stages = [(stage["stage"], stage["steps"], stage["examples"]) for stage in card["stages"]]
    assert stages == [("text infilling", 4, 16), ("span corruption", 4, 16)]
    assert card["training_tokens"] == len(teacher.token_stream("train", tokenizer, tokenizer_folder))
    assert card["corpus_fingerprint"] == FACTS["fingerprint"]
    compared = [(row["task"], row["name"]) for row in card["downstream"]]
    assert compared == [(task, name) for task in t5_teacher.TASKS for name in ("pre-trained", "untrained")]
    for row in card["downstream"]:
        assert row["score_low"] <= row["score"] <= row["score_high"]
        assert row["name"] == "pre-trained" or row["difference"] == 0  # from itself
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert f"{mean:.3f}" in text and f"{card['training_tokens']:,} tokens" in text and card["commit"] in text
    for path in folder.glob("*.*"):  # nothing of where it was made
        if path.suffix in (".json", ".md"):
            assert str(tmp_path) not in path.read_text(encoding="utf-8"), path.name


def test_command_builds_every_teacher(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(teacher, "build", lambda: tmp_path / "pydocs-bart")
    monkeypatch.setattr(t5_teacher, "build", lambda name: tmp_path / name)
    assert main(["teachers"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"wrote {name}" for name in ("pydocs-bart", *t5_teacher.SHAPES)]


# ---------------------------------------------------------------------------------------------------- the shipped files


@pytest.fixture(scope="module", params=t5_teacher.SHAPES)
def shipped(request, corpus):
    return *load_model(request.param), read_json(ASSETS / request.param / "card.json")


def test_card_states_what_the_files_give(shipped):
    model, tokenizer, card = shipped
    assert card["source_length"] == t5_teacher.SOURCE_LENGTH and card["num_checked"] == t5_teacher.CHECKED
    assert card["parameters"] == students.count_parameters(model)
    held_out = teacher.token_stream("validation", tokenizer, ASSETS / card["name"])
    found = miniend.window_losses(model, tokenizer, held_out, card["num_checked"], card["source_length"]).mean()
    same_corpus = loading.corpus_facts()["fingerprint"] == card["corpus_fingerprint"]
    # Another platform's wheels may hold other docstrings, and other windows with them: then only the size has to fit.
    assert found == pytest.approx(card["loss_checked"], abs=0.002 if same_corpus else 0.4)
    assert found < 0.6 * math.log(len(tokenizer))  # it learned something: drawn at random it gives about log(entries)
    mean, low, high = card["loss"]
    assert low < mean < high and card["num_windows"] > 100 and card["training_tokens"] > 1e6
    assert [stage["stage"] for stage in card["stages"]] == ["text infilling", "span corruption"]
    assert re.fullmatch(r"[0-9a-f]{12}", card["corpus_fingerprint"])
    assert len(denoising.find_sentinels(tokenizer)) == t5_teacher.SENTINELS


def test_shipped_teacher_beats_its_own_shape_from_nothing():
    rows = {(row["task"], row["name"]): row for row in read_json(ASSETS / "pydocs-t5" / "card.json")["downstream"]}
    assert {task for task, _ in rows} == set(t5_teacher.TASKS)
    for task in ("summaries", "family"):  # none of this size has learned the third (LOG.md)
        assert rows[task, "pre-trained"]["score_low"] > rows[task, "untrained"]["score_high"]
