"""Summaries in bulk against `generate` one by one; `make_documents` and `save` serve other tests too."""

import pytest
import torch
from tiny_models import EOS, FAMILIES, WORDS, tiny_bart, tiny_tokenizer

from distill_utils import artifacts
from distill_utils.evaluation import generation

GREEDY = {"num_beams": 1, "max_new_tokens": 10, "min_length": 0, "no_repeat_ngram_size": 0}


def make_documents(num: int, seed: int = 0) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 30, (num,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator).tolist()) for n in lengths]


def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def inputs_of(tokenizer, document: str, length: int) -> dict:
    encoded = tokenizer(document, truncation=True, max_length=length, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("settings", [{}, {"num_beams": 1, "max_new_tokens": 9}], ids=["own settings", "greedy"])
def test_summarize_equals_generate_one_by_one(settings):
    model, tokenizer = tiny_bart(), tiny_tokenizer()
    documents, seen = make_documents(9), []
    documents[3] = "  "
    model.train()  # dropout must be off for the summaries, and on again after them
    options = {"batch_size": 4, "prefix": "the list ", "progress": lambda *done: seen.append(done)}
    summaries = generation.summarize(model, tokenizer, documents, max_source_length=16, **options, **settings)
    assert model.training and seen == [(5, 9), (9, 9)]
    assert summaries[3] == "" and len(set(summaries)) > 3  # the order would not show otherwise
    model.eval()
    for document, summary in zip(documents, summaries, strict=True):
        if document.strip():
            with torch.no_grad():
                ids = model.generate(**inputs_of(tokenizer, "the list " + document, 16), **settings)
            assert summary == tokenizer.decode(ids[0], skip_special_tokens=True)
    assert generation.summarize(model, tokenizer, ["", None], max_source_length=16) == ["", ""]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "settings",
    [
        {"num_return_sequences": 3, "return_dict_in_generate": True},
        {"encoder_no_repeat_ngram_size": 1, "no_repeat_ngram_size": 0},
        {"encoder_repetition_penalty": 3.0},
    ],
    ids=["candidates", "ngrams", "penalty"],
)
def test_settings_that_a_model_carries_hold_with_and_without_scores(family, settings):
    model, tokenizer = FAMILIES[family](), tiny_tokenizer()
    documents = [" ".join((document + " the" * 9).split()[:9]) for document in make_documents(3)]  # nothing is padded
    model.generation_config.update(**settings)
    expected = []
    for document in documents:
        with torch.no_grad():
            single = {"num_return_sequences": 1, "return_dict_in_generate": False}
            ids = model.generate(**inputs_of(tokenizer, document, 24), **single)
        expected.append(generation.to_text(tokenizer, ids[0].tolist()))
    for summarize in (generation.summarize, lambda *given, **more: generation.summarize_with_scores(*given, **more)[0]):
        assert summarize(model, tokenizer, documents, max_source_length=24, batch_size=3) == expected


@pytest.mark.parametrize("limit", [{"max_length": 7}, {"max_length": None, "max_new_tokens": 6}, {"max_length": None}])
def test_the_forced_end_does_not_count_whatever_sets_the_limit(limit):
    model, tokenizer, document = tiny_bart(), tiny_tokenizer(), make_documents(1)[0]
    greedy = {"num_beams": 1, "min_length": 0, "no_repeat_ngram_size": 0, "length_penalty": 1.0}
    model.generation_config.update(**greedy, forced_eos_token_id=EOS, **limit)
    inputs = inputs_of(tokenizer, document, 24)
    with torch.no_grad():
        ids = model.generate(**inputs)
        log_probs = model(**inputs, decoder_input_ids=ids[:, :-1]).logits.log_softmax(-1)[0]
    assert ids.shape[1] == (21 if limit == {"max_length": None} else 7)  # nothing but the limit has ended it
    wanted = log_probs.gather(1, ids[0, 1:, None])[:-1].mean().item()
    assert generation.summarize_with_scores(model, tokenizer, [document], 24)[1] == [pytest.approx(wanted, abs=1e-4)]


@pytest.mark.parametrize("length", [1, 65])
def test_impossible_source_lengths_are_rejected(length):
    with pytest.raises(artifacts.InputError, match=str(length)):
        generation.summarize(tiny_bart(), tiny_tokenizer(), ["the"], max_source_length=length)


def test_new_line_token_of_pegasus():
    tokenizer = tiny_tokenizer()
    assert generation.to_text(tokenizer, tokenizer.convert_tokens_to_ids(["the", "list"])) == "the list"
    tokenizer.add_tokens(["<n>"])
    ids = tokenizer.convert_tokens_to_ids(["the", "<n>", "list", "</s>"])
    assert generation.to_text(tokenizer, ids) == "the\nlist"


def test_candidates_are_the_beams_of_generate():
    model, tokenizer = tiny_bart(), tiny_tokenizer()
    documents = [*make_documents(5), ""]
    options = {"batch_size": 2, "num_candidates": 3, "num_beams": 4}
    texts, scores = generation.summarize_with_scores(model, tokenizer, documents, 24, **options)
    assert texts[15:] == [""] * 3 and scores[15:] == [None] * 3
    for i, document in enumerate(documents[:5]):
        inputs = inputs_of(tokenizer, document, 24)
        with torch.no_grad():
            ids = model.generate(**inputs, num_beams=4, num_return_sequences=3)
            log_probs = model(**{k: v.repeat(3, 1) for k, v in inputs.items()}, decoder_input_ids=ids[:, :-1]).logits
        assert texts[3 * i : 3 * i + 3] == [generation.to_text(tokenizer, row) for row in ids.tolist()]
        log_probs = log_probs.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        own = (ids[:, 1:] == EOS).cumsum(1) - (ids[:, 1:] == EOS).long() == 0  # up to the end token
        assert scores[3 * i : 3 * i + 3] == pytest.approx(((log_probs * own).sum(1) / own.sum(1)).tolist(), abs=1e-4)
