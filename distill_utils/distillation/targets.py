"""Cached teacher targets: the teacher's distribution over each target token, on disk, so that it runs only once.

Out of scope: the loss on them (`losses.chunked_cached_losses`) and the objective (`objectives.kd_cached`).

A folder holds, one token after the other: entries.bin (int32, ids kept of this token), ids.bin (uint16, or int32 for a
vocabulary above 65,536), probs.bin (float16: probabilities, or how often an id was drawn); index.json with {id: [first
token, first entry, checksum of the row's token ids]}; and settings.json with the numbers that they were made with.
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from distill_utils.artifacts import InputError, folder_atomic, read_json, write_json
from distill_utils.data.batches import batch_list, target_facts
from distill_utils.device import mixed_precision, to_device
from distill_utils.distillation.losses import IGNORED
from distill_utils.distillation.objectives import decode, encode, teacher_mode
from distill_utils.models.students import project

CHUNK_TOKENS = 1024  # tokens projected to the vocabulary at a time
MAX_SAMPLES = 2048  # float16 holds whole numbers exactly up to here


def write_targets(
    folder: Path,
    teacher,
    rows: Dataset,
    *,
    pad_token_id: int,
    top_k: int = 0,
    samples: int = 0,
    temperature: float = 2.0,
    batch_size: int = 32,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Write the teacher's targets for tokenized rows (id, input_ids, labels); the folder appears whole or not at all.

    Either the `top_k` likeliest ids of each token, or `samples` ids drawn from the teacher's distribution. Returns
    rows, tokens, bytes, bytes_per_token, entries_per_token, mean_residual (probability outside of the kept ids) and
    seconds. Raises InputError for impossible numbers, repeated ids or a full disk.
    """
    began, on = time.monotonic(), teacher.device
    vocab_size = teacher.get_output_embeddings().weight.shape[0]
    _check_numbers(rows, top_k, samples, temperature, vocab_size)
    id_dtype = _id_dtype(vocab_size)
    generator = torch.Generator(on).manual_seed(seed)
    index, tokens, entries, residual = {}, 0, 0, 0.0
    with (
        folder_atomic(folder) as temporary,
        open(temporary / "entries.bin", "wb") as entries_file,
        open(temporary / "ids.bin", "wb") as ids_file,
        open(temporary / "probs.bin", "wb") as probs_file,
        teacher_mode(teacher),
        mixed_precision(on),
    ):
        for batch in batch_list(rows, pad_token_id, batch_size):
            moved = to_device(batch, on)
            decoded, _ = decode(teacher, moved, encode(teacher, moved)[0])
            counts = []  # ids kept, of each token
            for hidden in decoded[moved["labels"] != IGNORED].split(CHUNK_TOKENS):
                probs = (project(teacher, hidden).float() / temperature).softmax(-1)  # (chunk, vocab)
                values, ids = choose_targets(probs, top_k, samples, generator)
                used = values > 0
                residual += float((1 - (probs.gather(-1, ids) * used).sum(-1)).clamp(min=0).sum())
                counts += used.sum(-1).tolist()
                ids_file.write(ids[used].cpu().numpy().astype(id_dtype).tobytes())
                probs_file.write(values[used].cpu().numpy().astype(np.float16).tobytes())
            entries_file.write(np.asarray(counts, dtype=np.int32).tobytes())
            start = 0
            for name, length, checksum in zip(batch["ids"], *target_facts(batch), strict=True):
                index[str(name)] = [tokens, entries, checksum]
                tokens, entries = tokens + length, entries + sum(counts[start : start + length])
                start += length
            if progress:
                progress(len(index), len(rows))
        write_json(temporary / "index.json", index)
        settings = {"top_k": top_k, "samples": samples, "temperature": temperature, "vocab_size": vocab_size}
        write_json(temporary / "settings.json", settings)
    size = sum(path.stat().st_size for path in Path(folder).iterdir())
    return {
        "rows": len(index),
        "tokens": tokens,
        "bytes": size,
        "bytes_per_token": size / tokens,
        "entries_per_token": entries / tokens,
        "mean_residual": residual / tokens,
        "seconds": round(time.monotonic() - began, 2),
    }


def choose_targets(
    probs: Tensor, top_k: int = 0, samples: int = 0, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Return (values, ids), each (tokens, k), largest values first, of distributions (tokens, vocab).

    The `top_k` largest probabilities; or how often each id came up in `samples` draws with replacement, 0 for padding:
    divided by `samples` these are an unbiased estimate of the distribution, which its largest probabilities are not
    (Anshumann et al. 2025, Sparse Logit Sampling).
    """
    if not samples:
        return probs.topk(top_k)
    draws = torch.multinomial(probs, samples, replacement=True, generator=generator)  # (tokens, samples)
    counts = torch.zeros_like(probs).scatter_add_(-1, draws, torch.ones_like(draws, dtype=probs.dtype))
    return counts.topk(min(samples, probs.shape[-1]))


def with_targets(batches: Callable[[int], list[dict]], folder: Path) -> Callable[[int], list[dict]]:
    """Return `batches` with target_ids and target_probs (batch, target, k) and target_temperature in each batch.

    Rows are found by their ids. Raises InputError for a row that is not there, or whose source or target tokens are
    not those the teacher saw.
    """
    settings, index = (read_json(folder / f"{name}.json") for name in ("settings", "index"))
    files = {"entries": np.int32, "ids": _id_dtype(settings["vocab_size"]), "probs": np.float16}
    stored = {name: np.memmap(folder / f"{name}.bin", dtype, mode="r") for name, dtype in files.items()}

    def attach(batch: dict) -> dict:
        rows = []
        for name, length, checksum in zip(batch["ids"], *target_facts(batch), strict=True):
            first_token, first_entry, known = index.get(str(name), (0, 0, None))
            if checksum != known:
                reason = "is not among" if known is None else "has other tokens than"
                raise InputError(f"example {name} {reason} the cached targets in {folder.name}: write them again")
            counts = stored["entries"][first_token : first_token + length]
            part = slice(first_entry, first_entry + int(counts.sum()))
            rows.append((counts, stored["ids"][part], stored["probs"][part]))
        width = max(int(counts.max(initial=1)) for counts, _, _ in rows)
        ids = np.zeros((*batch["labels"].shape, width), dtype=np.int64)
        probs = np.zeros(ids.shape, dtype=np.float32)
        for row, (counts, row_ids, row_probs) in enumerate(rows):
            tokens, used = slice(len(counts)), np.arange(width) < counts[:, None]
            probs[row, tokens][used] = row_probs
            ids[row, tokens][used] = row_ids
            ids[row, tokens] = np.where(used, ids[row, tokens], ids[row, tokens, :1])  # padding repeats the first id
        probs /= settings["samples"] or 1
        attached = {"target_ids": torch.from_numpy(ids), "target_probs": torch.from_numpy(probs)}
        return batch | attached | {"target_temperature": settings["temperature"]}

    return lambda step: [attach(batch) for batch in batches(step)]


def _id_dtype(vocab_size: int) -> type:
    return np.uint16 if vocab_size <= 2**16 else np.int32


def _check_numbers(rows: Dataset, top_k: int, samples: int, temperature: float, vocab_size: int) -> None:
    if not len(rows):
        raise InputError("there are no rows to write targets for: check the data set and num_train")
    if len(set(map(str, rows["id"]))) < len(rows):
        raise InputError("two rows have the same id, by which targets are found: give each its own")
    if min(top_k, samples) < 0 or (top_k > 0) == (samples > 0):
        raise InputError(f"top_k is {top_k} and samples {samples}: make one of them positive and the other 0")
    if top_k > vocab_size:
        raise InputError(f"top_k {top_k} is above the vocabulary of {vocab_size}: use at most that many")
    if samples > MAX_SAMPLES:
        raise InputError(f"samples {samples} is above {MAX_SAMPLES}: use for example 64")
    if not temperature > 0:
        raise InputError(f"temperature {temperature} is not positive: use for example 2.0")
