"""Tiny random models of every supported family, a tiny tokenizer and batches, all built offline in milliseconds."""

from functools import partial

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

VOCAB_SIZE = 96
PAD, BOS, EOS, UNK, MASK = 0, 1, 2, 3, 4  # ids shared by every tiny model and by the tiny tokenizer
WORDS = "the a of to in is for read write file list number string text object value name path time error".split()

# What every tiny model generates with, unlike the library's defaults, so that a lost setting shows.
GENERATION = {"num_beams": 3, "max_length": 14, "min_length": 3, "length_penalty": 0.7, "no_repeat_ngram_size": 3}


BART = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 16,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 64,
    "dropout": 0.1,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "decoder_start_token_id": EOS,
    "forced_eos_token_id": None,
    # Fields of old checkpoints that CTranslate2 reads; a config written from nothing lacks them.
    "normalize_before": False,
    "normalize_embedding": True,
    "add_final_layer_norm": False,
}
PRE_NORM = {"normalize_before": True, "add_final_layer_norm": True, "scale_embedding": True}
LIKE_BART = {
    "bart": BART,
    "mbart": BART | PRE_NORM,
    "pegasus": BART | PRE_NORM | {"decoder_start_token_id": PAD, "normalize_embedding": False},
    "marian": BART | {"decoder_start_token_id": PAD, "decoder_vocab_size": VOCAB_SIZE, "scale_embedding": True},
}


def _finish(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Draw every trainable weight and the logits bias anew, norms included, so that no forgotten copy goes unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                is_norm = weight.ndim == 1 and name.endswith("weight")
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3 + float(is_norm))
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_(generator=generator)
    for name, value in GENERATION.items():
        setattr(model.generation_config, name, value)
    return model.eval()


def _tiny_like_bart(family, encoder_layers=3, decoder_layers=3, seed=0, **changes):
    depths = {"encoder_layers": encoder_layers, "decoder_layers": decoder_layers}
    config = AutoConfig.for_model(family, **(LIKE_BART[family] | depths | changes))
    return _finish(AutoModelForSeq2SeqLM.from_config(config), seed)


tiny_bart, tiny_mbart, tiny_pegasus, tiny_marian = (partial(_tiny_like_bart, family) for family in LIKE_BART)


def _t5_config(encoder_layers: int, decoder_layers: int, changes: dict) -> T5Config:
    settings = {
        "vocab_size": VOCAB_SIZE,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": encoder_layers,
        "num_decoder_layers": decoder_layers,
        "num_heads": 2,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 16,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "decoder_start_token_id": PAD,
    }
    return T5Config(**(settings | changes))


def tiny_t5(encoder_layers=3, decoder_layers=3, seed=0, **changes) -> T5ForConditionalGeneration:
    """T5 v1.0: one matrix for both embeddings and the head, outputs scaled before the head."""
    return _finish(T5ForConditionalGeneration(_t5_config(encoder_layers, decoder_layers, changes)), seed)


def tiny_t5_v1_1(encoder_layers=3, decoder_layers=3, seed=0, **changes) -> T5ForConditionalGeneration:
    """T5 v1.1 and Flan-T5: gated feed-forward, outputs not scaled, a head of its own as after loading a checkpoint."""
    changes = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False} | changes
    model = T5ForConditionalGeneration(_t5_config(encoder_layers, decoder_layers, changes))
    model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    return _finish(model, seed)


FAMILIES = {
    "bart": tiny_bart,
    "mbart": tiny_mbart,
    "pegasus": tiny_pegasus,
    "marian": tiny_marian,
    "t5": tiny_t5,
    "t5_v1_1": tiny_t5_v1_1,
}


def tiny_tokenizer(vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Return a word tokenizer of exactly `vocab_size` entries that ends every text with EOS and adds no start token."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "<mask>", *WORDS]
    words += [f"word{i}" for i in range(vocab_size - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words[:vocab_size])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    special = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token", "mask_token"), words, strict=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **special)


def tiny_batch(source_lengths=(9, 5, 7), target_lengths=(4, 6, 3), seed=0, padding=0) -> dict[str, torch.Tensor]:
    """Return input_ids, attention_mask and labels (-100 padded) of random tokens, with `padding` columns more."""
    generator = torch.Generator().manual_seed(seed)
    batch = {}
    for name, lengths, fill in (("input_ids", source_lengths, PAD), ("labels", target_lengths, -100)):
        rows = torch.full((len(lengths), max(lengths) + padding), fill)
        for row, length in zip(rows, lengths, strict=True):
            row[:length] = torch.randint(5, VOCAB_SIZE, (length,), generator=generator)
            row[length - 1] = EOS
        batch[name] = rows
    batch["attention_mask"] = (batch["input_ids"] != PAD).long()
    return batch
