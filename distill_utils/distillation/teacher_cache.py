"""A frozen teacher's outputs for each row, on disk, so that it runs once for all students and epochs.

Out of scope: which runs may read it (`runs.cut_student`), the loss on distributions (`losses.chunked_cached_losses`)
and the passes that states replace (`objectives.encode`, `kd`).

Targets are the distribution over each target token, or a part of it. Encoder states are the last ones of a document's
tokens, which a student with the teacher's encoder reads too; encoder layers are those of the layers that a student with
another encoder imitates. Decoder states are those of a row's target tokens: the last one, from which the output matrix
makes the teacher's exact distribution, and those of the layers that a student imitates.

A folder holds one token after the other: states.bin, in the dtype that the teacher computes in; or for targets
entries.bin (int32, ids kept of this token), ids.bin (uint16, or int32 for a vocabulary above 65,536) and probs.bin
(float16: probabilities, or how often an id was drawn). index.json is {id: [first token, checksum of the row's token
ids]}, and settings.json says how they were made.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor

from distill_utils.artifacts import InputError, artifact, folder_atomic, read_json, report_progress, write_json
from distill_utils.data.batches import batch_list, document_id, source_facts, target_facts, tokenize_pairs
from distill_utils.data.loading import data_fingerprint
from distill_utils.device import mixed_precision, to_device
from distill_utils.distillation.losses import IGNORED
from distill_utils.distillation.objectives import decode, encode, teacher_mode
from distill_utils.models.loading import model_fingerprint
from distill_utils.models.students import decoder_layers, encoder_layers, project

CHUNK_TOKENS = 1024  # tokens projected to the vocabulary at a time
MAX_SAMPLES = 2048  # float16 holds whole numbers exactly up to here
FACTS = {"encoder": source_facts, "encoder_layers": source_facts, "decoder": target_facts}


# ------------------------------------------------------------------------------------------------------- distributions


def write_targets(
    folder: Path, teacher, rows: Dataset, *, pad_token_id: int, top_k: int = 0, samples: int = 0,
    temperature: float = 2.0, batch_size: int = 32, seed: int = 0, dtype: torch.dtype | str | None = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Write the teacher's targets for tokenized rows (id, input_ids, labels); the folder appears whole or not at all.

    Either the `top_k` likeliest ids of each token, or `samples` ids drawn from the teacher's distribution; `dtype` is
    that of autocast, None without, "auto" what the device is good at. Returns rows, tokens, bytes, bytes_per_token,
    entries_per_token, mean_residual (probability outside of the kept ids) and seconds. Raises InputError for impossible
    numbers, repeated ids or a full disk.
    """
    began, vocab_size = time.monotonic(), teacher.get_output_embeddings().weight.shape[0]
    _check_numbers(rows, top_k, samples, temperature, vocab_size)
    generator = torch.Generator(teacher.device).manual_seed(seed)
    tokens, entries, residual = sum(map(len, rows["labels"])), 0, 0.0
    settings = {"top_k": top_k, "samples": samples, "temperature": temperature, "vocab_size": vocab_size}
    with _writing(folder, teacher, rows, "decoder", settings, dtype, progress) as write:
        for batch in batch_list(rows, pad_token_id, batch_size):
            moved = to_device(batch, teacher.device)
            decoded, _ = decode(teacher, moved, encode(teacher, moved)[0])
            chunks = []
            for hidden in decoded[moved["labels"] != IGNORED].split(CHUNK_TOKENS):
                probs = (project(teacher, hidden).float() / temperature).softmax(-1)  # (chunk, vocab)
                values, ids = choose_targets(probs, top_k, samples, generator)
                used = values > 0
                residual += float((1 - (probs.gather(-1, ids) * used).sum(-1)).clamp(min=0).sum())
                chunks.append((used.sum(-1).int(), ids[used], values[used]))
            counts, ids, values = map(torch.cat, zip(*chunks, strict=True))
            entries += len(ids)
            write(batch, entries=counts, ids=ids.cpu().to(_id_dtype(vocab_size)), probs=values.half())
    size = sum(path.stat().st_size for path in Path(folder).iterdir())
    return {
        "rows": len(rows),
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
    settings, index = _facts_of(folder)
    dtypes = {"entries": torch.int32, "ids": _id_dtype(settings["vocab_size"]), "probs": torch.float16}
    entries, ids, probs = (_numbers_of(folder / f"{name}.bin", dtype) for name, dtype in dtypes.items())
    before = torch.nn.functional.pad(entries.cumsum(0), (1, 0))  # entries of all tokens before each

    def attach(batch: dict) -> dict:
        spans, length = _find(batch, "decoder", index, folder), batch["labels"].shape[1]
        counts = [entries[span] for span in spans]
        width = max(int(row.max()) for row in counts)
        attached = {"target_ids": [], "target_probs": []}
        for span, row in zip(spans, counts, strict=True):
            used, kept = torch.arange(width) < row[:, None], slice(before[span.start], before[span.stop])
            row_ids, row_probs = torch.zeros(used.shape, dtype=torch.long), torch.zeros(used.shape)
            row_ids[used], row_probs[used] = ids[kept].long(), probs[kept].float()
            attached["target_ids"].append(row_ids.where(used, row_ids[:, :1]))  # padding repeats the first id
            attached["target_probs"].append(row_probs / (settings["samples"] or 1))
        attached = {name: _pad(found, length) for name, found in attached.items()}
        return batch | attached | {"target_temperature": settings["temperature"]}

    return lambda step: [attach(batch) for batch in batches(step)]


def _id_dtype(vocab_size: int) -> torch.dtype:
    return torch.uint16 if vocab_size <= 2**16 else torch.int32


def _check_numbers(rows: Dataset, top_k: int, samples: int, temperature: float, vocab_size: int) -> None:
    if not len(rows):
        raise InputError("there are no rows to write targets for: check the data set and num_train")
    if min(top_k, samples) < 0 or (top_k > 0) == (samples > 0):
        raise InputError(f"top_k is {top_k} and samples {samples}: make one of them positive and the other 0")
    if top_k > vocab_size:
        raise InputError(f"top_k {top_k} is above the vocabulary of {vocab_size}: use at most that many")
    if samples > MAX_SAMPLES:
        raise InputError(f"samples {samples} is above {MAX_SAMPLES}: use for example 64")
    if not temperature > 0:
        raise InputError(f"temperature {temperature} is not positive: use for example 2.0")


# -------------------------------------------------------------------------------------------------------------- states


def fits_disk(teacher, num_rows: int, max_source_length: int, max_target_length: int, gigabytes: float) -> bool:
    """Return whether the states of all rows take at most so much disk, were all as long as they may be, in float32.

    Counted are those that a student of half the depth imitates, in both stacks.
    """
    encoder, decoder = len(encoder_layers(teacher)) // 2, len(decoder_layers(teacher)) // 2
    states = max_source_length * max(encoder, 1) + max_target_length * (1 + decoder)
    return 4 * num_rows * states * teacher.config.d_model <= 1e9 * gigabytes


def teacher_states(
    side: str, name: str, teacher, tokenizer, rows: Dataset, lengths: tuple[int, int, str], dtype: torch.dtype | None,
    encoder: Path | None = None, **which,
) -> Path:  # fmt: skip
    """Return the folder of the states of all rows, of the artifact that `write_states` builds; `side` is one of FACTS.

    `name` is the teacher's; `lengths` are those of `tokenize_pairs`; `dtype` is that of autocast, None without. States
    depend on `which`, layer_ids and match, and decoder states on the targets. `encoder` is the folder of the encoder
    states of their documents, where there is one.
    """
    source, _, prefix = lengths
    inputs = {"lengths": list(lengths)}
    if side != "decoder":
        inputs, lengths = {"max_source_length": source, "prefix": prefix}, (source, 1, prefix)
    inputs |= which | {"teacher": model_fingerprint(name, teacher), "data": data_fingerprint(rows), "dtype": str(dtype)}

    def build(folder: Path) -> dict:
        began, tokenized = time.monotonic(), tokenize_pairs(rows, tokenizer, *lengths)
        facts = write_states(
            folder / "states", teacher, tokenized, side, pad_token_id=tokenizer.pad_token_id, dtype=dtype,
            encoder=encoder, **which,
            progress=lambda done, total: report_progress(folder, f"{side} states", done, total, "documents"),
        )  # fmt: skip
        return facts | {"seconds": round(time.monotonic() - began, 2)}

    return artifact(f"{side}-states", inputs, build) / "states"


def write_states(
    folder: Path, teacher, rows: Dataset, side: str, *, pad_token_id: int, layer_ids: Sequence[int] = (),
    match: str = "outputs", encoder: Path | None = None, dtype: torch.dtype | None = None, batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:  # fmt: skip
    """Write the states of tokenized rows (id, input_ids, labels) and return how many rows, tokens and bytes.

    They are kept in `dtype`, to which the next product would round the last states under autocast; those of other
    layers are rounded, too. The folder appears whole or not at all. Raises InputError for repeated ids or full disk.
    """
    kept_dtype, tokens = dtype or torch.float32, sum(map(len, rows["labels" if side == "decoder" else "input_ids"]))
    states = {"encoder": [], "encoder_layers": [len(layer_ids)], "decoder": [1 + len(layer_ids)]}[side]
    shape = [tokens, *states, teacher.config.d_model]
    settings = {"side": side, "shape": shape, "dtype": str(kept_dtype).removeprefix("torch.")}
    batches = batch_list(rows, pad_token_id, batch_size)
    batches = with_states(lambda step: batches, encoder)(0) if encoder else batches
    with _writing(folder, teacher, rows, side, settings, dtype, progress) as write:
        for batch in batches:
            moved = to_device(batch, teacher.device)
            valid = moved["labels"] != IGNORED if side == "decoder" else moved["attention_mask"].bool()
            write(batch, states=states_of(teacher, moved, side, layer_ids, match)[valid].to(kept_dtype))
    return {"rows": len(rows), "tokens": tokens, "bytes": (Path(folder) / "states.bin").stat().st_size}


@torch.no_grad()
def states_of(teacher, batch: dict, side: str, layer_ids: Sequence[int] = (), match: str = "outputs") -> Tensor:
    """Return one side's states of a batch, in the shapes of `with_states`."""
    encoded, layers = encode(teacher, batch, layer_ids if side == "encoder_layers" else (), match)
    if side != "decoder":
        return torch.stack(layers, 2) if layers else encoded
    last, others = decode(teacher, batch, encoded, layer_ids, match)
    return torch.stack([last, *others], 2)


def with_states(batches: Callable[[int], list[dict]], *folders: Path) -> Callable[[int], list[dict]]:
    """Return `batches` with the folders' states, padding 0, which objectives take instead of the teacher's passes.

    These are encoder_states (batch, source, dim), encoder_layers_states (batch, source, layers, dim) or decoder_states
    (batch, target, 1 + layers, dim). A row is found by its id or its document's. Raises InputError for
    one that is not there or has other tokens.
    """
    stored = []
    for folder in folders:
        settings, index = _facts_of(folder)
        states = _numbers_of(folder / "states.bin", getattr(torch, settings["dtype"])).view(settings["shape"])
        stored.append((settings["side"], index, folder, states))

    def attach(batch: dict) -> dict:
        found = {}
        for side, index, folder, states in stored:
            width = batch["labels" if side == "decoder" else "input_ids"].shape[1]
            found[f"{side}_states"] = _pad([states[span] for span in _find(batch, side, index, folder)], width)
        return batch | found

    return lambda step: [attach(batch) for batch in batches(step)]


# ------------------------------------------------------------------------------------------------------------- on disk


@contextmanager
def _writing(
    folder: Path, teacher, rows: Dataset, side: str, settings: dict, dtype: torch.dtype | str | None,
    progress: Callable[[int, int], None] | None,
) -> Iterator[Callable]:  # fmt: skip
    """Hold the teacher ready and yield `write(batch, file=numbers of its tokens)`; the folder appears at the end."""
    if len(set(map(str, rows["id"]))) < len(rows):
        raise InputError("two rows have the same id, by which the teacher's numbers are found: give each its own")
    index, tokens = {}, 0
    with folder_atomic(folder) as temporary, teacher_mode(teacher), mixed_precision(teacher.device, dtype):

        def write(batch: dict, **files: Tensor) -> None:
            nonlocal tokens
            for name, numbers in files.items():
                with open(temporary / f"{name}.bin", "ab") as file:
                    file.write(numbers.cpu().view(torch.uint8).numpy().tobytes())
            for name, length, checksum in zip(batch["ids"], *FACTS[side](batch), strict=True):
                index[str(name)] = [tokens, checksum]
                tokens += length
            if progress:
                progress(len(index), len(rows))

        yield write
        write_json(temporary / "index.json", index)
        write_json(temporary / "settings.json", settings)


def _facts_of(folder: Path) -> list[dict]:
    return [read_json(folder / f"{name}.json") for name in ("settings", "index")]


def _numbers_of(path: Path, dtype: torch.dtype) -> Tensor:
    """Return all numbers of a file, which stay on disk."""
    return torch.from_file(str(path), size=path.stat().st_size // dtype.itemsize, dtype=dtype)


def _find(batch: dict, side: str, index: dict, folder: Path) -> list[slice]:
    """Return where each row's tokens are; InputError for a row that is not there or has other tokens."""
    spans = []
    for name, length, checksum in zip(batch["ids"], *FACTS[side](batch), strict=True):
        # Targets from before also have the first entry in between.
        first, *_, known = index.get(str(name)) or index.get(document_id(str(name)), (0, None))
        if checksum != known:
            reason = "is not among" if known is None else "has other tokens than"
            raise InputError(f"row {name} {reason} the teacher's {folder.name} on disk: write them again")
        spans.append(slice(first, first + length))
    return spans


def _pad(rows: Sequence[Tensor], width: int) -> Tensor:
    """Return the numbers (tokens, ...) of each row as (batch, width, ...), padding 0."""
    padded = rows[0].new_zeros(len(rows), width, *rows[0].shape[1:])
    for line, row in zip(padded, rows, strict=True):
        line[: len(row)] = row
    return padded
