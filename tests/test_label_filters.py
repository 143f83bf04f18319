from __future__ import annotations

import pytest
from datasets import Dataset

from distill_utils import artifacts
from distill_utils.distillation import label_filters

DOCUMENT = "the file read_rows opens a table of 12 rows and the function returns a list"  # 15 words
# label, reference and what stands beside them: (reference_rouge2, copy_rate, length_ratio, repeating, numbers, names)
CASES = [
    # copied as one fragment; 3 of 3 and 3 of 4 bigrams of the reference: F1 = 2 * 1 * 0.75 / 1.75
    ("returns a list of", "it returns a list of", (100 * 1.5 / 1.75, 1.0, 0.8, 0, 0, 0)),
    # "a table of" and "rows" stand in the document, "with", "99" and "big" do not; 1 of 6 and 1 of 1 bigrams shared
    ("a table of rows with 99 big", "table of", (100 * 2 / 7, 4 / 7, 3.5, 0, 1, 0)),
    # 12 is in the document, 7 is not; the name read_rows is, FastReader is not; no bigram shared
    ("read_rows 12 FastReader 7", "opens two tables now", (0.0, 0.5, 1.0, 0, 0.5, 0.5)),
    # three times the same three words: "the file" is copied, "x" is not
    ("the file x the file x the file x", "the file x", (100 * 2 * 0.25 / 1.25, 6 / 9, 3.0, 1, 0, 0)),
    ("", "a list", (0.0, 0.0, 0.0, 0, 0, 0)),
]


def make_labels(with_references: bool = True) -> Dataset:
    labels, references, _ = zip(*CASES, strict=True)
    columns = {"id": [f"d{i}" for i in range(len(CASES))], "document": [DOCUMENT] * len(CASES), "summary": list(labels)}
    return Dataset.from_dict(columns | ({"reference": list(references)} if with_references else {}))


def test_measures_by_hand():
    measured = label_filters.measure_labels(make_labels())
    assert measured.column_names == ["id", "document", "summary", "reference", *label_filters.MEASURES]
    for row, (label, _, expected) in zip(measured, CASES, strict=True):
        assert [row[name] for name in label_filters.MEASURES] == pytest.approx(list(expected)), label


def test_without_references_the_document_gives_the_length_and_rouge_is_refused():
    measured = label_filters.measure_labels(make_labels(with_references=False))
    assert "reference_rouge2" not in measured.column_names
    assert measured["length_ratio"][:2] == pytest.approx([4 / 15, 7 / 15])
    for dataset, missing in (
        (make_labels(with_references=False), 5),
        (make_labels().map(lambda row, i: {"reference": "x" * (i != 2)}, with_indices=True), 1),
    ):
        with pytest.raises(artifacts.InputError, match=f"reference_rouge2 needs references, {missing} of 5"):
            label_filters.filter_labels(dataset, {"reference_rouge2": 10})


def test_filters_count_what_each_removes_first():
    kept, counts = label_filters.filter_labels(make_labels(), {"reference_rouge2": 10, "length_ratio": [0.5, 2.0]})
    assert kept["id"] == ["d0"]
    assert counts == {"total": 5, "kept": 1, "empty": 1, "reference_rouge2": 1, "length_ratio": 2}
    kept, counts = label_filters.filter_labels(make_labels(), {"repeating": 0, "unsupported_numbers": 0.5})
    assert kept["id"] == ["d0", "d2"]
    assert counts == {"total": 5, "kept": 2, "empty": 1, "repeating": 1, "unsupported_numbers": 1}
    # The other order: what two filters would remove is counted by the first; bounds are allowed values.
    thresholds = {"length_ratio": [1.0, 3.0], "copy_rate": [0, 0.5], "repeating": 0}
    kept, counts = label_filters.filter_labels(make_labels(), thresholds)
    assert kept["id"] == ["d2"]
    assert counts == {"total": 5, "kept": 1, "empty": 1, "length_ratio": 2, "copy_rate": 1, "repeating": 0}
    assert list(counts) == ["total", "kept", "empty", *thresholds]
    assert label_filters.filter_labels(kept, thresholds)[1]["kept"] == 1  # measures that are there are used again


def test_rows_for_a_histogram_tell_what_each_threshold_removes_alone():
    rows = label_filters.threshold_rows(make_labels(), {"length_ratio": [0.5, 2.0], "copy_rate": 0.9})
    assert list(rows.columns) == ["measure", "value", "removed", "low", "high", "share_removed"]
    assert rows["measure"].tolist() == ["length_ratio"] * 4 + ["copy_rate"] * 4  # the empty label is left out
    assert rows["value"].tolist() == pytest.approx([0.8, 3.5, 1.0, 3.0, 1.0, 4 / 7, 0.5, 6 / 9])
    assert rows["removed"].tolist() == [False, True, False, True, True, False, False, False]
    assert rows["share_removed"].tolist() == [0.5] * 4 + [0.25] * 4
    assert (rows["low"].iloc[-1], rows["high"].iloc[-1]) == (float("-inf"), 0.9)


def test_bad_thresholds_are_refused():
    with pytest.raises(artifacts.InputError, match="'rouge' is unknown: give some of reference_rouge2, copy_rate"):
        label_filters.filter_labels(make_labels(), {"rouge": 10})
    for value in (2.0, [2.0, 0.5], [0.5], "0.5", ["a", "b"], [float("nan"), 1]):
        with pytest.raises(artifacts.InputError, match="of length_ratio is no range"):
            label_filters.filter_labels(make_labels(), {"length_ratio": value})
    with pytest.raises(
        artifacts.InputError, match="leave no label, {'total': 5, 'kept': 0, 'empty': 1, 'copy_rate': 4}"
    ):
        label_filters.filter_labels(make_labels(), {"copy_rate": [0.1, 0.2]})
    assert label_filters.filter_labels(make_labels(), {})[1] == {"total": 5, "kept": 4, "empty": 1}
