"""Measure how fast a teacher labels documents, against `generate` as people call it: same model, documents, tokens.

    python benchmarks/pseudo_labels.py --shapes bart-large

`user` is float32, documents as they come, batches of 16; `expert` sorts them by length and decodes under bf16 autocast;
`ours` is `evaluation.generation.summarize`, which labelling calls. All use four beams and write the same number of
tokens a document; weights are random, so only speed is compared. Forms take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from kd_step import shape_config
from transformers import AutoModelForSeq2SeqLM

from distill_utils import artifacts
from distill_utils.device import device, mixed_precision
from distill_utils.evaluation.generation import summarize
from distill_utils.models.loading import load_model

BATCH = 16  # of the other forms
LONGEST = {"embedded": 120, "bart-base": 512, "bart-large": 512}  # tokens of a document


def make_documents(tokenizer, number: int, longest: int) -> list[str]:
    """Return texts of random words whose lengths, in tokens, are spread evenly up to `longest`."""
    draw = random.Random(0)
    words = [word for word in ("the", "list", "file", "value", "returns", "array", "of", "name", "object", "a", "to")]
    texts = [" ".join(draw.choices(words, k=draw.randint(longest // 8, longest))) for _ in range(number)]
    return [tokenizer.decode(tokenizer(text)["input_ids"][1 : longest - 2]) for text in texts]


def plain(model, tokenizer, documents: list[str], limits: dict, expert: bool) -> list[int]:
    order = sorted(range(len(documents)), key=lambda i: len(documents[i])) if expert else range(len(documents))
    lengths = []
    with torch.inference_mode(), mixed_precision(model.device, "auto" if expert else None):
        for start in range(0, len(documents), BATCH):
            texts = [documents[i] for i in list(order)[start : start + BATCH]]
            inputs = tokenizer(texts, padding=True, truncation=True, max_length=limits["longest"], return_tensors="pt")
            inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
            found = model.generate(
                **inputs, num_beams=4, max_new_tokens=limits["tokens"], min_new_tokens=limits["tokens"]
            )
            lengths += [found.shape[1]] * len(texts)
    return lengths


def ours(model, tokenizer, documents: list[str], limits: dict, batch_size: int) -> list[str]:
    return summarize(
        model, tokenizer, documents, max_source_length=limits["longest"], batch_size=batch_size, num_beams=4,
        max_new_tokens=limits["tokens"], min_length=limits["tokens"] + 1,
    )  # fmt: skip


def measure(shape: str, on: torch.device, arguments) -> list[dict]:
    torch.manual_seed(0)
    tokenizer = load_model("pydocs-bart")[1]
    limits = {"longest": LONGEST[shape], "tokens": arguments.tokens}
    config = shape_config(shape)
    config.vocab_size = len(tokenizer)  # every token written can be read
    with on:
        model = AutoModelForSeq2SeqLM.from_config(config).eval()
    documents = make_documents(tokenizer, arguments.documents, limits["longest"])
    given = (model, tokenizer, documents, limits)
    forms = {
        "ours": partial(ours, *given, batch_size=arguments.batch_size),
        "expert": partial(plain, *given, expert=True),
        "user": partial(plain, *given, expert=False),
    }
    times: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(-1, arguments.rounds):
        for name, form in forms.items():
            began = time.perf_counter()
            form()
            if on.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 0:
                times[name].append(time.perf_counter() - began)
    middle = {name: statistics.median(spent) for name, spent in times.items()}
    return [
        {"case": f"labels, {shape}", "shape": shape, "other": name, "documents": len(documents), **limits,
         "ours_seconds": middle["ours"], "other_seconds": middle[name], "ratio": middle[name] / middle["ours"],
         "ours_documents_per_second": len(documents) / middle["ours"]}
        for name in ("expert", "user")
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=LONGEST, default=["embedded"])
    parser.add_argument("--documents", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=32, help="of ours")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, help="default: results/pseudo_labels_DEVICE.json")
    arguments = parser.parse_args()
    on, load, rows = device(), os.getloadavg()[0], []
    for shape in arguments.shapes:
        rows += measure(shape, on, arguments)
        print(*map(json.dumps, rows[-2:]), sep="\n", flush=True)
    output = arguments.output or Path(__file__).parent / "results" / f"pseudo_labels_{on.type}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    load = {"before": load, "after": os.getloadavg()[0]}
    artifacts.write_json(output, {"rows": rows, "load": load, "provenance": artifacts.provenance()})


if __name__ == "__main__":
    main()
