"""Language understanding as text-to-text: GLUE and the embedded tasks as text pairs, labels by likelihood, scores.

Out of scope: how the embedded tasks are made (pydocs.py), and fine-tuning, which takes these rows as it does summaries.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from scipy.stats import rankdata
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from distill_utils.artifacts import InputError
from distill_utils.data import loading, pydocs
from distill_utils.data.batches import tokenize_pairs
from distill_utils.device import eval_mode, mixed_precision
from distill_utils.evaluation import generation
from distill_utils.evaluation.statistics import bootstrap_interval


class Task(NamedTuple):
    """Text columns as the hub names them, label words in the order of the hub's numbers, metrics behind the score."""

    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)


ONE, TWO = ("sentence",), ("sentence1", "sentence2")
MNLI = Task(("premise", "hypothesis"), ("entailment", "neutral", "contradiction"))
TASKS = {
    "belongs": Task(TWO, ("no", "yes")),
    "family": Task(ONE, tuple(pydocs.FAMILIES)),
    "sst2": Task(ONE, ("negative", "positive")),
    "mrpc": Task(TWO, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "stsb": Task(TWO, tuple(f"{fifth / 5:.1f}" for fifth in range(26)), ("pearson", "spearman")),
    "qqp": Task(("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "mnli": MNLI,
    "mnli_mismatched": MNLI,  # trained as mnli, tested on other genres
    "qnli": Task(("question", "sentence"), ("entailment", "not_entailment")),
    "rte": Task(TWO, ("entailment", "not_entailment")),
    "cola": Task(ONE, ("unacceptable", "acceptable"), ("matthews",)),
}
HUB_NAME = "nyu-mll/glue"
HUB_TEST = {"mnli": "validation_matched", "mnli_mismatched": "validation_mismatched"}  # the others: validation


# --------------------------------------------------------------------------------------------------------------- tasks


def load_task(task: str, split: str, path: str = "", num: int = 0) -> Dataset:
    """Return a split of a task as text pairs: id, document, summary (the label's text) and label; see `to_text`.

    `path` is a folder with one file a split. Without it the embedded tasks come from the corpus, GLUE from the hub,
    whose test labels are not public: its validation part is our test, and our validation is a tenth of its train part,
    drawn by a hash of the first text, so that pairs which share it stay together. `num` keeps the first rows (0 = all);
    the hub's are put in a fixed random order before, as some parts are sorted by source.
    Raises InputError for an unknown task, a missing split or column, and a label outside of the task's.
    """
    _task(task)
    loading.check_request(split, num)
    if path:
        folder = Path(path).expanduser()
        if folder.is_file():  # one file would be every split at once
            raise InputError(f"path {folder.name!r} is a file: give a folder with a train, validation and test file")
        rows = loading.read_files(folder, split)
    else:
        rows = loading.load_classification(task, split) if task in loading.TASKS else _read_hub(task, split)
    loading.check_count(f"{task} ({split})", len(rows), num)
    return to_text(task, rows.select(range(min(num, len(rows)))) if num else rows)


def _read_hub(task: str, split: str) -> Dataset:
    part = HUB_TEST.get(task, "validation") if split == "test" else "train"
    rows = loading.read_hub(HUB_NAME, task.partition("_")[0])[part]
    digests = [hashlib.sha256(text.encode()).digest() for text in rows[TASKS[task].columns[0]]]
    kept = [
        i for i, digest in enumerate(digests) if split == "test" or (split == "validation") == (digest[0] % 10 == 0)
    ]
    order = sorted(kept, key=digests.__getitem__)
    return rows.add_column("id", [f"{part}-{i}" for i in range(len(rows))]).select(order)


def to_text(task: str, rows: Dataset) -> Dataset:
    """Return rows as T5 reads and writes them (Raffel et al. 2020, appendix D): id, document, summary, label.

    A document is the task's name and its texts in alphabetical order of their columns, each behind its column's name:
    "mnli hypothesis: ... premise: ...". Rows have the hub's columns, or sentence1 and sentence2 in the hub's order.
    `label` is what `scores` compares with: the label word, or for stsb the number, which in the summary is rounded to
    the nearest fifth. Labels are read as words or as the hub's numbers.
    """
    known = _task(task)
    columns = [name if name in rows.column_names else f"sentence{i}" for i, name in enumerate(known.columns, start=1)]
    for column in (*columns, "label"):
        if column not in rows.column_names:
            raise InputError(
                f"column {column!r} is missing in task {task!r}: it has {', '.join(rows.column_names)}; "
                f"name them {', '.join(known.columns)} and label"
            )
    ids = [str(i) for i in (rows["id"] if "id" in rows.column_names else range(len(rows)))]
    texts = [[f"{name}: {'' if text is None else text}" for text in rows[column]]
             for name, column in sorted(zip(known.columns, columns, strict=True))]  # fmt: skip
    documents = [" ".join([task.partition("_")[0], *parts]).strip() for parts in zip(*texts, strict=True)]
    labels = [_read_label(task, value, i) for i, value in zip(ids, rows["label"], strict=True)]
    if task == "stsb":
        summaries = [f"{round(value * 5) / 5:.1f}" for value in labels]
    else:
        labels = summaries = [known.labels[place] for place in labels]
    return Dataset.from_dict({"id": ids, "document": documents, "summary": summaries, "label": labels})


def _task(task: str) -> Task:
    if task not in TASKS:
        raise InputError(f"task {task!r} is unknown: use one of {', '.join(TASKS)}")
    return TASKS[task]


def _read_label(task: str, value: object, row_id: str) -> float:
    """Return the number that the metrics compare: a label word's place, or the similarity itself."""
    text, words = str(value).strip(), TASKS[task].labels
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if task == "stsb" and 0 <= number <= 5:
        return number
    if task != "stsb" and (text in words or number in range(len(words))):
        return words.index(text) if text in words else int(number)
    known = "0 to 5" if task == "stsb" else ", ".join(f"{i} or {word!r}" for i, word in enumerate(words))
    raise InputError(f"label {value!r} of row {row_id} is not a label of task {task!r}: use {known}")


# --------------------------------------------------------------------------------------------------------- predictions


@torch.inference_mode()
def predict_labels(
    model, tokenizer, rows: Dataset, task: str, max_source_length: int, batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:  # fmt: skip
    """Return for every row the label text to which the model gives the highest likelihood, end token included.

    Published T5 scores come from free generation, with whatever is no label counted as wrong (Raffel et al. 2020,
    section 2.4). Choosing among the labels never meets an invalid one, so that a small or barely trained model is
    judged by what it tells apart and not by its spelling. For stsb the labels are the numbers from 0.0 to 5.0.
    """
    words = _task(task).labels
    # As the labels are tokenised in training, so that the model is asked for just what it was taught.
    table = Dataset.from_dict({"id": words, "document": words, "summary": words})
    candidates = tokenize_pairs(table, tokenizer, max_source_length, 64)["labels"]
    if len(set(map(tuple, candidates))) < len(words):
        raise InputError(f"the tokenizer writes two labels of task {task!r} alike ({', '.join(words)}): use another")
    limit = getattr(model.config, "max_position_embeddings", None)
    source_ids = generation.tokenize_documents(tokenizer, rows["document"], max_source_length, limit=limit)
    predictions = [""] * len(source_ids)
    batches = generation.batches_by_length(list(map(len, source_ids)), batch_size=batch_size, progress=progress)
    with eval_mode(model), mixed_precision(model.device, "auto" if model.device.type == "cuda" else None):
        for chosen in batches:
            inputs = generation.pad([source_ids[i] for i in chosen], tokenizer.pad_token_id, model.device)
            found = label_scores(model, inputs, candidates).argmax(1).tolist()
            for i, best in zip(chosen, found, strict=True):
                predictions[i] = words[best]
    return predictions


def label_scores(model, inputs: dict[str, torch.Tensor], candidates: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return (batch, candidates): the total log-probability of each candidate's tokens after each source.

    The encoder and the cross-attention's keys and values, which cost far more than a short label, are computed once.
    """
    mask = inputs["attention_mask"]
    encoded = BaseModelOutput(last_hidden_state=model.get_encoder()(**inputs).last_hidden_state)
    cross, columns = DynamicCache(), []
    for ids in candidates:
        labels = torch.tensor(ids, device=mask.device).expand(len(mask), -1)  # (batch, label)
        logits = model(
            encoder_outputs=encoded,
            attention_mask=mask,
            decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels),
            past_key_values=EncoderDecoderCache(DynamicCache(), cross),  # the first candidate fills `cross`
            use_cache=True,
        ).logits.float()  # (batch, label, vocabulary)
        columns.append(-cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1))
    return torch.stack(columns, dim=1)


# -------------------------------------------------------------------------------------------------------------- scores


def scores(task: str, predictions: Sequence, labels: Sequence, num_samples: int = 1000) -> dict[str, float]:
    """Return `num_documents`, the task's metrics, their mean `score` and its 95 % bootstrap interval, all x 100.

    Accuracy; accuracy and F1 for mrpc and qqp; Matthews correlation for cola; Pearson and Spearman for stsb. A
    correlation with a constant is 0. The interval, `score_low` to `score_high`, is over documents, not over seeds.
    """
    metrics = _task(task).metrics
    if len(predictions) != len(labels) or not len(labels):
        raise InputError(f"{len(predictions)} predictions for {len(labels)} labels: give one each, at least one")
    truth, guess = _read_labels(task, labels), _read_labels(task, predictions)
    row = {"num_documents": len(truth)} | {name: metric(name, truth, guess) for name in metrics}
    row["score"] = _score(task, truth, guess)
    if metrics == ("accuracy",):
        _, row["score_low"], row["score_high"] = bootstrap_interval(100.0 * (truth == guess), num_samples)
        return row
    generator, draws = np.random.default_rng(0), []  # no mean over documents: computed anew from each draw
    for _ in range(num_samples):
        drawn = generator.integers(len(truth), size=len(truth))
        draws.append(_score(task, truth[drawn], guess[drawn]))
    row["score_low"], row["score_high"] = np.quantile(draws, [0.025, 0.975]).tolist()
    return row


def document_values(task: str, predictions: Sequence, labels: Sequence) -> np.ndarray:
    """Return one value per document, (documents,), with the mean and the spread of the `score`.

    Correct answers, 100 or 0, for accuracy. F1 and correlations are no mean over documents: a value is then how much
    the score owes to a document, the jackknife's (Efron 1982), so that `compare` and all that draws documents is about
    the score itself.
    """
    truth, guess = _read_labels(task, labels), _read_labels(task, predictions)
    _, firsts, places = np.unique(np.stack([truth, guess]), axis=1, return_index=True, return_inverse=True)
    rest = len(truth) - 1
    without = [_score(task, np.delete(truth, i), np.delete(guess, i)) if rest else 0.0 for i in firsts]
    without = np.array(without)[places.ravel()]  # the score of all other documents; alike for equal ones
    return (_score(task, truth, guess) + rest * (without.mean() - without)).round(6)  # exactly 100 and 0 of accuracy


def _read_labels(task: str, values: Sequence) -> np.ndarray:
    return np.array([_read_label(task, value, str(i)) for i, value in enumerate(values)])


def _score(task: str, truth: np.ndarray, guess: np.ndarray) -> float:
    return float(np.mean([metric(name, truth, guess) for name in TASKS[task].metrics]))


def majority(task: str, train_labels: Sequence, labels: Sequence) -> dict[str, float]:
    """Return the scores of always giving the most frequent label of training: the baseline that costs nothing."""
    ((frequent, _),) = Counter(train_labels).most_common(1)
    return scores(task, [frequent] * len(labels), labels)


def metric(name: str, labels: np.ndarray, predictions: np.ndarray) -> float:
    """Return a metric x 100 of numbers, of f1 for the label 1; the libraries' checks cost seconds over a bootstrap."""
    if name == "accuracy":
        return 100 * float((labels == predictions).mean())
    if name == "f1":
        return 100 * float(2 * (labels * predictions).sum() / max((labels + predictions).sum(), 1))
    if not (np.ptp(labels) and np.ptp(predictions)):
        return 0.0  # undefined: a constant tells nothing apart
    if name == "spearman":
        labels, predictions = rankdata(labels), rankdata(predictions)
    return 100 * float(np.corrcoef(labels, predictions)[0, 1])  # Matthews' is Pearson's of 0 and 1
