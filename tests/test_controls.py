"""Controls: masking and streams, and every path of both kinds from text to a tested task."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from test_loading import refusal
from tiny_models import EOS, MASK, PAD, WORDS, tiny_tokenizer

from distill_utils.artifacts import read_json
from distill_utils.data.denoising import denoising_stream, language_model_stream, mask_tokens
from distill_utils.experiments import controls
from distill_utils.experiments.controls import KINDS, Text
from distill_utils.training.loop import Training, read_history

TRAINING = Training(max_steps=3, batch_size=4, learning_rate=1e-2, log_every=1, seed=0, precision="float32")
TOKENS = np.random.default_rng(0).integers(5, 25, size=2003).astype(np.uint16)


def tiny_text(tokens: np.ndarray = TOKENS) -> Text:
    return Text(tiny_tokenizer(), tokens, TOKENS[:500][::-1], 24)


def task_rows(num: int, seed: int) -> Dataset:
    """Return rows of the task "belongs" that one word decides."""
    generator = np.random.default_rng(seed)
    texts = [" ".join(generator.choice(WORDS[3:], size=generator.integers(4, 16))) for _ in range(num)]
    yes = generator.random(num) < 0.5
    documents = [f"the {text}" if is_yes else f"for {text}" for text, is_yes in zip(texts, yes, strict=True)]
    rows = {"id": [f"d{i}" for i in range(num)], "document": documents, "label": np.where(yes, "yes", "no").tolist()}
    return Dataset.from_dict(rows | {"summary": rows["label"]})


@pytest.fixture(autouse=True)
def small_and_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(controls, "SHAPE", {"layers": 2, "width": 16, "heads": 2})
    monkeypatch.setattr(controls, "STUDENT_LAYERS", 1)
    monkeypatch.setattr(controls, "RELATION_HEADS", 4)


@pytest.fixture(params=KINDS)
def place(request, small_and_apart) -> tuple:
    """Return a kind, its text, the run folder of a teacher of that kind, and the teacher."""
    text = tiny_text()
    teacher = controls.control_model(request.param, "teacher", text, TRAINING)
    return request.param, text, teacher, load(request.param, teacher).eval()


def load(kind: str, folder):
    return KINDS[kind][2].from_pretrained(folder / "model")


@torch.no_grad()
def loss_of(model, batch: dict) -> float:
    return model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.item()


# ---------------------------------------------------------------------------------------------------------------- text


def test_masking_hides_the_shares_of_bert_and_nothing_else():
    ids = np.random.default_rng(1).integers(5, 90, size=(400, 100))
    inputs, labels = mask_tokens(ids, MASK, np.arange(5, 96), np.random.default_rng(2))
    chosen = labels != -100
    assert (chosen.sum(axis=1) == 15).all()
    assert (inputs == ids)[~chosen].all() and (labels == ids)[chosen].all()
    masked, kept = (inputs == MASK)[chosen].mean(), (inputs == ids)[chosen].mean()
    assert masked == pytest.approx(0.8, abs=0.02)
    assert kept == pytest.approx(0.1 + 0.1 / 91, abs=0.02)  # a random token may be the one that was there
    replaced = inputs[chosen & (inputs != MASK) & (inputs != ids)]
    assert replaced.min() >= 5 and len(set(replaced.tolist())) > 80
    places = chosen.sum(axis=0) / 400  # no position is left out or preferred
    assert places.min() > 0.05 and places.max() < 0.25
    short = mask_tokens(ids[:, :2], MASK, np.arange(5, 96), np.random.default_rng(2))[1]
    assert ((short != -100).sum(axis=1) == 1).all()


@pytest.mark.parametrize("objective", ["masked", "causal"])
def test_streams_visit_windows_as_denoising_does(objective):
    tokenizer = tiny_tokenizer()
    batches = language_model_stream(TOKENS, tokenizer, objective, 20, 6, 3, micro_batch_size=2)
    again = language_model_stream(TOKENS, tokenizer, objective, 20, 6, 3, micro_batch_size=2)
    other = denoising_stream(TOKENS, tokenizer, "text_infilling", 22, 6, 3)  # start and end token beside the window
    for step in (7, 0, 40):
        micro = batches(step)
        assert [batch["input_ids"].shape for batch in micro] == [(2, 20)] * 3
        whole = {name: torch.cat([batch[name] for batch in micro]) for name in ("input_ids", "labels")}
        for batch, same in zip(micro, again(step), strict=True):
            assert all(torch.equal(batch[name], same[name]) for name in ("input_ids", "labels", "attention_mask"))
        windows = other(step)[0]["labels"][:, :20]
        hidden = whole["labels"] != -100
        assert torch.equal(torch.where(hidden, whole["labels"], whole["input_ids"]), windows)
        assert torch.equal(whole["input_ids"], windows) == (objective == "causal")
    assert not torch.equal(batches(0)[0]["input_ids"], batches(1)[0]["input_ids"])


def test_first_sentinel_masks_where_there_is_no_mask_token():
    tokenizer = tiny_tokenizer()
    tokenizer.mask_token = None
    message = refusal(language_model_stream, TOKENS, tokenizer, "masked", 20, 4, 0)
    assert "neither a mask token nor <extra_id_0>" in message
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra_id_1>", "<extra_id_0>"]})
    (batch,) = language_model_stream(TOKENS, tokenizer, "masked", 20, 40, 0)(0)
    sentinel = tokenizer.convert_tokens_to_ids("<extra_id_0>")
    seen = batch["input_ids"][batch["labels"] != -100]
    assert (seen == sentinel).float().mean() > 0.6
    assert not set(seen.tolist()) & (set(tokenizer.all_special_ids) - {sentinel})
    assert not (batch["input_ids"][batch["labels"] == -100] == sentinel).any()


# -------------------------------------------------------------------------------------------------------------- models


def test_every_path_from_text_to_rows(place):
    kind, text, teacher, large = place
    task = {"train": task_rows(24, 1), "test": task_rows(20, 2)}
    before = (teacher / "model" / "model.safetensors").read_bytes()
    assert large.config.model_type == kind and large.config.num_hidden_layers == 2
    checks = language_model_stream(text.held_out, text.tokenizer, KINDS[kind][0], 24, 10, 0)
    losses = [loss_of(large, checks(step)[0]) for step in range(4)]
    assert read_history(teacher)[-1]["validation_loss"] == pytest.approx(np.mean(losses), rel=1e-4)

    arguments = ([kind], text, {"belongs": task}, TRAINING, TRAINING, TRAINING, [1])
    rows = controls.run_controls(*arguments)
    assert (teacher / "model" / "model.safetensors").read_bytes() == before
    assert [row["path"] for row in rows] == ["none", "scratch", "logits", "self", "teacher"] * 2
    assert [row["task"] for row in rows] == [controls.MORE_TEXT] * 5 + ["belongs"] * 5
    assert [row["held_out_loss"] is None for row in rows] == [True, False, False, True, False] * 2
    for row in rows:
        low, high = (0, 100) if row["task"] == "belongs" else (-5, -1)  # nats; of 25 tokens chance has 3.2
        assert row["seeds"] == 1 and low <= row["score_low"] <= row["score"] <= row["score_high"] <= high
        assert ("difference" in row) == (row["path"] != "scratch")
    for start in (0, 5):
        scores = {row["path"]: row["score"] for row in rows[start : start + 5]}
        assert rows[start + 2]["difference"] == pytest.approx(scores["logits"] - scores["scratch"], abs=1e-6)
        if start == 0:
            untrained = rows[3]["untrained"]["difference"]
            assert untrained == pytest.approx(scores["self"] - scores["none"], abs=1e-6)
    assert controls.run_controls(*arguments) == rows  # every artifact is found again


def test_paths_share_a_start_and_train_what_they_should(place):
    kind, text, teacher, _ = place
    folders, terms = {}, {"none": set()}
    for path in controls.CONTROL_PATHS:
        folders[path] = controls.control_model(kind, path, text, TRAINING, teacher)
        if path != "none":
            terms[path] = {name for name in read_history(folders[path])[0] if name.endswith("_loss")}
    models = {path: load(kind, folder).state_dict() for path, folder in folders.items()}
    site = "encoder_self_loss" if kind == "bert" else "decoder_self_loss"
    assert terms == {
        "none": set(), "scratch": {"ce_loss"}, "logits": {"ce_loss", "kl_loss"}, "self": {site},
    }  # fmt: skip
    start = controls.new_model(kind, text, 1, TRAINING.seed).state_dict()
    assert all(torch.equal(start[name], weight) for name, weight in models["none"].items())
    changed = {path: {name for name in start if not torch.equal(start[name], models[path][name])} for path in models}
    # Relations stop at the projections of the last layer: neither what comes behind them nor the head is trained.
    behind = {name for name in start if any(part in name for part in ("out_proj", "attention.output", "fc", "cls."))}
    behind -= {name for name in behind if torch.equal(start[name], models["scratch"][name])}
    assert len(behind) > 3 and not changed["self"] & {name for name in behind if "decoder.weight" not in name}
    assert any("value" in name or "v_proj" in name for name in changed["self"])
    assert changed["scratch"] == changed["logits"] >= behind
    for other_text, training in (
        (text, replace(TRAINING, seed=1)), (tiny_text(TOKENS[:-1]), TRAINING), (text._replace(length=20), TRAINING),
    ):  # fmt: skip
        assert controls.control_model(kind, "self", other_text, training, teacher) != folders["self"]


# ------------------------------------------------------------------------------------------------------------- judging


@pytest.mark.parametrize("kind", KINDS)
def test_classifier_keeps_the_stack_and_ignores_padding(kind):
    tokenizer = tiny_tokenizer()
    model = controls.new_model(kind, tiny_text(), 2, seed=0)
    classifier = controls.new_classifier(model, 3, 5).eval()
    again = controls.new_classifier(model, 3, 5).state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in classifier.state_dict().items())
    stack, own = model.base_model.state_dict(), classifier.base_model.state_dict()
    assert all(torch.equal(weight, own[name]) for name, weight in stack.items())
    assert all("pooler" in name for name in own.keys() - stack.keys())

    rows = controls.encode_rows("belongs", task_rows(6, 3), tokenizer, 12)
    assert max(map(len, rows["input_ids"])) == 12 and all(ids[-1] == EOS for ids in rows["input_ids"])
    (batch,) = controls.batch_list(rows, PAD, 6)
    with torch.no_grad():
        together = controls.classify(classifier, batch)
        for row, logits in zip(batch["ids"], together["logits"], strict=True):
            alone = classifier(input_ids=torch.tensor([rows[row]["input_ids"]])).logits[0]
            torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-5)
    wanted = torch.tensor([rows[row]["labels"][0] for row in batch["ids"]])
    torch.testing.assert_close(together["loss"], torch.nn.functional.cross_entropy(together["logits"], wanted))


def test_tuning_learns_a_task_that_a_word_decides(place):
    kind, text, teacher, _ = place
    tuning = replace(TRAINING, max_steps=40, batch_size=16)
    train, test = task_rows(64, 1), task_rows(30, 2)
    tested = controls.tune_control(kind, teacher, "belongs", train, test, text, tuning)
    correct = read_json(tested / "scores.json")["correct"]
    results = read_json(tested / "results.json")
    assert len(correct) == 30 and set(correct) <= {0.0, 100.0} and np.mean(correct) > 90
    assert results["score"] == pytest.approx(np.mean(correct)) and results["num_documents"] == 30
    short = controls.tune_control(kind, teacher, "belongs", train, test, text, TRAINING)
    assert controls.tune_control(kind, teacher, "belongs", train, test.select(range(29)), text, TRAINING) != short


def test_going_on_takes_the_next_updates_of_the_text(place):
    kind, text, teacher, model = place
    still = replace(TRAINING, max_steps=2, learning_rate=1e-12)
    folder = controls.continue_control(kind, teacher, text, still, start=3)
    batches = language_model_stream(text.tokens, text.tokenizer, KINDS[kind][0], 24, 4, TRAINING.seed)
    wanted = [loss_of(model, batches(step)[0]) for step in (3, 4)]
    assert [row["loss"] for row in read_history(folder)] == pytest.approx(wanted, rel=1e-4)
    windows = language_model_stream(text.held_out, text.tokenizer, KINDS[kind][0], 24, 1, 0)
    found = read_json(folder / "scores.json")["log_likelihood"]
    assert found == pytest.approx([-loss_of(model, windows(step)[0]) for step in range(500 // 24)], rel=1e-4)
    assert read_json(folder / "results.json")["score"] == pytest.approx(np.mean(found))


def judged(model: str, task: str = "belongs", **paths: tuple) -> list[dict]:
    """Return rows of a control: {path: (low, high, held-out loss)} of its difference from scratch."""
    scratch = {"model": model, "task": task, "path": "scratch", "name": "scratch", "held_out_loss": 5.5}
    return [scratch] + [
        scratch | {"path": path, "name": path, "low": low, "high": high, "difference": (low + high) / 2,
                   "held_out_loss": loss}
        for path, (low, high, loss) in paths.items()
    ]  # fmt: skip


def test_suspects_are_paths_that_fail_where_they_are_known_to_work():
    paths = {"none": (-9, -8, None), "logits": (1, 3, 5.25), "self": (-1, 2, None), "teacher": (4, 6, 5.0)}
    worse = paths | {"self": (-3, -1, None)}
    assert controls.suspects(judged("bert", **paths)) == []
    (lost,) = controls.suspects([*judged("bert", **paths), *judged("opt", **worse)])
    assert lost.startswith("opt: self loses to scratch") and "-2.00" in lost
    assert controls.suspects(judged("opt", **worse | {"teacher": (-1, 2, 5.0)})) == []  # nothing to take over
    (higher,) = controls.suspects(judged("opt", **paths | {"logits": (-1, 2, 6.0)}))
    assert "no lower held-out loss" in higher
    on = judged("bert", controls.MORE_TEXT, **worse)
    on[3]["untrained"] = {"name": "self", "low": 1, "high": 3, "difference": 2}
    assert controls.suspects(on) == []  # losing to scratch proves nothing where scratch has had the task before
    on[3]["untrained"] = {"name": "self", "low": -3, "high": -1, "difference": -2}
    assert "an untrained student" in controls.suspects(on)[0]


def test_bad_input_is_rejected_before_anything_is_trained(tmp_path):
    task = {"belongs": {"train": task_rows(4, 1), "test": task_rows(4, 2)}}

    def rejected(kind: str, tokens: np.ndarray = TOKENS) -> str:
        return refusal(controls.run_controls, [kind], tiny_text(tokens), task, TRAINING, TRAINING, TRAINING, [0])

    assert "model kind 'gpt' is unknown: use bert or opt" in rejected("gpt")
    assert "fewer than batch_size 4" in rejected("bert", TOKENS[:50])
    assert not (tmp_path / "runs").exists()
