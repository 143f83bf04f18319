"""Captured queries, keys and values against projections by hand and against the attention of eager models."""

import pytest
import torch
from tiny_models import FAMILIES, PAD, VOCAB_SIZE, tiny_bart, tiny_batch
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from distill_utils.artifacts import InputError
from distill_utils.models.hooks import capture, projections


def one_stack(family, layers=2, width=16):
    """Return a language model like BERT, or like OPT."""
    shape = {"vocab_size": VOCAB_SIZE, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2}
    shape |= {"pad_token_id": PAD, "max_position_embeddings": 64}
    torch.manual_seed(layers)
    if family == "bert":
        return BertForMaskedLM(BertConfig(**shape, intermediate_size=32)).eval()
    return OPTForCausalLM(OPTConfig(**shape, ffn_dim=32, word_embed_proj_dim=width)).eval()


@pytest.mark.parametrize("family", [*FAMILIES, "bert", "opt"])
def test_captured_vectors_give_the_attention_of_the_model(family):
    batch, is_t5 = tiny_batch(), family.startswith("t5")
    source = batch["attention_mask"].bool()[:, None, None]
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    if family in FAMILIES:
        model = FAMILIES[family](2, 2)
        length = batch["labels"].shape[1]
        sites = {
            "encoder_self": ("encoder_attentions", source),
            "decoder_self": ("decoder_attentions", causal[:length, :length]),
            "decoder_cross": ("cross_attentions", source),
        }
    else:
        del batch["labels"]
        model = one_stack(family)
        site, mask = ("encoder_self", source) if family == "bert" else ("decoder_self", source & causal)
        sites = {site: ("attentions", mask)}
    model.set_attn_implementation("eager")
    with capture(model, [(site, -1) for site in sites]) as captured:
        outputs = model(**batch, output_attentions=True)
    names = {module: name for name, module in model.named_modules()}
    for site, (attention, mask) in sites.items():
        vectors = captured[site, -1]
        assert list(vectors) == ["q", "k", "v"] and vectors["v"].shape == vectors["k"].shape
        assert [names[module].rpartition(".")[2][0] for module in projections(model, site, -1)] == list(vectors)
        q, k = (vectors[name].unflatten(-1, (2, 8)).transpose(1, 2) for name in "qk")
        scores = q @ k.mT * (1.0 if is_t5 else 8**-0.5)
        if is_t5 and site != "decoder_cross":
            stack = model.get_encoder() if site == "encoder_self" else model.get_decoder()
            scores = scores + stack.block[0].layer[0].SelfAttention.compute_bias(*scores.shape[-2:])
        expected = scores.masked_fill(~mask, -1e9).softmax(-1)
        torch.testing.assert_close(expected, outputs[attention][-1], rtol=1e-4, atol=1e-5)


def test_what_does_not_exist_is_rejected():
    model = tiny_bart(2, 3)
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=4, n_layer=1, n_head=1))
    for asked, site, message in (
        (model, ("encoder_self", 2), "layer 2 of encoder_self .* 0 to 1"),
        (model, ("decoder_cross", -4), "layer -4 of decoder_cross .* 0 to 2"),
        (model, ("cross", 0), "bart models have no 'cross'"),
        (one_stack("bert"), ("decoder_cross", 0), "bert models have no 'decoder_cross'"),
        (gpt, ("decoder_self", 0), "'gpt2'"),
    ):
        sites = [("encoder_self", 0), site] if asked is model else [site]
        with pytest.raises(InputError, match=message), capture(asked, sites):
            pass
    assert not any(module._forward_hooks for module in model.modules())


def test_a_site_that_was_not_run_or_was_empty_is_named_and_other_errors_come_through():
    model, batch = tiny_bart(2, 2), tiny_batch()
    with pytest.raises(InputError, match="layer 1 of decoder_self was not run"), capture(model, [("decoder_self", 1)]):
        model.get_encoder()(input_ids=batch["input_ids"])
    with pytest.raises(InputError, match="layer 0 of encoder_self was not run"), capture(model, [("encoder_self", 0)]):
        for projection in projections(model, "encoder_self", 0):
            projection(torch.zeros(3, 0, 16))
    with pytest.raises(ZeroDivisionError), capture(model, [("decoder_self", 1)]):
        raise ZeroDivisionError
    assert not any(module._forward_hooks for module in model.modules())
