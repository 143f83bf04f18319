import pytest
import torch
from test_generation import GREEDY, make_documents, save
from tiny_models import BOS, EOS, FAMILIES, tiny_bart, tiny_t5_v1_1, tiny_tokenizer
from transformers import AutoModelForSeq2SeqLM

from distill_utils import artifacts
from distill_utils.evaluation import ctranslate, generation
from distill_utils.models.loading import load_model


def teacher_forced_mean(model, tokenizer, document, max_source_length, sequence, skip=0, end=None) -> float:
    """Mean log-probability of sequence[1:] by one plain forward pass."""
    inputs = tokenizer(document, truncation=True, max_length=max_source_length, return_tensors="pt")
    ids = torch.tensor([sequence])
    with torch.no_grad():
        log_probs = model(**{k: inputs[k] for k in ("input_ids", "attention_mask")}, decoder_input_ids=ids[:, :-1])
    log_probs = log_probs.logits.double().log_softmax(-1)[0].gather(1, ids[0, 1:, None])[:, 0]
    return log_probs[skip:end].mean().item()


def with_scores(model, tokenizer, documents, settings):
    return generation.summarize_with_scores(model, tokenizer, documents, 24, batch_size=5, **settings)


@pytest.mark.parametrize("family", ["bart", "mbart", "pegasus", "t5", "t5_v1_1"])
@pytest.mark.parametrize("forced", [False, True], ids=["free", "forced"])
def test_ctranslate2_greedy_and_scores_equal_transformers(family, forced, tmp_path):
    model, tokenizer = FAMILIES[family](), tiny_tokenizer()
    if forced:
        model.generation_config.forced_bos_token_id, model.generation_config.forced_eos_token_id = BOS, EOS
    folder = ctranslate.to_ctranslate2(save(model, tokenizer, tmp_path / "model"), tmp_path / "converted")
    documents = [*make_documents(12), ""]
    expected, expected_scores = with_scores(model, tokenizer, documents, GREEDY)
    seen = []
    summaries, scores = ctranslate.summarize_ctranslate2(
        folder,
        tokenizer,
        documents,
        max_source_length=24,
        batch_tokens=60,
        progress=lambda *done: seen.append(done),
        **GREEDY,
    )
    assert summaries == expected and len(set(expected)) > 3
    assert seen[-1] == (13, 13)
    assert scores[-1] is None and expected_scores[-1] is None
    assert scores[:-1] == pytest.approx(expected_scores[:-1], abs=2e-4)
    for document, score in zip(documents[:3], expected_scores, strict=False):
        inputs = tokenizer(document, truncation=True, max_length=24, return_tensors="pt")
        with torch.no_grad():
            settings = {"num_beams": 1, "max_length": 11, "min_length": 0, "no_repeat_ngram_size": 0}
            ids = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **settings)[0]
        end = -1 if forced and len(ids) == 11 else None
        mean = teacher_forced_mean(model, tokenizer, document, 24, ids.tolist(), skip=int(forced), end=end)
        assert score == pytest.approx(mean, abs=1e-4)


def test_ctranslate2_takes_the_models_own_settings(tmp_path):
    model, tokenizer = tiny_bart(), tiny_tokenizer()  # carries 3 beams, lengths, a penalty and no repeated 3-grams
    model.generation_config.early_stopping = True
    folder = ctranslate.to_ctranslate2(save(model, tokenizer, tmp_path / "model"), tmp_path / "converted")
    documents = make_documents(20)
    expected = generation.summarize(model, tokenizer, documents, max_source_length=24)
    found, _ = ctranslate.summarize_ctranslate2(folder, tokenizer, documents, max_source_length=24)
    assert sum(a == b for a, b in zip(found, expected, strict=True)) >= 14
    given = {"num_beams": 1, "max_new_tokens": 5}
    found = generation.decoding_settings(model.generation_config, **given)
    assert found == {"length_penalty": 0.7, "no_repeat_ngram_size": 3, "min_length": 3} | given
    assert generation.decoding_settings(model.generation_config)["max_new_tokens"] == 13  # max_length 14 with the start


def test_length_limits_mean_the_same_in_both_engines(tmp_path):
    model, tokenizer = tiny_bart(seed=3), tiny_tokenizer()
    model.final_logits_bias[0, EOS] = 8.0  # wants to end at once
    folder = ctranslate.to_ctranslate2(save(model, tokenizer, tmp_path / "model"), tmp_path / "converted")
    documents = make_documents(8)
    for min_length, max_new_tokens in ((0, 6), (2, 6), (5, 6), (7, 6), (5, 5), (4, 3)):
        settings = GREEDY | {"min_length": min_length, "max_new_tokens": max_new_tokens}
        if min_length > max_new_tokens + 1:
            continue
        expected = generation.summarize(model, tokenizer, documents, max_source_length=24, **settings)
        found, _ = ctranslate.summarize_ctranslate2(folder, tokenizer, documents, max_source_length=24, **settings)
        assert found == expected, settings


@pytest.mark.parametrize("family", ["bart", "t5_v1_1"])
def test_ctranslate2_beams_reach_the_scores_of_transformers(family, tmp_path):
    model, tokenizer = FAMILIES[family](), tiny_tokenizer()
    folder = ctranslate.to_ctranslate2(save(model, tokenizer, tmp_path / "model"), tmp_path / "converted")
    documents = make_documents(20)
    settings = GREEDY | {"num_beams": 4, "length_penalty": 1.0}
    expected, expected_scores = with_scores(model, tokenizer, documents, settings | {"early_stopping": True})
    found, scores = ctranslate.summarize_ctranslate2(folder, tokenizer, documents, max_source_length=24, **settings)
    same = [i for i in range(20) if found[i] == expected[i]]
    assert len(same) >= 15
    assert [scores[i] for i in same] == pytest.approx([expected_scores[i] for i in same], abs=2e-4)


def test_output_scaling_of_t5_v1_1_is_mended(tmp_path):
    """Without the mend the converter scales the outputs of a tied config that must not be scaled."""
    model = tiny_t5_v1_1()
    model.config.tie_word_embeddings = True  # what a checkpoint's configuration says since transformers 5
    model.config.scale_decoder_outputs = False
    save(model, tiny_tokenizer(), tmp_path / "model")
    folder = ctranslate.to_ctranslate2(tmp_path / "model", tmp_path / "converted")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model").eval()
    documents = make_documents(6)
    _, expected = with_scores(model, tiny_tokenizer(), documents, GREEDY)
    _, found = ctranslate.summarize_ctranslate2(folder, tiny_tokenizer(), documents, max_source_length=24, **GREEDY)
    assert found == pytest.approx(expected, abs=2e-4)


def test_conversion_without_legacy_fields_and_with_a_short_tokenizer(tmp_path):
    model, tokenizer = tiny_bart(), tiny_tokenizer(vocab_size=80)  # the model has 96 entries
    for name in ("normalize_before", "normalize_embedding", "add_final_layer_norm"):
        delattr(model.config, name)
    model.final_logits_bias[0, 80:] = -100.0
    folder = ctranslate.to_ctranslate2(save(model, tokenizer, tmp_path / "model"), tmp_path / "converted")
    documents = make_documents(4)
    expected = generation.summarize(model, tokenizer, documents, max_source_length=24, **GREEDY)
    assert ctranslate.summarize_ctranslate2(folder, tokenizer, documents, max_source_length=24, **GREEDY)[0] == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "model"]  # no temporary folder left


def test_generation_settings_of_an_old_checkpoint_are_found_in_its_config(tmp_path):
    save(tiny_bart(), tiny_tokenizer(), tmp_path / "model")
    settings = artifacts.read_json(tmp_path / "model" / "generation_config.json")
    (tmp_path / "model" / "generation_config.json").unlink()
    path = tmp_path / "model" / "config.json"
    artifacts.write_json(path, artifacts.read_json(path) | settings | {"forced_bos_token_id": BOS})
    folder = ctranslate.to_ctranslate2(tmp_path / "model", tmp_path / "converted")
    model, tokenizer = load_model(tmp_path / "model")
    documents = make_documents(6)
    expected = generation.summarize(model, tokenizer, documents, max_source_length=24, num_beams=1)
    found = ctranslate.summarize_ctranslate2(folder, tokenizer, documents, max_source_length=24, num_beams=1)[0]
    assert found == expected
    assert generation.decoding_settings(ctranslate.read_generation_config(folder))["max_new_tokens"] == 13


def test_conversion_refuses_what_it_cannot_express(tmp_path):
    model = tiny_bart()
    model.generation_config.encoder_no_repeat_ngram_size = 2
    save(model, tiny_tokenizer(), tmp_path / "model")
    with pytest.raises(ValueError, match="encoder_no_repeat_ngram_size"):
        ctranslate.to_ctranslate2(tmp_path / "model", tmp_path / "converted")
    save(FAMILIES["marian"](), tiny_tokenizer(), tmp_path / "marian")
    with pytest.raises(ValueError, match="marian"):
        ctranslate.to_ctranslate2(tmp_path / "marian", tmp_path / "converted")
    with pytest.raises(artifacts.InputError, match="config.json"):
        ctranslate.to_ctranslate2(tmp_path, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize(
    "shape", [{}, {"temperature": 0.5}, {"temperature": 0.5, "top_p": 0.8}, {"top_k": 3}], ids=["1", "0.5", "p", "k"]
)
def test_both_engines_sample_from_the_models_distribution(shape, tmp_path):
    """First tokens of many samples against the probabilities that one forward pass gives, cut and scaled by hand."""
    model, tokenizer = tiny_bart(), tiny_tokenizer()
    folder = ctranslate.to_ctranslate2(save(model, tokenizer, tmp_path / "model"), tmp_path / "converted")
    document, num = make_documents(1)[0], 2000
    shape = {"temperature": 1.0, "top_k": None, "top_p": None} | shape
    inputs = tokenizer(document, return_tensors="pt")
    start = torch.tensor([[model.config.decoder_start_token_id]])
    with torch.no_grad():
        logits = model(input_ids=inputs["input_ids"], decoder_input_ids=start).logits[0, 0].double()
    probs, order = (logits / shape["temperature"]).softmax(-1).sort(descending=True)
    reached = torch.cat([torch.zeros(1), probs.cumsum(0)[:-1]])  # before each token
    probs[(reached >= (shape["top_p"] or 1.1)) | (torch.arange(len(probs)) >= (shape["top_k"] or len(probs)))] = 0.0
    expected = {}  # special tokens have the same text, ""
    for token, prob in zip(order.tolist(), (probs / probs.sum()).tolist(), strict=True):
        text = generation.to_text(tokenizer, [token])
        expected[text] = expected.get(text, 0.0) + prob

    one_token = {"max_new_tokens": 1, "min_length": 0, "no_repeat_ngram_size": 0}
    options = {"max_source_length": 24, "num_candidates": num, "seed": 1, **one_token}
    found, scores = ctranslate.summarize_ctranslate2(folder, tokenizer, [document], **options, **shape)
    hub = {"do_sample": True, "num_beams": 1, "length_penalty": 1.0, "temperature": shape["temperature"]}
    hub |= {"top_k": shape["top_k"] or 0, "top_p": shape["top_p"] or 1.0}
    texts, hub_scores = generation.summarize_with_scores(model, tokenizer, [document], **options, **hub)
    log_probs = {generation.to_text(tokenizer, [i]): p for i, p in enumerate(logits.log_softmax(-1).tolist()) if i > 4}
    for labels, values in ((found, scores), (texts, hub_scores)):
        shares = {text: labels.count(text) / num for text in set(labels)}
        assert all(expected.get(text, 0.0) > 0 for text in shares)  # nothing that is cut off
        for text, prob in expected.items():
            assert abs(shares.get(text, 0.0) - prob) < 4.5 * (max(prob, 1 / num) / num) ** 0.5, text
        # The score is that of the model itself, whatever the temperature.
        assert all(
            value == pytest.approx(log_probs[text], abs=2e-4)
            for text, value in zip(labels, values, strict=True)
            if text
        )
