"""Masks of padding, as PyTorch and transformers have them, and blocks in the layers of others."""

import math

import pytest
import torch
from agreement import assert_close
from block_cases import CASES, CAUSAL_DEFAULTS, D, builder, defaults, every, make, sequences, soon
from torch import nn

from seqzoo import build_block
from seqzoo.blocks import AsSelfAttention
from seqzoo.testing import contract

FRONT, LENGTHS, T, COUNTS = contract.FRONT, contract.COUNT, contract.WHOLE, contract.COUNTS
MASKS = {
    "key_padding_mask": ~COUNTS,
    "attention_mask": COUNTS.long(),
    "attention_mask of bools": COUNTS,
    "attention_mask of floats": COUNTS.float(),
    "key_padding_mask of floats": torch.zeros(COUNTS.shape).masked_fill(~COUNTS, -math.inf),
}
streaming = pytest.mark.parametrize(("name", "options", "causal"), [case for case in CASES if case.values[2]])


def rows():
    """Inputs with garbage where nothing counts."""
    return sequences(len(FRONT), T).masked_fill(~COUNTS[..., None], math.nan)


@every
@pytest.mark.parametrize("kind", MASKS)
def test_padding_on_either_side_has_no_effect(name, options, causal, kind):
    contract.padding_on_either_side(builder(name, options, causal), kind.split()[0], MASKS[kind])


@streaming
def test_prompts_padded_in_front_go_on(name, options, causal):
    block, x = make(name, options, causal), rows()
    more = sequences(len(FRONT), 6, seed=3)
    y, state = block.extend(x, None, attention_mask=COUNTS.long())
    assert state.position.tolist() == list(LENGTHS)
    parts = [y]
    for step in more.split([1, 1, 4], 1):
        z, state = block.extend(step, state)
        parts.append(z)
    for b, (front, n) in enumerate(zip(FRONT, LENGTHS, strict=True)):
        whole = block(torch.cat([x[b : b + 1, front : front + n], more[b : b + 1]], 1))
        assert_close(parts[0][b : b + 1, front : front + n], whole[:, :n], 1e-10)
        assert_close(torch.cat(parts[1:], 1)[b : b + 1], whole[:, n:], 1e-10)


@every
@pytest.mark.parametrize("key", ["key_padding_mask", "attention_mask"])
def test_a_mask_that_hides_nothing_changes_nothing(name, options, causal, key):
    """However long the sequence has become, as when text is generated."""
    block, x = make(name, options, causal), sequences(2, 9)

    def masked(call, steps, *state):
        shown = torch.ones(*steps.shape[:2], dtype=torch.int64)
        return call(steps, *state, **{key: shown if key == "attention_mask" else shown == 0})

    for n in (1, 2, 3, 4, 9):
        assert_close(masked(block, x[:, :n]), block(x[:, :n]), 1e-12)
    if causal:
        given = plain = None
        for step in x.split([2, 3, 1, 1, 2], 1):
            (y, given), (z, plain) = masked(block.extend, step, given), block.extend(step, plain)
            assert_close(y, z, 1e-12)
        for a, b in zip(given, plain, strict=True):
            torch.testing.assert_close(a, b)


@soon(
    [case for case in CAUSAL_DEFAULTS if case.values[0] in ("softmax_attention", "gau", "lru", "mamba2")],
    CAUSAL_DEFAULTS,
)
def test_compiles_whole_with_a_mask(name, options, causal):
    block, x = make(name, options, causal, dtype=torch.float32), rows().float().nan_to_num()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, key_padding_mask=~COUNTS), block(x, key_padding_mask=~COUNTS))


@defaults
@pytest.mark.parametrize("key", ["key_padding_mask", "attention_mask"])
def test_wrong_masks_are_named(name, options, causal, key):
    block, x = make(name, options, causal), sequences(2, 5)
    counts = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    named = type(block).__name__
    with pytest.raises(ValueError, match=f"{named}: {key} has padding between steps that count; valid: in front"):
        block(x, **{key: counts if key == "attention_mask" else ~counts})
    with pytest.raises(ValueError, match=rf"{named}: {key} must be \[2, 5\].*torch.bool \[5\]"):
        block(x, **{key: counts[0]})
    with pytest.raises(ValueError, match=f"{named}: {key} must be .*got other numbers too"):
        block(x, **{key: torch.full((2, 5), 3.0)})
    with pytest.raises(ValueError, match="got a mask, and lengths or cu_seqlens"):
        block(x, **{key: torch.ones(2, 5).bool()}, lengths=torch.tensor([5, 5]))
    with pytest.raises(ValueError, match="got key_padding_mask and attention_mask; valid: one of them"):
        block(x, key_padding_mask=~counts, attention_mask=counts)
    if causal:
        with pytest.raises(ValueError, match=f"{named}: {key} has padding between"):
            block.extend(x, None, **{key: counts if key == "attention_mask" else ~counts})


def test_what_sees_what_is_the_blocks_own():
    x, later = sequences(2, 5), nn.Transformer.generate_square_subsequent_mask(5)
    causal, whole = (build_block("lru", D, causal=causal).double() for causal in (True, False))
    assert torch.equal(causal(x, is_causal=True), causal(x))
    for mask in (later, later.isinf()):
        assert torch.equal(causal(x, attn_mask=mask, is_causal=True), causal(x))
    assert torch.equal(whole(x, attn_mask=None, is_causal=False), whole(x))
    with pytest.raises(ValueError, match="LRU: is_causal=False of a block built with causal=True; valid: is_causal=Tr"):
        causal(x, is_causal=False)
    with pytest.raises(ValueError, match="LRU: is_causal=True of a block built with causal=False"):
        whole(x, is_causal=True)
    with pytest.raises(ValueError, match="LRU: got an attn_mask; valid: None, or the mask of what comes later"):
        whole(x, attn_mask=later)
    with pytest.raises(ValueError, match="LRU: got an attn_mask"):
        causal(x, attn_mask=torch.zeros(5, 5), is_causal=True)


@defaults
@pytest.mark.parametrize("norm_first", [False, True])
def test_stands_in_pytorchs_layers(name, options, causal, norm_first):
    block = make(name, options, causal, dtype=torch.float32)
    layer = nn.TransformerEncoderLayer(D, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    layer.self_attn = AsSelfAttention(block)
    x, hidden = rows().float().nan_to_num(), ~COUNTS
    mask = nn.Transformer.generate_square_subsequent_mask(T).isinf() if causal else None
    y = layer(x, src_mask=mask, src_key_padding_mask=hidden, is_causal=causal)
    y.sum().backward()
    inner = block(layer.norm1(x) if norm_first else x, key_padding_mask=hidden)
    expected = x + inner if norm_first else layer.norm1(x + inner)
    expected = expected + layer._ff_block(layer.norm2(expected) if norm_first else expected)
    torch.testing.assert_close(y, expected if norm_first else layer.norm2(expected))
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    with torch.no_grad():
        answers = [encoder(x, mask=mask, src_key_padding_mask=hidden) for _ in range(2)]
    assert torch.equal(*answers)


def test_a_stand_in_looks_at_nothing_else():
    attention, x = AsSelfAttention(build_block("gau", D)), torch.randn(2, 5, D)
    assert attention(x, x, x)[1] is None
    with pytest.raises(ValueError, match="GAU: keys and values are others than the queries"):
        attention(x, x + 1, x)
    with pytest.raises(ValueError, match="GAU has no weights to return; valid: need_weights=False"):
        attention(x, x, x, need_weights=True)
