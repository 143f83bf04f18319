"""Captured queries, keys and values against projections by hand and against the attention of eager models."""

import pytest
import torch
from tiny_models import FAMILIES, PAD, VOCAB_SIZE, tiny_bart, tiny_batch
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from distill_utils.artifacts import InputError
from distill_utils.models.hooks import capture, projections

each_family = pytest.mark.parametrize("family", FAMILIES)
SHAPE = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def tiny_bert():
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(**SHAPE, intermediate_size=32, pad_token_id=PAD)).eval()


def tiny_opt():
    torch.manual_seed(0)
    config = OPTConfig(**SHAPE, ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=64, pad_token_id=PAD)
    return OPTForCausalLM(config).eval()


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
        model = tiny_bert() if family == "bert" else tiny_opt()
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


@each_family
def test_a_stopped_pass_computes_nothing_further(family):
    model, batch = FAMILIES[family](3, 3), tiny_batch()
    seen = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *call, name=name: seen.append(name))
    with capture(model, [("encoder_self", 1), ("decoder_cross", 1)], stop=True) as captured:
        model(**batch)
        raise AssertionError("the rest of the block is left out")
    stopped = list(seen)
    with capture(model, [("encoder_self", 1), ("decoder_cross", 1)]) as full:
        model(**batch)
    for site, vectors in captured.items():
        assert all(torch.equal(vector, full[site][name]) for name, vector in vectors.items())
    last = {name for name, module in model.named_modules() if module in projections(model, "decoder_cross", 1)}
    assert stopped[-1] in last and "lm_head" not in stopped and "lm_head" in seen
    assert not any(name.startswith(("model.decoder.layers.2", "decoder.block.2")) for name in stopped)


def test_what_does_not_exist_is_rejected():
    model = tiny_bart(2, 3)
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=4, n_layer=1, n_head=1))
    for asked, site, message in (
        (model, ("encoder_self", 2), "layer 2 of encoder_self .* 0 to 1"),
        (model, ("decoder_cross", -4), "layer -4 of decoder_cross .* 0 to 2"),
        (model, ("cross", 0), "bart models have no 'cross'"),
        (tiny_bert(), ("decoder_cross", 0), "bert models have no 'decoder_cross'"),
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
