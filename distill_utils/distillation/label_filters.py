"""Filters of pseudo-labels before training: measures of each label, thresholds on them, what each threshold removes.

Not here: how a measure is computed (evaluation/speed), writing and joining labels (pseudo_labels.py), figures.
"""

from __future__ import annotations

import pandas as pd
from datasets import Dataset

from distill_utils.artifacts import InputError
from distill_utils.evaluation import generation, metrics

# Each measure and the side on which a single number bounds it; a ratio is bounded on both.
MEASURES = {
    "reference_rouge2": "low",
    "copy_rate": "high",
    "length_ratio": "both",
    "repeating": "high",
    "unsupported_numbers": "high",
    "unsupported_names": "high",
}
NEED_REFERENCES = ("reference_rouge2",)


def measure_labels(dataset: Dataset, names: list[str] | None = None) -> Dataset:
    """Add the named measures (all that the data set allows) as columns, one value a label; present ones are kept.

    `reference_rouge2`: ROUGE-2 F1 x 100 against the column `reference` (Distil-Whisper filters by an error rate so).
    `copy_rate`: share of the label's words in fragments copied from the document, single words included (coverage).
    `length_ratio`: words over those of the reference, or of the document where the data set has no references.
    `repeating`: 1 or 0, by `generation.is_repeating`. `unsupported_numbers`, `unsupported_names`: share of those
    written that the document lacks, 0 where none is written. An empty label has copy rate 0.
    Raises InputError for an unknown name, and for `reference_rouge2` unless every row has a reference.
    """
    _check_names(names or [])
    references = dataset["reference"] if "reference" in dataset.column_names else [""] * len(dataset)
    missing = sum(not (reference or "").strip() for reference in references)
    for name in names or []:
        if name in NEED_REFERENCES and missing and name not in dataset.column_names:
            raise InputError(f"{name} needs references, {missing} of {len(dataset)} rows have none: leave {name} out")
    if names is None:
        names = [name for name in MEASURES if not (missing and name in NEED_REFERENCES)]
    names = [name for name in names if name not in dataset.column_names]
    columns: dict[str, list[float]] = {name: [] for name in names}
    if "reference_rouge2" in names:
        columns["reference_rouge2"] = metrics.rouge_scores(dataset["summary"], list(references))["rouge2"].tolist()
    row_names = [name for name in names if name != "reference_rouge2"]
    rows = zip(dataset["document"], dataset["summary"], references, strict=True) if row_names else ()
    for document, label, reference in rows:
        found = metrics.text_diagnostics([document], [label])
        target = generation.words(document if missing else reference)
        values = {
            "copy_rate": found["coverage"] or 0.0,
            "length_ratio": found["words"] / max(1, len(target)),
            "repeating": found["repeating"],
            "unsupported_numbers": 1 - (1.0 if found["numbers_supported"] is None else found["numbers_supported"]),
            "unsupported_names": 1 - (1.0 if found["names_supported"] is None else found["names_supported"]),
        }
        for name in row_names:
            columns[name].append(values[name])
    for name, values in columns.items():
        dataset = dataset.add_column(name, values)
    return dataset


def filter_labels(dataset: Dataset, thresholds: dict[str, float | list[float]]) -> tuple[Dataset, dict[str, int]]:
    """Drop empty labels, then those beyond each threshold, in the order given; return (kept rows, counts by reason).

    A threshold is [low, high], both allowed values, or one number: the lowest for `reference_rouge2`, the highest for
    the others (`length_ratio` takes two). `counts` has total, kept, empty and one number a threshold: the labels that
    it removed first. The kept rows carry the measures as columns.
    Raises InputError for an unknown name, a threshold that is no range, missing references, and when no label is left.
    """
    bounds = bounds_of(thresholds)
    measured = measure_labels(dataset, list(thresholds))
    reasons = ["empty" if generation.is_empty(text) else "kept" for text in measured["summary"]]
    for name, (low, high) in bounds.items():
        for i, value in enumerate(measured[name]):
            if reasons[i] == "kept" and not low <= value <= high:
                reasons[i] = name
    counts = {"total": len(reasons), **{name: reasons.count(name) for name in ("kept", "empty", *thresholds)}}
    if not counts["kept"]:
        raise InputError(f"the filters leave no label, {counts}: widen the threshold that removes most")
    return measured.select([i for i, reason in enumerate(reasons) if reason == "kept"]), counts


def threshold_rows(dataset: Dataset, thresholds: dict[str, float | list[float]]) -> pd.DataFrame:
    """Return rows for a histogram a measure: measure, value, removed, low, high, share_removed (one row a label each).

    `removed` and `share_removed` are those of this threshold alone, empty labels left out before; an absent bound is
    infinite.
    """
    bounds = bounds_of(thresholds)
    measured = measure_labels(dataset, list(thresholds))
    full = [i for i, text in enumerate(measured["summary"]) if not generation.is_empty(text)]
    tables = []
    for name, (low, high) in bounds.items():
        table = pd.DataFrame({"measure": name, "value": measured.select(full)[name]})
        table["removed"] = ~table["value"].between(low, high)
        tables.append(table.assign(low=low, high=high, share_removed=table["removed"].mean()))
    return pd.concat(tables, ignore_index=True)


def _check_names(names: list[str]) -> None:
    for name in names:
        if name not in MEASURES:
            raise InputError(f"label filter {name!r} is unknown: give some of {', '.join(MEASURES)}")


def bounds_of(thresholds: dict[str, float | list[float]]) -> dict[str, tuple[float, float]]:
    """Return the lowest and highest allowed value of each threshold, or refuse it."""
    _check_names(list(thresholds))
    bounds = {}
    for name, value in thresholds.items():
        if isinstance(value, (int, float)) and MEASURES[name] != "both":
            value = [value, float("inf")] if MEASURES[name] == "low" else [float("-inf"), value]
        numbers = isinstance(value, (list, tuple)) and all(isinstance(bound, (int, float)) for bound in value)
        if not numbers or len(value) != 2 or not value[0] <= value[1]:
            raise InputError(f"threshold {value!r} of {name} is no range: give [low, high], such as [0.5, 2.0]")
        bounds[name] = tuple(value)
    return bounds
