"""Train the embedded teachers further for a given time, from the shipped weights: made for a few GPU minutes.

    python benchmarks/timed_teachers.py pydocs-bart --seconds 300 --tuning-seconds 100 --output results

pydocs-bart gets 512 positions: denoising of long windows first, then fine-tuning on every pair at two lengths. The T5
models go on with span corruption in large batches. How many updates fit is not known before: the trunk goes on while
there is time, then the learning rate cools down. What was done is in NAME.json. Once its weights are shipped, a
stage moves into experiments/teacher.py or experiments/t5_teacher.py.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets
from transformers import BartConfig, BartForConditionalGeneration, GenerationConfig, T5ForConditionalGeneration

from distill_utils.artifacts import provenance, runs_dir, write_json
from distill_utils.data.batches import batch_list, pair_stream, tokenize_pairs
from distill_utils.data.denoising import denoising_stream, gap_pairs
from distill_utils.data.loading import load_pairs, load_text
from distill_utils.device import seed_everything
from distill_utils.experiments import miniend, t5_teacher, teacher
from distill_utils.experiments.teacher import load_tokenizer, token_stream, train_tokenizer, without_teacher
from distill_utils.models import students
from distill_utils.models.loading import ASSETS, save_model
from distill_utils.training.checkpoints import write_history
from distill_utils.training.loop import Training, choose_attention, fit, fit_from_trunk

CHUNK = 500  # updates between two looks at the clock
POSITIONS, SHORT = 512, 128  # tokens; every pair is fine-tuned on at both lengths
LENGTHENING = Training(
    max_steps=6000, batch_size=128, optimizer="muon", learning_rate=1e-3, warmup_steps=200, weight_decay=0.01,
    eval_every=1000, checkpoint_every=500, log_every=50, seed=13, schedule="cooldown",
)  # fmt: skip
FINE_TUNING = Training(
    max_steps=4000, batch_size=64, optimizer="muon", learning_rate=5e-4, warmup_steps=100, weight_decay=0.01,
    eval_every=500, checkpoint_every=500, log_every=50, seed=12, schedule="cooldown",
)  # fmt: skip
FURTHER = Training(
    max_steps=6000, batch_size=128, optimizer="muon", learning_rate=1e-3, warmup_steps=200, weight_decay=0.01,
    checkpoint_every=500, log_every=50, seed=24, schedule="cooldown",
)  # fmt: skip


def gap_rows(split: str, tokenizer, max_source_length: int) -> Dataset:
    """Return docstrings without their first paragraph, which is to be written, as token ids."""
    return tokenize_pairs(
        gap_pairs(load_text("pydocs", split)), tokenizer, max_source_length, teacher.MAX_TARGET_LENGTH
    )


def gap_check(tokenizer, max_source_length: int) -> Callable:
    """Return the function that measures a model's loss on 512 first paragraphs of validation text."""
    rows = gap_rows("validation", tokenizer, max_source_length).select(range(512))
    return partial(miniend.held_out_loss, batches=batch_list(rows, tokenizer.pad_token_id, 32))


def with_positions(model: BartForConditionalGeneration, num: int) -> BartForConditionalGeneration:
    """Return the model with `num` positions; the new ones repeat the old, as in Longformer (Beltagy et al. 2020)."""
    config = BartConfig(**model.config.to_dict() | {"max_position_embeddings": num})
    longer = BartForConditionalGeneration(config)
    weights = model.state_dict()
    for name in ("model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"):
        shift, old = 2, weights[name]  # BART's first two rows are no positions
        weights[name] = torch.cat([old[:shift], old[shift:].repeat(-(-num // len(old[shift:])), 1)[:num]])
    longer.load_state_dict(weights)
    return longer


def lengthening(start: Path, training: Training) -> tuple[BartForConditionalGeneration, dict]:
    """Return the model at the beginning of the second stage and what `fit` needs for it besides settings and folder.

    Text infilling of windows as long as the positions and prediction of first paragraphs from long texts, in turn.
    """
    tokenizer_folder = train_tokenizer()
    tokenizer = load_tokenizer(tokenizer_folder)
    seed_everything(training.seed)
    model = with_positions(BartForConditionalGeneration.from_pretrained(start, dtype=torch.float32), POSITIONS)
    choose_attention(model, POSITIONS)
    tokens = token_stream("train", tokenizer, tokenizer_folder)
    size, seed = training.batch_size, training.seed
    infilling = denoising_stream(tokens, tokenizer, "text_infilling", POSITIONS, size, seed)
    gaps = pair_stream(gap_rows("train", tokenizer, POSITIONS), tokenizer.pad_token_id, size, seed)

    def batches(step: int) -> list[dict]:
        return (gaps if step % 2 else infilling)(step // 2)

    evaluate = gap_check(tokenizer, POSITIONS)
    return model, {"loss_fn": without_teacher, "batches": batches, "evaluate": evaluate, "stage": "lengthening"}


def tuning(start: Path, training: Training) -> tuple[BartForConditionalGeneration, dict]:
    """Return the model at the beginning of fine-tuning, and what `fit` needs besides settings and folder.

    Every pair comes twice, whole and cut at SHORT, so that the teacher is good at either length.
    """
    tokenizer = load_tokenizer(train_tokenizer())
    seed_everything(training.seed)
    model = BartForConditionalGeneration.from_pretrained(start, dropout=0.1)
    choose_attention(model, POSITIONS)

    def rows(split: str, length: int) -> Dataset:
        return tokenize_pairs(load_pairs("pydocs", split), tokenizer, length, teacher.MAX_TARGET_LENGTH)

    both = concatenate_datasets([rows("train", POSITIONS), rows("train", SHORT)])
    batches = pair_stream(both, tokenizer.pad_token_id, training.batch_size, training.seed)
    checks = batch_list(rows("validation", POSITIONS), tokenizer.pad_token_id, 32)
    evaluate = partial(miniend.held_out_loss, batches=checks)
    return model, {"loss_fn": without_teacher, "batches": batches, "evaluate": evaluate, "stage": "fine-tuning"}


def going_on(start: Path, training: Training) -> tuple[T5ForConditionalGeneration, dict]:
    """Return the model at the beginning of the last stage, and what `fit` needs besides settings and folder."""
    tokenizer_folder = t5_teacher.make_tokenizer()
    tokenizer = load_tokenizer(tokenizer_folder)
    seed_everything(training.seed)
    model = T5ForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
    choose_attention(model, t5_teacher.SOURCE_LENGTH)
    tokens = token_stream("train", tokenizer, tokenizer_folder)
    batches = denoising_stream(
        tokens, tokenizer, "span_corruption", t5_teacher.SOURCE_LENGTH, training.batch_size, training.seed
    )
    held_out = token_stream("validation", tokenizer, tokenizer_folder)

    def evaluate(model) -> dict:
        return {"validation_loss": float(t5_teacher.held_out_losses(model, tokenizer, held_out).mean())}

    return model, {"loss_fn": without_teacher, "batches": batches, "evaluate": evaluate, "stage": "T5, going on"}


def train_for(seconds: float, name: str, model, settings, rest: dict, eval_every: int = 0) -> dict:
    """Train the model in place for about `seconds`; return updates, seconds and the last losses."""
    began, folder = time.monotonic(), runs_dir() / f"timed-{name}"
    constant = replace(settings, schedule="constant", max_steps=10**6, checkpoint_every=0, eval_every=eval_every)
    done, share, chunk = 0, settings.cooldown_share, min(CHUNK, 10 * settings.batch_size)  # a trial has small batches
    while not done or (time.monotonic() - began) * (1 + chunk / done) < (1 - share) * seconds:
        done += chunk
        fit(model, settings=constant, folder=folder / "trunk", until=done, **rest)
        print(f"{name}: {done} updates in {time.monotonic() - began:.0f} s", flush=True)
    whole = replace(constant, schedule="cooldown", max_steps=round(done / (1 - share)))
    history = fit_from_trunk(model, settings=whole, folder=folder / "run", trunk=folder / "trunk", **rest)
    write_history(folder, history)
    seconds = time.monotonic() - began
    return {"stage": name, "max_steps": whole.max_steps, "seconds": seconds, "final": history[-1], "history": history}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["pydocs-bart", *t5_teacher.SHAPES])
    parser.add_argument("--seconds", type=float, default=300.0, help="of the long stage")
    parser.add_argument("--tuning-seconds", type=float, default=100.0, help="of fine-tuning")
    parser.add_argument("--batch-size", type=int, default=0, help="for a trial; 0 is the recipe's")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    sizes = {"batch_size": given.batch_size, "warmup_steps": 1} if given.batch_size else {}
    stages = []
    if given.model == "pydocs-bart":
        settings = replace(LENGTHENING, **sizes)
        model, rest = lengthening(ASSETS / "pydocs-bart-base", settings)
        stages.append(train_for(given.seconds, "lengthening", model, settings, rest, 1000))
        tokenizer, base = load_tokenizer(train_tokenizer()), given.output / "pydocs-bart-base"
        model.to("cpu").save_pretrained(runs_dir() / "base")
        save_model(model.to(torch.bfloat16), tokenizer, base)
        settings = replace(FINE_TUNING, **sizes)
        model, rest = tuning(runs_dir() / "base", settings)
        stages.append(train_for(given.tuning_seconds, "fine-tuning", model, settings, rest, 500))
        ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
        model.generation_config = GenerationConfig(**ids, **teacher.GENERATION)
    else:
        settings = replace(FURTHER, **sizes)
        model, rest = going_on(ASSETS / given.model, settings)
        stages.append(train_for(given.seconds, f"{given.model} further", model, settings, rest))
        model.generation_config = GenerationConfig.from_pretrained(ASSETS / given.model)
        tokenizer = load_tokenizer(t5_teacher.make_tokenizer())
    save_model(model.to("cpu").to(torch.bfloat16), tokenizer, given.output / given.model)
    facts = {"parameters": students.count_parameters(model), "stages": stages, "provenance": provenance()}
    write_json(given.output / f"{given.model}.json", facts)
    print(json.dumps([{key: stage[key] for key in ("stage", "max_steps", "seconds", "final")} for stage in stages]))


if __name__ == "__main__":
    main()
