"""What every operation does with the lengths of its sequences."""

from __future__ import annotations

import math

import pytest
import torch
from agreement import assert_close
from delta_cases import computed

from seqzoo.kernels import (
    attention,
    common,
    delta_rule,
    diagonal_scan,
    favor_attention,
    gated_attention,
    linear_attention,
    vq_attention,
)

B, T, H, D = 2, 5, 1, 16


def operations() -> dict:
    torch.manual_seed(0)
    q, k, v = (torch.rand(B, T, H, D) for _ in range(3))
    flat, directions, codebook = torch.rand(B, T, D), torch.rand(H, 3, D), torch.rand(H, 4, D)
    return {
        "attention": lambda **to: attention(q, k, v, **to),
        "delta_rule": lambda **to: delta_rule(q, k, v, torch.rand(B, T, H), **to),
        "diagonal_scan": lambda **to: diagonal_scan(flat, torch.rand(D), **to),
        "favor_attention": lambda **to: favor_attention(q, k, v, directions, **to),
        "gated_attention": lambda **to: gated_attention(*(flat,) * 6, chunk_len=2, **to),
        "linear_attention": lambda **to: linear_attention(q, k, v, **to),
        "vq_attention": lambda **to: vq_attention(q, k, v, codebook, block_len=2, **to),
    }


OPERATIONS = operations()


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_lengths_of_any_integer_dtype(name, dtype):
    torch.manual_seed(0)
    expected = OPERATIONS[name](lengths=torch.tensor([5, 2]))
    torch.manual_seed(0)
    assert torch.equal(OPERATIONS[name](lengths=torch.tensor([5, 2], dtype=dtype)), expected)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([5, 2], r"lengths must be int64 \[2\] or narrower integers, how many steps of each sequence count, got list"),
        (torch.tensor([5.0, 2.0]), r"got torch.float32 \[2\]"),
        (torch.tensor([True, False]), r"got torch.bool \[2\]"),
        (torch.ones(2, 5, dtype=torch.bool), r"a mask \[B, T\], true where steps count, becomes mask.sum\(1\)"),
        (torch.tensor([5]), r"got torch.int64 \[1\]"),
        (torch.tensor([6, 1]), r"lengths must lie in \[0, T\] = \[0, 5\], got \[6, 1\]"),
        (torch.tensor([-1, 1]), r"lengths must lie in \[0, T\]"),
    ],
    ids=["list", "float", "bool", "mask", "short", "long", "negative"],
)
def test_what_no_lengths_are_is_refused(name, lengths, message):
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        OPERATIONS[name](lengths=lengths)


def test_lengths_are_looked_at_inside_function_transforms():
    x = torch.rand(B, T, D)
    with pytest.raises(ValueError, match="lengths must lie in"):
        torch.func.jvp(lambda x: diagonal_scan(x, torch.ones(D), lengths=torch.tensor([9, 1])), (x,), (x,))


@pytest.mark.parametrize("name", OPERATIONS)
def test_lengths_that_hide_nothing_are_none(name):
    torch.manual_seed(0)
    expected = OPERATIONS[name]()
    torch.manual_seed(0)
    assert torch.equal(OPERATIONS[name](lengths=torch.tensor([5, 5])), expected)
    assert common.check_lengths(name, torch.tensor([5, 5]), B, T) is None


def test_what_is_padding_is_zero_in_value_and_gradients():
    x = torch.randn(3, 4, 2)
    x[0, 1:] = math.nan
    x.requires_grad_()
    lengths = torch.tensor([1, 4, 0])
    valid = common.valid_positions(lengths, 4)[..., None].expand_as(x)
    y = common.zero_padding(x, lengths)
    assert torch.equal(y, torch.where(valid, x, 0))
    (dx,) = torch.autograd.grad(y.square().sum() / 2, x, create_graph=True)
    assert torch.equal(dx, torch.where(valid, x, 0))
    assert torch.equal(torch.autograd.grad(dx.sum(), x)[0], valid.float())
    assert torch.equal(torch.vmap(common.zero_padding)(x[None], lengths[None])[0], y)


@pytest.mark.parametrize(
    ("name", "causal"),
    [(name, causal) for name in ("gated_attention", "vq_attention") for causal in (True, False)]
    + [("delta_rule", True)],
)
def test_results_do_not_depend_on_how_much_is_held_in_the_cache(name, causal, monkeypatch):
    results = []
    for numbers in (1, 1 << 30):
        monkeypatch.setattr(common, "CACHED", numbers)
        torch.manual_seed(0)
        x = torch.randn(2, 9, 1, 4, requires_grad=True)
        if name == "gated_attention":
            y = gated_attention(*(x[:, :, 0],) * 6, chunk_len=2, causal=causal, bias=torch.ones(2 if causal else 3))
        elif name == "delta_rule":
            with computed("chunks"):
                y = delta_rule(*(x.expand(2, 9, 50, 4),) * 3, x.sigmoid().mean(-1).expand(2, 9, 50))
                results.append((y, *torch.autograd.grad(y.square().sum(), x)))
            continue
        else:
            y = vq_attention(x, x, x, torch.randn(1, 3, 4), block_len=2, causal=causal)
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for one, other in zip(*results, strict=True):
        assert_close(one, other, 1e-6)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_batch_of_nothing(name, causal, backend):
    q = torch.rand(0, T, 2 * H, D, requires_grad=True)
    k, flat = q[:, :, :H], q.flatten(2)
    to = {"backend": backend, "lengths": torch.zeros(0, dtype=torch.int64)}
    directed = to | {"causal": causal}
    calls = {
        "attention": [lambda: attention(q, q, q, **directed), lambda: attention(q, q, q, window=2, **directed)],
        "delta_rule": [lambda: delta_rule(q, q, q, q[..., 0], log_decay=-q, **to)],
        "diagonal_scan": [lambda: diagonal_scan(flat, flat, **to)],
        "favor_attention": [lambda: favor_attention(q, q, q, torch.rand(2 * H, 3, D), **directed)],
        "gated_attention": [lambda: gated_attention(*(flat,) * 6, chunk_len=2, **directed)],
        "linear_attention": [
            lambda: linear_attention(q, q, q, normalize=True, **directed),
            lambda: linear_attention(k, k, q, log_decay=-q[..., 0], **directed),
            lambda: linear_attention(q, q, q, log_decay=-q, **directed),
        ],
        "vq_attention": [lambda: vq_attention(q, q, q, torch.rand(2 * H, 4, D), block_len=2, **directed)],
    }
    for call in calls[name]:
        y = call()
        assert y.shape[:2] == (0, T)
        assert torch.autograd.grad(y.sum(), q)[0].shape == q.shape


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "attention"])
def test_sequences_of_no_steps_are_refused(name):
    q, flat = torch.rand(B, 0, H, D), torch.rand(B, 0, D)
    calls = {
        "delta_rule": lambda: delta_rule(q, q, q, q[..., 0]),
        "diagonal_scan": lambda: diagonal_scan(flat, flat),
        "favor_attention": lambda: favor_attention(q, q, q, torch.rand(H, 3, D)),
        "gated_attention": lambda: gated_attention(*(flat,) * 6, chunk_len=2),
        "linear_attention": lambda: linear_attention(q, q, q),
        "vq_attention": lambda: vq_attention(q, q, q, torch.rand(H, 4, D), block_len=2),
    }
    with pytest.raises(ValueError, match=f"{name}: .*with T >= 1"):
        calls[name]()
