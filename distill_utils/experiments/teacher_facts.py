"""Facts about a corpus and its teacher: rows of tables and the verdict of notebook 1.

Out of scope: measuring (evaluation/, planning/plan.py) and drawing (report/figures.py).
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset

from distill_utils.artifacts import read_json
from distill_utils.evaluation import metrics, scoring, statistics
from distill_utils.evaluation.metrics import METRICS
from distill_utils.experiments.comparison import FEW_DOCUMENTS, decoding_row, smoke_note
from distill_utils.models import students
from distill_utils.models.loading import model_folder
from distill_utils.report.names import method_label, row_with_interval, with_interval
from distill_utils.report.style import HEADINGS

DIAGNOSTICS = {  # key of text_diagnostics -> name in the table; shares are shown in %
    "words": "words per summary",
    "different": "different summaries (%)",
    "empty": "empty (%)",
    "repeating": "repeating (%)",
    "novel_1gram": "novel words (%)",
    "novel_2gram": "novel word pairs (%)",
    "novel_3gram": "novel word triples (%)",
    "coverage": "coverage (%)",
    "density": "density",
    "numbers_supported": "numbers in source (%)",
    "names_supported": "names in source (%)",
}

# ------------------------------------------------------------------------------------------------------------- corpus


def split_sizes(splits: Mapping[str, Dataset]) -> list[dict]:
    """Return one row per split: pairs, distinct sources, and sources that occur verbatim in train."""
    known = set(splits["train"]["document"])
    return [
        {
            "split": name,
            "pairs": len(rows),
            "different sources": len(set(rows["document"])),
            "sources also in train": None if name == "train" else sum(text in known for text in rows["document"]),
        }
        for name, rows in splits.items()
    ]


def package_shares(splits: Mapping[str, Dataset], num: int = 8) -> list[dict]:
    """Return the largest packages' shares of train and test, by the ids of `pydocs`."""
    counts = {
        split: Counter(re.split("[.:]", i, maxsplit=1)[0] for i in splits[split]["id"]) for split in ("train", "test")
    }
    largest = [name for name, _ in counts["train"].most_common(num)]
    return [
        {"package": name, **{f"{split} (%)": 100 * count[name] / count.total() for split, count in counts.items()}}
        for name in largest
    ]


def copying(pairs: Dataset) -> tuple[list[float], list[float]]:
    """Return coverage and density of every reference with a word."""
    rows = zip(pairs["document"], pairs["summary"], strict=True)
    each = [metrics.text_diagnostics([source], [reference]) for source, reference in rows]
    coverage, density = ([row[key] for row in each if row[key] is not None] for key in ("coverage", "density"))
    return coverage, density


# ------------------------------------------------------------------------------------------------------------ teacher


def part_rows(model) -> list[dict]:
    """Return one row per part of a model: layers, parameters in millions and their share."""
    counts = students.count_parameters(model)
    depths = {"encoder": len(students.encoder_layers(model)), "decoder": len(students.decoder_layers(model))}
    parts = {part: counts[part] for part in ("encoder", "decoder", "embeddings", "total")}
    return [
        {"part": part, "layers": depths.get(part), "parameters_m": n / 1e6, "share (%)": 100 * n / counts["total"]}
        for part, n in parts.items()
    ]


def read_card(teacher: str) -> dict:
    """Return a shipped or local teacher's model card, {} when it has none."""
    path = model_folder(teacher) / "card.json"
    return read_json(path) if path.is_file() else {}


def stage_rows(card: Mapping) -> list[dict]:
    """Return one row per training stage of a model card; settings and other nested values stay in the card."""
    return [{key: value for key, value in stage.items() if not isinstance(value, dict)} for stage in card["stages"]]


def card_rows(card: Mapping) -> list[dict]:
    """Return what a model card says beside its training stages, as rows of name and text."""
    rouge = card.get("rouge", {})
    scores = [f"{HEADINGS.get(metric, metric)} {with_interval(*ends)}" for metric, ends in rouge.items()]
    decoding = card.get("decoding", "–")
    if isinstance(decoding, dict):
        decoding = ", ".join(f"{name} {value}" for name, value in decoding.items())
    facts = {"made by": card.get("command"), "commit": card.get("commit"), "corpus": card.get("corpus_fingerprint")}
    facts |= {"scores": "; ".join(scores), "test documents": card.get("num_test"), "decoding": decoding}
    texts = {name: f"{value:,}" if isinstance(value, int) else str(value or "–") for name, value in facts.items()}
    return [{"card": name, "value": text} for name, text in texts.items()]


# ---------------------------------------------------------------------------------------------------------- baselines


def best_rule(rules: Sequence[Mapping], metric: str) -> Mapping:
    """Return the row with the highest mean in a metric."""
    return max(rules, key=lambda row: row[metric])


def against_rules(
    teacher: Mapping, teacher_scores: Mapping[str, np.ndarray], rules: Sequence[Mapping], scores: Mapping[str, Mapping]
) -> list[dict]:
    """Return one row per metric: every system, and the teacher's paired difference from the better baseline.

    `scores` maps a rule's method to its ROUGE per document.
    """
    rows = []
    for metric in METRICS:
        systems = {method_label(row["method"]): row_with_interval(row, metric) for row in [*rules, teacher]}
        test = statistics.compare(teacher_scores[metric], scores[best_rule(rules, metric)["method"]][metric])
        rows.append({"metric": HEADINGS[metric], **systems, **test})
    return rows


def text_rows(sources: Sequence[str], written: Mapping[str, Sequence[str]]) -> tuple[list[dict], dict]:
    """Return one row per diagnostic, and the diagnostics by system, of "reference", rules and "teacher"."""
    found = {}
    for name, texts in written.items():
        found[name] = metrics.text_diagnostics(sources, texts) | {"different": len(set(texts)) / len(texts)}
    rows = []
    for key, title in DIAGNOSTICS.items():
        factor = 100 if "%" in title else 1
        values = {n: None if row[key] is None else factor * row[key] for n, row in found.items()}
        rows.append({"of the texts": title} | {method_label(n): value for n, value in values.items()})
    return rows, found


# ----------------------------------------------------------------------------------------------- decoding and headline


def beam_rows(decoded: Mapping[int, Path], own: Path) -> list[dict]:
    """Return one row per number of beams, with the paired change of ROUGE-2 from the test in `own`."""
    rows = []
    for num_beams, path in decoded.items():
        change = dict.fromkeys(("change", "change_low", "change_high"))
        if path != own:
            test = statistics.compare(scoring.read_scores(path)["rouge2"], scoring.read_scores(own)["rouge2"])
            change = {"change": test["difference"], "change_low": test["low"], "change_high": test["high"]}
        rows.append(decoding_row("teacher", {"num_beams": num_beams}, path) | change)
    return rows


def pass_rows(model, passes: Sequence[Mapping], ms_per_token: float, ceiling: Mapping[str, float | None]) -> list[dict]:
    """Return one row for each pass of `encoder_speed` and one for a greedy token: ms, GFLOP/s, share of ceiling.

    A token needs two operations for each weight of decoder and output matrix; its time holds its part of the encoder's.
    """
    weights = students.count_parameters(model)["decoder"] + model.get_output_embeddings().weight.numel()
    timed = [(f"encoder, {row['batch_size']} document(s)", row["ms"], row["gflops"]) for row in passes]
    timed.append(("decoder, a token, greedy", ms_per_token, 2 * weights / ms_per_token / 1e6))
    return [
        {"pass": name, "ms": ms, "GFLOP/s": gflops, "share of ceiling (%)": 100 * gflops / ceiling["float32"]}
        for name, ms, gflops in timed
    ]


def verdict(
    teacher: Mapping, rules: Sequence[Mapping], compared: Sequence[Mapping], texts: Mapping, num_test: int
) -> str:
    """Return whether to distil the teacher, as one paragraph of Markdown: does it beat the baselines, is it healthy.

    `compared` are the rows of `against_rules`, `texts` the diagnostics by system.
    """
    if num_test < FEW_DOCUMENTS:
        return smoke_note(num_test)
    names = " and ".join(method_label(row["method"]) for row in rules)
    better = f"the better of {names}" if len(rules) > 1 else names
    above = [row["metric"] for row in compared if statistics.effect_sign(row) > 0]
    test = next(row for row in compared if row["metric"] == HEADINGS["rouge2"])
    rule = method_label(best_rule(rules, "rouge2")["method"])
    sure = f"in ROUGE-2, {statistics.how_sure(test, f' than {rule}')}"
    if len(above) == len(compared):
        lines = [f"**Distill this teacher**: it beats {names} in every ROUGE metric; {sure}."]
    elif max(statistics.effect_sign(row) for row in compared) < 0:
        lines = [f"**Train the teacher first**: it is worse than {better} and has nothing to teach; {sure}."]
    else:
        but = f" but for {', '.join(above)}" if above else ""
        lines = [f"**Train the teacher first**: it is not shown to be better than {better}{but}; {sure}."]
    ours, theirs = texts["teacher"], texts["reference"]
    if ours["different"] < 0.8 * theirs["different"]:
        lines.append(f"**Only {100 * ours['different']:.0f} % of its summaries differ: it repeats stock sentences.**")
    if ours["empty"] + ours["repeating"] > 0.05:
        lines.append(f"**{100 * (ours['empty'] + ours['repeating']):.0f} % are empty or repeat themselves.**")
    lines.append(
        f"Students have to undercut its {teacher['latency_ms']:.0f} ms per summary and {teacher['parameters_m']:.1f} M "
        f"parameters. The interval is over {num_test:,} test documents, not over other trainings of it."
    )
    return " ".join(lines)
