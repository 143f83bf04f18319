"""A teacher of one's own: a pre-trained model fine-tuned on pairs, before anything is distilled from it.

It is a student of full depth in which nothing is frozen, trained on the references: found by name, listed and exported
like one. Out of scope: the embedded teachers, which begin from nothing (teacher.py).
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from datasets import Dataset

from distill_utils.artifacts import InputError, read_json
from distill_utils.device import device
from distill_utils.experiments import checks, runs
from distill_utils.experiments.pricing import Request, measured_prices
from distill_utils.models import students
from distill_utils.models.loading import load_model
from distill_utils.training.optimizers import MIN_VALIDATION, Training

EVALUATIONS, PATIENCE = 12, 3
TEACHER_SHARE, TEACHER_PASSES = 0.4, 20  # of the hours, and over the training pairs: what fine-tuning may take at most
RATE, WIDTH = 5e-4, 192  # AdamW's peak where a model of that width and its teacher's depth learns from references
# How summaries are written where the model that was fine-tuned does not say, as one that was only pre-trained.
DECODING = {"num_beams": 4, "no_repeat_ngram_size": 3, "early_stopping": True}


def load_teacher(name: str, max_target_length: int) -> tuple:
    """Return (model on the device, tokenizer); without a length, as T5 of the hub, it may write as much as targets.

    Else `generate` would end it after 20 tokens. With 0 it is left as it is, to be fine-tuned.
    """
    model, tokenizer = load_model(name)
    given = model.generation_config
    if max_target_length and not (given.max_new_tokens or given.max_length):
        given.max_new_tokens = max_target_length
    return model.to(device()), tokenizer


def teacher_run(
    base: str, model, dataset: str, lengths: tuple[int, int, str], num_validation: int, **training
) -> runs.StudentRun:  # fmt: skip
    """Return the description of a teacher's fine-tuning on a data set, checked before anything is computed.

    `lengths` are the longest source and target in tokens and the prefix; `training` are fields of `Training`. The
    learning rate is constant and falls at the end; with enough validation pairs training stops when their loss no
    longer falls, and the best weights are kept.
    """
    depths = len(students.encoder_layers(model)), len(students.decoder_layers(model))
    if (steps := training["max_steps"]) < EVALUATIONS:
        raise InputError(f"max_steps {steps} is too small for a teacher: give at least {EVALUATIONS}")
    settings = Training(
        **training, schedule="cooldown", eval_every=steps // EVALUATIONS, checkpoint_every=200,
        patience=PATIENCE if num_validation >= MIN_VALIDATION else 0,
    )  # fmt: skip
    source_length, target_length, prefix = lengths
    run = runs.StudentRun(
        method="sft", shape="{}-{}".format(*depths), teacher=base, training=settings, prefix=prefix,
        max_source_length=source_length, max_target_length=target_length, freeze_encoder=False,
        freeze_embeddings=False, variant=Path(dataset).name.partition(".")[0],
    )  # fmt: skip
    checks.check_runs([run], model, num_validation)
    return run


def usual_learning_rate(teacher, shape: str, method: str) -> float:
    """Return a peak for AdamW that suits a student, to be searched around.

    In proportion to how much shallower the decoder becomes, and twice that where the teacher's distributions teach:
    as found for one, two and three of six layers. An encoder that is cut is trained too, and such rates ruin it: at
    most twice RATE, and twice that for KD, whose hidden states hold the encoder (both in LOG.md). In inverse proportion
    to the width, an assumption; it gives 0.00038 for BART-large 12-3, where 0.0003 is published.
    """
    encoder, decoder = students.parse_shape(shape, teacher)
    ratio, taught = len(students.decoder_layers(teacher)) / decoder, method not in ("sft", "pl", "pl_gold")
    if encoder < len(students.encoder_layers(teacher)):
        ratio, taught = min(ratio, 2.0), method == "kd"
    return RATE * ratio * WIDTH / teacher.config.d_model * (1 + taught)


def at_usual_rate(run: runs.StudentRun, teacher) -> runs.StudentRun:
    """Return the run, at the `usual_learning_rate` of its shape and method where its own is 0."""
    if run.training.learning_rate:
        return run
    rate = float(f"{usual_learning_rate(teacher, run.shape, run.method):.2g}")
    return replace(run, training=replace(run.training, learning_rate=rate))


def train_teacher(run: runs.StudentRun, model, tokenizer, splits: Mapping[str, Dataset]) -> Path:
    """Return the run folder of a teacher fine-tuned on `splits`; its name is a teacher's name everywhere."""
    base = _as_tuned(model, run.max_target_length)
    return runs.train_student(run, base, tokenizer, splits["train"], splits["validation"])


def _as_tuned(model, max_target_length: int):
    """Return the model, its weights shared, with the decoding settings that it will have when it is fine-tuned."""
    base = copy.copy(model)
    base.generation_config = copy.deepcopy(model.generation_config)
    given = base.generation_config
    if not any((given.max_new_tokens, given.max_length, (given.num_beams or 1) > 1)):
        given.update(**DECODING)
    if not (given.max_new_tokens or given.max_length):  # as bart-base: 20 tokens would be written
        given.max_new_tokens = max_target_length
    return base


def with_own_teacher(asked: Request, check: Callable[[Request], object] | None) -> Request:
    """Return the request with a teacher fine-tuned on its pairs for at most TEACHER_SHARE of the hours, by price.

    `check` gets the request with the base and the price of its training, before that begins; None: that is returned.
    """
    given, lengths, batch_size = asked.given, asked.base.lengths, asked.base.training.batch_size
    num = {split: len(rows) for split, rows in asked.splits.items()}
    fields = {name: given[name] for name in ("batch_size", "warmup_steps", "seed")}
    whole = f"{len(students.encoder_layers(asked.teacher))}-{len(students.decoder_layers(asked.teacher))}"
    rate = next(iter(given["learning_rates"]), usual_learning_rate(asked.teacher, whole, "sft"))
    describe = partial(
        teacher_run, given["teacher"], asked.teacher, given["dataset"], lengths, num["validation"], learning_rate=rate,
        **fields,
    )  # fmt: skip
    least = max(given["first_rung"], EVALUATIONS)
    costs = measured_prices(asked, {"": describe(max_steps=least)})
    update = next(iter(read_json(costs / "results.json")["update"].values()))
    checks = EVALUATIONS * num["validation"] / batch_size * update  # a pass costs at most an update
    hours_s, passes = 3600 * given["hours"], TEACHER_PASSES * num["train"] / batch_size
    updates = math.floor(min((TEACHER_SHARE * hours_s - checks) / update, passes))
    if updates < least:
        reason, fix = f"{least} updates of a teacher", f"lower {'first_rung' if least > EVALUATIONS else 'batch_size'}"
        needed = math.ceil((least * update + checks) / TEACHER_SHARE / 36) / 100
        if passes < least:
            raise InputError(f"{num['train']} training pairs are too few for {reason}: {fix}")
        raise InputError(f"hours {given['hours']:g} are too few for {reason}: give {needed:.2f}, or {fix}")
    run = describe(max_steps=updates)
    known = {"name": run.name, "updates": updates, "priced_s": updates * update + checks, "measured_s": 0.0}
    known["price_s"] = read_json(costs / "results.json")["build_seconds"]
    priced = replace(asked, teacher=_as_tuned(asked.teacher, given["max_target_length"]), own_teacher=known)
    if check is None:
        return priced
    check(priced)
    tuned = train_teacher(run, asked.teacher, asked.tokenizer, asked.splits)
    teacher, tokenizer = load_model(tuned.name)
    known |= {"measured_s": read_json(tuned / "results.json")["seconds"]}
    return replace(
        asked, given={**given, "teacher": tuned.name}, teacher=teacher.to(device()), tokenizer=tokenizer,
        base=replace(asked.base, teacher=tuned.name), own_teacher=known,
    )  # fmt: skip
