"""Text pairs become batches: token ids, padding, batches by length; every stream is a function of the step.

Out of scope: reading data (loading.py) and corrupting text (denoising.py).
"""

import itertools
import re
import zlib
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from datasets import Dataset
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from distill_utils.artifacts import InputError


def tokenize_pairs(
    dataset: Dataset, tokenizer, max_source_length: int, max_target_length: int, prefix: str = ""
) -> Dataset:
    """Return the columns id, input_ids and labels: lists of token ids, cut to the given lengths, end token included.

    Line breaks in a summary become what the tokenizer has for them.
    """
    sources = [prefix + text for text in dataset["document"]]
    encoded = tokenizer(sources, truncation=True, max_length=max_source_length)["input_ids"]
    line = "<n>" if "<n>" in tokenizer.get_vocab() else " "  # Pegasus has a token for it; BART never saw a line break
    summaries = [re.sub(r"\s*\n\s*", line, text) for text in dataset["summary"]]
    labels = tokenizer(text_target=summaries, truncation=True, max_length=max_target_length)["input_ids"]
    if not getattr(tokenizer, "model_writes_bos", False):  # set by models.loading.load_model
        labels = [ids[1:] if len(ids) > 1 and ids[0] == tokenizer.bos_token_id else ids for ids in labels]
    return Dataset.from_dict({"id": dataset["id"], "input_ids": encoded, "labels": labels})


def collate(rows: list[dict], pad_token_id: int, pad_to_multiple: int = 8) -> dict:
    """Pad rows to one batch: input_ids, attention_mask, labels (padding -100), each (batch, length), and ids.

    decoder_input_ids are left to the model, whose own shift knows its start token.
    """

    def padded(key: str, padding: int) -> torch.Tensor:
        values = [torch.as_tensor(row[key], dtype=torch.long) for row in rows]
        values = pad_sequence(values, batch_first=True, padding_value=padding)
        return pad(values, (0, -values.shape[1] % pad_to_multiple), value=padding)

    input_ids, labels = padded("input_ids", pad_token_id), padded("labels", -100)
    lengths = torch.tensor([[len(row["input_ids"])] for row in rows])
    attention_mask = (torch.arange(input_ids.shape[1]) < lengths).long()
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, "ids": [r["id"] for r in rows]}


def collate_parts(rows: list[dict], size: int, pad_token_id: int, pad_to_multiple: int = 8) -> list[dict]:
    """Return the rows, in their order, as batches of `size`."""
    return [collate(rows[i : i + size], pad_token_id, pad_to_multiple) for i in range(0, len(rows), size)]


def length_batches(lengths: list[int], batch_size: int, seed: int, epoch: int, pool: int = 32) -> list[list[int]]:
    """Return one epoch's batches of row numbers: shuffled, then sorted by length within pools of `pool` batches.

    Every row appears once, except that the last incomplete batch is filled up from the start of the epoch's order.
    The order depends on the arguments alone.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    if len(order) % batch_size:
        order = np.concatenate([order, np.resize(order, batch_size - len(order) % batch_size)])
    batches = []
    for start in range(0, len(order), batch_size * pool):
        chunk = order[start : start + batch_size * pool]
        chunk = chunk[np.argsort([lengths[i] for i in chunk], kind="stable")]
        batches += [chunk[i : i + batch_size].tolist() for i in range(0, len(chunk), batch_size)]
    return [batches[i] for i in generator.permutation(len(batches))]


def document_id(name: str) -> str:
    """Return a document's id from that of one of its labels: candidates end in #number, joined labels in @number."""
    return re.sub(r"(#\d+)?(@\d+)*$", "", name) or name


def pair_stream(
    rows: Dataset, pad_token_id: int, batch_size: int, seed: int, micro_batch_size: int = 0,
    order: Dataset | None = None,
) -> Callable[[int], list[dict]]:  # fmt: skip
    """Return `batches(step)`: the micro-batches of an optimizer step, a function of step and seed alone.

    A resumed run thus sees the data of an uninterrupted one. `order` holds all documents of a comparison, tokenized
    (id, input_ids); without it `rows` are all. Methods with the same `order` and seed see the same documents in every
    update. Where a document has several rows, they take turns from epoch to epoch; where it has none, one of those that
    have takes its place, each in turn. Micro-batches are cut from a step's rows in the order of their targets: that
    leaves less padding.
    """
    if not len(rows):
        raise InputError("there are no training rows: check the data set and num_train")
    columns = {"id": list(rows["id"])}
    for name in ("input_ids", "labels"):  # as Python numbers ids take eight times the memory
        columns[name] = [np.asarray(ids, dtype=np.int32) for ids in rows[name]]
    # By source alone: pseudo-labels have other lengths than references, and the order must not depend on the method.
    lengths = [len(source) for source in (order or rows)["input_ids"]]
    targets: list[list[int]] = [[row] for row in range(len(rows))]  # of each document, its rows
    if order is not None:
        targets = [[] for _ in lengths]
        numbers = {document: number for number, document in enumerate(order["id"])}
        for row, name in enumerate(columns["id"]):
            targets[numbers[name if name in numbers else document_id(name)]].append(row)
    present = [number for number, found in enumerate(targets) if found]
    per_epoch, size = -(-len(lengths) // batch_size), micro_batch_size or batch_size

    @lru_cache(maxsize=1)
    def epoch_batches(epoch: int) -> list[list[int]]:
        spare = itertools.cycle(np.random.default_rng([seed, epoch, 1]).permutation(present).tolist())
        filled = [
            [number if targets[number] else next(spare) for number in batch]
            for batch in length_batches(lengths, batch_size, seed, epoch)
        ]
        # Half of the documents begin with their first row, half with their second, so that a batch mixes both.
        return [[targets[n][(n + epoch) % len(targets[n])] for n in batch] for batch in filled]

    def batches(step: int) -> list[dict]:
        numbers = epoch_batches(step // per_epoch)[step % per_epoch]
        chosen = [{name: column[i] for name, column in columns.items()} for i in numbers]
        if size < batch_size:
            chosen.sort(key=lambda row: len(row["labels"]))
        return collate_parts(chosen, size, pad_token_id)

    return batches


def source_facts(batch: dict) -> tuple[list[int], list[int]]:
    """Return the number of source tokens of each row, and a checksum of their ids, by which caches know a row."""
    lengths = batch["attention_mask"].sum(1).tolist()
    sources = zip(batch["input_ids"], lengths, strict=True)
    return lengths, [zlib.crc32(ids[:length].numpy().tobytes()) for ids, length in sources]


def target_facts(batch: dict) -> tuple[list[int], list[int]]:
    """Return the number of target tokens of each row, and a checksum of its source and target ids."""
    lengths = (batch["labels"] != -100).sum(1).tolist()
    rows = zip(batch["labels"], lengths, source_facts(batch)[1], strict=True)
    return lengths, [zlib.crc32(labels[:length].numpy().tobytes(), source) for labels, length, source in rows]


def batch_list(rows: Dataset, pad_token_id: int, batch_size: int) -> list[dict]:
    """Return all rows as batches in order of length, for evaluation."""
    return collate_parts(sorted(rows, key=lambda row: len(row["input_ids"])), batch_size, pad_token_id)


def tokens_per_update(batches: Callable[[int], list[dict]], num: int = 20) -> float:
    """Return the mean number of source and target tokens of an update, without padding, over the first `num`."""
    seen = [batch for step in range(num) for batch in batches(step)]
    return sum(int(batch["attention_mask"].sum() + (batch["labels"] != -100).sum()) for batch in seen) / num
