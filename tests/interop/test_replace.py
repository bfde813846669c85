"""Attention layers of other people's models replaced by blocks."""

import pytest
import torch
from stock_models import SIZES
from torch import nn

from seqzoo import build_block, replace
from seqzoo.blocks import AsSelfAttention

D, H = 16, 4


def softmax(old, **options):
    return build_block("softmax_attention", D, **{"num_heads": H, "rotary": False, "bias": True, **options})


def encoder(**options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(D, H, 32, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


@torch.no_grad()
def test_weights_of_pytorch_fit():
    model, x = encoder(), torch.randn(2, 9, D)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    padding = torch.arange(9) >= torch.tensor([[9], [5]])
    before = model(x, src_key_padding_mask=padding)
    changed = replace(model, nn.MultiheadAttention, softmax)
    torch.testing.assert_close(model(x, src_key_padding_mask=padding)[~padding], before[~padding], atol=1e-6, rtol=1e-6)
    assert [str(each) for each in changed] == [
        f"layers.{n}.self_attn: MultiheadAttention -> SoftmaxAttention; "
        "copied in_proj_bias, in_proj_weight, out_proj.bias, out_proj.weight; dropout of 0.1 there, none here"
        for n in range(2)
    ]
    assert not model.layers[0].self_attn.training


@torch.no_grad()
@pytest.mark.parametrize("places", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("nested", [False, True])
def test_padded_batches_of_an_encoder_that_nests_them(places, nested):
    """As it does where a block was assigned, not replaced."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, H, 32, batch_first=True), 2).eval()
    x, padding = torch.randn(2, 9, D), torch.arange(9) >= torch.tensor([[9], [5]])
    before, old = model(x, src_key_padding_mask=padding), [layer.self_attn for layer in model.layers]
    assert model.use_nested_tensor
    replace(model, nn.MultiheadAttention, lambda each: softmax(each) if each in [old[n] for n in places] else None)
    assert not model.use_nested_tensor
    model.use_nested_tensor = nested
    y = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(y[~padding], before[~padding], atol=1e-6, rtol=1e-6)


def test_what_does_not_fit_is_said():
    model = encoder()
    (first, _) = replace(model, nn.MultiheadAttention, lambda old: build_block("lru", old.embed_dim))
    assert (first.copied, len(first.left), first.why) == ((), 4, "LRU has no queries, keys and values to copy")
    model(torch.randn(2, 9, D))
    (first, _) = replace(encoder(), nn.MultiheadAttention, lambda old: softmax(old, num_heads=2))
    assert (first.copied, first.why) == ((), "4 heads and 4 of keys there, 2 and 2 here")
    (first, _) = replace(encoder(), nn.MultiheadAttention, lambda old: softmax(old, bias=False))
    assert first.copied == ("in_proj_weight", "out_proj.weight")
    assert first.left == ("in_proj_bias", "out_proj.bias")
    assert first.why == "bias is [16] there and none here; dropout of 0.1 there, none here"


@torch.no_grad()
@pytest.mark.parametrize("name", ["linear_attention", "performer"])
def test_weights_begin_what_is_to_be_trained_further(name):
    model = encoder()
    weights = model.layers[1].self_attn.in_proj_weight.clone()
    changed = replace(model, nn.MultiheadAttention, lambda old: build_block(name, D, num_heads=H, bias=True))
    assert changed[1].copied == ("in_proj_bias", "in_proj_weight", "out_proj.bias", "out_proj.weight")
    assert torch.equal(model.layers[1].self_attn.block.qkv_proj.weight, weights)


def test_layers_are_left_where_nothing_is_built_and_where_a_block_cannot_stand():
    model = encoder()
    changed = replace(
        model, nn.MultiheadAttention, lambda old: softmax(old) if old is model.layers[1].self_attn else None
    )
    assert [each.new for each in changed] == [None, "SoftmaxAttention"]
    assert isinstance(model.layers[0].self_attn, nn.MultiheadAttention)
    decoder = nn.TransformerDecoderLayer(D, H, 32, batch_first=True)
    changed = replace(decoder, nn.MultiheadAttention, lambda old: softmax(old, causal=True))
    assert str(changed[1]) == "multihead_attn: MultiheadAttention, kept: it attends to another sequence"
    assert isinstance(decoder.self_attn, AsSelfAttention)
    decoder(torch.randn(2, 9, D), torch.randn(2, 5, D), tgt_is_causal=True)


def test_a_layer_in_two_places_stays_one():
    shared = nn.MultiheadAttention(D, H, batch_first=True)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
    assert [each.name for each in replace(model, nn.MultiheadAttention, softmax)] == ["a.0", "b.0"]
    assert model["a"][0] is model["b"][0]


def test_nothing_is_changed_by_what_is_refused():
    model = encoder()
    before = list(model.modules())

    class Mine(nn.Module):
        def forward(self, x, rope):
            return x

    refused = [
        (model, nn.LSTM, softmax, "no LSTM in TransformerEncoder; attention in there: .*MultiheadAttention .2."),
        (nn.Linear(2, 2), (nn.LSTM, nn.GRU), softmax, "no LSTM or GRU in Linear; attention in there: none"),
        (nn.MultiheadAttention(D, H), nn.MultiheadAttention, softmax, "the model is a MultiheadAttention itself"),
        (nn.Sequential(Mine()), Mine, softmax, "0: Mine is called with rope, which no block takes"),
        (nn.Sequential(nn.MultiheadAttention(D, H)), nn.MultiheadAttention, softmax, "0: batch_first=False"),
    ]
    for where, kind, build, message in refused:
        with pytest.raises(ValueError, match=message):
            replace(where, kind, build)

    def second_fails(old):
        if old is model.layers[1].self_attn:
            raise RuntimeError
        return softmax(old)

    with pytest.raises(RuntimeError):
        replace(model, nn.MultiheadAttention, second_fails)
    assert list(model.modules()) == before


STRANGERS = {
    "T5Attention": ("t5", "is called with mask, position_bias, which no block takes"),
    "T5LayerSelfAttention": ("t5", "is called with position_bias, which no block takes"),
    "BloomAttention": ("bloom", "is called with residual, alibi, which no block takes; valid: a build that returns"),
    "LlamaMLP": ("llama", "is called with x, which no block takes"),
    "BertAttention": ("bert", "is a layer around the BertSelfAttention in its self; valid: BertSelfAttention, or"),
    "JetMoeAttention": ("jetmoe", "returns 3; valid: 2 values, outputs and weights, or a build that returns"),
    "MobileViTSelfAttention": ("mobilevit", "returns 1; valid: 2 values"),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_layers_of_transformers_that_no_block_can_stand_for(transformers, name):
    model, message = STRANGERS[name]
    sizes = {} if model == "mobilevit" else SIZES
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(model, **sizes))
    before = list(model.modules())
    kind = next(type(layer) for layer in before if type(layer).__name__ == name)
    with pytest.raises(ValueError, match=f"{name} {message}"):
        replace(model, kind, lambda old: build_block("lru", 32))
    assert list(model.modules()) == before


@torch.no_grad()
@pytest.mark.parametrize("rotary", [True, False])
def test_weights_of_llama_fit(build, ids, in_front, rotary):
    """Its pairs of rotated channels lie in halves."""
    expected, model = build("Llama"), build("Llama", "seqzoo_softmax")
    kind = type(model.model.layers[0].self_attn)
    options = {"num_heads": 4, "num_kv_heads": 2, "causal": True, "rotary": rotary}
    changed = replace(model, kind, lambda old: build_block("softmax_attention", 32, **options))
    assert changed[0].copied == ("k_proj.weight", "o_proj.weight", "q_proj.weight", "v_proj.weight")
    assert changed[0].why.startswith("" if rotary else "rotary positions there alone; outputs differ by ")
    assert rotary == (changed[0].why == "")
    there = in_front.bool()
    y, z = (each(ids, attention_mask=in_front).logits[there] for each in (model, expected))
    if rotary:
        torch.testing.assert_close(y, z, atol=1e-4, rtol=1e-4)
        options = {"attention_mask": in_front, "max_new_tokens": 6, "do_sample": False}
        assert torch.equal(model.generate(ids, **options), expected.generate(ids, **options))
    else:
        assert (y - z).abs().max() > 1e-2


@torch.no_grad()
def test_weights_of_bert_fit(build, ids, both_sides):
    expected, model = build("Bert"), build("Bert", "seqzoo_softmax")
    kind = type(model.encoder.layer[0].attention.self)
    replace(model, kind, lambda old: build_block("softmax_attention", 32, num_heads=4, rotary=False, bias=True))
    there = both_sides.bool()
    y, z = (each(ids, attention_mask=both_sides).last_hidden_state[there] for each in (model, expected))
    torch.testing.assert_close(y, z, atol=1e-4, rtol=1e-4)


UNLIKE_LLAMA = {
    "cohere": {},  # channels 2i and 2i + 1 are turned together
    "glm": {"head_dim": 8, "attention_bias": True},  # and half of them alone
    "granite": {"attention_multiplier": 0.9},
    "nemotron": {"head_dim": 8},
    "olmo": {"clip_qkv": 0.3},
    "phi": {},
    "qwen3": {"head_dim": 8},
    "smollm3": {"no_rope_layers": [0, 0]},
}


@torch.no_grad()
@pytest.mark.parametrize("name", UNLIKE_LLAMA)
def test_what_computes_something_else_says_how_far_off_it_is(transformers, name):
    torch.manual_seed(0)
    rope = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}} if name not in ("glm", "phi") else {}
    sizes = {**SIZES, "num_key_value_heads": 4, "pad_token_id": 0, **rope, **UNLIKE_LLAMA[name]}
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(name, **sizes)).eval()
    kind = next(type(layer) for layer in model.modules() if type(layer).__name__.endswith("Attention"))
    options = {"num_heads": 4, "causal": True, "rotary": True, "bias": name in ("glm", "phi")}
    changed = replace(model, kind, lambda old: build_block("softmax_attention", 32, **options))
    assert all("v_proj.weight" in each.copied and "outputs differ by" in each.why for each in changed)


def test_a_window_is_no_full_attention(build):
    model = build("Mistral", sliding_window=4)
    kind = type(model.model.layers[0].self_attn)
    options = {"num_heads": 4, "num_kv_heads": 2, "causal": True, "rotary": True}
    (first, *_) = replace(model, kind, lambda old: build_block("softmax_attention", 32, **options))
    assert first.why == "a window of 4 there, none here"


def test_a_block_that_sees_what_comes_later_stands_in_no_layer_that_hides_it(build):
    model = build("Llama")
    kind = type(model.model.layers[0].self_attn)
    with pytest.raises(ValueError, match="LlamaAttention hides what comes later, LRU does not; valid: a block"):
        replace(model, kind, lambda old: build_block("lru", 32))


def test_what_was_frozen_stays_frozen():
    model = encoder()
    model.layers[0].requires_grad_(False)
    assert len(replace(model, nn.MultiheadAttention, softmax)) == 2
    assert not any(parameter.requires_grad for parameter in model.layers[0].parameters())
    assert all(parameter.requires_grad for parameter in model.layers[1].parameters())
