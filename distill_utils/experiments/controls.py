"""Controls: the paths on BERT-like and GPT-like models, where logits and self-attention relations should beat scratch.

Not here: the objective (objectives.miniend) and the paths (miniend.PATHS). Where a path that is known to work on
one stack fails here, the code is suspect, and so is what it says about encoder-decoder models.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from datasets import Dataset
from transformers import PreTrainedModel

from distill_utils.artifacts import InputError, artifact, config_hash, read_json, write_json
from distill_utils.data.batches import batch_list, collate, pair_stream
from distill_utils.data.denoising import _window_visits
from distill_utils.data.loading import data_fingerprint
from distill_utils.device import device, seed_everything
from distill_utils.distillation import objectives
from distill_utils.distillation.losses import IGNORED, check_relation_heads
from distill_utils.evaluation import tasks
from distill_utils.experiments import miniend
from distill_utils.experiments.miniend import PATHS, RELATIONS
from distill_utils.models.loading import model_fingerprint, save_model
from distill_utils.training.loop import Training, choose_attention, fit

# {config.model_type: the relations it has, its language model, its classifier}
KINDS = {
    "bert": ("encoder_self_weight", transformers.BertForMaskedLM, transformers.BertForSequenceClassification),
    "opt": ("decoder_self_weight", transformers.OPTForCausalLM, transformers.OPTForSequenceClassification),
}
CONTROL_PATHS = ("none", "scratch", "logits", "self")  # none: the untrained student
SHAPE = {"layers": 6, "width": 192, "heads": 4}  # of the teachers
MORE_TEXT = "more text"  # the language model's own task, on which a longer trained teacher should lead
SILENT = dict.fromkeys((*RELATIONS, "ce_weight", "kl_weight", "hidden_weight"), 0.0)


class Text(NamedTuple):
    """What models of both kinds are trained on: flat token ids, read `length` at a time."""

    tokens: np.ndarray
    held_out: np.ndarray
    tokenizer: object
    length: int

    @property
    def fingerprint(self) -> str:
        hashes = [hashlib.sha256(part.astype(np.uint32)).hexdigest() for part in (self.tokens, self.held_out)]
        return config_hash([*hashes, self.length, self.tokenizer.get_vocab(), self.tokenizer.all_special_ids])


def text_stream(
    kind: str, tokens: np.ndarray, tokenizer, length: int, batch_size: int, seed: int, micro_batch_size: int = 0
) -> Callable[[int], list[dict]]:
    """Return `batches(step)`: micro-batches of packed windows, a function of step and seed alone.

    For "bert" tokens are masked, for "opt" the labels are the input ids. Windows are visited as in `denoising_stream`.
    Raises InputError for an unknown kind, too little text, and a tokenizer with neither mask token nor sentinel.
    """
    if kind not in KINDS:
        raise InputError(f"model kind {kind!r} is unknown: use {' or '.join(KINDS)}")
    visit = _window_visits(tokens, length, batch_size, seed)
    mask_id, words = tokenizer.mask_token_id, np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
    if mask_id is None:
        mask_id = tokenizer.get_vocab().get("<extra_id_0>")  # T5 has no mask, and its first sentinel is as good
    if mask_id is None and kind == "bert":
        raise InputError("the tokenizer has neither a mask token nor <extra_id_0>, which bert needs: use opt only")

    def batches(step: int) -> list[dict]:
        numbers, ids, generator = visit(step)
        pairs = mask_tokens(ids, mask_id, words, generator) if kind == "bert" else (ids, ids)
        names = ("id", "input_ids", "labels")
        rows = [dict(zip(names, row, strict=True)) for row in zip(numbers.tolist(), *pairs, strict=True)]
        size = micro_batch_size or batch_size
        return [collate(rows[i : i + size], tokenizer.pad_token_id, 1) for i in range(0, batch_size, size)]

    return batches


def mask_tokens(
    ids: np.ndarray, mask_id: int, words: np.ndarray, generator: np.random.Generator, share: float = 0.15
) -> tuple[np.ndarray, np.ndarray]:
    """Return input ids and labels (batch, length) of masked language modelling (Devlin et al. 2019, section 3.1).

    In every window the same number of tokens is chosen, at least one. Of these 80 % become the mask, 10 % any of
    `words` and 10 % stay; all others have label -100.
    """
    num = max(1, round(share * ids.shape[1]))
    chosen = generator.random(ids.shape).argsort(axis=1) < num  # a random permutation a row has `num` such places
    fate = generator.random(ids.shape)
    inputs = np.where(chosen & (fate < 0.8), mask_id, ids)
    inputs = np.where(chosen & (fate >= 0.9), generator.choice(words, size=ids.shape), inputs)
    return inputs, np.where(chosen, ids, IGNORED)


# -------------------------------------------------------------------------------------------------------------- models


def new_model(kind: str, tokenizer, length: int, layers: int, width: int, heads: int) -> PreTrainedModel:
    """Return a randomly initialised language model of one stack, without dropout; it has `length` positions."""
    shape = {
        "vocab_size": len(tokenizer), "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "max_position_embeddings": length, "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    if kind == "bert":
        shape |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "intermediate_size": 4 * width}
    else:
        shape |= {"dropout": 0.0, "ffn_dim": 4 * width, "word_embed_proj_dim": width}
    return KINDS[kind][1](transformers.AutoConfig.for_model(kind, **shape))


def new_student(teacher: PreTrainedModel, layers: int, seed: int) -> PreTrainedModel:
    """Return the untrained student, of fewer layers than the teacher; every path of a seed starts from it."""
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = layers
    torch.manual_seed(seed)
    return type(teacher)(config).eval()


def control_teacher(kind: str, text: Text, training: Training, shape: Mapping[str, int] = SHAPE) -> Path:
    """Return the artifact of a language model trained from nothing: model/, history.csv with its validation_loss."""
    settings = {"shape": dict(shape), "text": text.fingerprint, "training": asdict(training)}

    def build(folder: Path) -> dict:
        torch.manual_seed(training.seed)
        model = new_model(kind, text.tokenizer, text.length, **shape)
        return _train(folder, kind, model, None, SILENT | PATHS["scratch"], text, training)

    return artifact(f"control-{kind}-teacher-s{training.seed}", settings, build)


def distill_control(
    kind: str, path: str, teacher: Path, text: Text, training: Training, layers: int = 3, num_relation_heads: int = 12
) -> Path:
    """Return the artifact of a student of `control_teacher`'s: model/, history.csv, results.json.

    The paths of a seed share initialisation, data order and number of updates; path "none" has no update.
    """
    if path not in CONTROL_PATHS:
        raise InputError(f"path {path!r} is no control: use {', '.join(CONTROL_PATHS)}")
    site, language_model, _ = KINDS[kind]
    here = {name: weight for name, weight in PATHS.get(path, {}).items() if name == site or name not in RELATIONS}
    weights = SILENT | here | {"num_relation_heads": num_relation_heads}
    settings = {
        "teacher": model_fingerprint(str(teacher / "model"), None), "layers": layers, "weights": weights,
        "text": text.fingerprint, "training": asdict(training),
    }  # fmt: skip

    def build(folder: Path) -> dict:
        large = language_model.from_pretrained(teacher / "model").eval().to(device())
        student = new_student(large, layers, training.seed)
        if path != "none":
            return _train(folder, kind, student, large, weights, text, training)
        save_model(student, text.tokenizer, folder / "model")
        return {}

    return artifact(f"control-{kind}-{path}-{layers}-s{training.seed}", settings, build)


def _train(
    folder: Path, kind: str, model: PreTrainedModel, teacher: PreTrainedModel | None, weights: dict, text: Text,
    training: Training,
) -> dict:  # fmt: skip
    """Train a model in place along a path, write it, and return its results; a trained head is measured."""
    history = _fit(folder, kind, model, teacher, weights, text, training)
    model.set_attn_implementation("sdpa")
    save_model(model.to("cpu"), text.tokenizer, folder / "model")
    return {"final": history[-1]}


def _fit(
    folder: Path, kind: str, model: PreTrainedModel, teacher: PreTrainedModel | None, weights: dict, text: Text,
    training: Training, start: int = 0,
) -> list[dict]:  # fmt: skip
    """Train a model in place along a path, from update `start` of its text, and return the history."""
    seed_everything(training.seed)
    choose_attention(model, text.length)
    stream = partial(text_stream, kind, tokenizer=text.tokenizer, length=text.length)
    batches = stream(
        text.tokens, batch_size=training.batch_size, seed=training.seed, micro_batch_size=training.micro_batch_size
    )
    checks = stream(text.held_out, batch_size=min(32, max(len(text.held_out) // text.length, 1)), seed=0)
    evaluate = partial(held_out_loss, batches=[checks(step)[0] for step in range(4)])
    return fit(
        model, lambda model, batch: objectives.miniend(model, teacher, batch, **weights),
        lambda step: batches(start + step),
        training, folder, evaluate if weights["ce_weight"] else None, stage=folder.name.rpartition("-")[0],
    )  # fmt: skip


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, batches: Sequence[dict]) -> dict[str, float]:
    """Return the validation_loss over batches of equally many labels, nats per target token."""
    losses = []
    for batch in batches:
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask", "labels")}
        losses.append(float(objectives.miniend(model, None, inputs, **SILENT | PATHS["scratch"])["loss"]))
    return {"validation_loss": float(np.mean(losses))}


# ------------------------------------------------------------------------------------------------------------- judging


def encode_rows(task: str, rows: Dataset, tokenizer, length: int) -> Dataset:
    """Return id (the row's number), input_ids (at most `length`) and labels (one number in a list).

    As in packed text a document has no start token and ends with the end token, off which "opt" reads its class.
    """
    cut = {"add_special_tokens": False, "truncation": True, "max_length": length - 1}
    ids = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(list(rows["document"]), **cut)["input_ids"]]
    labels = [[tasks.TASKS[task].labels.index(word)] for word in rows["summary"]]
    return Dataset.from_dict({"id": list(range(len(ids))), "input_ids": ids, "labels": labels})


def new_classifier(model: PreTrainedModel, num_labels: int, seed: int) -> PreTrainedModel:
    """Return the stack of a language model under a new head, which depends on the seed and the shape alone."""
    config = copy.deepcopy(model.config)
    config.num_labels = num_labels
    torch.manual_seed(seed)
    classifier = KINDS[config.model_type][2](config)
    classifier.base_model.load_state_dict(model.base_model.state_dict(), strict=False)  # BERT's pooler is new
    return classifier


def tune_control(
    kind: str, trained: Path, task: str, train: Dataset, test: Dataset, text: Text, training: Training
) -> Path:
    """Return the artifact of a trained model fine-tuned and tested on a task: scores.json, results.json, history.csv.

    Rows are those of `tasks.load_task`. scores.json has under "correct" 100 or 0 for each test row.
    """
    words = tasks.TASKS[task].labels
    settings = {
        "model": model_fingerprint(str(trained / "model"), None), "text": text.fingerprint,
        "rows": [data_fingerprint(rows) for rows in (train, test)], "training": asdict(training),
    }  # fmt: skip

    def build(folder: Path) -> dict:
        model, pad_token_id = KINDS[kind][1].from_pretrained(trained / "model"), text.tokenizer.pad_token_id
        classifier = new_classifier(model, len(words), training.seed)
        seed_everything(training.seed)
        choose_attention(classifier, text.length)
        encoded = [encode_rows(task, rows, text.tokenizer, text.length) for rows in (train, test)]
        batches = pair_stream(encoded[0], pad_token_id, training.batch_size, training.seed, training.micro_batch_size)
        fit(classifier, classification_loss, batches, training, folder, stage=f"{task} {trained.name}")
        found = [""] * len(test)
        with torch.no_grad():
            for batch in batch_list(encoded[1], pad_token_id, 64):
                inputs = {name: batch[name].to(classifier.device) for name in ("input_ids", "attention_mask")}
                for row, best in zip(batch["ids"], classifier(**inputs).logits.argmax(1).tolist(), strict=True):
                    found[row] = words[best]
        correct = [100.0 * (a == b) for a, b in zip(found, test["summary"], strict=True)]
        write_json(folder / "scores.json", {"correct": correct})
        return tasks.scores(task, found, test["label"])

    return artifact(f"tuned-{trained.name.rpartition('-')[0]}-{task}-s{training.seed}", settings, build)


def continue_control(kind: str, trained: Path, text: Text, training: Training, start: int) -> Path:
    """Return the artifact of a trained model that reads on, from update `start` of its text: task MORE_TEXT.

    Every path goes on with the loss of the language model alone, whose head "none" and "self" have not trained yet.
    scores.json has under "log_likelihood" the mean of each held-out window in nats per target token, 256 at most.
    """
    settings = {
        "model": model_fingerprint(str(trained / "model"), None), "text": text.fingerprint, "start": start,
        "training": asdict(training),
    }  # fmt: skip

    def build(folder: Path) -> dict:
        model = KINDS[kind][1].from_pretrained(trained / "model")
        _fit(folder, kind, model, None, SILENT | PATHS["scratch"], text, training, start)
        windows = text_stream(kind, text.held_out, text.tokenizer, text.length, batch_size=1, seed=0)
        num = min(256, len(text.held_out) // text.length)
        losses = [held_out_loss(model, windows(step))["validation_loss"] for step in range(num)]
        write_json(folder / "scores.json", {"log_likelihood": [-loss for loss in losses]})
        return {"score": -float(np.mean(losses)), "num_documents": num}

    return artifact(f"continued-{trained.name.rpartition('-')[0]}-s{training.seed}", settings, build)


def classification_loss(model: PreTrainedModel, batch: dict) -> dict:
    """Return the cross-entropy of the first column of labels; the others are padding."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return {"loss": model(**inputs, labels=batch["labels"][:, 0]).loss}


def run_controls(
    kinds: Sequence[str], tokens: np.ndarray, held_out: np.ndarray, tokenizer,
    task_rows: Mapping[str, Mapping[str, Dataset]], teacher_training: Training, distilling: Training, tuning: Training,
    seeds: Sequence[int], length: int, layers: int = 3, num_relation_heads: int = 12, shape: Mapping[str, int] = SHAPE,
) -> list[dict]:  # fmt: skip
    """Return one row a kind, task and path: its score, mean over seeds, with interval and paired test against scratch.

    `task_rows` is {task: {"train": rows, "test": rows}}; MORE_TEXT is a task of every run. Paths are CONTROL_PATHS and
    "teacher", which is trained once and fine-tuned with every seed. `held_out_loss` is in nats per target token, None
    where no head was trained; "untrained" of "self" on MORE_TEXT is its row with the paired test against "none".
    Raises InputError for an unknown kind, too little text, no mask, and relation heads that do not divide the width.
    """
    for kind in kinds:  # before anything is trained
        for part, size in ((tokens, max(teacher_training.batch_size, distilling.batch_size)), (held_out, 1)):
            text_stream(kind, part, tokenizer, length, size, seed=0)
    try:
        check_relation_heads(num_relation_heads, shape["width"], shape["width"])
    except ValueError as error:
        raise InputError(str(error)) from None
    text, rows = Text(tokens, held_out, tokenizer, length), []
    for kind in kinds:
        teacher = control_teacher(kind, text, teacher_training, shape)
        student = partial(distill_control, kind, teacher=teacher, text=text, layers=layers,
                          num_relation_heads=num_relation_heads)  # fmt: skip
        found = {path: [student(path, training=replace(distilling, seed=seed)) for seed in seeds]
                 for path in CONTROL_PATHS} | {"teacher": [teacher] * len(seeds)}  # fmt: skip
        for task in (MORE_TEXT, *task_rows):
            if task == MORE_TEXT:
                tune = partial(continue_control, kind, text=text, start=distilling.max_steps)
            else:
                tune = partial(tune_control, kind, task=task, text=text, **task_rows[task])
            tested = {path: [tune(trained=folder, training=replace(tuning, seed=seed))
                             for folder, seed in zip(folders, seeds, strict=True)]
                      for path, folders in found.items()}  # fmt: skip
            for path, tests in tested.items():
                finals = [read_json(folder / "results.json").get("final", {}) for folder in found[path]]
                losses = [final["validation_loss"] for final in finals if "validation_loss" in final]
                baseline = None if path == "scratch" else tested["scratch"]
                row = {"model": kind, "path": path, "held_out_loss": float(np.mean(losses)) if losses else None}
                row |= miniend.result_row(path, task, tests, baseline)
                if task == MORE_TEXT and path == "self":  # scratch has read for this very task, "none" has not
                    row["untrained"] = miniend.result_row(path, task, tests, tested["none"])
                rows.append(row)
    return rows


def verdict(rows: Sequence[Mapping]) -> str:
    """Return one sentence on whether logits and self-attention relations beat scratch, from rows of `run_controls`.

    Logits are also compared by their loss on held-out text. A task on which the teacher itself is not shown to beat
    scratch judges nothing: there is nothing that a student could have taken from it. On MORE_TEXT scratch has a lead,
    as it has read for that very task; there relations are held against the student that has read nothing.
    """
    said, suspect = [], False
    for kind in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == kind]
        losses = {row["path"]: row["held_out_loss"] for row in own}
        if losses.get("logits") is not None and losses.get("scratch") is not None:
            lower = "" if losses["logits"] < losses["scratch"] else "no "
            said.append(
                f"{kind}: logits reach {lower}lower held-out loss than scratch ({losses['logits']:.2f} against "
                f"{losses['scratch']:.2f})"
            )
            suspect |= bool(lower)
        for task in dict.fromkeys(row["task"] for row in own):
            paths = {row["path"]: row for row in own if row["task"] == task}
            if not paths["teacher"]["low"] > 0:
                said.append(f"{kind}: {task} judges nothing, as the teacher itself is not shown to beat scratch there")
                continue
            compared = [(paths["logits"], "scratch"), (paths["self"], "scratch")]
            if task == MORE_TEXT:
                compared[1] = (paths["self"]["untrained"], "a student that has read nothing")
            said += [f"{kind}: {miniend.verdict(row, other)} on {task}" for row, other in compared]
            suspect |= any(row["high"] < 0 for row, _ in compared)
    return "; ".join([*said, "then the pipeline is suspect"] if suspect else said) + "."
