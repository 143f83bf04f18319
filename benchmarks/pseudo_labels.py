"""Measure how fast a teacher labels documents, against `generate` as people call it: same model, documents, tokens.

    python benchmarks/pseudo_labels.py --shapes pydocs-bart bart-large

`user` is float32, documents as they come, batches of 16; `expert` sorts them by length and decodes under bf16 autocast,
where that is native; `ours` is the engine that labelling takes here, CTranslate2 on a CPU (float32; `int8` is what
`quantization` offers) and `generate` in bf16 on a GPU. All use four beams and write equally many tokens a document.
Shapes have random weights, so only speed is compared; `pydocs-bart` is the embedded teacher on `pydocs`, which decodes
freely in a second pass: `value` is the ROUGE-2 of those labels.
"""

from __future__ import annotations

import random
import tempfile
from functools import partial
from pathlib import Path

import timing
import torch
from kd_step import shape_config
from transformers import AutoModelForSeq2SeqLM

from distill_utils.data.loading import load_pairs
from distill_utils.device import device, mixed_precision
from distill_utils.evaluation.ctranslate import load_translator, summarize_ctranslate2, to_ctranslate2
from distill_utils.evaluation.generation import summarize, to_text
from distill_utils.evaluation.metrics import rouge_scores
from distill_utils.models.loading import load_model, save_model

BATCH = 16  # of the other forms
LONGEST = {"pydocs-bart": 120, "bart-base": 512, "bart-large": 512}  # tokens of a document
GOALS = {"user": 5.0, "expert": 2.0}
QUALITY_GOAL = 0.3  # ROUGE-2 that labels may differ by


def make_documents(tokenizer, number: int, longest: int) -> list[str]:
    """Return texts of random words whose lengths, in tokens, are spread evenly up to `longest`."""
    draw = random.Random(0)
    words = ("the", "list", "file", "value", "returns", "array", "of", "name", "object", "a", "to")
    texts = [" ".join(draw.choices(words, k=draw.randint(longest // 8, longest))) for _ in range(number)]
    return [tokenizer.decode(tokenizer(text)["input_ids"][1 : longest - 2]) for text in texts]


def plain(model, tokenizer, documents: list[str], longest: int, settings: dict, expert: bool) -> list[str]:
    order = sorted(range(len(documents)), key=lambda i: len(documents[i])) if expert else list(range(len(documents)))
    labels = [""] * len(documents)
    with torch.inference_mode(), mixed_precision(model.device, "auto" if expert else None):
        for start in range(0, len(documents), BATCH):
            chosen = order[start : start + BATCH]
            texts = [documents[i] for i in chosen]
            inputs = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
            inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
            for i, ids in zip(chosen, model.generate(**inputs, num_beams=4, **settings).tolist(), strict=True):
                labels[i] = to_text(tokenizer, ids)
    return labels


def form(name: str, turns: timing.Turns, case: dict) -> dict | None:
    """Label all documents in a turn, loading left out; free decoding afterwards where the model has learned to."""
    torch.manual_seed(0)
    turns.counts = False  # nothing below asks for operations
    model, tokenizer = load_model("pydocs-bart")
    embedded, longest = case["shape"] == "pydocs-bart", LONGEST[case["shape"]]
    if embedded:
        pairs = load_pairs("pydocs", "test", case["documents"])
        documents = pairs["document"]
    else:
        config = shape_config(case["shape"])
        config.vocab_size = len(tokenizer)  # every token written can be read
        with device():
            model = AutoModelForSeq2SeqLM.from_config(config)
        documents = make_documents(tokenizer, case["documents"], longest)
    model.to(device()).eval()
    with tempfile.TemporaryDirectory() as folder:
        if name in ("user", "expert"):

            def label(**settings) -> list[str]:
                return plain(model, tokenizer, documents, longest, settings, expert=name == "expert")
        elif device().type == "cuda":
            label = partial(
                summarize, model, tokenizer, documents, max_source_length=longest, batch_size=64, num_beams=4
            )
        else:
            save_model(model, tokenizer, Path(folder) / "model")
            kind = "int8" if name == "int8" else "float32"
            converted = to_ctranslate2(Path(folder) / "model", Path(folder) / "engine", kind)
            translator = load_translator(converted, len(documents))
            options = {"max_source_length": longest, "num_beams": 4, "translator": translator}

            def label(**settings) -> list[str]:
                return summarize_ctranslate2(converted, tokenizer, documents, **options, **settings)[0]

        tokens = case["tokens"]
        # min_length counts the decoder's start token, the others do not
        shortest = {"min_new_tokens": tokens} if name in ("user", "expert") else {"min_length": tokens + 1}
        for _ in turns:
            label(max_new_tokens=tokens, **shortest)
        if embedded:
            scores = rouge_scores(label(), pairs["summary"])
            return {"value": float(scores["rouge2"].mean())}


FORMS = {name: partial(form, name) for name in ("ours", "int8", "expert", "user")}


def main() -> None:
    arguments = timing.parse(
        __doc__, "pseudo_labels", 3, FORMS,
        shapes={"nargs": "+", "choices": LONGEST, "default": ["pydocs-bart"]},
        documents={"type": int, "default": 128}, tokens={"type": int, "default": 32},
    )  # fmt: skip
    rows = []
    for shape in arguments.shapes:
        case = {"shape": shape, "documents": arguments.documents, "tokens": arguments.tokens}
        names = [name for name in FORMS if name != "int8" or device().type == "cpu"]
        found = timing.in_turns(__file__, FORMS, names, case, arguments, warm_up=1)
        label = f"labels, {shape}, {arguments.documents} x {arguments.tokens} tokens, {timing.dtype_name()}"
        for fast in [name for name in names if name in ("ours", "int8")]:
            of = {name: found[name] for name in (fast, "expert", "user")}
            title = f"{label}, int8" if fast == "int8" else label
            rows += timing.rows_of(title, of, ours=fast, goals=GOALS, quality_goal=QUALITY_GOAL, **case)
    timing.write(arguments, rows)


if __name__ == "__main__":
    main()
