"""Cached encoder states: what a frozen encoder makes of each document, on disk, so that it runs once for all students.

Out of scope: which runs may read them (`runs.train_student`) and the pass that they replace (`objectives.encode`).

A folder holds states.bin, the states of one token after the other in the dtype that the encoder computes in; index.json
with {id: [first token, checksum of the document's token ids]}; and settings.json with width and dtype.
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset

from distill_utils.artifacts import InputError, artifact, folder_atomic, read_json, report_progress, write_json
from distill_utils.data.batches import batch_list, document_id, source_facts, tokenize_pairs
from distill_utils.data.loading import data_fingerprint
from distill_utils.device import mixed_precision, to_device
from distill_utils.distillation.objectives import encode, teacher_mode
from distill_utils.models.loading import model_fingerprint


def fits_cache(model, documents: Dataset, max_source_length: int, gigabytes: float) -> bool:
    """Return whether the documents' states take at most so much disk, were all as long as they may be, in float32."""
    return 4 * len(documents) * max_source_length * model.config.d_model <= 1e9 * gigabytes


def encoder_states(
    name: str, teacher, tokenizer, documents: Dataset, max_source_length: int, prefix: str, dtype: torch.dtype | None
) -> Path:
    """Return the folder of the states of all documents, of the artifact that `write_states` builds.

    `name` is the teacher's; `dtype` is that of autocast, None without.
    """
    inputs = {
        "teacher": model_fingerprint(name, teacher), "data": data_fingerprint(documents),
        "max_source_length": max_source_length, "prefix": prefix, "dtype": str(dtype),
    }  # fmt: skip

    def build(folder: Path) -> dict:
        began, rows = time.monotonic(), tokenize_pairs(documents, tokenizer, max_source_length, 1, prefix)
        facts = write_states(
            folder / "states", teacher, rows, pad_token_id=tokenizer.pad_token_id, dtype=dtype,
            progress=lambda done, total: report_progress(folder, "encoder states", done, total, "documents"),
        )  # fmt: skip
        return facts | {"seconds": round(time.monotonic() - began, 2)}

    return artifact("encoder-states", inputs, build) / "states"


def write_states(
    folder: Path, teacher, rows: Dataset, *, pad_token_id: int, dtype: torch.dtype | None = None, batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:  # fmt: skip
    """Write the states of tokenized rows (id, input_ids, labels) and return how many rows, tokens and bytes.

    They are kept in `dtype`, to which the decoder's first product would round them under autocast. The folder appears
    whole or not at all. Raises InputError for repeated ids or a full disk.
    """
    if len(set(map(str, rows["id"]))) < len(rows):
        raise InputError("two rows have the same id, by which encoder states are found: give each its own")
    index, tokens, kept_dtype = {}, 0, dtype or torch.float32
    with (
        folder_atomic(folder) as temporary,
        open(temporary / "states.bin", "wb") as file,
        teacher_mode(teacher),
        mixed_precision(teacher.device, dtype),
    ):
        for batch in batch_list(rows, pad_token_id, batch_size):
            encoded, _ = encode(teacher, to_device(batch, teacher.device))
            kept = encoded[batch["attention_mask"].bool().to(encoded.device)].to(kept_dtype).cpu()  # (tokens, dim)
            file.write(kept.view(torch.uint8).numpy().tobytes())
            for name, length, checksum in zip(batch["ids"], *source_facts(batch), strict=True):
                index[str(name)] = [tokens, checksum]
                tokens += length
            if progress:
                progress(len(index), len(rows))
        write_json(temporary / "index.json", index)
        settings = {"dim": encoded.shape[-1], "dtype": str(kept_dtype).removeprefix("torch."), "tokens": tokens}
        write_json(temporary / "settings.json", settings)
    return {"rows": len(index), "tokens": tokens, "bytes": (Path(folder) / "states.bin").stat().st_size}


def with_states(batches: Callable[[int], list[dict]], folder: Path) -> Callable[[int], list[dict]]:
    """Return `batches` with encoder_states (batch, source, dim) in each, padding 0, which `objectives.encode` takes.

    A row is found by its id or its document's. Raises InputError for one that is not there or has other source tokens.
    """
    settings, index = (read_json(folder / f"{name}.json") for name in ("settings", "index"))
    shape, dtype = (settings["tokens"], settings["dim"]), getattr(torch, settings["dtype"])
    stored = torch.from_file(str(folder / "states.bin"), size=shape[0] * shape[1], dtype=dtype).view(shape)

    def attach(batch: dict) -> dict:
        states = torch.zeros(*batch["input_ids"].shape, shape[1], dtype=dtype)
        for row, (name, length, checksum) in enumerate(zip(batch["ids"], *source_facts(batch), strict=True)):
            first, known = index.get(str(name)) or index.get(document_id(str(name)), (0, None))
            if checksum != known:
                reason = "is not among" if known is None else "has other tokens than"
                raise InputError(f"document {name} {reason} the encoder states in {folder.name}: write them again")
            states[row, :length] = stored[first : first + length]
        return batch | {"encoder_states": states}

    return lambda step: [attach(batch) for batch in batches(step)]
