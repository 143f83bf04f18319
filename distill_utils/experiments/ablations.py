"""One change at a time: variants of a method written as text, the runs they name, and what each change did.

"kd hidden_weight=0 versus kd" names two runs of the same shape, seeds and budget. Without "versus" a variant stands
against its own method unchanged.
"""

from __future__ import annotations

import ast
import csv
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from distill_utils.artifacts import InputError, read_json
from distill_utils.evaluation import scoring
from distill_utils.evaluation.statistics import effect_sign, holm, paired_test
from distill_utils.experiments import runs
from distill_utils.models.loading import ASSETS

FIXED = ("method", "shape", "teacher", "max_source_length", "max_target_length", "training", "prefix", "variant")


def parse_variant(base: runs.StudentRun, text: str) -> runs.StudentRun:
    """Return the run that "<method> <field>=<value> ..." names: `base` but for these fields of `runs.StudentRun`.

    `learning_rate` is one of the fields, and label_<name> a decoding setting of the teacher that writes labels.
    """
    method, *pairs = text.split()
    known = [field.name for field in fields(base) if field.name not in FIXED]
    changes: dict = {"method": method, "variant": " ".join(pairs)}
    for pair in pairs:
        name, _, written = pair.partition("=")
        value = _value(written)
        if name == "learning_rate":
            changes["training"] = replace(base.training, learning_rate=float(value))
        elif name.startswith("label_") and name not in known:
            changes["label_settings"] = changes.get("label_settings", base.label_settings) | {name[6:]: value}
        elif name not in known:
            raise InputError(f"ablation {text!r}: there is no {name}: use {', '.join(known)}, learning_rate")
        elif not _fits(value, getattr(base, name)):
            raise InputError(f"ablation {text!r}: {name} cannot be {written!r}: write it like {getattr(base, name)!r}")
        else:
            changes[name] = value
    return replace(base, **changes)


def parse_settings(texts: Sequence[str]) -> dict:
    """Return {name: value} of texts like "num_beams=2"."""
    found = {}
    for text in texts:
        name, sign, written = text.partition("=")
        if not sign or not name.strip():
            raise InputError(f"{text!r} sets nothing: write name=value, as in num_beams=2")
        found[name.strip()] = _value(written.strip())
    return found


def _value(written: str):
    try:
        return ast.literal_eval(written)
    except (ValueError, SyntaxError):  # a plain word
        return written


def _fits(value, default) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    return default is None or isinstance(value, (int, float) if isinstance(default, float) else type(default))


def parse_ablation(base: runs.StudentRun, text: str) -> tuple[runs.StudentRun, runs.StudentRun]:
    """Return (changed run, run it is compared with) of an ablation's text."""
    changed, _, against = text.partition(" versus ")
    if not changed.strip():
        raise InputError(f"ablation {text!r} names no method: write for example 'kd hidden_weight=0 versus kd'")
    pair = parse_variant(base, changed), parse_variant(base, against or changed.split()[0])
    if pair[0] == pair[1]:
        raise InputError(f"ablation {text!r} changes nothing: name what it stands against, as in 'pl_gold versus pl'")
    return pair


def ablation_runs(base: runs.StudentRun, texts: Sequence[str], seeds: Sequence[int]) -> list[runs.StudentRun]:
    """Return every run that the ablations need, each once and for every seed."""
    found = {}
    for text in texts:
        for run in parse_ablation(base, text):
            for seed in seeds:
                seeded = runs.with_seed(run, seed)
                found[seeded.name] = seeded
    return list(found.values())


def ablation_row(
    base: runs.StudentRun, text: str, tested: Mapping[str, Path], seeds: Sequence[int], metric: str = "rouge2"
) -> dict | None:
    """Return what a change did to a metric: paired difference with its 95 % interval; None when no seed has both runs.

    Scores are averaged over those seeds, document by document, first; the interval is over documents.
    """
    named = [[runs.with_seed(run, seed).name for run in parse_ablation(base, text)] for seed in seeds]
    pairs = [names for names in named if all(name in tested for name in names)]
    if not pairs:
        return None
    sides = zip(*pairs, strict=True)
    scores = [np.mean([scoring.read_scores(tested[name])[metric] for name in names], axis=0) for names in sides]
    means = {"seeds": len(pairs), "score": float(scores[0].mean()), "versus": float(scores[1].mean())}
    return {"name": text, **means, **paired_test(*scores)}


def ablation_rows(
    base: runs.StudentRun,
    texts: Sequence[str],
    trained: Mapping[str, Path],
    tested: Mapping[str, Path],
    seeds: Sequence[int],
    forecast: Sequence[dict],
) -> list[dict]:
    """Return one row an ablation: what it did to ROUGE-2, and the time and memory of its training step."""
    cost = {row["student"]: row for row in forecast}
    rows = []
    for text in texts:
        run, _ = parse_ablation(base, text)
        seeded = runs.with_seed(run, seeds[0])
        row, step = ablation_row(base, text, tested, seeds), cost.get(seeded.group, {})
        seconds = read_json(trained[seeded.name] / "results.json")["seconds"]
        rows.append(row | {"seconds": seconds, **{key: step.get(key) for key in ("ms/step", "activations (MB)")}})
    for row, p_value in zip(rows, holm([row["p_value"] for row in rows]), strict=True):
        row["p (Holm)"] = p_value
    return rows


def hypothesis_rows(base: runs.StudentRun, tested: Mapping[str, Path], seeds: Sequence[int]) -> list[dict]:
    """Return one row a published hypothesis: confirmed, contradicted, not confirmed, or not tested in this run."""
    verdicts = {1: "confirmed", 0: "not confirmed", -1: "contradicted"}
    rows = []
    for claim in claims():
        row = ablation_row(base, claim["comparison"], tested, seeds)
        interval = f"{row['difference']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f})" if row else ""
        here = verdicts[effect_sign(row)] if row else "not tested here"
        found = {"ROUGE-2": interval, "seeds": str(row["seeds"]) if row else "", "here": here}
        rows.append({"claim": claim["claim"], "comparison": claim["comparison"], **found, "source": claim["source"]})
    return rows


def claims() -> list[dict]:
    """Return what the papers and the first author's logs suggest: claim, comparison that should be positive, source."""
    with open(ASSETS / "claims.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
