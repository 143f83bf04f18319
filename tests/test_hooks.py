"""Captured queries, keys and values against projections by hand and against the attention of eager models."""

import pytest
import torch
from tiny_models import FAMILIES, PAD, VOCAB_SIZE, tiny_bart, tiny_batch, tiny_t5
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from distill_utils.artifacts import InputError
from distill_utils.models.hooks import capture, projections

SITES = ("encoder_self", "decoder_self", "decoder_cross")

each_family = pytest.mark.parametrize("family", FAMILIES)
SHAPE = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def tiny_bert():
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(**SHAPE, intermediate_size=32, pad_token_id=PAD)).eval()


def tiny_opt():
    torch.manual_seed(0)
    config = OPTConfig(**SHAPE, ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=64, pad_token_id=PAD)
    return OPTForCausalLM(config).eval()


@each_family
def test_captured_vectors_are_the_projections_of_the_layers_inputs(family):
    model, batch = FAMILIES[family](2, 3), tiny_batch()
    sites = [("encoder_self", 0), ("encoder_self", -1), ("decoder_self", 1), ("decoder_cross", -1)]
    inputs = {}
    for site in sites:
        for name, module in zip("qkv", projections(model, *site), strict=True):
            module.register_forward_pre_hook(lambda _, args, key=(site, name): inputs.update({key: args[0]}))
    with capture(model, sites) as captured:
        model(**batch)
    assert list(captured) == sites
    for site, vectors in captured.items():
        assert list(vectors) == ["q", "k", "v"]
        for (name, vector), module in zip(vectors.items(), projections(model, *site), strict=True):
            expected = inputs[site, name] @ module.weight.T + (0.0 if module.bias is None else module.bias)
            torch.testing.assert_close(vector, expected)
            on_target = site[0] == "decoder_self" or (site[0] == "decoder_cross" and name == "q")
            assert vector.shape == (*batch["labels" if on_target else "input_ids"].shape, 16) and vector.requires_grad
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("make", [tiny_bart, tiny_t5])
def test_captured_vectors_give_the_attention_of_the_model(make):
    model, batch = make(2, 2), tiny_batch()
    model.set_attn_implementation("eager")
    with capture(model, [(site, 1) for site in SITES]) as captured:
        outputs = model(**batch, output_attentions=True)
    is_t5 = make is tiny_t5
    source = batch["attention_mask"].bool()[:, None, None]
    length = batch["labels"].shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    stacks = {"encoder_self": model.get_encoder(), "decoder_self": model.get_decoder()}
    for site, attentions, mask in (
        ("encoder_self", outputs.encoder_attentions, source),
        ("decoder_self", outputs.decoder_attentions, causal),
        ("decoder_cross", outputs.cross_attentions, source),
    ):
        q, k = (captured[site, 1][name].unflatten(-1, (2, 8)).transpose(1, 2) for name in "qk")
        scores = q @ k.mT * (1.0 if is_t5 else 8**-0.5)
        if is_t5 and site in stacks:
            scores = scores + stacks[site].block[0].layer[0].SelfAttention.compute_bias(*scores.shape[-2:])
        torch.testing.assert_close(scores.masked_fill(~mask, -1e9).softmax(-1), attentions[1], rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize(("make", "site"), [(tiny_bert, "encoder_self"), (tiny_opt, "decoder_self")])
def test_models_of_one_stack_have_their_self_attention(make, site):
    model, batch = make(), tiny_batch()
    model.set_attn_implementation("eager")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with capture(model, [(site, -1)]) as captured:
        attention = model(**inputs, output_attentions=True).attentions[-1]
    q, k = (captured[site, -1][name].unflatten(-1, (2, 8)).transpose(1, 2) for name in "qk")
    mask = inputs["attention_mask"].bool()[:, None, None]
    mask = mask & torch.ones(9, 9, dtype=torch.bool).tril() if site == "decoder_self" else mask
    torch.testing.assert_close((q @ k.mT * 8**-0.5).masked_fill(~mask, -1e9).softmax(-1), attention)


def test_what_does_not_exist_is_rejected():
    model = tiny_bart(2, 3)
    for site, message in (
        (("encoder_self", 2), "layer 2 of encoder_self does not exist: give 0 to 1"),
        (("decoder_cross", -4), "layer -4 of decoder_cross does not exist: give 0 to 2"),
        (("cross", 0), "bart models have no 'cross': use encoder_self or decoder_self or decoder_cross"),
    ):
        with pytest.raises(InputError, match=message), capture(model, [("encoder_self", 0), site]):
            pass
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(InputError, match="bert models have no 'decoder_cross'"), capture(tiny_bert(), [(SITES[2], 0)]):
        pass
    other = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=4, n_layer=1, n_head=1))
    with pytest.raises(InputError, match="attention of 'gpt2' models cannot be read"), capture(other, [(SITES[1], 0)]):
        pass


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
