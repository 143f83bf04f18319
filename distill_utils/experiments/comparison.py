"""What a comparison of students says: tidy rows, means over seeds, paired differences, cost, and the verdict.

Out of scope: training and testing (runs.py, evaluation/scoring.py). All but speed is read from finished artifacts.
"""

from __future__ import annotations

import csv
import math
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset

from distill_utils.artifacts import read_json
from distill_utils.evaluation import scoring, statistics
from distill_utils.evaluation.metrics import METRICS, evaluate_summaries, lead_words, rouge_scores, text_diagnostics
from distill_utils.evaluation.scoring import decoding_runs
from distill_utils.evaluation.statistics import effect_sign, paired_test
from distill_utils.experiments import runs
from distill_utils.models import students
from distill_utils.models.loading import ASSETS, load_model
from distill_utils.report.figures import method_label

FEW_DOCUMENTS = 50  # below, a table shows that the code runs and nothing else
NOT_MEASURED = ("provenance", "build_seconds")
RULES = ("lead_words", "object_name")
# Share of the references' word pairs that the source lacks: Narayan et al. (2018), table 1.
NOVEL_PAIRS = {"CNN/DailyMail": 0.54, "XSum": 0.83}
MEMORIZED = 1.15  # labels this many times closer to their references than test outputs were memorized


# ---------------------------------------------------------------------------------------------------------------- rows


def student_row(base: runs.StudentRun, shape: str, teacher) -> dict:
    """Return one row on a student's shape: layers kept and parameters in millions."""
    student, cut = runs.cut_student(runs.replace(base, shape=shape), teacher)
    counts = students.count_parameters(student)
    return {
        "student": shape,
        "encoder layers": ", ".join(map(str, cut["encoder_ids"])),
        "decoder layers": ", ".join(map(str, cut["decoder_ids"])),
        "parameters_m": counts["total"] / 1e6,
        "trainable (M)": counts["trainable"] / 1e6,
        "encoder shared": "yes" if cut["shared"] else "no",
    }


def label_row(folder: Path) -> dict:
    """Return one row on pseudo-labels: kept, closeness to the references, length, speed."""
    results, kept = read_json(folder / "results.json"), runs.labelled(folder)
    scores = rouge_scores(kept["summary"], kept["reference"])
    return {
        "written": results["counts"]["total"],
        "kept": results["counts"]["kept"],
        "empty": results["counts"]["empty"],
        "repeating": results["counts"]["repeating"],
        "rouge1": float(scores["rouge1"].mean()),
        "rouge2": float(scores["rouge2"].mean()),
        "words": float(np.mean([len(text.split()) for text in kept["summary"]])),
        "seconds": results["seconds"],
        "documents/s": results["documents_per_second"],
    }


def teacher_row(teacher, tested: Path) -> dict:
    """Return the teacher's results row."""
    total = students.count_parameters(teacher)["total"]
    measured = {k: v for k, v in read_json(tested / "results.json").items() if k not in NOT_MEASURED}
    return {"method": "teacher", "student": "", "parameters_m": round(total / 1e6, 3), **measured}


def object_name(identifier: str) -> str:
    """Return the words of the qualified name in an id: "pandas:DataFrame.drop_level" gives "data frame drop level"."""
    return " ".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+", identifier.partition(":")[2])).lower()


def rule_summaries(train: Dataset, test: Dataset, named: bool) -> dict[str, list[str]]:
    """Return the summaries of rules that cost nothing: lead words and, where ids carry it, the object's name.

    As many lead words as a reference in `train` has on average.
    """
    num_words = round(float(np.mean([len(text.split()) for text in train["summary"]])))
    rules = {"lead_words": lead_words(list(test["document"]), num_words)}
    return rules | ({"object_name": [object_name(i) for i in test["id"]]} if named else {})


def rule_rows(train: Dataset, test: Dataset, named: bool) -> list[dict]:
    """Return the results rows of the rules."""
    documents, references = list(test["document"]), list(test["summary"])
    rules = rule_summaries(train, test, named)
    return [
        {"method": name, "student": "", **evaluate_summaries(documents, summaries, references)[0]}
        for name, summaries in rules.items()
    ]


def decoding_row(name: str, setting: Mapping, tested: Path) -> dict:
    """Return one row of a decoding sweep: model, its method, the setting, quality, length and speed."""
    method, _, rest = name.partition("-")
    keys = ["rouge2", "rouge2_low", "rouge2_high", "words", "latency_ms", "throughput"]
    found = read_json(tested / "results.json")
    text = f"{setting['num_beams']} beam{'s' if setting['num_beams'] > 1 else ''}"
    text += f", penalty {setting['length_penalty']:g}" if "length_penalty" in setting else ""
    shape = rest.rpartition("-s")[0]
    row = {"name": method_label(method, shape), "method": method, "setting": text, **setting}
    return row | {key: found.get(key) for key in keys}


def reference_row(test: Dataset) -> dict:
    """Return the text diagnostics of the references themselves."""
    return {"name": "reference", **text_diagnostics(list(test["document"]), list(test["summary"]))}


def result_row(run: runs.StudentRun, trained: Path, tested: Path, label_seconds: float) -> dict:
    """Return one tidy row of a student: what was run, what it scored, how fast it is, what it cost."""
    training, test = read_json(trained / "results.json"), read_json(tested / "results.json")
    return {
        "method": run.method,
        "student": run.shape,
        "variant": run.variant,
        "seed": run.training.seed,
        "run": run.name,
        "parameters_m": round(training["parameters"]["total"] / 1e6, 3),
        "trainable_m": round(training["parameters"]["trainable"] / 1e6, 3),
        "num_train": training["num_train"],
        "steps": run.training.max_steps,
        "train_seconds": training["seconds"],
        "label_seconds": label_seconds if run.method in runs.ON_PSEUDO_LABELS else 0.0,
        "validation_ce": training["final"]["validation_ce"],
        "validation_kl": training["final"]["validation_kl"],
        **{key: value for key, value in test.items() if key not in NOT_MEASURED},
    }


def time_students(
    teacher, tokenizer, plan: Sequence[runs.StudentRun], trained: Mapping[str, Path],
    documents: Sequence[str], *, max_source_length: int, prefix: str = "", num_new_tokens: int = 16,
    **generation_settings,
) -> dict[tuple[str, str, str], dict[str, float]]:  # fmt: skip
    """Return latency_ms and ms_per_token of the teacher and of one student of each method, shape and variant.

    The keys are (method, shape, variant), the teacher's ("teacher", "", ""). All models are in memory and take turns,
    because times that were taken minutes apart differ by the machine's noise more than models do.
    """
    models = {("teacher", "", ""): teacher}
    for run in plan:
        if (run.method, run.shape, run.variant) not in models:
            student = load_model(trained[run.name] / "student")[0]
            models[run.method, run.shape, run.variant] = student.to(teacher.device)
    options = {"max_source_length": max_source_length, "prefix": prefix}
    timed = {
        (key, name): function
        for key, model in models.items()
        for name, function in decoding_runs(model, tokenizer, num_new_tokens, options, **generation_settings).items()
    }
    found = scoring.interleaved_latency_ms(timed, documents, teacher.device)
    per_token = {key: found[key, "ms_per_token"] / num_new_tokens for key in models}
    return {key: {"latency_ms": found[key, "latency_ms"], "ms_per_token": per_token[key]} for key in models}


def add_speed(rows: list[dict], times: Mapping[tuple[str, str, str], Mapping[str, float]]) -> None:
    """Replace latency and time per token of the rows by those taken in turns, and add `speedup` over the teacher.

    `times` is what `time_students` returned. Students of one shape are one architecture and get one time per
    token, the median of theirs; one that was not timed itself has no latency, which depends on what it writes.
    """
    by_shape: dict[str, list[float]] = {}
    for (_, shape, _), time in times.items():
        by_shape.setdefault(shape, []).append(time["ms_per_token"])
    teacher = by_shape[""][0]
    for row in rows:
        key = (row["method"], row["student"], row.get("variant") or "")
        if row.get("ms_per_token") and row["student"] in by_shape:  # rules such as lead words take no time
            row["latency_ms"] = times.get(key, {}).get("latency_ms")
            row["ms_per_token"] = round(float(np.median(by_shape[row["student"]])), 4)
            row["speedup"] = round(teacher / row["ms_per_token"], 3)


def mean_over_seeds(rows: Sequence[dict], tested: Mapping[str, Path], teacher_test: Path) -> list[dict]:
    """Return one row for each method, shape and variant; scores are first averaged over seeds, document by document.

    Intervals and the paired test against the teacher are then over documents, as for a single seed.
    """
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["student"], row.get("variant", "")), []).append(row)
    means = []
    for (method, shape, variant), members in groups.items():
        numbers = [k for k, v in members[0].items() if isinstance(v, int | float) and k != "seed"]
        mean = members[0] | {k: float(np.mean([row[k] for row in members if row.get(k) is not None])) for k in numbers}
        mean.pop("seed", None)
        mean |= {"name": " ".join(filter(None, (method_label(method, shape), variant))), "seeds": len(members)}
        folders = [tested[row["run"]] for row in members if "run" in row]
        if folders:
            teacher = scoring.read_scores(teacher_test)
            for metric in METRICS:
                scores = _mean_scores(folders, metric)
                mean[metric], mean[f"{metric}_low"], mean[f"{metric}_high"] = statistics.bootstrap_interval(scores)
                mean[f"{metric}_p_value"] = paired_test(scores, teacher[metric])["p_value"]
        mean["p_value"] = mean.get("rouge2_p_value")
        mean["ROUGE-2 95 %"] = f"{mean['rouge2_low']:.2f} – {mean['rouge2_high']:.2f}"
        means.append(mean)
    return means


def _mean_scores(folders: Sequence[Path], metric: str) -> np.ndarray:
    return np.mean([scoring.read_scores(folder)[metric] for folder in folders], axis=0)


def compare_methods(
    plan: Sequence[runs.StudentRun], tested: Mapping[str, Path], baseline: str = "sft", metric: str = "rouge2"
) -> list[dict]:
    """Return, for each shape, the paired difference of every method from the baseline; empty without the baseline.

    Scores are averaged over seeds first. Interval: 95 % bootstrap over documents of the mean difference.
    """
    folders: dict[tuple[str, str], list[Path]] = {}
    for run in plan:
        folders.setdefault((run.method, run.shape), []).append(tested[run.name])
    rows = []
    for (method, shape), found in folders.items():
        if method == baseline or (baseline, shape) not in folders:
            continue
        test = paired_test(_mean_scores(found, metric), _mean_scores(folders[baseline, shape], metric))
        rows.append({"name": method_label(method, shape), "student": shape, **test})
    return rows


def cost_table(
    plan: Sequence[runs.StudentRun], trained: Mapping[str, Path], label_seconds: float, forecast: Sequence[dict]
) -> list[dict]:
    """Return measured beside predicted training seconds of each run, and what the teacher added."""
    predicted = {row["student"]: row for row in forecast}
    rows = []
    for run in plan:
        result = read_json(trained[run.name] / "results.json")
        decoder = run.method in ("kd", "pl_kl", "on_policy")
        step = predicted[run.group]
        rows.append(
            {
                "name": run.name,
                "train_seconds": result["seconds"],
                "predicted_seconds": step["predicted_seconds"],
                "ms/step": step["ms/step"],
                "activations (MB)": step["activations (MB)"],
                "label_seconds": label_seconds if run.method in runs.ON_PSEUDO_LABELS else 0.0,
                "teacher passes": run.training.max_steps * run.training.batch_size if decoder else 0,
                "examples/s": result["final"]["examples_per_second"],
                "padding (%)": 100 * result["final"]["padding"],
            }
        )
    return rows


def best_students(means: Sequence[dict], plan: Sequence[runs.StudentRun]) -> list[str]:
    """Return the run name of the best student of each shape by ROUGE-2 (first seed), the best of all first."""
    ranked = sorted((row for row in means if row["method"] in runs.METHODS), key=lambda row: -row["rouge2"])
    best: dict[str, str] = {}
    for row in ranked:
        name = next(r.name for r in plan if (r.method, r.shape) == (row["method"], row["student"]))
        best.setdefault(row["student"], name)
    return list(best.values())


def side_by_side(teacher_test: Path, tested: Mapping[str, Path], num: int, seed: int) -> list[dict]:
    """Return `num` random test documents with the reference and what the teacher and each student wrote."""
    teacher = scoring.read_predictions(teacher_test)
    others = {name: scoring.read_predictions(folder) for name, folder in tested.items()}
    chosen = random.Random(seed).sample(range(len(teacher)), min(num, len(teacher)))
    return [
        {
            "document": teacher[i]["document"],
            "reference": teacher[i]["reference"],
            "teacher": teacher[i]["prediction"],
            **{name: rows[i]["prediction"] for name, rows in others.items()},
        }
        for i in chosen
    ]


def published(dataset: str, teacher: str) -> list[dict]:
    """Return published figures on this data set and teacher (hub names), preferred sources first; [] without any."""
    with open(ASSETS / "published.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if (row["dataset"], row["teacher"]) == (dataset, teacher)]
    numbers = (*METRICS, "length", "ms_per_document", "speedup", "parameters_m")
    return [row | {name: float(row[name]) if row[name] else None for name in numbers} for row in rows]


def beside_published(means: Sequence[dict], dataset: str, teacher: str) -> list[dict]:
    """Return one row for each result that has a published figure of the same method and shape."""
    found: dict[tuple, dict] = {}
    for row in published(dataset, teacher):
        if row["rouge2"] is not None:
            found.setdefault((row["method"], row["student"]), row)
    pairs = [(ours, found.get((ours["method"], ours["student"]))) for ours in means if not ours.get("variant")]
    return [
        {"name": ours["name"], "rouge2": ours["rouge2"], "ROUGE-2 (published)": theirs["rouge2"],
         "rougeL": ours["rougeL"], "ROUGE-L (published)": theirs["rougeL"],
         "times faster a document (published)": theirs["speedup"], "source": theirs["source"], "note": theirs["note"]}
        for ours, theirs in pairs if theirs
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- verdict


def verdict(means: Sequence[dict], versus: Sequence[dict], num_test: int, num_seeds: int, max_steps: int) -> str:
    """Return which student to take, what it costs and what this run cannot say, as Markdown computed from the results.

    `means` are the rows of `mean_over_seeds`, `versus` those of `compare_methods`.
    """
    teacher = next(row for row in means if row["method"] == "teacher")
    ranked = sorted((row for row in means if row["method"] in runs.METHODS), key=lambda row: -row["rouge2"])
    best, fastest = ranked[0], min(ranked, key=lambda row: row["ms_per_token"])
    share = 100 * best["rouge2"] / max(teacher["rouge2"], 1e-9)
    size = 100 * best["parameters_m"] / teacher["parameters_m"]
    lines = []
    if num_test < FEW_DOCUMENTS:
        lines.append(f"**Smoke run:** {num_test} test documents show that the code runs, nothing else.")
    lines.append(
        f"**Take {best['name']}**: {best['speedup']:.2f} times faster per token and {share:.0f} % of the teacher's "
        f"ROUGE-2 ({best['rouge2']:.2f}, {best['rouge2_low']:.2f} to {best['rouge2_high']:.2f}, against "
        f"{teacher['rouge2']:.2f}), with {size:.0f} % of its parameters. "
        + ("The gap to the teacher is real" if best["rouge2_p_value"] < 0.05 else "No gap to the teacher is shown")
        + f" (paired test, p = {best['rouge2_p_value']:.3f})."
    )
    if fastest["student"] != best["student"]:
        peer = max((row for row in ranked if row["student"] == fastest["student"]), key=lambda row: row["rouge2"])
        lines.append(f"Faster still: {peer['name']}, {peer['speedup']:.2f} times, at {peer['rouge2']:.2f} ROUGE-2.")
    lines += [_against_sft(shape, versus, num_test) for shape in dict.fromkeys(row["student"] for row in versus)]
    rule = max((row for row in means if row["method"] in RULES), key=lambda row: row["rouge2"], default=None)
    worse = [row["name"] for row in ranked if rule and row["rouge2"] < rule["rouge2"]]
    if worse:
        lines.append(
            f"**Not worth their cost as they are**: {', '.join(worse)} score below a rule that costs nothing "
            f"({rule['name']}, {rule['rouge2']:.2f} ROUGE-2)."
        )
    seeds = "one seed" if num_seeds == 1 else f"{num_seeds} seeds"
    scope = f"{num_test} test documents, {seeds}, {max_steps} updates a student."
    lines.append(scope if num_seeds >= 3 else f"{scope} A demonstration: a ranking needs three seeds.")
    return "\n\n".join(lines)


def _against_sft(shape: str, versus: Sequence[dict], num_test: int) -> str:
    rows = [row for row in versus if row["student"] == shape]
    told = [statistics.format_comparison(row["name"], row, "SFT") for row in rows if effect_sign(row)]
    if told:
        return f"{shape}: {'; '.join(told)}."
    best = max(rows, key=lambda row: row["difference"])
    needed = documents_needed(best, num_test)
    if best["difference"] <= 0 or needed is None:
        return f"{shape}: no method scores above SFT, and none is cheaper."
    return (
        f"{shape}: no method can be separated from SFT, the cheapest; the largest gain is that of {best['name']} "
        f"({statistics.format_interval(best)}), and about {needed:,} test documents would settle one of that size."
    )


def documents_needed(row: Mapping, num_documents: int) -> int | None:
    """Return about how many test documents would separate a paired difference of this size from zero."""
    if row["difference"] == 0:
        return None
    return math.ceil(num_documents * ((row["high"] - row["low"]) / 2 / abs(row["difference"])) ** 2)


def signal_rows(
    novel_2gram: float | None, initial: Sequence[Mapping], labels: Mapping | None, teacher_rouge2: float
) -> list[dict]:
    """Return rows signal, measured, reading: what can be known before a student is trained.

    `novel_2gram` is that of the references, `initial` the checks of the untrained students, `labels` the facts of the
    pseudo-labels of the training documents, `teacher_rouge2` the teacher's on test documents.
    """
    rows = []
    if novel_2gram is not None:
        near = min(NOVEL_PAIRS, key=lambda name: abs(NOVEL_PAIRS[name] - novel_2gram))
        advice = "SFT is enough" if near == "CNN/DailyMail" else "PL or KD beats SFT"
        found = f"{100 * novel_2gram:.0f} % new word pairs", f"nearer to {near}, where the paper says: {advice}"
        rows.append(("abstractiveness of the references", *found))
    for row in initial:
        weak = f"{100 * row['empty']:.0f} % of its first outputs are empty: it starts from little"
        reading = weak if row["empty"] > 0.5 else "starts as a weak copy: short training can do"
        rows.append((f"initial gap, {row['student']}", f"KL {row['kl_loss']:.2f} nats per token", reading))
    if labels:
        memorized = labels["rouge2"] > MEMORIZED * max(teacher_rouge2, 1e-9)
        found = f"{labels['rouge2']:.1f} ROUGE-2 on training, {teacher_rouge2:.1f} on test documents"
        reading = "the teacher has memorized references: labels may teach them again"
        rows.append(
            ("quality of the pseudo-labels", found, reading if memorized else "labels are as good as test outputs")
        )
    return [dict(zip(("signal", "measured", "reading"), row, strict=True)) for row in rows]
