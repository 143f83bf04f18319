"""One change at a time: variants of a method as text, the runs they name, and what each change did.

"kd hidden_weight=0 versus kd" names two runs of the same shape, seeds and budget; "versus kd" can be left out.
"""

import ast
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

import pandas as pd

from distill_utils.artifacts import InputError
from distill_utils.evaluation import generation
from distill_utils.evaluation.statistics import compare, effect_sign, holm
from distill_utils.experiments import fine_tuning, runs
from distill_utils.experiments.comparison import FEW_DOCUMENTS, scores_over_seeds, training_seconds
from distill_utils.models.loading import ASSETS
from distill_utils.report.dashboard import VERDICTS
from distill_utils.report.names import with_interval

FIXED = ("method", "shape", "teacher", "max_source_length", "max_target_length", "training", "prefix", "variant")

# Fields that only some methods read: another one would train the same student under another name.
READERS = {
    **dict.fromkeys(("ce_weight", "kl_weight"), ("kd", "on_policy", "kd_cached")),
    **dict.fromkeys(("hidden_weight", "match", "normalize_hidden", "supervise_forward", "teacher_dropout"), ("kd",)),
    **dict.fromkeys(("divergence", "jsd_beta"), ("kd", "pl_kl", "on_policy")),
    **dict.fromkeys(("top_k", "target_samples"), ("kd_cached",)),
    **dict.fromkeys(("label_filters", "label_teachers", "cross_fit"), runs.ON_PSEUDO_LABELS),
    "temperature": ("kd", "pl_kl", "on_policy", "kd_cached"),
    "on_policy_share": ("on_policy",),
}


def parse_variant(base: runs.StudentRun, text: str) -> runs.StudentRun:
    """Return `base` with the fields in "<method> <field>=<value> ..."; label_<name> sets the decoding of the labels."""
    method, *pairs = text.split()
    known = [field.name for field in fields(base) if field.name not in FIXED]
    changes: dict = {"method": method, "variant": " ".join(pairs)}
    for name, value in parse_settings(pairs).items():
        default = getattr(base, name, None)
        kinds = {float: (int, float), type(None): (list,)}.get(type(default), (type(default),))
        if name == "learning_rate":
            if type(value) not in (int, float):
                raise InputError(f"ablation {text!r}: learning_rate cannot be {value!r}: write it like 0.001")
            changes["training"] = replace(base.training, learning_rate=float(value))
        elif name.startswith("label_") and name not in known and method in runs.METHODS:
            if method not in runs.ON_PSEUDO_LABELS:
                raise InputError(f"ablation {text!r}: {method} reads no pseudo-labels: use pl, or leave {name} out")
            changes["label_settings"] = changes.get("label_settings", base.label_settings) | {name[6:]: value}
        elif name not in known:
            raise InputError(f"ablation {text!r}: {name} is unknown: use {', '.join(known)}, learning_rate")
        elif method in runs.METHODS and method not in READERS.get(name, runs.METHODS):
            raise InputError(f"ablation {text!r}: {method} does not read {name}, {', '.join(READERS[name])} does")
        elif type(value) not in kinds:
            raise InputError(f"ablation {text!r}: {name} cannot be {value!r}: write it like {default!r}")
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
        try:
            found[name.strip()] = ast.literal_eval(written.strip())
        except (ValueError, SyntaxError):  # a plain word
            found[name.strip()] = written.strip()
    return found


def parse_decoding(texts: Sequence[str], teacher) -> dict:
    """Return changes to a teacher's decoding of texts like "num_beams=2"; another name is rejected."""
    found = parse_settings(texts)
    try:
        generation.decoding_settings(teacher.generation_config, **found)
    except TypeError as error:
        raise InputError(f"decoding: {error}") from error
    return found


def with_learning_rates(plan: Sequence[runs.StudentRun], texts: Sequence[str], teacher) -> list[runs.StudentRun]:
    """Return the runs, with the given peak for a shape, method or change: "6-1=0.004", "sft freeze_encoder=False=0.1".

    If several match, the last one counts; a variant that sets its own learning rate keeps it, and a rate of 0 becomes
    the usual one of the shape and method.
    """
    changed = [fine_tuning.at_usual_rate(run, teacher) for run in plan]
    for text in texts:
        name, _, written = text.rpartition("=")
        words, rate = set(name.split()), parse_settings([f"rate={written}"])["rate"]
        fits = [i for i, run in enumerate(plan) if words and words <= {run.method, run.shape, *run.variant.split()}]
        if not fits or type(rate) not in (int, float):
            raise InputError(f"learning rate {text!r} matches no student: write it as in kd 6-1=0.004")
        for i in fits:
            if "learning_rate=" not in plan[i].variant:
                own = replace(plan[i].training, learning_rate=float(rate))
                changed[i] = fine_tuning.at_usual_rate(replace(plan[i], training=own), teacher)
    return changed


def parse_ablation(base: runs.StudentRun, text: str) -> tuple[runs.StudentRun, runs.StudentRun]:
    """Return (changed run, run it is compared with) of an ablation's text."""
    changed, _, against = text.partition(" versus ")
    if not changed.strip():
        raise InputError(f"ablation {text!r} names no method: write for example 'kd hidden_weight=0 versus kd'")
    pair = parse_variant(base, changed), parse_variant(base, against or changed.split()[0])
    if pair[0] == pair[1]:
        raise InputError(f"ablation {text!r} changes nothing: name what to compare with, as in 'pl_gold versus pl'")
    return pair


def ablation_runs(base: runs.StudentRun, texts: Sequence[str], seeds: Sequence[int]) -> list[runs.StudentRun]:
    """Return every run that the ablations need, each once and for every seed."""
    if texts and not seeds:
        raise InputError("ablation_seeds is empty: name at least one, or leave ablation_list empty")
    found = [runs.with_seed(run, seed) for text in texts for run in parse_ablation(base, text) for seed in seeds]
    return list({run.name: run for run in found}.values())


def ablation_row(base: runs.StudentRun, text: str, tested: Mapping[str, Path], seeds: Sequence[int]) -> dict | None:
    """Return what a change did to ROUGE-2: paired difference, 95 % interval; None when no seed has both runs."""
    named = [[runs.with_seed(run, seed).name for run in parse_ablation(base, text)] for seed in seeds]
    pairs = [names for names in named if all(name in tested for name in names)]
    if not pairs:
        return None
    ours, theirs = (scores_over_seeds([tested[name] for name in names]) for names in zip(*pairs, strict=True))
    means = {"score": float(ours.mean(0).mean()), "versus": float(theirs.mean(0).mean())}
    return {"name": text, "documents": ours.shape[1], **means, **compare(ours, theirs)}


def ablation_rows(
    base: runs.StudentRun, texts: Sequence[str], trained: Mapping[str, Path], tested: Mapping[str, Path],
    seeds: Sequence[int], forecast: Sequence[dict],
) -> list[dict]:  # fmt: skip
    """Return one row per ablation: what it did to ROUGE-2, and the time and memory of its training step."""
    cost = {row["student"]: row for row in forecast}
    rows = []
    for text in texts:
        run = runs.with_seed(parse_ablation(base, text)[0], seeds[0])
        seconds = training_seconds(trained[run.name])
        step = {key: cost.get(run.group, {}).get(key) for key in ("ms/step", "activations (MB)")}
        rows.append({**ablation_row(base, text, tested, seeds), "seconds": seconds, **step})
    adjusted = holm([row["p_value"] for row in rows])
    return [row | {"p (Holm)": p_value} for row, p_value in zip(rows, adjusted, strict=True)]


def claim_rows(
    base: runs.StudentRun, tested: Mapping[str, Path], seeds: Sequence[int], kind: str
) -> list[dict]:  # fmt: skip
    """Return one row per claim of the papers and the first author's logs: confirmed, contradicted, or neither.

    Claims on another kind of data than `kind`, abstractive or extractive, are left out. Fewer than FEW_DOCUMENTS test
    none, as the interval of two that agree holds no zero. The file has more than what two runs of students can test;
    report/dashboard.py judges those from all pages.
    """
    claims = pd.read_csv(ASSETS / "claims.csv", dtype=str).query("page == '03'").fillna({"data": ""})
    claims = claims.loc[claims["data"].isin(["", kind]), ["claim", "comparison", "source"]]
    rows = []
    for claim in claims.to_dict("records"):
        test = ablation_row(base, claim["comparison"], tested, seeds)
        found = {"ROUGE-2": "", "seeds": "", "here": "not tested here"}
        if test and test["documents"] >= FEW_DOCUMENTS:
            interval = with_interval(*(test[name] for name in ("difference", "low", "high")), "+.2f")
            sign = effect_sign(test) * test["seeds_agree"]
            found = {"ROUGE-2": interval, "seeds": str(test["seeds"]), "here": VERDICTS[sign]}
        rows.append(claim | found)
    return rows
