"""Teacher states on disk: what a frozen teacher makes of each row, so that it runs once for all students and epochs.

Out of scope: which runs may read them (`runs.cut_student`) and the passes they replace (`objectives.encode`, `kd`).

Encoder states are those of a document's tokens, which a student with the teacher's encoder reads too. Decoder states
are those of a row's target tokens: the last one, from which the output matrix makes the teacher's exact distribution,
and those of the layers that a student imitates. They take the width's numbers a token, a distribution the vocabulary's.

A folder holds states.bin, the states of one token after the other in the dtype that the teacher computes in; index.json
with {id: [first token, checksum of the row's token ids]}; and settings.json with side, shape and dtype.
"""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from datasets import Dataset

from distill_utils.artifacts import InputError, artifact, folder_atomic, read_json, report_progress, write_json
from distill_utils.data.batches import batch_list, document_id, source_facts, target_facts, tokenize_pairs
from distill_utils.data.loading import data_fingerprint
from distill_utils.device import mixed_precision, to_device
from distill_utils.distillation.losses import IGNORED
from distill_utils.distillation.objectives import decode, encode, teacher_mode
from distill_utils.models.loading import model_fingerprint
from distill_utils.models.students import decoder_layers

FACTS = {"encoder": source_facts, "decoder": target_facts}


def fits_disk(teacher, rows: Dataset, max_source_length: int, max_target_length: int, gigabytes: float) -> bool:
    """Return whether the states of all rows take at most so much disk, were all as long as they may be, in float32.

    Counted are those of the encoder, and of the decoder for a student of half the depth.
    """
    states = max_source_length + max_target_length * (1 + len(decoder_layers(teacher)) // 2)
    return 4 * len(rows) * states * teacher.config.d_model <= 1e9 * gigabytes


def teacher_states(
    side: str, name: str, teacher, tokenizer, rows: Dataset, lengths: tuple[int, int, str], dtype: torch.dtype | None,
    encoder: Path | None = None, **which,
) -> Path:  # fmt: skip
    """Return the folder of the states of all rows, of the artifact that `write_states` builds; `side` names the stack.

    `name` is the teacher's; `lengths` are those of `tokenize_pairs`; `dtype` is that of autocast, None without. Decoder
    states depend on the targets, and on `which`: layer_ids and match. `encoder` is the folder of the encoder states of
    their documents, where there is one.
    """
    source, _, prefix = lengths
    inputs = {"max_source_length": source, "prefix": prefix}
    if side == "decoder":
        inputs = {"lengths": list(lengths)} | which
    else:
        lengths = source, 1, prefix
    inputs |= {"teacher": model_fingerprint(name, teacher), "data": data_fingerprint(rows), "dtype": str(dtype)}

    def build(folder: Path) -> dict:
        began, tokenized = time.monotonic(), tokenize_pairs(rows, tokenizer, *lengths)
        facts = write_states(
            folder / "states", teacher, tokenized, pad_token_id=tokenizer.pad_token_id, dtype=dtype, encoder=encoder,
            progress=lambda done, total: report_progress(folder, f"{side} states", done, total, "documents"), **which,
        )  # fmt: skip
        return facts | {"seconds": round(time.monotonic() - began, 2)}

    return artifact(f"{side}-states", inputs, build) / "states"


def write_states(
    folder: Path, teacher, rows: Dataset, *, pad_token_id: int, layer_ids: Sequence[int] | None = None,
    match: str = "outputs", encoder: Path | None = None, dtype: torch.dtype | None = None, batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:  # fmt: skip
    """Write the states of tokenized rows (id, input_ids, labels) and return how many rows, tokens and bytes.

    They are the encoder's, or with `layer_ids` the decoder's, and are kept in `dtype`, to which the next product would
    round them under autocast. The folder appears whole or not at all. Raises InputError for repeated ids or full disk.
    """
    if len(set(map(str, rows["id"]))) < len(rows):
        raise InputError("two rows have the same id, by which teacher states are found: give each its own")
    side = "encoder" if layer_ids is None else "decoder"
    index, tokens, kept_dtype = {}, 0, dtype or torch.float32
    batches = batch_list(rows, pad_token_id, batch_size)
    batches = with_states(lambda step: batches, encoder)(0) if encoder else batches
    with (
        folder_atomic(folder) as temporary,
        open(temporary / "states.bin", "wb") as file,
        teacher_mode(teacher),
        mixed_precision(teacher.device, dtype),
    ):
        for batch in batches:
            moved = to_device(batch, teacher.device)
            valid = moved["attention_mask"].bool() if side == "encoder" else moved["labels"] != IGNORED
            states = states_of(teacher, moved, side, layer_ids or (), match)
            kept = states[valid].to(kept_dtype).cpu()  # (tokens, ..., dim)
            file.write(kept.view(torch.uint8).numpy().tobytes())
            for name, length, checksum in zip(batch["ids"], *FACTS[side](batch), strict=True):
                index[str(name)] = [tokens, checksum]
                tokens += length
            if progress:
                progress(len(index), len(rows))
        write_json(temporary / "index.json", index)
        settings = {"side": side, "shape": [tokens, *kept.shape[1:]], "dtype": str(kept_dtype).removeprefix("torch.")}
        write_json(temporary / "settings.json", settings)
    return {"rows": len(index), "tokens": tokens, "bytes": (Path(folder) / "states.bin").stat().st_size}


@torch.no_grad()
def states_of(teacher, batch: dict, side: str, layer_ids: Sequence[int] = (), match: str = "outputs") -> torch.Tensor:
    """Return encoder_states (batch, source, dim) or decoder_states (batch, target, 1 + layers, dim) of a batch."""
    encoded, _ = encode(teacher, batch)
    if side == "encoder":
        return encoded
    last, others = decode(teacher, batch, encoded, layer_ids, match)
    return torch.stack([last, *others], 2)


def with_states(batches: Callable[[int], list[dict]], *folders: Path) -> Callable[[int], list[dict]]:
    """Return `batches` with the folders' states, padding 0, which objectives take instead of the teacher's passes.

    These are encoder_states (batch, source, dim) or decoder_states (batch, target, 1 + layers, dim). A row is found by
    its id or its document's. Raises InputError for one that is not there or has other tokens.
    """
    stored = [_open(folder) for folder in folders]

    def attach(batch: dict, side: str, index: dict, states: torch.Tensor, folder: Path) -> torch.Tensor:
        size = batch["input_ids" if side == "encoder" else "labels"].shape
        found = torch.zeros(*size, *states.shape[1:], dtype=states.dtype)
        for row, (name, length, checksum) in enumerate(zip(batch["ids"], *FACTS[side](batch), strict=True)):
            first, known = index.get(str(name)) or index.get(document_id(str(name)), (0, None))
            if checksum != known:
                reason = "is not among" if known is None else "has other tokens than"
                raise InputError(f"document {name} {reason} the {side} states in {folder.name}: write them again")
            found[row, :length] = states[first : first + length]
        return found

    return lambda step: [
        batch | {f"{side}_states": attach(batch, side, *rest) for side, *rest in stored} for batch in batches(step)
    ]


def _open(folder: Path) -> tuple[str, dict, torch.Tensor, Path]:
    """Return side, index, states (tokens, ..., dim), which stay on disk, and folder."""
    settings, index = (read_json(folder / f"{name}.json") for name in ("settings", "index"))
    size, dtype = settings["shape"], getattr(torch, settings["dtype"])
    states = torch.from_file(str(folder / "states.bin"), size=math.prod(size), dtype=dtype).view(size)
    return settings["side"], index, states, folder
