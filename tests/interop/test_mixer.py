"""Blocks as layers of a stock model that generates."""

import pytest
import torch

import seqzoo
from seqzoo import build_block, replace
from seqzoo.analysis import mixing_matrices

BLOCKS = {"lru": {}, "mamba2": {"state_dim": 4}, "gau": {"chunk_len": 4, "key_dim": 6}, "softmax_attention": {}}


@pytest.fixture
def model(request, build):
    """A Llama with a block in its first layer, or in both."""
    name, layers = getattr(request, "param", ("lru", 2))
    model = build("Llama", "seqzoo_softmax")
    kind = type(model.model.layers[0].self_attn)
    block = {"d_model": 32, "causal": True, **BLOCKS[name]}
    replace(model, kind, lambda old: build_block(name, **block) if old.layer_idx < layers else None)
    return model


@torch.no_grad()
@pytest.mark.parametrize("model", [(name, 2) for name in BLOCKS] + [("lru", 1)], indirect=True, ids=str)
def test_generates_as_if_it_saw_everything_anew(model, ids, in_front):
    options = {"attention_mask": in_front, "max_new_tokens": 6, "do_sample": False}
    y = model.generate(ids, **options)
    assert torch.equal(y, model.generate(ids, use_cache=False, **options))
    assert len(y[:, 12:].unique()) > 6
    beams = {**options, "num_beams": 3, "max_new_tokens": 4}
    assert torch.equal(model.generate(ids, **beams), model.generate(ids, use_cache=False, **beams))
    for row, front in enumerate((0, 4, 9)):
        alone = model.generate(ids[row : row + 1, front:], max_new_tokens=6, do_sample=False)
        assert torch.equal(alone[0], y[row, front:])


@torch.no_grad()
@pytest.mark.parametrize("name", ["GPTNeoX", "GPTBigCode"])
def test_a_cache_of_another_name_is_its_history(name, build, ids, in_front):
    model = build(name, "seqzoo_softmax")
    kind = next(type(layer) for layer in model.modules() if type(layer).__name__ == f"{name}Attention")
    replace(model, kind, lambda old: build_block("lru", 32, causal=True))
    whole, first = model(ids).logits, model(ids[:, :11], use_cache=True)
    last = model(ids[:, 11:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(last[:, 0], whole[:, 11], atol=1e-4, rtol=1e-4)
    options = {"attention_mask": in_front, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


@torch.no_grad()
def test_a_mask_of_the_new_steps_or_of_all_so_far(transformers, in_front):
    mixer, cache = seqzoo.hf.Mixer(build_block("lru", 8, causal=True)), transformers.DynamicCache()
    x = torch.randn(3, 12, 8, generator=torch.Generator().manual_seed(1))
    whole, _ = mixer(x, attention_mask=in_front)
    for new, masked in (((0, 6), (0, 6)), ((6, 8), (0, 8)), ((8, 11), (8, 11)), ((11, 12), (0, 12))):
        new, mask = slice(*new), in_front[:, slice(*masked)]
        y, _ = mixer(x[:, new], attention_mask=mask, past_key_values=cache)
        torch.testing.assert_close(y, whole[:, new])
    with pytest.raises(ValueError, match=r"\[3, 5\] of 1 steps; valid: \[batch, 1\], or \[batch, 13\] of those before"):
        mixer(x[:, :1], attention_mask=in_front[:, :5], past_key_values=cache)
    with pytest.raises(ValueError, match=r"LRU: a mask \[3, 12\] of 6 steps; valid: \[batch, 6\]$"):
        mixer(x[:, :6], attention_mask=in_front)


@torch.no_grad()
def test_its_state_does_not_grow(model, ids):
    cache = model(ids, use_cache=True).past_key_values
    assert cache.get_seq_length() == 12
    sizes = [sum(part.numel() for part in layer.state) for layer in cache.layers]
    model(ids, past_key_values=cache)
    assert cache.get_seq_length() == 24
    assert sizes == [sum(part.numel() for part in layer.state) for layer in cache.layers]


def test_trains_on_padded_and_packed_batches(model, ids, both_sides):
    model.train()(ids, attention_mask=both_sides, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    places = torch.cat([torch.arange(5), torch.arange(7)]).expand(3, -1)
    with torch.no_grad():
        y = model(ids, position_ids=places, use_cache=False).logits
        alone = torch.cat([model(part).logits for part in ids.split([5, 7], 1)], 1)
    torch.testing.assert_close(y, alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_its_mixing_is_seen_though_it_keeps_a_cache(model, ids):
    kept, without = (mixing_matrices(model, ids, use_cache=use_cache) for use_cache in (True, False))
    assert [*kept] == [f"model.layers.{n}.self_attn.block" for n in range(2)]
    assert all(torch.equal(weights, without[name]) for name, weights in kept.items())
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"LRU was given a state with steps in it; valid: .* use_cache=False"):
        mixing_matrices(model, ids, past_key_values=cache)


def test_refusals(model, build, ids, both_sides):
    with pytest.raises(ValueError, match="LRU has no weights to return"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="LRU: a StaticLayer where its state would stand"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")
    model.set_attn_implementation("sdpa")
    model(ids)  # needs no mask
    with pytest.raises(ValueError, match=r"LRU: a mask of all pairs of steps; valid: seqzoo\.hf\.register"):
        model(ids, attention_mask=both_sides)
    other = build("Bert", "seqzoo_softmax")
    replace(other, type(other.encoder.layer[0].attention.self), lambda old: build_block("lru", 32, causal=True))
    with pytest.raises(ValueError, match="LRU is built with causal=True, the layer's mask is of causal=False"):
        other(ids)
    full = model(ids, use_cache=True).past_key_values
    full.layers[0] = seqzoo.hf.StateLayer()
    full.layers[0].update(torch.zeros(1, 1, 3, 1), torch.zeros(1, 1, 3, 1))
    with pytest.raises(ValueError, match="a state cannot forget its last steps"):
        full.crop(-1)
