"""What there is to say about a corpus and its teacher: rows of tables and computed text for notebook 1.

Not here: measuring (evaluation/, planning/machine.py) and drawing (figures.py).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset

from distill_utils.artifacts import read_json
from distill_utils.evaluation import metrics, scoring, statistics
from distill_utils.evaluation.metrics import METRICS
from distill_utils.experiments.comparison import FEW_DOCUMENTS, decoding_row
from distill_utils.models import students
from distill_utils.models.loading import ASSETS, shipped_models
from distill_utils.report.figures import HEADINGS, method_label

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
    """Return one row a split: pairs, different sources, and sources that stand word for word in train."""
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


def package_shares(splits: Mapping[str, Dataset], num: int = 8) -> tuple[list[dict], str]:
    """Return the largest packages' shares of train and test by the ids of `pydocs`, and a reading."""
    counts = {
        split: Counter(re.split("[.:]", i, maxsplit=1)[0] for i in splits[split]["id"]) for split in ("train", "test")
    }
    largest = [name for name, _ in counts["train"].most_common(num)]
    rows = [
        {"package": name, **{f"{split} (%)": 100 * count[name] / count.total() for split, count in counts.items()}}
        for name in largest
    ]
    share = sum(row["train (%)"] for row in rows[:2])
    known = sum(count for name, count in counts["test"].items() if name in counts["train"])
    return rows, (
        f"Two of {len(counts['train'])} packages, {' and '.join(largest[:2])}, give {share:.0f} % of the training "
        f"pairs, and {100 * known / counts['test'].total():.0f} % of the test pairs come from packages that training "
        "has seen."
    )


def lengths_reading(lengths: Mapping[str, Sequence[int]], limits: Mapping[str, int]) -> tuple[str, str]:
    """Return (alternative text, reading) of the figure of source and reference lengths in tokens."""
    whole = {name: 100 * np.mean(np.asarray(lengths[name]) <= limits[name]) for name in limits}
    lost = 100 * sum(max(n - limits["source"], 0) for n in lengths["source"]) / sum(lengths["source"])
    ratio = np.median(lengths["source"]) / np.median(lengths["reference"])
    verdict = "as it should be" if whole["reference"] >= 95 else "**too few: raise `max_target_length`**"
    ratio = f"has {ratio:.1f} times the tokens of a"
    alt = (
        f"Cumulative distributions of lengths: a typical source {ratio} reference; the limits leave "
        f"{whole['source']:.0f} % of sources and {whole['reference']:.0f} % of references whole."
    )
    return alt, (
        f"The source limit leaves {whole['source']:.0f} % of the sources whole and hides {lost:.0f} % of all source "
        f"tokens. Of the references {whole['reference']:.1f} % are whole: {verdict}. A typical source {ratio} typical "
        "reference."
    )


def copying(pairs: Dataset) -> tuple[list[float], list[float], str, str]:
    """Return (coverage, density) of every reference with a word, and (alternative text, reading) on how they copy."""
    sources, references = list(pairs["document"]), list(pairs["summary"])
    each = [metrics.text_diagnostics([s], [r]) for s, r in zip(sources, references, strict=True)]
    coverage, density = ([row[key] for row in each if row[key] is not None] for key in ("coverage", "density"))
    novel = metrics.text_diagnostics(sources, references)
    shares = [100 * (novel[f"novel_{n}gram"] or 0) for n in (1, 2, 3)]
    alt = (
        f"Scatter of references: half have a coverage below {np.median(coverage):.2f} and a density below "
        f"{np.median(density):.1f}; points far up copy long phrases."
    )
    copied = 100 * np.mean(np.asarray(density) >= 4)
    reading = (
        f"Of the references' words {shares[0]:.0f} % do not occur in the source, of their word pairs {shares[1]:.0f} "
        f"%, of their triples {shares[2]:.0f} %. Half of all have a coverage below {np.median(coverage):.2f}; "
        f"{copied:.0f} % have at least the density of a text copied in runs of four words."
    )
    return coverage, density, alt, reading


# ------------------------------------------------------------------------------------------------------------ teacher


def part_rows(model) -> list[dict]:
    """Return one row a part of a model: layers, parameters in millions and their share."""
    counts = students.count_parameters(model)
    depths = {"encoder": len(students.encoder_layers(model)), "decoder": len(students.decoder_layers(model))}
    parts = {part: counts[part] for part in ("encoder", "decoder", "embeddings", "total")}
    return [
        {"part": part, "layers": depths.get(part), "parameters_m": n / 1e6, "share (%)": 100 * n / counts["total"]}
        for part, n in parts.items()
    ]


def read_card(teacher: str) -> dict:
    """Return a shipped or local teacher's model card, {} when it has none."""
    folder = ASSETS / teacher if teacher in shipped_models() else Path(teacher).expanduser()
    path = folder / "card.json"
    return read_json(path) if path.is_file() else {}


def stage_rows(card: Mapping) -> list[dict]:
    """Return one row a training stage of a model card; settings and other nested values are left to the card."""
    return [{key: value for key, value in stage.items() if not isinstance(value, dict)} for stage in card["stages"]]


def card_rows(card: Mapping) -> list[dict]:
    """Return what a model card says beside its training stages, as rows of name and text."""
    rouge = card.get("rouge", {})
    scores = [f"{HEADINGS.get(m, m)} {mean:.2f} ({low:.2f}–{high:.2f})" for m, (mean, low, high) in rouge.items()]
    decoding = card.get("decoding", "–")
    if isinstance(decoding, dict):
        decoding = ", ".join(f"{name} {value}" for name, value in decoding.items())
    facts = {"made by": card.get("command"), "commit": card.get("commit"), "corpus": card.get("corpus_fingerprint")}
    facts |= {"scores": "; ".join(scores), "test documents": card.get("num_test"), "decoding": decoding}
    return [{"card": name, "value": "–" if value is None else str(value)} for name, value in facts.items()]


# ---------------------------------------------------------------------------------------------------------- baselines


def relation(row: Mapping, other: Mapping, metric: str) -> str:
    """Tell where one row's interval lies beside another's: "above", "below" or "overlaps"."""
    if row[f"{metric}_low"] > other[f"{metric}_high"]:
        return "above"
    return "below" if row[f"{metric}_high"] < other[f"{metric}_low"] else "overlaps"


def best_rule(rules: Sequence[Mapping], metric: str) -> Mapping:
    """Return the row with the highest mean in a metric."""
    return max(rules, key=lambda row: row[metric])


def with_interval(row: Mapping, metric: str) -> str:
    """Write a mean with its interval: 22.60 (21.90–23.30)."""
    return f"{row[metric]:.2f} ({row[f'{metric}_low']:.2f}–{row[f'{metric}_high']:.2f})"


def against_rules(
    teacher: Mapping, teacher_scores: Mapping[str, np.ndarray], rules: Sequence[Mapping], scores: Mapping[str, Mapping]
) -> tuple[list[dict], str]:
    """Return one row a metric (every system, the paired difference from the better baseline) and a reading.

    `scores` maps a rule's method to its ROUGE of every document.
    """
    rows = []
    for metric in METRICS:
        systems = {method_label(row["method"]): with_interval(row, metric) for row in [*rules, teacher]}
        test = statistics.paired_test(teacher_scores[metric], scores[best_rule(rules, metric)["method"]][metric])
        rows.append({"metric": HEADINGS[metric], **systems, **test})
    gained = ", ".join(row["metric"] for row in rows if row["low"] > 0)
    lost = ", ".join(row["metric"] for row in rows if row["high"] < 0)
    unclear = sum(row["low"] <= 0 <= row["high"] for row in rows)
    text = f"The paired test puts the teacher above the better baseline in {gained or 'no metric'}"
    text += f", below it in {lost}" if lost else ""
    return rows, text + (f", and cannot tell in {unclear} of {len(rows)}." if unclear else ".")


def describe_texts(sources: Sequence[str], written: Mapping[str, Sequence[str]]) -> tuple[list[dict], dict, str]:
    """Return (one row a diagnostic, diagnostics by system, reading) of "reference", rules and "teacher"."""
    found = {}
    for name, texts in written.items():
        found[name] = metrics.text_diagnostics(sources, texts) | {"different": len(set(texts)) / len(texts)}
    rows = []
    for key, title in DIAGNOSTICS.items():
        factor = 100 if "%" in title else 1
        shown = {n: None if row[key] is None else factor * row[key] for n, row in found.items()}
        rows.append({"of the texts": title} | {method_label(n): value for n, value in shown.items()})
    ours, theirs = found["teacher"], found["reference"]
    text = f"The teacher writes {ours['words']:.1f} words where the references have {theirs['words']:.1f}."
    if ours["different"] < 0.8 * theirs["different"]:
        text += f" **Only {100 * ours['different']:.0f} % of its summaries differ: it repeats stock sentences.**"
    if ours["empty"] + ours["repeating"] > 0.05:
        text += f" **{100 * (ours['empty'] + ours['repeating']):.0f} % of them are empty or repeat themselves.**"
    if (ours["novel_2gram"] or 0) < (theirs["novel_2gram"] or 0):
        text += " It stays closer to the source's words than the references do."
    else:
        text += " It has as many word pairs of its own as the references or more: new, not yet right."
    return rows, found, text


# ----------------------------------------------------------------------------------------------- decoding and headline


def beam_rows(decoded: Mapping[int, Path], own: Path) -> tuple[list[dict], str]:
    """Return one row a number of beams, with the paired change of ROUGE-2 from the test in `own`, and a reading."""
    rows = []
    for num_beams, path in decoded.items():
        change = dict.fromkeys(("change", "change_low", "change_high"))
        if path != own:
            test = statistics.paired_test(scoring.read_scores(path)["rouge2"], scoring.read_scores(own)["rouge2"])
            change = {"change": test["difference"], "change_low": test["low"], "change_high": test["high"]}
        row = decoding_row("teacher", {"num_beams": num_beams}, path)
        rows.append({**row, **change})
    if len(rows) < 2:
        return rows, "One number of beams only: nothing to compare."
    first, last = rows[0], rows[-1]
    text = (
        f"{last['num_beams']} beams take {last['latency_ms'] / first['latency_ms']:.2f} times as long as "
        f"{first['num_beams']} and score {last['rouge2'] - first['rouge2']:+.2f} ROUGE-2. "
    )
    real = [str(row["num_beams"]) for row in rows if (row["change_low"] or 0) > 0 or (row["change_high"] or 0) < 0]
    separated = f"{', '.join(real)} beam(s)" if real else "no number of beams"
    return rows, text + f"The paired test separates from the teacher's own decoding: {separated}."


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


def speed_reading(row: Mapping, passes: Sequence[Mapping], ceiling: Mapping[str, float | None]) -> str:
    """Return a reading of the encoder's part of the latency and of the shares of the machine's ceiling."""
    shares = [each["share of ceiling (%)"] for each in passes]
    part = 100 * row["encoder_ms"] / row["latency_ms"]
    text = (
        f"The encoder takes {part:.0f} % of the latency of one summary; the rest is decoding. Of the float32 ceiling "
        f"the encoder uses {shares[0]:.0f} % on one document and {shares[-2]:.0f} % in the largest batch, decoding one "
        f"token after another {shares[-1]:.1f} %."
    )
    if ceiling["bfloat16"]:
        text += f" Products in bfloat16 are {ceiling['bfloat16'] / ceiling['float32']:.1f} times as fast here."
    return text


def headline(teacher: Mapping, rules: Sequence[Mapping], num_test: int, paired: str = "") -> str:
    """Return the answer as Markdown: is the teacher above the baselines, by intervals, and how fast is it.

    `paired` is the reading of `against_rules`, which tells more than intervals do.
    """
    lines = []
    if num_test < FEW_DOCUMENTS:
        lines.append(f"**Smoke run:** {num_test} test documents show that the code runs, nothing else.")
    best = {metric: best_rule(rules, metric) for metric in ("rouge1", "rouge2")}
    found = {metric: relation(teacher, row, metric) for metric, row in best.items()}
    names = " and ".join(method_label(row["method"]) for row in rules)
    if set(found.values()) == {"above"}:
        lines.append(f"**The teacher is clearly better than {names}**: no intervals overlap in ROUGE-1 and ROUGE-2.")
    elif "below" in found.values():
        lines.append(f"**The teacher is worse than a baseline** ({names}): it has nothing to teach yet.")
    else:
        lines.append(f"**The teacher is not clearly better than {names}**: intervals overlap.")
    for metric, row in best.items():
        where = "overlaps" if found[metric] == "overlaps" else f"lies {found[metric]}"
        lines.append(
            f"{HEADINGS[metric]}: the teacher's {with_interval(teacher, metric)} {where} the better baseline's, "
            f"{method_label(row['method'])} with {with_interval(row, metric)}."
        )
    lines += [paired] if paired else []
    lines.append(
        f"It has {teacher['parameters_m']:.1f} M parameters, takes {teacher['latency_ms']:.0f} ms a summary and "
        f"{teacher['ms_per_token']:.2f} ms a generated token, and writes {teacher['words']:.1f} words. {num_test} test "
        "documents; intervals are 95 % bootstrap over documents."
    )
    return "\n\n".join(lines)
