"""What a comparison of students says: tidy rows, means over seeds, paired differences, cost, and the verdict.

Out of scope: training students (runs.py) and testing one (evaluation/scoring.py).
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset

from distill_utils.artifacts import read_json
from distill_utils.evaluation import scoring, statistics
from distill_utils.evaluation.metrics import METRICS, evaluate_summaries, lead_words, rouge_scores
from distill_utils.experiments import runs
from distill_utils.models import students
from distill_utils.models.loading import ASSETS, load_model
from distill_utils.report.dashboard import FEW_DOCUMENTS
from distill_utils.report.names import method_label, row_with_interval, run_label, with_interval
from distill_utils.training.checkpoints import read_history

RULES = ("lead_words", "object_name")
COSTS = ("train_seconds", "label_seconds", "states_seconds")  # of a student; what the teacher makes is made once
# Share of the references' word pairs that the source lacks: Narayan et al. (2018), table 1.
NOVEL_PAIRS = {"CNN/DailyMail": 0.54, "XSum": 0.83}
MEMORIZED = 1.15  # the teacher memorized references if its labels are this many times closer to them than test outputs


# ---------------------------------------------------------------------------------------------------------------- rows


def shape_row(base: runs.StudentRun, shape: str, teacher) -> dict:
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


def labels_row(folder: Path) -> tuple[dict, np.ndarray]:
    """Return one row on pseudo-labels (kept, closeness to the references, length, speed), and the ROUGE-2 of each."""
    results, kept = read_json(folder / "results.json"), runs.labelled(folder)
    counts, scores = results["counts"], rouge_scores(kept["summary"], kept["reference"])
    row = {
        "written": counts["total"],
        **{name: counts[name] for name in ("kept", "empty", "repeating")},
        "rouge1": float(scores["rouge1"].mean()),
        "rouge2": float(scores["rouge2"].mean()),
        "words": float(np.mean([len(text.split()) for text in kept["summary"]])),
        "seconds": results["seconds"],
        "documents/s": results["documents_per_second"],
    }
    return row, scores["rouge2"]


def teacher_row(teacher, tested: Path) -> dict:
    """Return the teacher's results row."""
    millions = round(students.count_parameters(teacher)["total"] / 1e6, 3)
    return {"method": "teacher", "student": "", "parameters_m": millions, **_measured(tested)}


def _measured(tested: Path) -> dict:
    found = read_json(tested / "results.json")
    return {key: value for key, value in found.items() if key not in ("provenance", "build_seconds")}


def object_name(identifier: str) -> str:
    """Return the words of the qualified name in an id: "pandas:DataFrame.drop_level" gives "data frame drop level"."""
    return " ".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+", identifier.partition(":")[2])).lower()


def rule_summaries(train: Dataset, test: Dataset, named: bool) -> dict[str, list[str]]:
    """Return the summaries of the rule baselines: as many lead words as references have, the object's name."""
    num_words = round(float(np.mean([len(text.split()) for text in train["summary"]])))
    rules = {"lead_words": lead_words(list(test["document"]), num_words)}
    return rules | ({"object_name": [object_name(i) for i in test["id"]]} if named else {})


def rule_rows(train: Dataset, test: Dataset, named: bool) -> list[dict]:
    """Return the results rows of the rules."""
    documents, references = list(test["document"]), list(test["summary"])
    return [
        {"method": name, "student": "", **evaluate_summaries(documents, summaries, references)[0]}
        for name, summaries in rule_summaries(train, test, named).items()
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


def result_row(
    run: runs.StudentRun, trained: Path, tested: Path, label_seconds: float, teacher_test: Path | None = None
) -> dict:
    """Return one tidy row of a student: what was run, what it scored, how fast it is, what it cost.

    With the teacher's test also the share of its ROUGE-2 that this one seed keeps, as of `statistics.share_of`.
    """
    training = read_json(trained / "results.json")
    scores = [scoring.read_scores(folder)["rouge2"] for folder in (tested, teacher_test) if folder]
    best = training.get("best_step")  # with patience the student has its best weights, not the last
    kept = next((row for row in read_history(trained) if row["step"] == best), training["final"])
    return {
        "method": run.method,
        "student": run.shape,
        "variant": run.variant,
        "seed": run.training.seed,
        "run": run.name,
        "parameters_m": round(training["parameters"]["total"] / 1e6, 3),
        "trainable_m": round(training["parameters"]["trainable"] / 1e6, 3),
        "num_train": training["num_train"],
        "steps": training.get("trained_steps", run.training.max_steps),
        "learning_rate": run.training.learning_rate,
        "train_seconds": training_seconds(trained),
        "states_seconds": training.get("states_seconds"),
        "label_seconds": label_seconds if run.method in runs.ON_PSEUDO_LABELS else 0.0,
        "validation_ce": kept["validation_ce"],
        "validation_kl": kept["validation_kl"],
        **_measured(tested),
        **(statistics.share_of(*scores) if teacher_test else {}),
    }


def training_seconds(trained: Path) -> float:
    """Return what the updates of a student took, those before a resume and of its trunk included."""
    return read_history(trained)[-1]["seconds"]


def add_speed(
    rows: list[dict], teacher, tokenizer, plan: Sequence[runs.StudentRun], trained: Mapping[str, Path],
    documents: Sequence[str], *, max_source_length: int, prefix: str = "", num_new_tokens: int = 16,
    **generation_settings,
) -> None:  # fmt: skip
    """Replace latency_ms and ms_per_token of the rows by those of models that take turns, and add `speedup`.

    In memory together are the teacher and one student of each method, shape and variant of the plan, because times that
    were taken minutes apart differ by the machine's noise more than models do. Students of one shape are one
    architecture and get one time per token, the median of theirs; a row outside of the plan gets no latency, which
    depends on what is written.
    """
    models = {("teacher", "", ""): teacher}
    for run in plan:
        if (key := (run.method, run.shape, run.variant)) not in models:
            models[key] = load_model(trained[run.name] / "student")[0].to(teacher.device)
    options, timed = {"max_source_length": max_source_length, "prefix": prefix}, {}
    for key, model in models.items():
        decoded = scoring.decoding_runs(model, tokenizer, num_new_tokens, options, **generation_settings)
        timed |= {(key, name): function for name, function in decoded.items()}
    times = scoring.interleaved_latency_ms(timed, documents, teacher.device, repeats=9)  # three still varied by a fifth
    per_token: dict[str, list[float]] = {}
    for key in models:
        per_token.setdefault(key[1], []).append(times[key, "ms_per_token"] / num_new_tokens)
    for row in rows:
        if row.get("ms_per_token") and row["student"] in per_token:  # rules such as lead words take no time
            key = (row["method"], row["student"], row.get("variant") or "")
            row["latency_ms"] = times.get((key, "latency_ms"))
            row["ms_per_token"] = round(float(np.median(per_token[row["student"]])), 4)
            row["speedup"] = round(per_token[""][0] / row["ms_per_token"], 3)


def mean_over_seeds(rows: Sequence[dict], tested: Mapping[str, Path], teacher_test: Path) -> list[dict]:
    """Return one row for each method, shape and variant: means over seeds, and intervals (`bootstrap_interval`).

    Students also get the paired test against the teacher, in ROUGE-2 with its interval, and `share_of` the teacher's.
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
                scores = scores_over_seeds(folders, metric)
                mean[metric], mean[f"{metric}_low"], mean[f"{metric}_high"] = statistics.bootstrap_interval(scores)
                test = statistics.compare(scores, teacher[metric])
                mean[f"{metric}_p_value"] = test["p_value"]
                mean |= {key: test[key] for key in ("difference", "low", "high") if metric == "rouge2"}
            mean |= statistics.share_of(scores_over_seeds(folders), teacher["rouge2"])
            mean["at least 95 %"] = _at_least(mean, scores.shape[1])
        mean["p_value"] = mean.get("rouge2_p_value")
        mean["ROUGE-2"] = row_with_interval(mean, "rouge2")
        means.append(mean)
    return means


def scores_over_seeds(folders: Sequence[Path], metric: str = "rouge2") -> np.ndarray:
    """Return the scores of test artifacts, (seeds, documents)."""
    return np.array([scoring.read_scores(folder)[metric] for folder in folders])


def compare_methods(plan: Sequence[runs.StudentRun], tested: Mapping[str, Path]) -> list[dict]:
    """Return, for each shape, the paired difference in ROUGE-2 of every two methods, those from SFT first.

    A row also has `share_of`: the share of the other's ROUGE-2.
    """
    folders: dict[str, dict[str, list[Path]]] = {}
    for run in sorted(plan, key=lambda run: run.method != "sft"):
        folders.setdefault(run.shape, {}).setdefault(method_label(run.method, run.shape), []).append(tested[run.name])
    rows = []
    for shape, methods in folders.items():
        for other, name in itertools.combinations(methods, 2):
            pair = [scores_over_seeds(methods[label]) for label in (name, other)]
            row = {"name": name, "versus": other, "student": shape, "pair": f"{name} versus {other}"}
            row |= statistics.compare(*pair) | statistics.share_of(*pair)
            rows.append(row | {"at least 95 %": _at_least(row, pair[0].shape[1])})
    return rows


def _at_least(test: Mapping, num_documents: int) -> str:
    return "too few documents" if num_documents < FEW_DOCUMENTS else ", ".join(statistics.format_share(test))


def cost_table(
    plan: Sequence[runs.StudentRun], trained: Mapping[str, Path], label_seconds: float, forecast: Sequence[dict]
) -> list[dict]:
    """Return measured beside predicted training seconds of each run, and what the teacher added."""
    predicted = {row["student"]: row for row in forecast}
    rows = []
    for run in plan:
        result, step = read_json(trained[run.name] / "results.json"), predicted[run.group]
        stored = ["decoder"] if run.cache_states and result["shared_encoder"] and not run.teacher_dropout else []
        stored = result.get("stored", stored)  # results from before do not say
        decoder = run.method == "on_policy" or (run.method in ("kd", "pl_kl") and "decoder" not in stored)
        steps = result.get("trained_steps", run.training.max_steps)
        rows.append(
            {
                "name": run_label(run.name),
                "train_seconds": training_seconds(trained[run.name]),
                "predicted_seconds": step["predicted_seconds"],
                "ms/step": step["ms/step"],
                "label_seconds": label_seconds if run.method in runs.ON_PSEUDO_LABELS else 0.0,
                "states_seconds": result.get("states_seconds"),
                "teacher passes": steps * run.training.batch_size if decoder else 0,
                "examples/s": result["final"]["examples_per_second"],
                "padding (%)": 100 * result["final"]["padding"],
            }
        )
    return rows


def recommended(means: Sequence[dict], versus: Sequence[Mapping]) -> list[dict]:
    """Return the row of the student to take, then those of the best student of every other shape (`choose_student`).

    Taken is the fastest of those shown to keep at least 95 % of the teacher's ROUGE-2, and the best where none is.
    """
    ranked = sorted((row for row in means if row["method"] in runs.METHODS), key=lambda row: -row["rouge2"])
    chosen = [choose_student(means, versus, shape) for shape in dict.fromkeys(row["student"] for row in ranked)]
    equal = [row for row in chosen if row["not_worse_5_percent"]]
    take = max(equal, key=lambda row: row["speedup"]) if equal else chosen[0]
    return [take, *(row for row in chosen if row is not take)]


def beside_published(means: Sequence[dict], dataset: str, teacher: str) -> pd.DataFrame:
    """Return one row for each result with a published figure; data set and teacher are known by their hub names."""
    published = pd.read_csv(ASSETS / "published.csv").fillna({"student": ""})
    published = published[(published["dataset"] == dataset) & (published["teacher"] == teacher)]
    published = published.dropna(subset="rouge2").drop_duplicates(["method", "student"])  # preferred sources come first
    rouge2, rouge_l, speedup = "ROUGE-2 (published)", "ROUGE-L (published)", "speed-up per document (published)"
    published = published.rename(columns={"rouge2": rouge2, "rougeL": rouge_l, "speedup": speedup})
    ours = pd.DataFrame([row for row in means if not row.get("variant")])
    both = ours[["method", "student", "name", "rouge2", "rougeL"]].merge(published, on=["method", "student"])
    return both[["name", "rouge2", rouge2, "rougeL", rouge_l, speedup, "source", "note"]].fillna({"note": ""})


# ------------------------------------------------------------------------------------------------- signals and verdict


def signal_rows(
    novel_2gram: float | None, initial: Sequence[Mapping], labels: np.ndarray | None, tested: np.ndarray
) -> list[dict]:
    """Return rows signal, measured, reading: what is known before a student is trained, and what it suggests.

    `novel_2gram` is that of the references, `initial` holds `check_initial_student` of each shape, `labels` the ROUGE-2
    of each pseudo-label of a training document, `tested` that of each of the teacher's summaries of test documents.
    """
    found = []
    if novel_2gram is not None:
        near = min(NOVEL_PAIRS, key=lambda name: abs(NOVEL_PAIRS[name] - novel_2gram))
        advice = "SFT is enough" if near == "CNN/DailyMail" else "PL or KD beats SFT"
        reading = f"nearer to {near}, where the paper says: {advice}"
        found.append(("abstractiveness of the references", f"{100 * novel_2gram:.0f} % new word pairs", reading))
    for row in initial:
        reading = "a weak copy: short training can do" if row["empty"] <= 0.5 else "mostly empty outputs"
        found.append((f"initial gap, {row['student']}", f"KL {row['kl_loss']:.2f} nats per token", reading))
    if labels is not None and len(labels):
        ratio = statistics.ratio_of_means(labels, tested)
        reading = "references memorized by the teacher" if ratio[1] > MEMORIZED else "not decided by these documents"
        reading = "as close to references as test outputs" if ratio[2] <= MEMORIZED else reading
        means = f"{labels.mean():.1f} ROUGE-2 on training, {tested.mean():.1f} on test documents"
        measured = f"{means}, ratio {with_interval(*ratio)}; memorized above {MEMORIZED}"
        if min(len(labels), len(tested)) < FEW_DOCUMENTS or not tested.any():
            measured, reading = means, "too few documents to tell, or a teacher that scores nothing"
        found.append(("quality of the pseudo-labels", measured, reading))
    return [dict(zip(("signal", "measured", "reading"), row, strict=True)) for row in found]


def choose_student(means: Sequence[dict], versus: Sequence[Mapping], shape: str) -> dict:
    """Return the row of the method to take for a shape: the cheapest that is shown not to be worse than the best.

    The best is the one shown to beat SFT by most, SFT where none is, without SFT that of the highest ROUGE-2. Not worse
    is by `share_of`, so that a negligible gain does not justify a more expensive method.
    """
    rows = {row["name"]: row for row in means if row["method"] in runs.METHODS and row["student"] == shape}
    sft = method_label("sft", shape)
    better = [test for test in versus if test["versus"] == sft and statistics.effect_sign(test) > 0]
    best = sft if sft in rows else max(rows, key=lambda name: rows[name]["rouge2"])
    if better:
        best = max(better, key=lambda test: test["difference"])["name"]
    near = {test["name"] for test in versus if test["versus"] == best and test["not_worse_5_percent"]}
    tied = [test for test in versus if test["name"] == best and test["share"]]
    near |= {test["versus"] for test in tied if test["share_high"] < 1 / (1 - statistics.MARGIN)}
    return min((rows[name] for name in {best} | near), key=lambda row: sum(row.get(each) or 0 for each in COSTS))


def verdict(
    means: Sequence[dict], versus: Sequence[Mapping], histories: Mapping[str, Sequence[Mapping]], *,
    num_test: int, whole_test: bool, seeds: int, max_steps: int,
) -> str:  # fmt: skip
    """Return which student to take, how sure that is and what limits it, as one paragraph of Markdown.

    The tables beside it have the other students and methods.
    """
    if num_test < FEW_DOCUMENTS:
        return smoke_note(num_test)
    take, *others = recommended(means, versus)
    says = f"{statistics.format_share(take)[0]} of the teacher's ROUGE-2"
    says += ", shown to be at least 95 %" if take["not_worse_5_percent"] else ""
    says += f"; {statistics.how_sure(take)}"
    lines = [f"**Take {take['name']}**: {take['speedup']:.2f} times as fast per token and {says}."]

    rule = max((row for row in means if row["method"] in RULES), key=lambda row: row["rouge2"], default=None)
    if rule and take["rouge2"] < rule["rouge2"]:
        lines.append(f"**It scores below {rule['name']}**, a rule that costs nothing.")
    tests = [test for test in versus if test["versus"] == method_label("sft", take["student"])]
    if tests:
        best = max(tests, key=lambda test: test["difference"])
        names = [test["name"] for test in tests if statistics.effect_sign(test) > 0]
        none = f"No other signal is shown to beat {tests[0]['versus'] if others else 'SFT'}."
        lines.append(f"Shown to beat SFT: {', '.join(names)}." if names else none)
        if not names and best["difference"] > 0:
            # Intervals narrow with the root; 2.04: four of five such runs would show the difference, not one of two.
            times = float(f"{2.04 * ((best['high'] - best['low']) / 2 / best['difference']) ** 2:.2g}")
            more = "test documents and seeds" if seeds > 1 else "test documents"
            times = f"about {times:,g}" if times <= 20 else "over 20"
            lines[-1] = lines[-1][:-1] + f"; {best['name']} would need {times} times as many {more}."

    others = [method_label("sft", row["student"]) for row in others]
    better = [test["name"] for test in versus if test["versus"] in others and statistics.effect_sign(test) > 0]
    if better:
        lines.append(f"In other shapes, shown to beat SFT: {', '.join(better)}.")

    own = [history for name, history in histories.items() if name.rpartition(" ")[2] == take["student"]]
    reasons = {
        statistics.seeds_in_words(seeds): seeds < 3,
        f"only {num_test:,} of the test documents": not whole_test,
        f"students that still gained after {max_steps:,} updates": any(map(still_gains, own)),
    }
    missing = ", ".join(reason for reason, holds in reasons.items() if holds)
    budget = statistics.budget_in_words(max_steps, seeds, f"{num_test:,} test documents")
    return " ".join([*lines, f"It is a demonstration: {missing}." if missing else f"{budget}."])


def still_gains(history: Sequence[Mapping]) -> bool:
    """Return whether the validation loss was lowest at the end; of a cooldown, before the rate fell (it drops then)."""
    rows = [row for row in history if "validation_ce" in row]
    constant = [row for row in rows if row["lr"] == max(each["lr"] for each in rows)]
    losses = [row["validation_ce"] for row in (constant if len(constant) > 1 else rows)]
    return losses.index(min(losses)) == len(losses) - 1  # a loss as low as before is no gain


def smoke_note(number: int, what: str = "test documents") -> str:
    """Return the note for a verdict with too few test documents."""
    return f"**Smoke run:** {number} {what} show that the code runs, nothing else."
