"""The fast engine against `generate`: the same summaries, scores, lengths and samples of every family it converts."""

import pytest
import torch
from test_generation import GREEDY, inputs_of, make_documents, save
from tiny_models import BOS, EOS, FAMILIES, tiny_bart, tiny_t5_v1_1, tiny_tokenizer

from distill_utils import artifacts
from distill_utils.evaluation import ctranslate, generation
from distill_utils.models.loading import load_model


def convert(model, tokenizer, folder):
    return ctranslate.to_ctranslate2(save(model, tokenizer, folder / "model"), folder / "converted")


def both_engines(model, folder, tokenizer, documents, settings, **options):
    """Return (summaries, scores) of `generate` and those of the converted model."""
    theirs = generation.summarize_with_scores(model, tokenizer, documents, 24, batch_size=5, **settings)
    return theirs, ctranslate.summarize_ctranslate2(
        folder, tokenizer, documents, max_source_length=24, **options, **settings
    )


@pytest.mark.parametrize("family", ["bart", "mbart", "pegasus", "t5", "t5_v1_1"])
@pytest.mark.parametrize("forced", [False, True], ids=["free", "forced"])
def test_greedy_summaries_and_scores_equal_those_of_generate(family, forced, tmp_path):
    model, tokenizer = FAMILIES[family](), tiny_tokenizer()
    if forced:
        model.generation_config.forced_bos_token_id, model.generation_config.forced_eos_token_id = BOS, EOS
    folder, documents, seen = convert(model, tokenizer, tmp_path), [*make_documents(12), ""], []
    options = {"batch_tokens": 60, "progress": lambda *done: seen.append(done)}
    theirs, (summaries, scores) = both_engines(model, folder, tokenizer, documents, GREEDY, **options)
    assert summaries == theirs[0] and len(set(summaries)) > 3 and seen[-1] == (13, 13)
    assert scores[-1] is None and theirs[1][-1] is None
    assert scores[:-1] == pytest.approx(theirs[1][:-1], abs=2e-4)
    for document, score in zip(documents[:3], theirs[1], strict=False):
        inputs = inputs_of(tokenizer, document, 24)
        with torch.no_grad():
            settings = {"num_beams": 1, "max_length": 11, "min_length": 0, "no_repeat_ngram_size": 0}
            ids = model.generate(**inputs, **settings)
            logits = model(**inputs, decoder_input_ids=ids[:, :-1]).logits.double()
        log_probs = logits.log_softmax(-1)[0].gather(1, ids[0, 1:, None])[:, 0]
        end = -1 if forced and ids.shape[1] == 11 else None  # forced tokens do not count
        assert score == pytest.approx(log_probs[int(forced) : end].mean().item(), abs=1e-4)


def test_the_engine_leaves_the_threads_of_torch(tmp_path):
    folder, given = convert(tiny_bart(), tiny_tokenizer(), tmp_path), torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert ctranslate.load_translator(folder, 2).num_translators == 2 and torch.get_num_threads() == 4
        assert ctranslate.load_translator(folder, 9).num_translators == 4 and torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(given)


@pytest.mark.parametrize(("slow", "kept"), [({1: 0.2, 4: 0.1}, 4), ({1: 0.1, 4: 0.2}, 1), ({1: 0.1, 4: 0.1}, 1)])
def test_one_batch_gets_all_threads_only_where_they_are_faster(slow, kept, tmp_path, monkeypatch):
    folder, given = convert(tiny_bart(), tiny_tokenizer(), tmp_path), torch.get_num_threads()
    built, real = [], ctranslate._engine
    monkeypatch.setattr(ctranslate, "_engine", lambda *given: built.append(given[2]) or real(*given))
    monkeypatch.setattr(ctranslate, "timed", lambda probe, on: probe() and slow[built[-1]])
    try:
        torch.set_num_threads(4)
        assert ctranslate.load_translator(folder).num_translators == 1 and built[-1] == kept
        assert set(built) == {1, 4} and torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(given)


@pytest.mark.parametrize(("family", "settings"), [("bart", {}), ("t5_v1_1", GREEDY | {"num_beams": 4})])
def test_beams_reach_the_summaries_and_scores_of_generate(family, settings, tmp_path):
    model, tokenizer = FAMILIES[family](), tiny_tokenizer()  # carries 3 beams, lengths, a penalty, no repeated 3-grams
    model.generation_config.early_stopping = True
    folder = convert(model, tokenizer, tmp_path)
    theirs, ours = both_engines(model, folder, tokenizer, make_documents(20), settings)
    same = [i for i in range(20) if ours[0][i] == theirs[0][i]]
    assert len(same) >= 14
    if settings:  # the engine's own scores are other ones where n-grams are forbidden
        assert [ours[1][i] for i in same] == pytest.approx([theirs[1][i] for i in same], abs=2e-4)


def test_settings_not_given_are_the_models_own():
    config, given = tiny_bart().generation_config, {"num_beams": 1, "max_new_tokens": 5}
    own = {"length_penalty": 0.7, "no_repeat_ngram_size": 3, "min_length": 3}
    assert generation.decoding_settings(config, **given) == own | given
    assert generation.decoding_settings(config)["max_new_tokens"] == 13  # max_length 14 with the start
    with pytest.raises(TypeError, match="top_p"):
        generation.decoding_settings(config, top_p=0.5)


@pytest.mark.parametrize("forced", [None, EOS])
def test_length_limits_mean_the_same_in_both_engines(tmp_path, forced):
    model, tokenizer = tiny_bart(seed=3), tiny_tokenizer()
    model.final_logits_bias[0, EOS] = 8.0  # wants to end at once
    model.generation_config.forced_eos_token_id = forced
    folder = convert(model, tokenizer, tmp_path)
    for min_length, max_new_tokens in ((0, 6), (2, 6), (5, 6), (7, 6), (5, 5), (4, 3)):
        settings = GREEDY | {"min_length": min_length, "max_new_tokens": max_new_tokens}
        theirs, ours = both_engines(model, folder, tokenizer, make_documents(8), settings)
        assert ours[0] == theirs[0], settings


def unscaled_t5(folder):
    """Save what the converter would scale, because the configuration says "tied" since transformers 5."""
    model = tiny_t5_v1_1()
    model.config.tie_word_embeddings, model.config.scale_decoder_outputs = True, False
    save(model, tiny_tokenizer(), folder)


def short_tokenizer(folder):
    model, tokenizer = tiny_bart(), tiny_tokenizer(vocab_size=80)  # the model has 96 entries
    for name in ("normalize_before", "normalize_embedding", "add_final_layer_norm"):
        delattr(model.config, name)
    model.final_logits_bias[0, 80:] = -100.0
    save(model, tokenizer, folder)


def settings_in_config(folder):
    save(tiny_bart(), tiny_tokenizer(), folder)
    settings = artifacts.read_json(folder / "generation_config.json")
    (folder / "generation_config.json").unlink()
    config = artifacts.read_json(folder / "config.json")
    artifacts.write_json(folder / "config.json", config | settings | {"forced_bos_token_id": BOS})


@pytest.mark.parametrize("prepare", [unscaled_t5, short_tokenizer, settings_in_config])
def test_checkpoints_that_the_converter_alone_reads_wrongly(prepare, tmp_path):
    prepare(tmp_path / "model")
    folder = ctranslate.to_ctranslate2(tmp_path / "model", tmp_path / "converted")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "model"]  # no temporary folder left
    model, tokenizer = load_model(tmp_path / "model")
    theirs, ours = both_engines(model, folder, tokenizer, make_documents(6), GREEDY)
    assert ours[0] == theirs[0] and ours[1] == pytest.approx(theirs[1], abs=2e-4)
    assert generation.decoding_settings(ctranslate.read_generation_config(folder))["max_new_tokens"] == 13


def test_what_the_engine_cannot_express_is_rejected(tmp_path):
    settings = {"encoder_no_repeat_ngram_size": 2, "min_new_tokens": 4, "penalty_alpha": 0.6}
    for name, value in settings.items():
        model = tiny_bart()
        setattr(model.generation_config, name, value)
        save(model, tiny_tokenizer(), tmp_path / name)
    save(FAMILIES["marian"](), tiny_tokenizer(), tmp_path / "marian")
    for named in (*settings, "marian"):
        with pytest.raises(ValueError, match=named):
            ctranslate.to_ctranslate2(tmp_path / named, tmp_path / "converted")
    with pytest.raises(artifacts.InputError, match="config.json"):
        ctranslate.to_ctranslate2(tmp_path, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("shape", [{"temperature": 0.5}, {"temperature": 0.5, "top_p": 0.8}, {"top_k": 3}], ids=str)
def test_both_engines_sample_from_the_models_distribution(shape, tmp_path):
    """First tokens of many samples against the probabilities that one forward pass gives, cut and scaled by hand."""
    model, tokenizer = tiny_bart(), tiny_tokenizer()
    folder, document, num = convert(model, tokenizer, tmp_path), make_documents(1)[0], 2000
    shape = {"temperature": 1.0, "top_k": None, "top_p": None} | shape
    start = torch.tensor([[model.config.decoder_start_token_id]])
    with torch.no_grad():
        logits = model(**inputs_of(tokenizer, document, 24), decoder_input_ids=start).logits[0, 0].double()
    probs, order = (logits / shape["temperature"]).softmax(-1).sort(descending=True)
    reached = torch.cat([torch.zeros(1), probs.cumsum(0)[:-1]])  # before each token
    probs[(reached >= (shape["top_p"] or 1.1)) | (torch.arange(len(probs)) >= (shape["top_k"] or len(probs)))] = 0.0
    expected = {}  # special tokens have the same text, ""
    for token, prob in zip(order.tolist(), (probs / probs.sum()).tolist(), strict=True):
        text = generation.to_text(tokenizer, [token])
        expected[text] = expected.get(text, 0.0) + prob

    options = {"num_candidates": num, "seed": 1, "max_new_tokens": 1, "min_length": 0, "no_repeat_ngram_size": 0}
    ours = ctranslate.summarize_ctranslate2(folder, tokenizer, [document], max_source_length=24, **options, **shape)
    hub = {"do_sample": True, "num_beams": 1, "length_penalty": 1.0, "temperature": shape["temperature"]}
    hub |= {"top_k": shape["top_k"] or 0, "top_p": shape["top_p"] or 1.0}
    theirs = generation.summarize_with_scores(model, tokenizer, [document], 24, **options, **hub)
    log_probs = {generation.to_text(tokenizer, [i]): p for i, p in enumerate(logits.log_softmax(-1).tolist()) if i > 4}
    for texts, scores in (ours, theirs):
        shares = {text: texts.count(text) / num for text in set(texts)}
        assert all(expected.get(text, 0.0) > 0 for text in shares)  # nothing that is cut off
        for text, prob in expected.items():
            assert abs(shares.get(text, 0.0) - prob) < 4.5 * (max(prob, 1 / num) / num) ** 0.5, text
        # The score is that of the model itself, whatever the temperature.
        of_words = [(score, log_probs[text]) for text, score in zip(texts, scores, strict=True) if text]
        assert [score for score, _ in of_words] == pytest.approx([exact for _, exact in of_words], abs=2e-4)
