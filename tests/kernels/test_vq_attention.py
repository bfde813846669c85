from importlib import import_module

import pytest
import torch
from agreement import assert_close

from seqzoo.kernels import VQState, nearest_code, vq_attention
from seqzoo.kernels.vq_attention.outside import read_outside, read_outside_backward


def inputs(B, T, H, D, Dv, S, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(B, T, H, D, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    v = torch.randn(B, T, H, Dv, generator=generator, dtype=torch.float64).requires_grad_()
    return q, k, v, torch.randn(H, S, D, generator=generator, dtype=torch.float64)


def some_bias(kind, causal, block_len, B, T, H, reach=None):
    if kind is None:
        return None
    reach = block_len if reach is None else reach
    distances = reach + 1 if causal else 2 * reach + 1
    shape = (H, distances) if kind == "by head" else (B, T, H, distances)
    return torch.randn(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).requires_grad_()


def some_state(B, H, S, Dv, block_len, *, seed=5, steps=None):
    """The state of sequences of different lengths, some shorter than a block."""
    generator = torch.Generator().manual_seed(seed)
    T = 3 * block_len + 1 if steps is None else steps
    codes = torch.randint(S, (B, T, H), generator=generator)
    values = torch.randn(B, T, H, Dv, generator=generator, dtype=torch.float64)
    empty = VQState.empty(B, H, S, Dv, block_len, device=None, dtype=torch.float64)
    return empty.advance(codes, values, torch.linspace(1, T, B).long())


def gradients(y, tensors, seed=1):
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(y.dtype)
    return torch.autograd.grad((y * weight).sum(), tensors)


CASES = [  # B, T, H, D, Dv, S, block_len, causal, padded, bias, with state
    (2, 1, 1, 8, 8, 4, 4, True, False, None, False),
    (2, 2, 2, 8, 4, 4, 4, False, True, "by head", False),
    (1, 15, 2, 16, 8, 8, 4, True, False, "by query", True),
    (2, 16, 1, 24, 8, 4, 4, False, False, "by query", False),
    (2, 16, 2, 8, 16, 16, 16, True, True, "by head", True),
    (1, 63, 1, 8, 8, 5, 16, False, False, None, False),
    (2, 64, 2, 8, 8, 8, 16, True, True, "by query", False),
    (3, 65, 2, 16, 8, 8, 8, False, True, "by head", False),
    (2, 100, 1, 8, 24, 32, 7, True, True, "by head", True),
    (2, 100, 2, 8, 8, 8, 7, False, True, "by query", False),
    (1, 257, 2, 8, 8, 16, 64, True, False, "by query", True),
    (2, 257, 1, 8, 8, 16, 32, False, True, None, False),
    (2, 9, 1, 8, 8, 1, 1, True, True, "by head", True),
    (2, 9, 1, 8, 8, 1, 1, False, True, "by head", False),
]


@pytest.mark.parametrize(("B", "T", "H", "D", "Dv", "S", "block_len", "causal", "padded", "kind", "resumed"), CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_agrees_with_the_reference(B, T, H, D, Dv, S, block_len, causal, padded, kind, resumed, dtype, tolerance):
    q, k, v, codebook = inputs(B, T, H, D, Dv, S)
    codes = nearest_code(k, codebook)
    bias = some_bias(kind, causal, block_len, B, T, H)
    tensors = [q, k, v] + ([] if bias is None else [bias])
    options = {"block_len": block_len, "causal": causal, "codes": codes}
    options["lengths"] = torch.linspace(1, T, B).long() if padded else None
    state = some_state(B, H, S, Dv, block_len) if resumed else None
    expected = vq_attention(q, k, v, codebook, bias=bias, initial_state=state, backend="reference", **options)
    cast = [t.detach().to(dtype).requires_grad_() for t in tensors]
    if state is not None:
        state = state._replace(values=state.values.to(dtype), sums=state.sums.to(dtype))
    actual = vq_attention(
        *cast[:3], codebook.to(dtype), bias=cast[3] if bias is not None else None, initial_state=state, **options
    )
    assert_close(actual, expected, tolerance, "y")
    expected_gradients = gradients(expected, tensors)
    for name, a, e in zip(("q", "k", "v", "bias"), gradients(actual, cast), expected_gradients, strict=False):
        assert_close(a, e, 4 * tolerance, f"d{name}")


@pytest.mark.parametrize("causal", [True, False])
def test_reference_is_softmax_attention_over_quantised_keys(causal):
    q, k, v, codebook = inputs(1, 12, 2, 8, 8, 4)
    codes = nearest_code(k, codebook)
    y = vq_attention(q, k, v, codebook, block_len=4, causal=causal, backend="reference")
    for h in range(2):
        for t in range(12):
            distance = (codebook[h] - k[0, t, h]).norm(dim=-1)
            assert codes[0, t, h] == distance.argmin()
            seen = slice(0, t + 1 if causal else 12)
            weights = (codebook[h][codes[0, seen, h]] @ q[0, t, h]).exp()
            torch.testing.assert_close(y[0, t, h], weights @ v[0, seen, h] / weights.sum())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("reach", [0, 3])
def test_values_and_gradients_do_not_depend_on_block_len(causal, reach):
    """dk does: its straight-through part lives in the window."""
    T, H = 50, 2
    q, k, v, codebook = inputs(2, T, H, 8, 8, 6)
    lengths = torch.tensor([50, 33])
    bias = some_bias("by query", causal, 3, 2, T, H, reach)
    results = []
    for block_len in (3, 8, 50, 64):
        y = vq_attention(q, k, v, codebook, block_len=block_len, bias=bias, causal=causal, lengths=lengths)
        results.append((y, *gradients(y, (q, v, bias))))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            torch.testing.assert_close(a, b)


def test_key_gradient_stops_at_the_window():
    q, k, v, codebook = inputs(1, 16, 1, 8, 8, 4)
    y = vq_attention(q, k, v, codebook, block_len=4, causal=True)
    (dk,) = torch.autograd.grad(y[:, 8:].square().sum(), k)
    assert (dk[:, :4] == 0).all()
    assert (dk[:, 4:] != 0).any(dim=-1).all()


def test_gradcheck_of_queries_and_values():
    q, k, v, codebook = inputs(2, 7, 1, 3, 2, 3)
    lengths, codes = torch.tensor([7, 4]), nearest_code(k, codebook)
    for causal in (True, False):
        bias = some_bias("by query", causal, 2, 2, 7, 1)

        def f(q, v, bias, causal=causal):
            return vq_attention(
                q, k.detach(), v, codebook, codes=codes, block_len=2, bias=bias, causal=causal, lengths=lengths
            )

        assert torch.autograd.gradcheck(f, (q, v, bias))


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("splits", [(13,), (1, 1, 5, 20), (40,), (3, 37)])
def test_splits_and_resumes(backend, splits):
    B, T, H, D, S, block_len = 2, 41, 2, 8, 6, 4
    q, k, v, codebook = inputs(B, T, H, D, 8, S)
    bias = some_bias("by query", True, block_len, B, T, H)
    whole, last = vq_attention(
        q, k, v, codebook, block_len=block_len, bias=bias, causal=True, output_final_state=True, backend=backend
    )
    state, parts, start = None, [], 0
    for stop in (*[sum(splits[: n + 1]) for n in range(len(splits))], T):
        piece = slice(start, stop)
        y, state = vq_attention(
            q[:, piece], k[:, piece], v[:, piece], codebook, block_len=block_len, bias=bias[:, piece], causal=True,
            initial_state=state, output_final_state=True, backend=backend,
        )  # fmt: skip
        parts.append(y)
        start = stop
        if stop == T:
            break
    resumed = torch.cat(parts, 1)
    torch.testing.assert_close(resumed, whole)
    for a, b in zip(gradients(resumed, (q, v, bias)), gradients(whole, (q, v, bias)), strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(state, last, strict=True):
        torch.testing.assert_close(a, b)


def test_final_state_stops_at_the_length():
    q, k, v, codebook = inputs(3, 20, 1, 8, 8, 4)
    lengths = torch.tensor([2, 11, 20])
    _, state = vq_attention(q, k, v, codebook, block_len=4, causal=True, output_final_state=True, lengths=lengths)
    for b, n in enumerate(lengths.tolist()):
        one = [t[b : b + 1, :n] for t in (q, k, v)]
        _, alone = vq_attention(*one, codebook, block_len=4, causal=True, output_final_state=True)
        for got, expected in zip(state, alone, strict=True):
            torch.testing.assert_close(got[b : b + 1], expected)
    assert state.counts.sum(-1).flatten().tolist() == [0, 7, 16]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_bias_goes_by_offset(causal, backend):
    """With no other score, a bias of 100 at one offset picks one value."""
    q, k, v, codebook = inputs(1, 11, 1, 8, 8, 4)
    reach = 3
    for entry in range(reach + 1 if causal else 2 * reach + 1):
        bias = torch.zeros(1, reach + 1 if causal else 2 * reach + 1, dtype=torch.float64)
        bias[0, entry] = 100.0
        y = vq_attention(0 * q, k, v, codebook, block_len=4, bias=bias, causal=causal, backend=backend)
        for i in range(11):
            if 0 <= i + entry - reach < 11:
                torch.testing.assert_close(y[0, i], v[0, i + entry - reach])


@pytest.mark.parametrize(("causal", "at_once"), [(True, 0), (False, 0), (False, 10**9)])
def test_what_is_outside_the_windows(causal, at_once, monkeypatch):
    """Block by block and at once, against what it is: a weight for every key, zero in the windows."""
    monkeypatch.setattr(import_module("seqzoo.kernels.vq_attention.outside"), "AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 5, 3, 4, generator=generator, dtype=torch.float64).requires_grad_()
    values, dy = torch.randn(2, 2, 5, 3, 6, generator=generator, dtype=torch.float64)
    values.requires_grad_()
    codes = torch.randint(4, (2, 5, 3), generator=generator)
    block = torch.arange(15) // 3
    ahead = block[:, None] - block
    outside = ahead >= 2 if causal else ahead.abs() >= 2
    of_keys = weights.flatten(1, 2).gather(-1, codes.view(2, 1, 15).expand(2, 15, 15)) * outside
    expected = (of_keys @ values.flatten(1, 2)).view_as(values)
    assert_close(read_outside(weights.detach(), values.detach(), codes, causal), expected, 1e-14)
    found = read_outside_backward(dy, weights.detach(), values.detach(), codes, causal)
    for one, other in zip(found, torch.autograd.grad(expected, (weights, values), dy), strict=True):
        assert_close(one, other, 1e-14)
    torch.library.opcheck(read_outside, (weights.detach(), values.detach(), codes, causal))
    torch.library.opcheck(read_outside_backward, (dy, weights.detach(), values.detach(), codes, causal))


def test_a_block_of_the_state_that_is_not_full_counts_as_far_as_it_is():
    B, T, block_len = 2, 9, 4
    q, k, v, codebook = inputs(B, T, 1, 8, 8, 6)
    state = some_state(B, 1, 6, 8, block_len, steps=3)  # of 1 and 3 steps
    unfilled = (torch.arange(-block_len, 0) < -state.position[:, None])[..., None, None]
    values = torch.where(unfilled, torch.nan, state.values).requires_grad_()
    y = vq_attention(q, k, v, codebook, block_len=block_len, causal=True, initial_state=state._replace(values=values))
    expected = vq_attention(
        q, k, v, codebook, block_len=block_len, causal=True, initial_state=state, backend="reference"
    )
    torch.testing.assert_close(y, expected)
    (d_values,) = torch.autograd.grad(y.square().sum(), values)
    assert ((d_values == 0) == unfilled).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_padding_has_no_effect(causal, backend):
    q, k, v, codebook = inputs(2, 30, 2, 8, 8, 6)
    bias = some_bias("by query", causal, 4, 2, 30, 2)
    lengths = torch.tensor([17, 30])
    dirty = [t.detach().clone() for t in (q, k, v, bias)]
    for t in dirty:
        t[0, 17:] = torch.nan
        t.requires_grad_()
    y = vq_attention(*dirty[:3], codebook, block_len=4, bias=dirty[3], causal=causal, lengths=lengths, backend=backend)
    one = [t[:1, :17] for t in (q, k, v)]
    alone = vq_attention(*one, codebook, block_len=4, bias=bias[:1, :17], causal=causal, backend=backend)
    torch.testing.assert_close(y[:1, :17], alone)
    assert (y[0, 17:] == 0).all()
    for gradient in gradients(y, dirty):
        assert gradient.isfinite().all()
        assert (gradient[0, 17:] == 0).all()


def test_counts_stay_exact_where_half_precision_would_not():
    T, S = 5000, 2
    codes = torch.zeros(1, T, 1, dtype=torch.int64)
    ones = torch.ones(1, T, 1, 8)
    codebook = torch.zeros(1, S, 8)
    _, state = vq_attention(ones, ones, ones, codebook, codes=codes, block_len=4, causal=True, output_final_state=True)
    assert state.counts[0, 0].tolist() == [T - 4, 0]
    assert (state.sums[0, 0, 0] == T - 4).all()


def test_time_and_memory_are_linear():
    """No tensor on the way grows faster than T."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, torch.Tensor):
                    self.numel = max(self.numel, t.numel())
            return out

    largest = []
    for T in (256, 1024):
        q, k, v, codebook = inputs(1, T, 1, 8, 8, 16)
        with Largest() as mode:
            vq_attention(q, k, v, codebook, block_len=16).square().sum().backward()
        largest.append(mode.numel)
    assert largest[1] <= 4.1 * largest[0]


def test_errors_say_what_is_valid():
    q, k, v, codebook = inputs(1, 8, 2, 8, 8, 4)
    with pytest.raises(ValueError, match="codebook must be"):
        vq_attention(q, k, v, codebook[:1], block_len=4)
    with pytest.raises(ValueError, match="block_len must be 1 or more"):
        vq_attention(q, k, v, codebook, block_len=0)
    with pytest.raises(ValueError, match="at most 5"):
        vq_attention(q, k, v, codebook, block_len=4, causal=True, bias=torch.zeros(2, 6))
    with pytest.raises(ValueError, match="at most 9 and odd"):
        vq_attention(q, k, v, codebook, block_len=4, bias=torch.zeros(2, 4))
    with pytest.raises(ValueError, match="valid: causal=True"):
        vq_attention(q, k, v, codebook, block_len=4, output_final_state=True)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_and_out_with_states_in_single(dtype, backend):
    options = {"block_len": 4, "causal": True, "backend": backend}
    whole = [x.to(dtype) for x in inputs(1, 12, 2, 8, 8, 4)]
    *parts, codebook = whole
    first, state = vq_attention(*(x[:, :7] for x in parts), codebook, output_final_state=True, **options)
    halved = state._replace(values=state.values.to(dtype), sums=state.sums.to(dtype))
    second = vq_attention(*(x[:, 7:] for x in parts), codebook, initial_state=halved, **options)
    assert first.dtype == second.dtype == dtype
    assert state.values.dtype == state.sums.dtype == torch.float32
    assert_close(torch.cat([first, second], 1).float(), vq_attention(*whole, **options).float(), 1e-2)


@pytest.mark.parametrize("spread", [1.0, 0.05])
def test_the_nearest_code_is_found_under_autocast(spread):
    torch.manual_seed(0)
    mean = torch.nn.functional.normalize(torch.randn(64), dim=0) * 64**0.25
    codebook, k = mean + spread * torch.randn(1, 128, 64), mean + spread * torch.randn(2, 100, 1, 64)
    nearest = torch.cdist(k.double().flatten(0, 2), codebook[0].double()).argmin(-1)
    with torch.autocast("cpu", torch.bfloat16):
        codes = nearest_code(k, codebook)
    assert torch.equal(codes, nearest_code(k, codebook))
    assert (codes.flatten() != nearest).sum() <= 1  # a tie
    # Keys in half precision do not narrow the codebook.
    wide = nearest_code(k.bfloat16().float(), codebook)
    assert torch.equal(nearest_code(k.bfloat16(), codebook, backend="chunked"), wide)
