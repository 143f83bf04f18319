"""Controls: the paths on BERT-like and GPT-like models, where logits and self-attention relations should beat scratch.

Where a path that is known to work on one stack fails here, the code is suspect, and so is what it says about
encoder-decoder models.
"""

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from datasets import Dataset
from transformers import PreTrainedModel

from distill_utils.artifacts import InputError, artifact, config_hash, hashed, read_json, write_json
from distill_utils.data.batches import batch_list, pair_stream
from distill_utils.data.denoising import language_model_stream
from distill_utils.data.loading import data_fingerprint
from distill_utils.device import device, seed_everything, to_device
from distill_utils.evaluation import scoring, tasks
from distill_utils.evaluation.statistics import effect_sign, format_comparison
from distill_utils.experiments import miniend
from distill_utils.experiments.miniend import RELATIONS, SILENT, AgnosticRun
from distill_utils.models.loading import model_fingerprint, save_model
from distill_utils.training.loop import Training, choose_attention, fit

# {config.model_type: its objective on text, the relations it has, its language model, its classifier}
KINDS = {
    "bert": ("masked", "encoder_self_weight", transformers.BertForMaskedLM, transformers.BertForSequenceClassification),
    "opt": ("causal", "decoder_self_weight", transformers.OPTForCausalLM, transformers.OPTForSequenceClassification),
}
CONTROL_PATHS = ("none", "scratch", "logits", "self")  # none: the untrained student
SHAPE = {"layers": 6, "width": 192, "heads": 4}  # of the teachers
STUDENT_LAYERS, RELATION_HEADS = 3, 12
MORE_TEXT = "more text"  # the language model's own task, on which a longer trained teacher should lead


class Text(NamedTuple):
    """What models of both kinds are trained on: flat token ids, read `length` at a time."""

    tokenizer: object
    tokens: np.ndarray
    held_out: np.ndarray
    length: int

    @property
    def fingerprint(self) -> str:
        hashes = [hashlib.sha256(part.astype(np.uint32)).hexdigest() for part in (self.tokens, self.held_out)]
        return config_hash([*hashes, self.length, self.tokenizer.get_vocab(), self.tokenizer.all_special_ids])


def new_model(kind: str, text: Text, layers: int, seed: int) -> PreTrainedModel:
    """Return a randomly initialised language model of one stack, without dropout; a position per token of a window."""
    width, tokenizer = SHAPE["width"], text.tokenizer
    shape = {
        "vocab_size": len(tokenizer), "hidden_size": width, "num_hidden_layers": layers,
        "num_attention_heads": SHAPE["heads"], "max_position_embeddings": text.length,
        "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    if kind == "bert":
        shape |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "intermediate_size": 4 * width}
    else:
        shape |= {"dropout": 0.0, "ffn_dim": 4 * width, "word_embed_proj_dim": width}
    torch.manual_seed(seed)
    return KINDS[kind][2](transformers.AutoConfig.for_model(kind, **shape))


def control_run(kind: str, path: str, text: Text, training: Training) -> AgnosticRun:
    """Return the run of a path on a kind of model, without the relations that its one stack does not have."""
    objective, own, *_ = KINDS[kind]
    return AgnosticRun(
        path=path, shape=kind, teacher="", training=training, source_length=text.length, denoising=objective,
        num_relation_heads=RELATION_HEADS, options={name: 0.0 for name in RELATIONS if name != own},
    )  # fmt: skip


def control_model(kind: str, path: str, text: Text, training: Training, teacher: Path | None = None) -> Path:
    """Return the artifact of a language model: model/, history.csv, results.json.

    It is the teacher, trained from nothing, or with a `teacher` its student along one of CONTROL_PATHS. The students
    of a seed share initialisation, data order and number of updates; path "none" has no update.
    """
    run = control_run(kind, path if path in miniend.PATHS else "scratch", text, training)
    settings, layers = {"text": text.fingerprint, "training": hashed(training)}, SHAPE["layers"]
    if teacher:
        layers = STUDENT_LAYERS
        settings |= {"teacher": model_fingerprint(str(teacher / "model"), None), "layers": layers}
        settings["weights"] = run.weights | SILENT if path == "none" else run.weights
    else:
        settings["shape"] = SHAPE

    def build(folder: Path) -> dict:
        model, large, results = new_model(kind, text, layers, training.seed), None, {}
        if teacher:
            large = KINDS[kind][2].from_pretrained(teacher / "model").eval().to(device())
        if path != "none":
            results = miniend.train_student(folder, run, model, large, *text[:3], stream=language_model_stream)
        save_model(model.to("cpu"), text.tokenizer, folder / "model")
        return results

    depth = f"-{layers}" if teacher else ""
    return artifact(f"control-{kind}-{path}{depth}-s{training.seed}", settings, build)


# ------------------------------------------------------------------------------------------------------------- judging


def continue_control(kind: str, trained: Path, text: Text, training: Training, start: int) -> Path:
    """Return the artifact of a trained model that goes on with its text, from update `start`: task MORE_TEXT.

    Every path takes the plain loss of a language model, whose head "none" and "self" have not trained yet.
    scores.json has under "log_likelihood" the mean of each held-out window in nats per target token, 256 at most.
    """
    run = control_run(kind, "scratch", text, training)
    settings = {
        "model": model_fingerprint(str(trained / "model"), None), "text": text.fingerprint, "start": start,
        "training": hashed(training),
    }  # fmt: skip

    def build(folder: Path) -> dict:
        model = KINDS[kind][2].from_pretrained(trained / "model")
        miniend.train_student(folder, run, model, None, *text[:3], stream=language_model_stream, start=start)
        choose_attention(model, text.length)
        num = min(256, len(text.held_out) // text.length)
        windows = (text.tokenizer, text.held_out, num, text.length, run.denoising)
        losses = miniend.window_losses(model, *windows, stream=language_model_stream)
        write_json(folder / "scores.json", {"log_likelihood": (-losses).tolist()})
        return {"score": -float(losses.mean()), "num_documents": num}

    return artifact(f"continued-{trained.name.rpartition('-')[0]}-s{training.seed}", settings, build)


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
    classifier = KINDS[config.model_type][3](config)
    classifier.base_model.load_state_dict(model.base_model.state_dict(), strict=False)  # BERT's pooler is new
    return classifier


def classify(classifier: PreTrainedModel, batch: dict) -> dict:
    """Return the logits (batch, labels) and their loss, the cross-entropy of the first column of labels."""
    moved = to_device(batch, classifier.device)
    inputs = {name: moved[name] for name in ("input_ids", "attention_mask")}
    found = classifier(**inputs, labels=moved["labels"][:, 0])  # the other columns are padding
    return {"loss": found.loss, "logits": found.logits}


def tune_control(
    kind: str, trained: Path, task: str, train: Dataset, test: Dataset, text: Text, training: Training
) -> Path:
    """Return the artifact of a trained model fine-tuned and tested on a task: scores.json, results.json, history.csv.

    Rows are those of `tasks.load_task`.
    """
    settings = {
        "model": model_fingerprint(str(trained / "model"), None), "text": text.fingerprint,
        "rows": [data_fingerprint(rows) for rows in (train, test)], "training": hashed(training),
    } | scoring.label_settings(task)  # fmt: skip

    def build(folder: Path) -> dict:
        words, pad_token_id = tasks.TASKS[task].labels, text.tokenizer.pad_token_id
        model = KINDS[kind][2].from_pretrained(trained / "model")
        classifier = new_classifier(model, len(words), training.seed)
        seed_everything(training.seed)
        choose_attention(classifier, text.length)
        encoded = [encode_rows(task, rows, text.tokenizer, text.length) for rows in (train, test)]
        batches = pair_stream(encoded[0], pad_token_id, training.batch_size, training.seed, training.micro_batch_size)
        fit(
            classifier, lambda model, batch: {"loss": classify(model, batch)["loss"]}, batches, training, folder,
            stage=f"{task} {trained.name}",
        )  # fmt: skip
        found = [""] * len(test)
        for batch in batch_list(encoded[1], pad_token_id, 64):
            with torch.no_grad():
                best = classify(classifier, batch)["logits"].argmax(1).tolist()
            for row, label in zip(batch["ids"], best, strict=True):
                found[row] = words[label]
        return scoring.save_label_scores(folder, task, found, test)

    return artifact(f"tuned-{trained.name.rpartition('-')[0]}-{task}-s{training.seed}", settings, build)


def run_controls(
    kinds: Sequence[str], text: Text, task_rows: Mapping[str, Mapping[str, Dataset]], teacher_training: Training,
    distilling: Training, tuning: Training, seeds: Sequence[int],
) -> list[dict]:  # fmt: skip
    """Return one row per kind, task and path: score, mean over seeds, with interval and paired test against scratch.

    `task_rows` is {task: {"train": rows, "test": rows}}; MORE_TEXT is a task of every run. Paths are CONTROL_PATHS and
    "teacher", which is trained once and fine-tuned with every seed. `held_out_loss` is in nats per target token, None
    where no head was trained; "untrained" of "self" on MORE_TEXT is its row with the paired test against "none".
    Raises InputError for an unknown kind, too little text, and no mask token.
    """
    sizes = (max(teacher_training.batch_size, distilling.batch_size), 1)
    for kind in kinds:  # before anything is trained
        if kind not in KINDS:
            raise InputError(f"model kind {kind!r} is unknown: use {' or '.join(KINDS)}")
        for part, size in zip((text.tokens, text.held_out), sizes, strict=True):
            language_model_stream(part, text.tokenizer, KINDS[kind][0], text.length, size, seed=0)

    rows = []
    for kind in kinds:
        teacher = control_model(kind, "teacher", text, teacher_training)
        trained = {
            path: [control_model(kind, path, text, replace(distilling, seed=seed), teacher) for seed in seeds]
            for path in CONTROL_PATHS
        }
        trained["teacher"] = [teacher] * len(seeds)
        for task in (MORE_TEXT, *task_rows):
            if task == MORE_TEXT:
                tune = partial(continue_control, text=text, start=distilling.max_steps)
            else:
                tune = partial(tune_control, task=task, text=text, **task_rows[task])
            tested = {
                path: [
                    tune(kind, folder, training=replace(tuning, seed=seed))
                    for folder, seed in zip(folders, seeds, strict=True)
                ]
                for path, folders in trained.items()
            }
            for path, tests in tested.items():
                finals = [read_json(folder / "results.json").get("final", {}) for folder in trained[path]]
                losses = [final["validation_loss"] for final in finals if "validation_loss" in final]
                row = {"model": kind, "path": path, "held_out_loss": float(np.mean(losses)) if losses else None}
                row |= miniend.result_row(path, task, tests, tested["scratch"] if path != "scratch" else None)
                if task == MORE_TEXT and path == "self":  # scratch was trained for this very task, "none" was not
                    row["untrained"] = miniend.result_row(path, task, tests, tested["none"])
                rows.append(row)
    return rows


def suspects(rows: Sequence[Mapping]) -> list[str]:
    """Return what speaks against the code, from rows of `run_controls`: paths that fail where they are known to work.

    Logits must reach a lower held-out loss than scratch, and neither they nor self-attention relations may lose to it
    on a task. A task on which the teacher itself is not shown to beat scratch is inconclusive: there is nothing that a
    student could have taken from it. On MORE_TEXT, for which scratch was trained, relations are compared with "none".
    """
    found = []
    for kind in dict.fromkeys(row["model"] for row in rows):
        own = {(row["task"], row["path"]): row for row in rows if row["model"] == kind}
        losses = {path: row["held_out_loss"] for (_, path), row in own.items()}
        if not losses["logits"] < losses["scratch"]:
            found.append(f"{kind}: logits reach no lower held-out loss than scratch")
        for task in dict.fromkeys(task for task, _ in own):
            if effect_sign(own[task, "teacher"]) <= 0:
                continue
            compared = [(own[task, "logits"], "scratch"), (own[task, "self"], "scratch")]
            if "untrained" in own[task, "self"]:
                compared[1] = (own[task, "self"]["untrained"], "an untrained student")
            lost = [pair for pair in compared if effect_sign(pair[0]) < 0]
            found += [f"{kind}: {format_comparison(row['name'], row, other)} on {task}" for row, other in lost]
    return found
