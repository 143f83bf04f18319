"""One change at a time: variants of a method written as text, the runs they name, and what each change did.

"kd hidden_weight=0 versus kd" names two runs of the same shape, seeds and budget. Without "versus" a variant stands
against its own method unchanged.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from distill_utils.artifacts import InputError, read_json
from distill_utils.evaluation import scoring
from distill_utils.evaluation.statistics import holm, paired_test
from distill_utils.experiments import runs

FIXED = ("method", "shape", "teacher", "max_source_length", "max_target_length", "training", "prefix", "variant")

# What the papers and the first author's logs suggest (claim, difference that should be positive, source).
HYPOTHESES = (
    ("Pseudo-labels beat SFT on abstractive data", "pl versus sft", "Shleifer & Rush 2020, abstract (XSum)"),
    ("KD beats SFT on abstractive data", "kd versus sft", "published README: XSum students use KD"),
    ("Logits alone do not beat SFT", "sft versus kd hidden_weight=0", "author's XSum log, 12-3: 19.36 against 18.38"),
    ("Hidden states are the decisive part of KD", "kd versus kd hidden_weight=0",
     "author's XSum log, 12-3: 21.34, 18.38"),
    ("KD without references loses", "kd versus kd ce_weight=0", "author's XSum log: 0.5 to 0.8 ROUGE-2"),
    ("A trained encoder beats a frozen one", "sft freeze_encoder=False versus sft",
     "author's XSum log, 12-6: 21.50, 20.72"),
    ("Supervising the block's end helps", "kd versus kd supervise_forward=False",
     "transformers PR 6834: only outside BART"),
    ("Matching outputs beats matching inputs", "kd versus kd match=inputs", "not published"),
    ("Normalised hidden states help", "kd versus kd normalize_hidden=False", "transformers PR 6834: only outside BART"),
    ("TVD beats forward KL", "kd divergence=tvd versus kd", "Wen et al. 2023, XSum 3-3: 19.30 against 18.98"),
    ("JSD beats forward KL", "kd divergence=jsd versus kd", "Wen et al. 2023, XSum 3-3: 19.22 against 18.98"),
    ("Reverse KL beats forward KL", "kd divergence=reverse_kl versus kd", "Wen et al. 2023, XSum 3-3: 19.02, 18.98"),
    ("References beside pseudo-labels help", "pl_gold versus pl", "published recipe for Pegasus on XSum"),
    ("Filtered pseudo-labels are better", "pl label_filters={'reference_rouge2':10} versus pl",
     "published data set, no figure"),
    ("Labels of a teacher that saw other data are better", "pl cross_fit=other versus pl cross_fit=own",
     "not published"),
    ("Own samples as targets help", "on_policy versus kd hidden_weight=0", "Agarwal et al. 2024, other models"),
    ("A teacher with dropout is worse", "kd versus kd teacher_dropout=True", "not published"),
)  # fmt: skip


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
                seeded = replace(run, training=replace(run.training, seed=seed))
                found[seeded.name] = seeded
    return list(found.values())


def ablation_row(
    base: runs.StudentRun, text: str, tested: Mapping[str, Path], seeds: Sequence[int], metric: str = "rouge2"
) -> dict | None:
    """Return what a change did to a metric: paired difference with its 95 % interval; None when no seed has both runs.

    Scores are averaged over those seeds, document by document, first; the interval is over documents.
    """
    named = [
        [replace(run, training=replace(run.training, seed=seed)).name for run in parse_ablation(base, text)]
        for seed in seeds
    ]
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
        seeded = replace(run, training=replace(run.training, seed=seeds[0]))
        row, step = ablation_row(base, text, tested, seeds), cost.get(seeded.name.rpartition("-s")[0], {})
        seconds = read_json(trained[seeded.name] / "results.json")["seconds"]
        rows.append(row | {"seconds": seconds, **{key: step.get(key) for key in ("ms/step", "activations (MB)")}})
    for row, p_value in zip(rows, holm([row["p_value"] for row in rows]), strict=True):
        row["p (Holm)"] = p_value
    return rows


def hypothesis_rows(base: runs.StudentRun, tested: Mapping[str, Path], seeds: Sequence[int]) -> list[dict]:
    """Return one row a published hypothesis: confirmed, contradicted, not confirmed, or not tested in this run."""
    rows = []
    for claim, text, source in HYPOTHESES:
        row = ablation_row(base, text, tested, seeds)
        if row is None:
            verdict = "not tested here"
        elif row["low"] > 0:
            verdict = "confirmed"
        else:
            verdict = "contradicted" if row["high"] < 0 else "not confirmed"
        interval = f"{row['difference']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f})" if row else ""
        found = {"ROUGE-2": interval, "seeds": str(row["seeds"]) if row else "", "here": verdict}
        rows.append({"claim": claim, "comparison": text, **found, "source": source})
    return rows
