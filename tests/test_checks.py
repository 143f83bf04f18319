import json

import pytest
import torch
from test_generation import make_documents
from tiny_models import EOS, FAMILIES, WORDS, tiny_bart, tiny_batch, tiny_mbart, tiny_t5_v1_1, tiny_tokenizer
from transformers import MBartTokenizer
from transformers.models.mbart.tokenization_mbart import FAIRSEQ_LANGUAGE_CODES

from distill_utils import artifacts
from distill_utils.artifacts import InputError
from distill_utils.evaluation import ctranslate
from distill_utils.experiments import checks
from distill_utils.models import students
from distill_utils.models.loading import load_model, save_model

# ------------------------------------------------------------------------------------------------------ before training


SETTINGS = {"max_source_length": 24, "max_new_tokens": 8}


def check(student, teacher):
    documents = make_documents(6)
    return checks.check_initial_student(
        student, teacher, tiny_tokenizer(), tiny_batch(), documents, documents, **SETTINGS
    )


@pytest.mark.parametrize("family", ["bart", "pegasus", "t5_v1_1"])
def test_a_cut_student_passes_and_its_gap_is_measured(family):
    teacher = FAMILIES[family]()
    same = check(teacher, teacher)
    assert [same[key] for key in ("kl_loss", "encoder_gap", "decoder_gap")] == pytest.approx([0, 0, 0], abs=1e-5)
    student = students.init_student(teacher, 3, 1)[0].train()
    row = check(student, teacher)
    assert row["kl_loss"] > 0.01 and row["decoder_gap"] > 0.01 and row["encoder_gap"] == pytest.approx(0, abs=1e-6)
    assert all(module.training for module in student.modules())
    json.dumps(row, allow_nan=False)


def with_nan(student):
    student.model.decoder.layers[1].fc1.weight.data[0, 0] = float("nan")


def with_stale_layer_ids(student):
    student.model.decoder.layers = torch.nn.ModuleList([student.model.decoder.layers[i] for i in (0, 2)])
    student.config.decoder_layers = 2


def with_a_shared_cache_slot(student):
    for attention in ("self_attn", "encoder_attn"):
        getattr(student.model.decoder.layers[2], attention).layer_idx = 1


def that_ends_at_once(student):
    student.generation_config.min_length = 0
    student.final_logits_bias[0, EOS] = 1e4


def with_another_vocabulary(student):
    student.resize_token_embeddings(90)


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (with_nan, r"student weights are not finite, first .*decoder.layers.1.fc1"),
        (with_stale_layer_ids, "layer_idx"),
        (with_a_shared_cache_slot, "cached generation"),
        (that_ends_at_once, "writes nothing for all 6"),
        (with_another_vocabulary, "student 90, teacher 96, tokenizer 96"),
    ],
)
def test_a_broken_student_is_rejected_before_training(breaks, message):
    student = tiny_bart()
    breaks(student)
    with pytest.raises(InputError, match=message):
        check(student, tiny_bart())


# --------------------------------------------------------------------------------------------------------- round trip


@pytest.fixture
def prove(tmp_path):
    """Return a function that saves a student and takes it, or another one in its place, through the round trip."""

    def round_trip(student, taken=None, tokenizer=None):
        if not (tmp_path / "student").exists():
            save_model(student, tiny_tokenizer(), tmp_path / "student")
        given = (taken or student, tokenizer or tiny_tokenizer(), [*make_documents(6), ""])
        return checks.round_trip(tmp_path / "student", *given, **SETTINGS)

    return round_trip


@pytest.fixture
def observe_here(monkeypatch):
    """Reload in this process: as strict, and without seconds of imports a test."""

    def observe(folder, model, documents, settings):
        reloaded, tokenizer = load_model(folder)
        return checks._observe(reloaded, tokenizer, documents, settings)

    monkeypatch.setattr(checks, "_observe_in_new_process", observe)


def test_round_trip_in_a_new_process_of_t5_v1_1_with_ctranslate2(prove, tmp_path):
    row = prove(tiny_t5_v1_1())
    assert row["logits_difference"] < 1e-4 and row["same_summaries"] == 7
    assert row["ctranslate2_rougeL"] > 95 and row["ctranslate2_score_gap"] < 1e-3
    (tmp_path / "student" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="new process: .*InputError"):
        prove(tiny_t5_v1_1())


def test_round_trip_names_what_differs(prove, observe_here, tmp_path):
    assert prove(tiny_bart()).items() >= {"logits_difference": 0, "same_summaries": 7}.items()
    changed = tiny_bart()
    changed.model.decoder.layers[0].fc1.weight.data += 0.1
    with pytest.raises(ValueError, match="logits by"):
        prove(None, changed)
    with pytest.raises(ValueError, match="tokenizer"):
        prove(None, tiny_bart(), tiny_tokenizer(90))
    path = tmp_path / "student" / "generation_config.json"
    artifacts.write_json(path, artifacts.read_json(path) | {"min_length": 5})
    with pytest.raises(ValueError, match="generation settings, min_length: '3' in memory, '5' reloaded"):
        prove(None, tiny_bart())


def test_round_trip_finds_a_wrong_conversion(prove, observe_here, tmp_path, monkeypatch):
    save_model(tiny_bart(seed=5), tiny_tokenizer(), tmp_path / "other")
    real = ctranslate.to_ctranslate2
    monkeypatch.setattr(ctranslate, "to_ctranslate2", lambda _, output: real(tmp_path / "other", output))
    with pytest.raises(ValueError, match="CTranslate2 writes other summaries"):
        prove(tiny_bart())
    monkeypatch.setattr(checks, "MIN_AGREEMENT", 0)
    with pytest.raises(ValueError, match="nats per token off"):
        prove(tiny_bart())


def test_round_trip_skips_what_does_not_convert(prove, observe_here):
    row = prove(FAMILIES["marian"]())
    assert row["ctranslate2_rougeL"] is None and "marian" in row["ctranslate2_skipped"]


def agreement(folder, converted, model, tokenizer, documents):
    """Return what `ctranslate2_agreement` says of a model and another one, converted."""
    save_model(converted, tokenizer, folder / "model")
    converted = ctranslate.to_ctranslate2(folder / "model", folder / "converted")
    settings = SETTINGS | {"prefix": "", "min_length": 0}
    return checks.ctranslate2_agreement(converted, model, tokenizer, documents, documents, settings)


def test_a_language_behind_the_end_token_is_not_compared(tmp_path):
    words = ("<s>", "<pad>", "</s>", "<unk>", "▁", *(f"▁{word}" for word in WORDS), *FAIRSEQ_LANGUAGE_CODES, "<mask>")
    tokenizer = MBartTokenizer(vocab=[(word, 0.0) for word in words], src_lang="en_XX", tgt_lang="en_XX")
    language = tokenizer.convert_tokens_to_ids("en_XX")
    assert tokenizer(text_target="the of")["input_ids"][-2:] == [2, language]
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": language}
    model, documents = tiny_mbart(vocab_size=len(tokenizer), **ids).eval(), make_documents(4)
    model.generation_config.update(**ids)
    _, gap, lost = agreement(tmp_path, model, model, tokenizer, documents)
    assert gap < 1e-4 and abs(lost) < 1e-4


def test_gap_and_lost_likelihood_are_those_of_plain_forward_passes(tmp_path):
    model, other = tiny_bart().eval(), tiny_bart(seed=5).eval()
    tokenizer, documents = tiny_tokenizer(), make_documents(3)
    rouge, gap, lost = agreement(tmp_path, other, model, tokenizer, documents)
    gaps = []  # of one text after the other, of each token
    for document in documents:
        ids = tokenizer(document, truncation=True, max_length=24, return_tensors="pt")["input_ids"]
        start = torch.tensor([[model.generation_config.decoder_start_token_id]])
        given = {"input_ids": ids, "decoder_input_ids": torch.cat([start, ids[:, :-1]], 1)}
        own, theirs = (each(**given).logits.log_softmax(-1).gather(2, ids[..., None]) for each in (model, other))
        gaps.append((own - theirs).flatten())
    assert gap == pytest.approx(sum(each.abs().mean().item() for each in gaps) / 3, rel=1e-4)
    assert lost == pytest.approx(sum(each.mean().item() for each in gaps) / 3, rel=1e-4)
    assert abs(lost) < 0.9 * gap and rouge < 100
