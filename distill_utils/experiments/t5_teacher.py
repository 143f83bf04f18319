"""The embedded language models: T5's shape and objective on the corpus's raw text, from nothing, in three sizes.

`pydocs-t5` is the teacher of task-agnostic distillation, the smaller ones are further rungs of a ladder of teachers:
they have seen no task, only text, and all of them the same. `python -m distill_utils teachers` rebuilds
`assets/pydocs-t5*`.
"""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from distill_utils.artifacts import artifact, git_state, hashed, read_json
from distill_utils.data.denoising import denoising_stream
from distill_utils.data.loading import corpus_facts
from distill_utils.evaluation.statistics import bootstrap_interval
from distill_utils.experiments import miniend
from distill_utils.experiments.teacher import (
    load_tokenizer,
    origin,
    stage_facts,
    token_stream,
    train_stage,
    train_tokenizer,
    write_card,
)
from distill_utils.models import students
from distill_utils.models.loading import ASSETS, load_model, save_model
from distill_utils.training.loop import Training

HEAD_WIDTH = 48
# {name: (width, layers of either stack)}; parameters are about as 12 to 3 to 1.
SHAPES = {"pydocs-t5": (192, 6), "pydocs-t5-small": (96, 4), "pydocs-t5-tiny": (48, 4)}
SENTINELS = 100  # as T5: <extra_id_0> first
SOURCE_LENGTH = 128  # tokens of the encoder's input; the decoder's follow from it
WINDOW = 64  # tokens of text in one example of text infilling
HELD_OUT = 512  # windows of validation text that the loss is measured on
CHECKED = 32  # of them, those that a test of the shipped files repeats
INFILLING = Training(
    max_steps=1000, batch_size=32, optimizer="muon", learning_rate=2e-3, warmup_steps=100, weight_decay=0.01,
    eval_every=500, checkpoint_every=250, log_every=50, seed=21,
)  # fmt: skip
SPAN_CORRUPTION = replace(INFILLING, max_steps=2200, learning_rate=1.5e-3, seed=22)
TUNING = Training(
    max_steps=300, batch_size=16, optimizer="muon", learning_rate=2e-3, warmup_steps=30, checkpoint_every=100, seed=23
)  # fmt: skip
TASKS = ("summaries", "family", "belongs")
TASK_ROWS = {"train": 5000, "validation": 128, "test": 1000}
LENGTHS = (128, 40)  # of sources and targets, in tokens


def make_tokenizer() -> Path:
    """Return the folder of the corpus's tokenizer in T5's manner: sentinels, an end token, no start token."""
    original = train_tokenizer()

    def build(folder: Path) -> dict:
        tokenizer = Tokenizer.from_file(str(original / "tokenizer.json"))
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
        made = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
            clean_up_tokenization_spaces=False,
        )  # fmt: skip
        made.add_special_tokens({"additional_special_tokens": [f"<extra_id_{i}>" for i in range(SENTINELS)]})
        made.save_pretrained(folder)
        return {"vocabulary": len(made)}

    return artifact("t5-tokenizer", {"tokenizer": original.name, "sentinels": SENTINELS}, build)


def new_model(vocab_size: int, width: int, layers: int) -> T5ForConditionalGeneration:
    """Return a randomly initialised model in the shape of T5 v1.0, with tied embeddings."""
    config = T5Config(
        vocab_size=vocab_size, d_model=width, d_kv=HEAD_WIDTH, num_heads=width // HEAD_WIDTH, d_ff=4 * width,
        num_layers=layers, num_decoder_layers=layers, dropout_rate=0.0, feed_forward_proj="relu",
        tie_word_embeddings=True, pad_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


@torch.no_grad()
def ease_copying(model: T5ForConditionalGeneration) -> None:
    """Change the random initialisation so that cross-attention finds copying within few updates (LOG.md).

    Layers add little to what their tokens are, position counts in self-attention from the start, and cross-attention
    looks for tokens like its own: its queries are made as its keys are.
    """
    for name, weight in model.named_parameters():
        if name.endswith((".o.weight", ".wo.weight")):
            weight.mul_(0.25)
        elif "relative_attention_bias" in name:
            weight.normal_()
    for block in students.decoder_layers(model):
        cross = block.layer[1].EncDecAttention
        cross.q.weight.copy_(cross.k.weight * (2 * cross.q.weight.std() / cross.k.weight.std()))


def held_out_losses(model, tokenizer, tokens: np.ndarray) -> np.ndarray:
    """Return the loss of every window of text that the card's figure is a mean of, nats per target token."""
    return miniend.window_losses(model, tokenizer, tokens, HELD_OUT, SOURCE_LENGTH)


def base_embeddings(width: int) -> torch.Tensor:
    """Return the embeddings (vocabulary, width) of pydocs-bart-base, whose tokens are ours but for the sentinels.

    A narrower model gets their coordinates along as many first principal directions.
    """
    given = load_model("pydocs-bart-base")[0].get_input_embeddings().weight.detach()
    return students.project_embeddings(given, width)


def infill(width: int, layers: int) -> Path:
    """Train on text infilling, which teaches cross-attention to copy, and return the run folder.

    Span corruption alone does not in this budget: its targets are hidden tokens only, which a decoder guesses about as
    well without the source (LOG.md). The embeddings start as those of pydocs-bart-base, which has the same vocabulary.
    """
    tokenizer_folder = make_tokenizer()
    tokenizer = load_tokenizer(tokenizer_folder)
    masking = load_tokenizer(tokenizer_folder)
    masking.mask_token = "<extra_id_0>"  # here only: one sentinel for every span, the whole text as target
    embeddings = base_embeddings(width)
    shape = {"width": width, "heads": width // HEAD_WIDTH, "layers": layers, "window": WINDOW, "held_out": HELD_OUT,
             "eased": True}  # fmt: skip
    digest = hashlib.sha256(embeddings.numpy().tobytes()).hexdigest()[:10]
    settings = {"tokenizer": tokenizer_folder.name, "shape": shape, "embeddings": digest}

    def start() -> T5ForConditionalGeneration:
        model = new_model(len(tokenizer), width, layers)
        own = model.get_input_embeddings().weight.data
        own[: len(embeddings)] = embeddings * (own.std() / embeddings.std())
        ease_copying(model)
        return model

    def data() -> tuple[Callable, Callable, dict]:
        tokens, held_out = (token_stream(split, tokenizer, tokenizer_folder) for split in ("train", "validation"))
        infilling = partial(denoising_stream, tokenizer=masking, objective="text_infilling", source_length=WINDOW)
        checks = infilling(held_out, batch_size=32, seed=0)
        evaluate = partial(miniend.held_out_loss, batches=[checks(step)[0] for step in range(HELD_OUT // 32)])
        batches = infilling(tokens, batch_size=INFILLING.batch_size, seed=INFILLING.seed)
        return batches, evaluate, {"tokens": len(tokens)}

    return train_stage("t5-infilled", "T5, infilling", settings, INFILLING, tokenizer, WINDOW, start, data)


def corrupt(infilled: Path) -> Path:
    """Go on with span corruption, T5's own objective, and return the run folder."""
    tokenizer_folder = make_tokenizer()
    tokenizer = load_tokenizer(tokenizer_folder)

    def start() -> T5ForConditionalGeneration:
        model = T5ForConditionalGeneration.from_pretrained(infilled / "model")
        ids = {"pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
        model.generation_config = GenerationConfig(max_new_tokens=40, **ids)
        return model

    def data() -> tuple[Callable, Callable, dict]:
        tokens, held_out = (token_stream(split, tokenizer, tokenizer_folder) for split in ("train", "validation"))

        def evaluate(model) -> dict:
            return {"validation_loss": float(held_out_losses(model, tokenizer, held_out).mean())}

        size, seed = SPAN_CORRUPTION.batch_size, SPAN_CORRUPTION.seed
        batches = denoising_stream(tokens, tokenizer, "span_corruption", SOURCE_LENGTH, size, seed)
        return batches, evaluate, {"tokens": len(tokens)}

    settings = {"start": infilled.name, "source": SOURCE_LENGTH}
    return train_stage("t5-corrupted", "T5, spans", settings, SPAN_CORRUPTION, tokenizer, SOURCE_LENGTH, start, data)


def build(name: str = "pydocs-t5") -> Path:
    """Train one of the language models, write it to assets/ in bf16 with its card, and return that folder.

    The largest, which notebook 04 fine-tunes, is also measured on the tasks.
    """
    facts = git_state()
    infilled = infill(*SHAPES[name])
    trained = corrupt(infilled)
    folder = ASSETS / name
    model, tokenizer = load_model(trained / "model")
    save_model(model.to(torch.bfloat16), tokenizer, folder)
    facts |= origin(trained) | {"training_tokens": read_json(trained / "results.json")["tokens"]}
    stages = (("text infilling", infilled, INFILLING), ("span corruption", trained, SPAN_CORRUPTION))
    facts["stages"] = [stage_facts(*stage) for stage in stages]
    tasks = measure_tasks(name) if name == "pydocs-t5" else {}
    write_card(folder, facts | measure(name) | tasks)
    return folder


def measure_tasks(name: str) -> dict:
    """Return what the card says of fine-tuning a shipped model on the tasks; an hour on a processor core.

    "downstream" are `miniend.result_row`s of the model ("pre-trained") and of the same shape from nothing
    ("untrained"), which it is compared with over the test rows.
    """
    model, tokenizer = load_model(name)
    width, layers = SHAPES[name]
    run = miniend.AgnosticRun(
        path="scratch", shape=f"{layers}-{layers}", teacher=name, training=TUNING, source_length=SOURCE_LENGTH,
        variant=f"w{width}",
    )  # fmt: skip
    places = {"pre-trained": name, "untrained": str(miniend.untrained(run, model, tokenizer))}
    source_length, target_length = LENGTHS
    rows = []
    for task in TASKS:
        train, validation, test = (miniend.load_task(task, split, num) for split, num in TASK_ROWS.items())
        tested = {}
        for label, place in places.items():
            model, _ = load_model(place)
            given = place, model, tokenizer, task, train, validation, TUNING, *LENGTHS
            tuned = miniend.fine_tune(f"{label} {name}", *given)
            decoding = {"num_beams": 1, "max_new_tokens": target_length}
            tested[label] = miniend.test_task(tuned, task, test, source_length, **decoding)
        rows += [miniend.result_row(label, task, [tested[label]], [tested["untrained"]]) for label in places]
    facts = {"tasks_corpus": corpus_facts()["fingerprint"], "tuning": hashed(TUNING), "task_rows": TASK_ROWS}
    return facts | {"downstream": rows}


def measure(name: str) -> dict:
    """Return what the card says of a shipped model's files: their size, and the loss on held-out windows."""
    model, tokenizer = load_model(name)
    losses = held_out_losses(model, tokenizer, token_stream("validation", tokenizer, make_tokenizer()))
    mean, low, high = bootstrap_interval(losses)
    return {
        "parameters": students.count_parameters(model),
        "source_length": SOURCE_LENGTH,
        "num_windows": HELD_OUT,
        "loss": [round(value, 4) for value in (mean, low, high)],
        "num_checked": CHECKED,
        "loss_checked": round(float(losses[:CHECKED].mean()), 4),
    }
