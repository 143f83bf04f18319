"""The request of a race, and what things cost here: shapes in use, and an update, a label, a load, in seconds.

All is measured once, before anything is trained, so that a race depends on it, the data and the seed alone. Out
of scope: what the prices pay for (race.py).
"""

import itertools
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from distill_utils.artifacts import InputError, artifact, hashed, processor_name, read_json
from distill_utils.data import loading
from distill_utils.data.batches import tokenize_pairs
from distill_utils.device import amp_dtype, device, timed
from distill_utils.distillation.pseudo_labels import join_labels, pseudo_labels
from distill_utils.distillation.teacher_cache import with_states
from distill_utils.evaluation import generation, scoring
from distill_utils.evaluation.ctranslate import converted_decoder
from distill_utils.evaluation.metrics import rouge_scores
from distill_utils.experiments import budget, runs
from distill_utils.models import students
from distill_utils.models.frozen import frozen_in
from distill_utils.models.loading import load_model, model_fingerprint
from distill_utils.training.loop import choose_attention, fit

COOLDOWN = 0.15  # share of a student's updates
UNPRICED = ("kd_cached",)  # the teacher's pass over all data, which nothing here measures
REPEATS = 5  # of which the best counts: shapes of nearly one speed decide who starts
NUM_QUALITY = 100  # documents on which the teacher's cheaper decodings are scored
PRICE_SECONDS, PRICE_ROWS, PRICE_LABELS = 10.0, 512, (40, 240)  # what measuring one price may take


@dataclass
class Request:
    """The request of a race, loaded and checked: the notebook's parameters, models, data."""

    given: dict
    limits: dict[str, float]  # the budget, as of budget.py
    teacher: torch.nn.Module
    tokenizer: object
    splits: dict[str, Dataset]
    base: runs.StudentRun
    decoding: dict  # changes to the teacher's decoding settings, for every student
    made: dict = field(default_factory=dict)  # (name, updates, seed): folders of the student and of its scores
    own_teacher: dict = field(default_factory=dict)  # a teacher fine-tuned first: updates, priced_s, measured_s, base_s

    @property
    def options(self) -> dict:
        """How documents are read, by students and teacher alike."""
        return {"max_source_length": self.base.max_source_length, "prefix": self.base.prefix}


def _machine() -> dict:
    return {"processor": processor_name(), "threads": torch.get_num_threads(), "device": device().type}


# -------------------------------------------------------------------------------------------------------------- shapes


def measured_shapes(asked: Request) -> Path:
    """Return the artifact with one row for every shape and for the teacher in its cheaper ways, timed in turns.

    Speed and size do not depend on what the weights are. All write as many tokens as the teacher's median summary has,
    one document at a time, the teacher as it decodes and students with the changes of `decoding`: `latency_ms`, and
    `speedup` over the teacher. `memory_mb` are the weights. `decode_s` are seconds per document of many, as
    scoring takes after the `convert_s` of its engine, at the teacher's 95th percentile of tokens, because the longest
    summary of a batch decides. A teacher that is still to be fine-tuned will write as much as its targets have,
    whatever its base writes. Teacher rows have ROUGE on the first documents. With `int8` students are timed as
    CTranslate2 runs them.
    """
    teacher, tokenizer, validation = asked.teacher, asked.tokenizer, asked.splits["validation"]
    shapes = list(asked.given["student_shapes"] or budget.candidate_shapes(teacher))
    int8, num_timed = asked.given["int8"], asked.given["num_timed"]
    settings = {"teacher": model_fingerprint(asked.given["teacher"], teacher), "shapes": shapes, "int8": int8}
    settings |= {"data": loading.data_fingerprint(validation), "decoding": asked.decoding, "num_timed": num_timed}
    tuned_later = bool(asked.own_teacher) and not asked.own_teacher["measured_s"]
    settings |= {"lengths": "targets"} if tuned_later else {}

    def build(folder: Path) -> dict:
        few = validation.select(range(min(NUM_QUALITY, len(validation))))
        documents = list(few["document"])
        own = generation.decoding_settings(teacher.generation_config)["num_beams"]
        with tempfile.TemporaryDirectory() as temporary:
            decoders, rows, scored = {}, [], {"teacher": (teacher, {})}
            for beams in sorted({own, min(own, 2), 1}, reverse=True):
                label = "teacher" if beams == own else f"teacher, {beams} beam{'s' * (beams > 1)}"
                decode = partial(generation.summarize, teacher, tokenizer, **asked.options)
                decoders[label] = decode if beams == own else partial(decode, num_beams=beams)
                rows.append(_row(label, "", teacher))
            fast = _int8_teacher(teacher, tokenizer, Path(temporary) / "teacher")
            if int8 and not fast:
                kind = f"{teacher.config.model_type} model on {teacher.device.type}"
                raise InputError(f"int8 is not possible for a {kind}: leave int8 out")
            if fast:
                decoders["teacher, int8"] = partial(fast[0], **asked.options)
                rows.append(_row("teacher, int8", "", teacher) | {"memory_mb": fast[1]})
            for row in rows:
                written = decoders[row["name"]](documents)
                row["rouge2"] = float(rouge_scores(written, list(few["summary"]))["rouge2"].mean())
                if row["name"] == "teacher":
                    texts = list(few["summary"]) if tuned_later else written
                    cut = {"truncation": True, "max_length": asked.base.max_target_length} if tuned_later else {}
                    lengths = [len(ids) for ids in tokenizer(text_target=texts, **cut)["input_ids"]]
            for shape in shapes:
                student, *_ = students.init_student(teacher, *map(int, shape.split("-")), share_weights=True)
                rows.append(_row(shape, shape, student))
                scored[shape] = student, asked.decoding
                decode = partial(generation.summarize, student, tokenizer)
                if int8:
                    decode, rows[-1]["memory_mb"] = converted_decoder(student, tokenizer, Path(temporary) / shape)
                decoders[shape] = partial(decode, **asked.options, **asked.decoding)
            median, long = (max(2, int(np.quantile(lengths, share))) for share in (0.5, 0.95))
            turns = {label: partial(decode, **exactly(median)) for label, decode in decoders.items()}
            times = scoring.interleaved_latency_ms(turns, documents[:num_timed], teacher.device, REPEATS)
            for row in rows:
                row |= {"latency_ms": times[row["name"]], "speedup": times["teacher"] / times[row["name"]]}
            for row in (row for row in rows if row["name"] in scored):  # as `scoring.evaluate_model` does
                model, changes = scored[row["name"]]
                engine, began = scoring.engine_type(model, len(validation), **changes), time.monotonic()
                decode = scoring.decoder(model, tokenizer, Path(temporary) / f"{row['name']} scored", engine)
                row["convert_s"] = time.monotonic() - began
                batch = documents if engine else documents[:32]
                decode = partial(decode, batch, **asked.options, **changes, **exactly(long))
                row["decode_s"] = timed(decode, teacher.device) / len(batch)
        return {"rows": rows, "num_new_tokens": median, "num_quality": len(few), "num_timed": num_timed}

    return artifact("shapes", settings | asked.options | _machine(), build)


def _row(name: str, shape: str, model) -> dict:
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters()) / 2**20
    counts = students.count_parameters(model)
    return {"name": name, "student": shape, "parameters_m": counts["total"] / 1e6, "memory_mb": size}


def exactly(num_new_tokens: int) -> dict:
    """Return decoding settings that force the number of tokens; min_length counts the decoder's start token."""
    return {"max_new_tokens": num_new_tokens, "min_length": num_new_tokens + 1}


def _int8_teacher(teacher, tokenizer, folder: Path) -> tuple[Callable, float] | None:
    """Return the teacher's int8 decoding where there is one: on the CPU, of families that CTranslate2 knows."""
    try:
        return converted_decoder(teacher, tokenizer, folder) if teacher.device.type == "cpu" else None
    except InputError:  # a full disk
        raise
    except ValueError:
        return None


# -------------------------------------------------------------------------------------------------------------- prices


def measured_prices(asked: Request, plan: Mapping[str, runs.StudentRun]) -> Path:
    """Return the artifact of what things cost here, in seconds: an update of each method and shape, a label, a load.

    Updates are those of real training, data and optimizer included, of students that are thrown away; methods on
    pseudo-labels train on some, which may be shorter than references.
    """
    plain = [replace(run, variant="", decoder_layer_ids=None, training=replace(run.training, seed=0))
             for run in plan.values()]  # fmt: skip
    kinds = {(run.method, run.shape): run for run in plain}  # no price depends on the seed or on the layers copied
    train = asked.splits["train"].select(range(min(PRICE_ROWS, len(asked.splits["train"]))))
    settings = {"runs": [hashed(run) for run in kinds.values()], "data": loading.data_fingerprint(train), **_machine()}
    settings |= {"teacher": model_fingerprint(asked.given["teacher"], asked.teacher), "states": asked.base.cache_states}
    on_labels = [run for run in kinds.values() if run.method in runs.ON_PSEUDO_LABELS]
    settings |= {"labels": hashed(on_labels[0])["label_settings"]} if on_labels else {}

    def build(folder: Path) -> dict:
        began = time.monotonic()
        load_model(asked.given["teacher"])
        loaded = time.monotonic()
        tokenize_pairs(train, asked.tokenizer, *asked.base.lengths)
        found = {"load": loaded - began, "row": (time.monotonic() - loaded) / len(train), "label": 0.0}
        rows = dict.fromkeys(kinds, train)
        if on_labels:
            found["label"], labels = _label_seconds(asked, train, folder)
            beside = join_labels([labels, train.select(range(len(labels)))])[0]
            rows |= {(run.method, run.shape): beside if run.method == "pl_gold" else labels for run in on_labels}
        states = {kind: _states(asked, run, train, rows[kind]) for kind, run in kinds.items()}
        made = [read_json(each.parent / "results.json") for each in {*itertools.chain(*states.values())}]
        found["states"] = sum(each["seconds"] / each["rows"] for each in made)  # also of those from before
        updates = {_kind(run): _update_seconds(asked, run, rows[kind], states[kind]) for kind, run in kinds.items()}
        return found | {"update": updates}

    return artifact("prices", settings, build)


def _label_seconds(asked: Request, train: Dataset, folder: Path) -> tuple[float, Dataset]:
    """Return the seconds of one pseudo-label, and those that were written for it, as rows to train on."""
    label = partial(pseudo_labels, asked.given["teacher"], **asked.options, **asked.base.label_settings)

    def written(size: int) -> tuple[float, Dataset]:
        began = time.monotonic()
        labels = label(train.select(range(size)), tempfile.mkdtemp(dir=folder))
        return time.monotonic() - began, labels

    few, more = (min(size, len(train)) for size in PRICE_LABELS)
    written(1)  # what is imported
    seconds, labels = written(few)
    each = seconds / few
    if more > few and seconds < PRICE_SECONDS:  # the difference, because each begins with a conversion
        longer, labels = written(more)
        each = max(longer - seconds, 0.0) / (more - few)
    kept = [i for i, text in enumerate(labels["summary"]) if not generation.is_empty(text)]
    return each, labels.select(kept) if kept else train  # a model that is still to be fine-tuned may write nothing


def _kind(run: runs.StudentRun) -> str:
    return f"{run.method} {run.shape}"


def _states(asked: Request, run: runs.StudentRun, train: Dataset, rows: Dataset) -> list[Path]:
    stored = runs.cut_student(run, asked.teacher)[1]["stored"]
    return runs.stored_states(run, stored, asked.teacher, asked.tokenizer, train, rows)


def _update_seconds(asked: Request, run: runs.StudentRun, rows: Dataset, states: list[Path]) -> float:
    """Return the mean seconds of an update after the first two, of 16 or as many as PRICE_SECONDS allow."""
    batches, seconds = with_states(runs.batches_of(run, asked.tokenizer, rows), *states), PRICE_SECONDS
    for most in (2, 16):
        num = int(np.clip(PRICE_SECONDS / seconds, 2, most))
        student, cut = runs.cut_student(run, asked.teacher)
        choose_attention(student.to(device()), run.max_source_length)
        objective = partial(runs.objective_of(run.method), teacher=asked.teacher, **cut["options"])
        settings = replace(run.training, max_steps=2 + num, log_every=1, schedule="constant", checkpoint_every=0,
                           patience=0)  # fmt: skip
        with tempfile.TemporaryDirectory() as folder, frozen_in(amp_dtype(), student, asked.teacher):
            history = fit(student, lambda model, batch, loss=objective: loss(model, batch=batch), batches, settings,
                          Path(folder), stage=f"price of {run.group}")  # fmt: skip
        seconds = max((history[-1]["seconds"] - history[1]["seconds"]) / num, 1e-4)
    return seconds


def race_prices(asked: Request, plan: Mapping[str, runs.StudentRun], shapes: Path, priced: Path) -> dict:
    """Return the prices of a race (race.py) from the two artifacts; what they took to build is spent before it."""
    measured, costs = read_json(shapes / "results.json"), read_json(priced / "results.json")
    rows = {row["name"]: row for row in measured["rows"]}
    num, batch_size = {split: len(found) for split, found in asked.splits.items()}, asked.base.training.batch_size
    found = {}
    for name, run in plan.items():
        row, update, labels = rows[run.shape], costs["update"][_kind(run)], run.method in runs.ON_PSEUDO_LABELS
        # Models, tokens of documents and of labels, and validation losses (a pass costs at most an update).
        tokens = (1 + labels + (run.method == "pl_gold")) * num["train"] * costs["row"]
        overhead = 2 * costs["load"] + row.get("convert_s", 0.0) + tokens + update * num["validation"] / batch_size
        found[name] = {"update": update, "score": overhead + num["validation"] * row["decode_s"], "labels": labels,
                       "parameters": row["parameters_m"]}  # fmt: skip
    slowest = max((rows[run.shape] for run in plan.values()), key=lambda row: row["decode_s"])
    own, states = asked.own_teacher, costs["states"] * (num["train"] + num["validation"])
    tests = [(rows["teacher"], "validation"), (rows["teacher"], "test"), (slowest, "test")]
    return {
        "candidates": found, "labels": costs["load"] + num["train"] * costs["label"],
        "end": 4 * costs["load"]
        + sum(row.get("convert_s", 0.0) + num[split] * row["decode_s"] for row, split in tests),
        "measured": measured["build_seconds"] + costs["build_seconds"] + own.get("base_s", 0.0)
        + own.get("priced_s", 0.0) + states,
        "teacher": own.get("priced_s", 0.0), "states": states,
        "first_rung": asked.base.training.max_steps, "cooldown_share": COOLDOWN,
        "max_rungs": asked.given["max_rungs"],
    }  # fmt: skip
