"""Which shapes a budget allows: every student is cut and timed beside its teacher before any is trained.

Speed and size do not depend on what the weights are. Out of scope: training what fits (race.py).
"""

import math
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from distill_utils.artifacts import InputError, artifact, processor_name
from distill_utils.data.loading import data_fingerprint
from distill_utils.device import timed
from distill_utils.evaluation import ctranslate, generation, scoring
from distill_utils.evaluation.metrics import rouge_scores
from distill_utils.models import students
from distill_utils.models.loading import model_fingerprint, save_model

MAX_SHAPES = 3
REPEATS = 5  # of which the best counts: shapes of nearly one speed decide who starts
NUM_QUALITY = 100  # documents on which the teacher's cheaper decodings are scored
UNITS = {
    "latency": {"ms": 1.0, "s": 1000.0},
    "parameters": {"k": 1e-3, "M": 1.0, "B": 1000.0},
    "memory": {"MB": 1.0, "GB": 1024.0},
}
EXAMPLES = {"latency": "30ms or 0.03s", "parameters": "100M", "memory": "500MB"}


@dataclass(frozen=True)
class Budget:
    """What a student may cost: at most, and for the speed-up at least; 0 = no limit."""

    latency: float = 0.0  # milliseconds per summary, batch 1
    speedup: float = 0.0  # over the teacher as it is decoded
    parameters: float = 0.0  # millions
    memory: float = 0.0  # megabytes (2**20 bytes) of weights


COLUMNS = {"latency": "latency_ms", "speedup": "speedup", "parameters": "parameters_m", "memory": "memory_mb"}
SUFFIXES = {"latency": "ms", "speedup": "", "parameters": "M", "memory": "MB"}


def parse_budget(latency: str = "", speedup: float = 0.0, parameters: str = "", memory: str = "") -> Budget:
    """Return the budget of texts like "30ms", "100M" and "500MB"; InputError names what is not such a text."""
    if speedup < 0:
        raise InputError(f"speedup {speedup:g} is negative: give for example 2, or 0 for no limit")
    written = {"latency": latency, "parameters": parameters, "memory": memory}
    return Budget(speedup=speedup, **{name: _amount(name, text) for name, text in written.items() if text.strip()})


def _amount(name: str, text: str) -> float:
    units = {unit.lower(): size for unit, size in UNITS[name].items()}
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-z]+)", text.strip().lower())
    if not found or found[2] not in units or not float(found[1]) > 0:
        raise InputError(f"{name} {text!r} is no amount with its unit ({', '.join(UNITS[name])}): {EXAMPLES[name]}")
    return float(found[1]) * units[found[2]]


# ------------------------------------------------------------------------------------------------------------- choosing


def candidate_shapes(teacher) -> list[str]:
    """Return the shapes of both stacks halved down to one layer, largest first, without the teacher's own."""
    stacks = []
    for layers in (students.encoder_layers(teacher), students.decoder_layers(teacher)):
        depths = [len(layers)]
        while depths[-1] > 1:
            depths.append(-(-depths[-1] // 2))
        stacks.append(depths)
    return [f"{encoder}-{decoder}" for encoder in stacks[0] for decoder in stacks[1]][1:]


def excesses(row: Mapping, budget: Budget) -> dict[str, float]:
    """Return by which factor a measured row misses each limit; limits that it keeps are left out."""
    found = {}
    for name, limit in asdict(budget).items():
        value = row[COLUMNS[name]]
        factor = (limit / value if name == "speedup" else value / limit) if limit else 0.0
        if factor > 1:
            found[name] = factor
    return found


def choose_shapes(rows: Sequence[Mapping], budget: Budget, every: bool = False) -> list[str]:
    """Return the shapes inside a budget that no other fitting shape contains, at most MAX_SHAPES, or every one.

    Of more, those with the deepest encoders: the published students keep the encoder and cut the decoder. InputError
    names the nearest budget that can be met.
    """
    fitting = [row["student"] for row in rows if row["student"] and not excesses(row, budget)]
    if not fitting:
        near = min((row for row in rows if row["student"]), key=lambda row: max(excesses(row, budget).values()))
        wanted = ", ".join(f"{name} {getattr(budget, name):g}{SUFFIXES[name]}" for name in excesses(near, budget))
        offered = {name: near[COLUMNS[name]] for name in excesses(near, budget)}
        # Rounded to the side on which the nearest shape lies inside.
        rounded = {name: math.floor(v * 100) / 100 if name == "speedup" else math.ceil(v * 10) / 10
                   for name, v in offered.items()}  # fmt: skip
        asked = " ".join(f"--{name} {value:g}{SUFFIXES[name]}" for name, value in rounded.items())
        raise InputError(f"no student meets {wanted}: the nearest is {near['student']}, ask for {asked}")
    if every:
        return fitting
    layers = {shape: tuple(map(int, shape.split("-"))) for shape in fitting}
    largest = [a for a in fitting if not any(a != b and _contains(layers[b], layers[a]) for b in fitting)]
    return sorted(largest, key=lambda shape: layers[shape], reverse=True)[:MAX_SHAPES]


def _contains(outer: tuple[int, int], inner: tuple[int, int]) -> bool:
    return outer[0] >= inner[0] and outer[1] >= inner[1]


def fit_column(rows: Sequence[Mapping], budget: Budget, chosen: Sequence[str]) -> list[str]:
    """Return for every row whether it fits, and why it does not start."""
    texts = []
    for row in rows:
        outside = excesses(row, budget)
        late = ", ".join(f"{name} off by {100 * (factor - 1):.1f} %" for name, factor in outside.items())
        kept = "starts" if row["student"] in chosen else "fits; a larger one does too" if row["student"] else "fits"
        texts.append(late or kept)
    return texts


# ------------------------------------------------------------------------------------------------------------ measuring


def measure_shapes(
    name: str, teacher, tokenizer, validation: Dataset, shapes: Sequence[str], *, max_source_length: int,
    prefix: str = "", decoding: Mapping | None = None, int8: bool = False, num_timed: int = 4,
) -> Path:  # fmt: skip
    """Return the artifact with one row for every shape and for the teacher in its cheaper ways, timed in turns.

    All write as many tokens as the teacher's median summary has, one document at a time, the teacher as it decodes and
    students with the changes of `decoding`: `latency_ms`, and `speedup` over the teacher. `memory_mb` are the weights.
    `decode_s` are seconds per document in batches of 32, as scoring does, at the teacher's 95th percentile of tokens,
    because the longest summary of a batch decides. Teacher rows have ROUGE on the first documents. With `int8` students
    are timed as CTranslate2 runs them.
    """
    options, decoding = {"max_source_length": max_source_length, "prefix": prefix}, dict(decoding or {})
    machine = {"processor": processor_name(), "threads": torch.get_num_threads(), "device": teacher.device.type}
    settings = {"teacher": model_fingerprint(name, teacher), "data": data_fingerprint(validation)}
    settings |= options | {"shapes": list(shapes), "decoding": decoding, "int8": int8, "num_timed": num_timed}
    settings |= machine

    def build(folder: Path) -> dict:
        few = validation.select(range(min(NUM_QUALITY, len(validation))))
        documents = list(few["document"])
        own = generation.decoding_settings(teacher.generation_config)["num_beams"]
        with tempfile.TemporaryDirectory() as temporary:
            decoders, rows = {}, []
            for beams in sorted({own, min(own, 2), 1}, reverse=True):
                label = "teacher" if beams == own else f"teacher, {beams} beam{'s' * (beams > 1)}"
                decode = partial(generation.summarize, teacher, tokenizer, **options)
                decoders[label] = decode if beams == own else partial(decode, num_beams=beams)
                rows.append(_row(label, "", teacher))
            fast = _int8_teacher(teacher, tokenizer, Path(temporary) / "teacher")
            if int8 and not fast:
                kind = f"{teacher.config.model_type} model on {teacher.device.type}"
                raise InputError(f"int8 is not possible for a {kind}: leave int8 out")
            if fast:
                decoders["teacher, int8"] = partial(fast[0], **options)
                rows.append(_row("teacher, int8", "", teacher) | {"memory_mb": fast[1]})
            for row in rows:
                written = decoders[row["name"]](documents)
                row["rouge2"] = float(rouge_scores(written, list(few["summary"]))["rouge2"].mean())
                if row["name"] == "teacher":
                    lengths = [len(ids) for ids in tokenizer(text_target=written)["input_ids"]]
            for shape in shapes:
                student, *_ = students.init_student(teacher, *map(int, shape.split("-")), share_weights=True)
                rows.append(_row(shape, shape, student))
                decoders[shape] = partial(generation.summarize, student, tokenizer, **options, **decoding)
                if int8:
                    decode, rows[-1]["memory_mb"] = int8_decoder(student, tokenizer, Path(temporary) / shape)
                    decoders[shape] = partial(decode, **options, **decoding)
            median, long = (max(2, int(np.quantile(lengths, share))) for share in (0.5, 0.95))
            turns = {label: partial(decode, **exactly(median)) for label, decode in decoders.items()}
            times = scoring.interleaved_latency_ms(turns, documents[:num_timed], teacher.device, REPEATS)
            for row in rows:
                row |= {"latency_ms": times[row["name"]], "speedup": times["teacher"] / times[row["name"]]}
                batch = partial(decoders[row["name"]], documents[:32], **exactly(long))
                row["decode_s"] = timed(batch, teacher.device) / len(documents[:32])
        return {"rows": rows, "num_new_tokens": median, "num_quality": len(few), "num_timed": num_timed}

    return artifact("shapes", settings, build)


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
        return int8_decoder(teacher, tokenizer, folder) if teacher.device.type == "cpu" else None
    except InputError:  # a full disk
        raise
    except ValueError:
        return None


def int8_decoder(model, tokenizer, folder: Path) -> tuple[Callable, float]:
    """Return a function like `summarize` that decodes in int8 by CTranslate2, loaded once, and its megabytes.

    The folder takes the saved model and the converted one. ValueError for what CTranslate2 cannot express.
    """
    save_model(model, tokenizer, folder / "model")
    converted = ctranslate.to_ctranslate2(folder / "model", folder / "int8", quantization="int8")
    translator = ctranslate.load_translator(converted)

    def decode(documents: Sequence[str], **settings) -> list[str]:
        return ctranslate.summarize_ctranslate2(converted, tokenizer, documents, translator=translator, **settings)[0]

    return decode, (converted / "model.bin").stat().st_size / 2**20
