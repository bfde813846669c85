"""A Llama whose keys are codes."""

import math

import pytest
import torch
from stock_models import V

import seqzoo


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(1, V, (2, 24), generator=generator)} for _ in range(2)]


@torch.no_grad()
def test_as_many_codes_as_keys_change_nothing(build, batches, ids, in_front):
    model = build("Llama", "eager")
    loss = sum(model(**each, labels=each["input_ids"]).loss.item() for each in batches) / 2
    made = seqzoo.hf.quantize_keys(model, batches, codebook_size=96, block_len=5)
    assert made.loss_before == pytest.approx(loss, abs=1e-5)
    assert made.loss_after == pytest.approx(loss, abs=1e-2)
    assert all(error < 0.02 for error in made.errors.values())
    assert {tuple(each.shape) for each in made.codebooks.values()} == {(2, 96, 8)}
    assert model.config._attn_implementation == "seqzoo_vq"


@torch.no_grad()
def test_fewer_codes_are_further_off_and_block_lengths_do_not_matter(build, batches, ids, in_front):
    model = build("Llama", "seqzoo_softmax")
    few, made = (seqzoo.hf.quantize_keys(model, batches, codebook_size=size, block_len=4) for size in (4, 16))
    assert 0.9 > max(few.errors.values()) > max(made.errors.values()) > 0.2
    assert math.isfinite(made.loss_after)
    assert made.loss_after != pytest.approx(made.loss_before, abs=1e-3)
    assert str(made).startswith(f"2 layers: loss {made.loss_before:.4f} before, {made.loss_after:.4f} after; keys are")
    options = {"attention_mask": in_front, "position_ids": (in_front.cumsum(1) - 1).clamp(min=0)}
    there, y = in_front.bool(), model(ids, **options).logits
    other = build("Llama", "seqzoo_softmax")
    seqzoo.hf.set_codebooks(other, made.codebooks, block_len=7)
    torch.testing.assert_close(other(ids, **options).logits[there], y[there], atol=1e-4, rtol=1e-4)
    for row, front in enumerate((0, 4, 9)):
        torch.testing.assert_close(model(ids[row : row + 1, front:]).logits[0], y[row, front:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_it_generates_with_any_cache(build, batches, ids, in_front):
    model = build("Llama", "seqzoo_softmax")
    seqzoo.hf.quantize_keys(model, batches, codebook_size=16, block_len=4)
    options = {"attention_mask": in_front, "max_new_tokens": 6, "do_sample": False}
    y = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, **options), y)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), y)
    assert torch.equal(model.generate(ids, past_key_values=seqzoo.hf.StateCache(model.config), **options), y)


def test_refusals(build, batches, ids):
    model = build("Llama", "sdpa")
    refused = [([], {}, "no batch"), (batches, {"codebook_size": 97}, "96 keys for codebook_size=97; valid: more")]
    for given, options, message in refused:
        with pytest.raises(ValueError, match=message):
            seqzoo.hf.quantize_keys(model.train(), given, **options)
        assert model.config._attn_implementation == "sdpa"
        assert model.training
    model.set_attn_implementation("seqzoo_vq")
    with pytest.raises(ValueError, match=r"LlamaAttention has no codebook; valid: seqzoo\.hf\.quantize_keys"):
        model(ids)
    with pytest.raises(ValueError, match="no layer 'there' in LlamaForCausalLM"):
        seqzoo.hf.set_codebooks(model, {"there": torch.zeros(1, 2, 3)})
