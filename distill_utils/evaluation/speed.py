"""How fast a model writes: latency of one document, time per token, throughput.

Out of scope: what the machine could do at best (planning/machine.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch

from distill_utils.device import amp_dtype
from distill_utils.evaluation import generation


def _seconds(run: Callable, device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def interleaved_latency_ms(
    runs: Mapping[object, Callable[[list[str]], object]], documents: Sequence[str], device: torch.device,
    repeats: int = 3, max_seconds: float = 60.0,
) -> dict[object, float]:  # fmt: skip
    """Return milliseconds a document of several functions of a list with one document.

    They take turns document by document, so that a busy moment of the machine meets them all; of repeats the best
    counts, since what disturbs a measurement only adds to it, and of documents the median. No repeat begins after
    `max_seconds`: large models on a processor are slow, and their times steady.
    """
    found = {name: np.full((repeats, len(documents)), np.inf) for name in runs}
    began = time.perf_counter()
    for repeat in range(-1, repeats):  # the first turn is a warm-up: kernels, caches, allocator
        if repeat > 0 and time.perf_counter() - began > max_seconds:
            break
        for i, text in enumerate(documents[:1] if repeat < 0 else documents):
            for name, run in runs.items():
                spent = _seconds(partial(run, [text]), device)
                if repeat >= 0:
                    found[name][repeat, i] = spent
    return {name: 1000 * float(np.median(times.min(0))) for name, times in found.items()}


def decoding_runs(model, tokenizer, num_new_tokens: int, options: dict, **generation_settings) -> dict[str, Callable]:
    """Return functions of documents to time: a model's own decoding, and greedily exactly `num_new_tokens` tokens."""
    # Equal limits force the number of tokens; min_length counts the decoder's start token, max_new_tokens does not.
    fixed = {"num_beams": 1, "max_new_tokens": num_new_tokens, "min_length": num_new_tokens + 1}
    summarize = partial(generation.summarize, model, tokenizer, **options)
    return {"latency_ms": partial(summarize, **generation_settings), "ms_per_token": partial(summarize, **fixed)}


def measure_speed(
    model, tokenizer, documents: Sequence[str], *, max_source_length: int, num_new_tokens: int = 16, repeats: int = 3,
    batch_size: int = 16, prefix: str = "", dtype: torch.dtype | None = None, **generation_settings,
) -> dict[str, float | None]:  # fmt: skip
    """Time a model on documents; every number is after one untimed pass, and tokenisation is part of it.

    `latency_ms`: batch 1, the model's own decoding (or the settings given), as `interleaved_latency_ms` measures it.
    `throughput`: summaries a second in length-sorted batches, the same decoding, best of the repeats.
    `ms_per_token`: batch 1, greedy, exactly `num_new_tokens` tokens, whole time (encoder too) over tokens.
    `encoder_ms`: the share of a latency that no shallower decoder removes. `peak_memory_gb`: most that CUDA held
    meanwhile, 2**30 bytes; None on the CPU, where it cannot be told from the rest of the process.
    """
    if not documents:
        raise ValueError("no documents to time: give at least one")
    device, on_cuda = model.device, model.device.type == "cuda"
    options = {"max_source_length": max_source_length, "prefix": prefix, "dtype": dtype, "batch_size": batch_size}
    timed = decoding_runs(model, tokenizer, num_new_tokens, options, **generation_settings)
    own = timed["latency_ms"]
    cast = dtype or (amp_dtype(device) if on_cuda else None)

    @torch.inference_mode()
    def encode(texts: list[str]) -> None:
        inputs = tokenizer(prefix + texts[0], truncation=True, max_length=max_source_length, return_tensors="pt")
        with torch.autocast(device.type, dtype=cast, enabled=cast not in (None, torch.float32)):
            model.get_encoder()(inputs["input_ids"].to(device), inputs["attention_mask"].to(device))

    was_training = model.training
    model.eval()
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    own(documents)
    row = interleaved_latency_ms(timed | {"encoder_ms": encode}, documents, device, repeats)
    row["ms_per_token"] /= num_new_tokens
    row["throughput"] = len(documents) / min(_seconds(partial(own, documents), device) for _ in range(repeats))
    row["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30 if on_cuda else None
    model.train(was_training)
    return row
