"""The shipped teacher: its card tells what its files give, and it is a useful teacher."""

import re

import numpy as np
import pytest

from distill_utils.artifacts import read_json
from distill_utils.data import loading
from distill_utils.evaluation.generation import summarize
from distill_utils.evaluation.metrics import rouge_scores
from distill_utils.models.loading import ASSETS, load_model

FOLDER = ASSETS / "pydocs-bart"


@pytest.fixture(scope="module")
def card() -> dict:
    return read_json(FOLDER / "card.json")


@pytest.fixture(scope="module")
def written(card, corpus):
    """Return the first test documents, their references and the teacher's summaries of them."""
    model, tokenizer = load_model("pydocs-bart")
    test = loading.load_pairs("pydocs", "test", card["num_checked"])
    documents = list(test["document"])
    return documents, list(test["summary"]), summarize(model, tokenizer, documents, max_source_length=128)


def test_card_states_what_the_files_give(card, written):
    _, references, predictions = written
    same_corpus = loading.corpus_facts()["fingerprint"] == card["corpus_fingerprint"]
    for name, scores in rouge_scores(predictions, references).items():
        mean, low, high = card["rouge_checked"][name]
        # Another platform's wheels may hold other docstrings: then the figures only have to be compatible.
        assert scores.mean() == pytest.approx(mean, abs=0.3) if same_corpus else low <= scores.mean() <= high, name
    assert card["num_test"] > 1000 and [stage["stage"] for stage in card["stages"]] == ["denoising", "fine-tuning"]
    assert all(low < mean < high for mean, low, high in card["rouge"].values())


def test_teacher_writes_a_summary_for_each_document(written):
    documents, _, predictions = written
    assert all(predictions) and len(set(predictions)) > 0.9 * len(predictions)
    # A summary is of *its* document: it shares more words with it than with the next one.
    words = [set(re.findall(r"\w+", text.lower())) for text in documents]
    said = [set(re.findall(r"\w+", text.lower())) for text in predictions]
    own = np.mean([len(s & w) / len(s) for s, w in zip(said, words, strict=True)])
    other = np.mean([len(s & w) / len(s) for s, w in zip(said, words[1:] + words[:1], strict=True)])
    assert own > 1.3 * other


def test_assets_stay_small():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) < 64 * 2**20
