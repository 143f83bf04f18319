import json
from functools import partial

import numpy as np
import pytest
import torch
from rouge_score import rouge_scorer
from test_generation import make_documents
from tiny_models import EOS, tiny_bart, tiny_tokenizer

from distill_utils.evaluation import metrics, scoring

# -------------------------------------------------------------------------------------------------------------- ROUGE


def test_rouge_lsum_takes_sentences_apart():
    reference, prediction = "The cat sat. The dog ran.", "The dog ran. The cat sat."
    scores = metrics.rouge_scores([prediction], [reference])
    assert scores["rougeL"][0] == pytest.approx(50)  # the longest common run of words is one sentence of two
    assert scores["rougeLsum"][0] == pytest.approx(100)


def test_rouge_equals_rouge_score_itself():
    generator = np.random.default_rng(0)
    vocabulary = ["running", "runs", "list", "lists", "of", "names.", "The", "value"]
    texts = ["", *(" ".join(generator.choice(vocabulary, generator.integers(1, 14))) for _ in range(59))]
    scores = metrics.rouge_scores(texts[:30], texts[30:])
    scorer = rouge_scorer.RougeScorer(list(metrics.METRICS), use_stemmer=True)
    expected = [scorer.score(*map(metrics.split_sentences, pair)) for pair in zip(texts[30:], texts[:30], strict=True)]
    for metric in metrics.METRICS:
        assert scores[metric] == pytest.approx(np.array([100 * found[metric].fmeasure for found in expected]))


@pytest.mark.parametrize("function", [metrics.rouge_scores, metrics.text_diagnostics])
@pytest.mark.parametrize(("lists", "named"), [((["a"], ["a", "b"]), "1|2"), (([], []), "0")])
def test_lists_that_do_not_fit_are_rejected(function, lists, named):
    with pytest.raises(ValueError, match=f"({named}) predictions"):
        function(*lists)


# --------------------------------------------------------------------------------------------------- text diagnostics


def test_fragments_coverage_and_density_by_hand():
    source = "the reader opens a file and the reader returns rows".split()
    # "the reader returns" (3; not the first "the reader"), "new" (none), "a file" (2), "rows" (1)
    summary = "the reader returns new a file rows".split()
    assert metrics.fragment_lengths(source, summary) == [3, 2, 1]
    found = metrics.text_diagnostics([" ".join(source)], [" ".join(summary)])
    assert found["coverage"] == pytest.approx(6 / 7)
    assert found["density"] == pytest.approx((9 + 4 + 1) / 7)
    # novel: "new"; bigrams "returns new", "new a", "file rows" of 6; trigrams all but the first of 5
    assert found["novel_1gram"] == pytest.approx(1 / 7)
    assert found["novel_2gram"] == pytest.approx(3 / 6)
    assert found["novel_3gram"] == pytest.approx(4 / 5)
    assert (found["words"], found["empty"], found["repeating"]) == (7, 0, 0)


def test_diagnostics_numbers_names_empty_and_repeating():
    document = "Read up to 1,000 rows with numpy.ndarray from MySQL. Uses read_rows and 2.5 seconds. In Paris."
    written = [
        "Return 1,000 rows of numpy.ndarray. Uses read_rows.",  # Return and Uses only begin sentences
        "Reads 25 rows in 2.5 s from PostgreSQL or from Paris, 2.5x.",  # 2.5x is no number, nor is its 2
        "",
        "rows rows rows rows of",
    ]
    found = metrics.text_diagnostics([document] * 4, written)
    assert found["numbers_supported"] == pytest.approx(2 / 3)  # 1,000 and 2.5, not 25
    assert found["names_supported"] == pytest.approx(3 / 4)  # numpy.ndarray, read_rows, Paris, not PostgreSQL
    assert (found["empty"], found["repeating"]) == (0.25, 0.25)


def test_places_to_mark_by_hand():
    document, teacher = "Return 3 rows of numpy.array.", "Return the rows of an array."
    text = "Return 3 or 42 rows of an PostgreSQL array."
    found = metrics.spans_to_mark(document, text, teacher)
    assert [text[start:end] for start, end in found["unsupported"]] == ["42", "PostgreSQL"]
    assert [text[start:end] for start, end in found["differs"]] == ["3", "or", "42", "PostgreSQL"]
    assert metrics.spans_to_mark(document, teacher, teacher)["differs"] == []


def test_what_no_output_has_is_none():
    found = metrics.text_diagnostics(["some text"], [""])
    assert {name for name, value in found.items() if value is not None} == {"words", "empty", "repeating"}


def test_evaluate_summaries_gives_one_flat_row():
    documents = ["read the file", "write the list", "copy the tree"]
    references = ["reads a file", "writes a list", "copies a tree"]
    _, baseline = metrics.evaluate_summaries(documents, ["file", "list", "x"], references)
    row, scores = metrics.evaluate_summaries(documents, references, references, baseline_scores=baseline)
    assert row["num_documents"] == 3
    assert (row["rouge2"], row["rouge2_low"], row["rouge2_high"]) == pytest.approx((100, 100, 100))
    assert row["rouge1_difference"] == pytest.approx((scores["rouge1"] - baseline["rouge1"]).mean())
    assert {"rougeLsum_p_value", "rougeL_difference_low", "coverage", "words"} <= row.keys()
    json.dumps(row, allow_nan=False)


# -------------------------------------------------------------------------------------------------------------- speed


def test_functions_take_turns_when_timed(monkeypatch):
    order, clock = [], [0.0]

    def run(name, cost, documents):
        order.append((name, *documents))
        # The second round falls into a busy moment: it must not count.
        clock[0] += cost * (10 if len(order) > 2 + 4 else 1)

    monkeypatch.setattr(scoring.time, "perf_counter", lambda: clock[0])
    timed = {"a": partial(run, "a", 0.5), "b": partial(run, "b", 0.25)}
    found = scoring.interleaved_latency_ms(timed, ["x", "y"], torch.device("cpu"), repeats=2)
    assert found == {"a": pytest.approx(500.0), "b": pytest.approx(250.0)}
    scoring.interleaved_latency_ms(timed, ["x"], torch.device("cpu"), repeats=5, max_seconds=0.0)
    order, again = order[: 2 + 8], order[2 + 8 :]
    assert again == [("a", "x"), ("b", "x")] * 2  # a warm-up and one turn, whatever the limit
    turn = [("a", "x"), ("b", "x")]
    assert order == [*turn, *[*turn, ("a", "y"), ("b", "y")] * 2]


def test_measure_speed_counts_tokens_exactly(monkeypatch):
    model, tokenizer = tiny_bart(), tiny_tokenizer()
    model.final_logits_bias[0, EOS] = 20.0  # would end at once
    lengths, real = [], model.generate

    def generate(**arguments):
        ids = real(**arguments)
        lengths.append((len(ids), ids.shape[1] - 1))
        return ids

    monkeypatch.setattr(model, "generate", generate)
    settings = {"max_source_length": 16, "num_new_tokens": 7, "repeats": 2, "batch_size": 3}
    found = scoring.measure_speed(model, tokenizer, make_documents(5), **settings)
    assert lengths.count((1, 7)) == 1 + 2 * 5  # forced to exactly that many, and one warm-up
    assert sum(size > 1 for size, _ in lengths) == 2 * (1 + 2)  # batches of 3 and 2, warm-up and two repeats
    assert found.pop("peak_memory_gb") is None
    assert set(found) == {"latency_ms", "throughput", "ms_per_token", "encoder_ms"}
    assert all(np.isfinite(value) and value > 0 for value in found.values())
