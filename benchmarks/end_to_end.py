"""Measure the time from pairs to a student of the same ROUGE-2: our run against `Seq2SeqTrainer` with the same loss.

    python benchmarks/end_to_end.py --rounds 6 --every 30

Both cut a 6-3 student of the embedded teacher, freeze the same weights and train it by KD on the same pairs at the same
batch size, learning rate and schedule. The trainer takes the data as one writes it: `DataCollatorForSeq2Seq`, random
order, all hidden states, both encoders. After every turn of `every` updates ROUGE-2 is measured on validation
documents, off the clock, which holds all else: tokenizing, cutting, teacher states, training. Compared is when each
first reaches what both reach; `curves` hold (seconds, ROUGE-2) of both.
"""

from __future__ import annotations

import itertools
import tempfile
from functools import partial
from pathlib import Path

import timing
from kd_step import WEIGHTS, DistillationTrainer, InTurns, training_arguments, write_both
from transformers import DataCollatorForSeq2Seq

from distill_utils.data.batches import pair_stream, tokenize_pairs
from distill_utils.data.loading import load_pairs
from distill_utils.device import amp_dtype, device, seed_everything
from distill_utils.distillation import objectives
from distill_utils.distillation.teacher_cache import with_states
from distill_utils.evaluation.generation import summarize
from distill_utils.evaluation.metrics import rouge_scores
from distill_utils.models import students
from distill_utils.models.frozen import frozen_in, own_trained
from distill_utils.models.loading import load_model
from distill_utils.training.loop import Training, choose_attention, fit

SOURCE, TARGET, KEPT = 128, 32, 3  # tokens; decoder layers of the student
GOAL = 2.5


def cut(teacher, share_weights: bool = False):
    """Return the student, as both train it, and the layers it copied."""
    depth = len(students.encoder_layers(teacher))
    student, _, decoder_ids = students.init_student(teacher, depth, KEPT, share_weights=share_weights)
    (own_trained if share_weights else students.freeze)(student, encoder=True, embeddings=True)
    return student, decoder_ids


def score(student, tokenizer, pairs, turns: timing.Turns) -> None:
    """End the turn, then measure ROUGE-2 off the clock."""
    turns.lap("")
    options = {"max_source_length": SOURCE, "num_beams": 1, "dtype": amp_dtype()}  # what is frozen is in that dtype
    written = summarize(student, tokenizer, pairs["document"], **options)
    turns.notes["rouge2"] = float(rouge_scores(written, pairs["summary"])["rouge2"].mean())


def ours(turns: timing.Turns, case: dict) -> None:
    """Train by `training.loop.fit` on the stream of a run."""
    train, validation = load_pairs("pydocs", "train", case["pairs"]), load_pairs("pydocs", "validation", case["scored"])
    teacher, tokenizer = load_model("pydocs-bart")
    next(turns)
    seed_everything(0)
    settings = Training(
        max_steps=case["updates"], batch_size=case["batch"], learning_rate=3e-4, warmup_steps=0, schedule="linear",
        eval_every=case["every"], checkpoint_every=0,
    )  # fmt: skip
    rows = tokenize_pairs(train, tokenizer, SOURCE, TARGET)
    stream = pair_stream(rows, tokenizer.pad_token_id, settings.batch_size, settings.seed)
    student, decoder_ids = cut(teacher, share_weights=True)
    teacher.to(device()).requires_grad_(False)
    choose_attention(student.to(device()), SOURCE)
    layers = {"encoder_layer_ids": [], "decoder_layer_ids": decoder_ids}
    loss = partial(objectives.kd, teacher=teacher, shared_encoder=True, **layers, **WEIGHTS)

    def evaluate(model) -> dict:
        score(model, tokenizer, validation, turns)
        next(turns, None)
        return {}

    with tempfile.TemporaryDirectory() as folder, frozen_in(amp_dtype(), student, teacher):
        stream = with_states(stream, *write_both(Path(folder), teacher, rows, decoder_ids))
        fit(student, lambda model, batch: loss(model, batch=batch), stream, settings, Path(folder) / "run", evaluate)


class Scored(InTurns):
    """Score the student at the end of every turn of the trainer."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0:
            self.score(model)
            model.train()


def trainer(turns: timing.Turns, case: dict) -> None:
    """Train by `Seq2SeqTrainer.train`."""
    train, validation = load_pairs("pydocs", "train", case["pairs"]), load_pairs("pydocs", "validation", case["scored"])
    teacher, tokenizer = load_model("pydocs-bart")
    next(turns)
    seed_everything(0)
    rows = tokenize_pairs(train, tokenizer, SOURCE, TARGET).remove_columns("id")
    student, decoder_ids = cut(teacher)
    callback = Scored(itertools.chain([0], turns), case["every"])  # the first turn has begun
    callback.score = partial(score, tokenizer=tokenizer, pairs=validation, turns=turns)
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(folder, case["batch"], max_steps=case["updates"], lr_scheduler_type="linear")
        collator = DataCollatorForSeq2Seq(tokenizer, model=student)
        found = DistillationTrainer(
            student, arguments, train_dataset=rows, data_collator=collator, callbacks=[callback]
        )
        found.teacher, found.decoder_ids = teacher.to(device()).eval(), decoder_ids
        found.train()
    next(turns, None)


FORMS = {"ours": ours, "trainer": trainer}


def curve(found: dict) -> list[tuple[float, float]]:
    """Return (seconds since the pairs, ROUGE-2) after every turn."""
    seconds = itertools.accumulate(found["laps"][""])
    return list(zip(seconds, [notes["rouge2"] for notes in found["notes"]], strict=True))


def reached(points: list[tuple[float, float]], target: float) -> float:
    """Return the seconds after which a curve first is at the target, on the line between two points."""
    before = (0.0, 0.0)
    for seconds, rouge in points:
        if rouge >= target:
            return before[0] + (seconds - before[0]) * (target - before[1]) / (rouge - before[1])
        before = max((seconds, before[1]), (seconds, rouge), key=lambda point: point[1])
    raise ValueError(f"no point of the curve is at {target}")


def main() -> None:
    arguments = timing.parse(
        __doc__, "end_to_end", 6, FORMS,
        every={"type": int, "default": 30, "help": "updates of a turn"}, batch={"type": int, "default": 32},
        pairs={"type": int, "default": 4000}, scored={"type": int, "default": 200},
    )  # fmt: skip
    sizes = {name: getattr(arguments, name) for name in ("every", "batch", "pairs", "scored")}
    case = sizes | {"updates": arguments.every * arguments.rounds}
    found = timing.in_turns(__file__, FORMS, list(FORMS), case, arguments, warm_up=0)
    curves = {name: curve(each) for name, each in found.items()}
    target = min(max(rouge for _, rouge in points) for points in curves.values())
    (row,) = timing.rows_of(f"pairs to a 6-3 student of the embedded teacher, {timing.dtype_name()}", found, **case)
    seconds = {name: reached(points, target) for name, points in curves.items()}
    row |= {"ours_seconds": seconds["ours"], "other_seconds": seconds["trainer"], "goal": GOAL, "rouge2": target}
    row |= {"ratio": seconds["trainer"] / seconds["ours"]}
    timing.write(arguments, [row], curves=curves)


if __name__ == "__main__":
    main()
