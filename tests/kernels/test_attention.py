import math

import pytest
import torch
from agreement import assert_close

from seqzoo.kernels import attention
from seqzoo.kernels.attention import kept
from seqzoo.kernels.cpu import MULTIPLIES_BFLOAT16


def inputs(B, T, S, H, G, D, Dv, *, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, T, H, D), (B, S, G, D), (B, S, G, Dv))
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def gradients(y, tensors, seed=1):
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(y.dtype)
    return torch.autograd.grad((y * weight).sum(), tensors)


CASES = [  # B, T, H, G, D, Dv, causal, padded, scale
    (2, 1, 1, 1, 8, 8, True, False, "default"),
    (2, 2, 2, 1, 16, 16, False, True, "number"),
    (1, 15, 4, 2, 24, 8, True, True, "per step"),
    (2, 16, 4, 4, 8, 24, False, False, "per sequence"),
    (1, 63, 2, 2, 64, 64, True, False, "number"),
    (2, 64, 1, 1, 100, 100, False, True, "per step"),
    (2, 65, 6, 3, 8, 8, True, True, "per sequence"),
    (1, 100, 2, 1, 16, 16, False, False, "default"),
    (2, 257, 2, 2, 24, 16, True, True, "default"),
    (2, 257, 2, 1, 8, 8, False, True, "number"),
]


@pytest.mark.parametrize(("B", "T", "H", "G", "D", "Dv", "causal", "padded", "scaling"), CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_agrees_with_the_reference(B, T, H, G, D, Dv, causal, padded, scaling, dtype, tolerance):
    tensors = inputs(B, T, T, H, G, D, Dv)
    lengths = torch.linspace(1, T, B).long() if padded else None
    scale = {
        "default": None,
        "number": 0.3,
        "per step": torch.linspace(0.1, 1, T, dtype=torch.float64),
        "per sequence": torch.linspace(0.1, 1, B * T, dtype=torch.float64).reshape(B, T),
    }[scaling]
    expected = attention(*tensors, causal=causal, lengths=lengths, scale=scale, backend="reference")
    expected_gradients = gradients(expected, tensors)
    cast = [t.detach().to(dtype).requires_grad_() for t in tensors]
    scale = scale.to(dtype) if isinstance(scale, torch.Tensor) else scale
    actual = attention(*cast, causal=causal, lengths=lengths, scale=scale)
    assert actual.dtype == dtype
    assert_close(actual, expected, tolerance, "y")
    for name, a, e in zip("qkv", gradients(actual, cast), expected_gradients, strict=True):
        assert_close(a, e, 4 * tolerance, f"d{name}")


@pytest.mark.skipif(not MULTIPLIES_BFLOAT16, reason="the processor has no instructions for bfloat16")
@pytest.mark.parametrize(("B", "T", "H", "G", "D", "Dv", "causal", "padded", "scaling"), CASES)
def test_weights_kept_in_half_agree(B, T, H, G, D, Dv, causal, padded, scaling, monkeypatch):
    monkeypatch.setattr(kept, "BLOCK", 40 * T)  # blocks of 40 queries
    tensors = [t.detach().bfloat16().requires_grad_() for t in inputs(B, T, T, H, G, D, Dv)]
    lengths = torch.linspace(0, T, B).long() if padded else None
    scale = 0.3 if scaling == "number" else None
    assert kept.keeps(*tensors)
    actual = attention(*tensors, causal=causal, lengths=lengths, scale=scale)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    expected = attention(*wide, causal=causal, lengths=lengths, scale=scale, backend="reference")
    assert_close(actual, expected, 1e-2, "y")
    for name, a, e in zip("qkv", gradients(actual, tensors), gradients(expected, wide), strict=True):
        assert_close(a, e, 2e-2, f"d{name}")


def test_reference_is_the_equation():
    q, k, v = inputs(1, 5, 5, 2, 2, 4, 4)
    y = attention(q, k, v, causal=True, backend="reference")
    for t in range(5):
        for h in range(2):
            weights = (k[0, : t + 1, h] @ q[0, t, h] / math.sqrt(4)).exp()
            expected = weights @ v[0, : t + 1, h] / weights.sum()
            torch.testing.assert_close(y[0, t, h], expected)


def test_gradcheck():
    q, k, v = inputs(2, 5, 5, 2, 1, 3, 2)
    lengths = torch.tensor([5, 3])
    for causal in (True, False):
        assert torch.autograd.gradcheck(
            lambda q, k, v, c=causal: attention(q, k, v, causal=c, lengths=lengths), (q, k, v)
        )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("scaled", [False, True])
def test_padding_has_no_effect(causal, backend, scaled):
    q, k, v = (t.detach() for t in inputs(2, 20, 20, 2, 2, 8, 8))
    lengths = torch.tensor([13, 20])
    dirty = [
        t.clone().index_put((torch.tensor(0), torch.arange(13, 20)), torch.tensor(math.nan).double()) for t in (q, k, v)
    ]
    dirty = [t.requires_grad_() for t in dirty]
    scale = torch.linspace(0.1, 1, 40, dtype=torch.float64).reshape(2, 20)
    padded = scale.index_put((torch.tensor(0), torch.arange(13, 20)), torch.tensor(math.nan).double())
    y = attention(*dirty, scale=padded if scaled else None, causal=causal, lengths=lengths, backend=backend)
    one = {"scale": scale[:1, :13] if scaled else None, "causal": causal, "backend": backend}
    alone = attention(q[:1, :13], k[:1, :13], v[:1, :13], **one)
    torch.testing.assert_close(y[:1, :13], alone)
    assert (y[0, 13:] == 0).all()
    for gradient in gradients(y, dirty):
        assert gradient.isfinite().all()
        assert (gradient[0, 13:] == 0).all()


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_queries_behind_a_cache(backend):
    q, k, v = (t.detach() for t in inputs(2, 12, 12, 2, 1, 8, 8))
    whole = attention(q, k, v, causal=True, backend="reference")
    position = torch.tensor([7, 5])
    late = torch.stack([q[0, 7:10], q[1, 5:8]])
    y = attention(late, k, v, causal=True, position=position, lengths=position + 3, backend=backend)
    torch.testing.assert_close(y[0], whole[0, 7:10])
    torch.testing.assert_close(y[1], whole[1, 5:8])
    with_padding = attention(late, k, v, causal=True, position=position, lengths=position + 2, backend=backend)
    torch.testing.assert_close(with_padding[:, :2], y[:, :2])
    assert (with_padding[:, 2] == 0).all()


def test_queries_ahead_of_all_keys():
    q, k, v = inputs(2, 12, 12, 2, 1, 8, 8)
    options = {"causal": True, "position": torch.tensor([-3, -12])}
    actual, expected = (attention(q, k, v, **options, backend=backend) for backend in ("chunked", "reference"))
    assert_close(actual, expected, 1e-12)
    assert (actual[0, :3] == 0).all()
    assert (actual[1] == 0).all()
    for name, a, e in zip("qkv", gradients(actual, (q, k, v)), gradients(expected, (q, k, v)), strict=True):
        assert_close(a, e, 1e-12, f"d{name}")


@pytest.mark.parametrize("G", [4, 2])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_single_query_behind_a_cache(G, scaled):
    """Of each sequence: in the middle of its keys, behind all of them, at the first, past those that are valid."""
    q, k, v = inputs(5, 1, 33, 4, G, 8, 6)
    position, lengths = torch.tensor([20, 32, 0, 9, 20]), torch.tensor([21, 33, 1, 5, 30])
    scale = torch.linspace(0.1, 1, 5, dtype=torch.float64)[:, None] if scaled else None
    options = {"causal": True, "position": position, "lengths": lengths, "scale": scale}
    expected = attention(q, k, v, **options, backend="reference")
    actual = attention(q, k, v, **options)
    assert_close(actual, expected, 1e-12)
    assert (actual[3] == 0).all()
    for name, a, e in zip("qkv", gradients(actual, (q, k, v)), gradients(expected, (q, k, v)), strict=True):
        assert_close(a, e, 1e-12, f"d{name}")
    with torch.no_grad():
        unseen = torch.arange(33) > torch.minimum(position, lengths - 1)[:, None]
        k[unseen], v[unseen] = math.nan, math.nan
    assert_close(attention(q, k, v, **options), expected, 1e-12)


@pytest.mark.parametrize("backend", ["chunked", "reference", "fused"])
@pytest.mark.parametrize(
    ("queries", "keys", "lengths"), [(12, 9, None), (6, 9, [9, 4]), (12, 9, [0, 3]), (9, 9, [5, 9])]
)
def test_across_sequences_every_query_counts(queries, keys, lengths, backend):
    q, k, v = (t.detach().float() for t in inputs(2, queries, keys, 4, 2, 16, 16))
    given = torch.tensor(lengths or [keys, keys])
    options = {"lengths": None if lengths is None else given}
    if queries == keys:
        options["query_lengths"] = torch.tensor([queries, queries])
    y = attention(q, k, v, **options, backend=backend)
    for b, n in enumerate(given.tolist()):
        expected = torch.zeros_like(y[b])
        if n:
            q_b, k_b, v_b = (x[b].transpose(0, 1).double() for x in (q, k[:, :n], v[:, :n]))
            expected = torch.nn.functional.scaled_dot_product_attention(q_b, k_b, v_b, enable_gqa=True).transpose(0, 1)
        assert_close(y[b], expected, 1e-6)


@pytest.mark.parametrize("backend", ["chunked", "reference", "fused"])
def test_queries_have_lengths_of_their_own(backend):
    q, k, v = (t.detach().float() for t in inputs(3, 5, 7, 2, 2, 16, 16))
    lengths, asked = torch.tensor([7, 2, 0]), torch.tensor([1, 5, 3])
    whole = attention(q, k, v, lengths=lengths, backend=backend)
    padding = (torch.arange(5) >= asked[:, None])[..., None, None]
    y = attention(q.masked_fill(padding, math.nan), k, v, lengths=lengths, query_lengths=asked, backend=backend)
    assert (y.masked_select(padding) == 0).all()
    torch.testing.assert_close(y.masked_fill(padding, 0), whole.masked_fill(padding, 0))


def test_large_logits_stay_exact():
    tensors = inputs(2, 65, 65, 2, 2, 16, 16)
    expected = attention(*tensors, scale=30.0, backend="reference")
    actual = attention(*(t.detach().float() for t in tensors), scale=30.0)
    assert_close(actual, expected, 5e-5)


def test_errors_say_what_is_valid():
    q, k, v = inputs(1, 4, 4, 4, 4, 8, 8)
    with pytest.raises(ValueError, match="3 key/value heads do not divide 4"):
        attention(q, k[:, :, :3], v[:, :, :3])
    with pytest.raises(ValueError, match="2 causal queries against 4 keys need position"):
        attention(q[:, :2], k, v, causal=True)
    with pytest.raises(ValueError, match="query_lengths are for causal=False"):
        attention(q, k, v, causal=True, query_lengths=torch.tensor([4]))
    with pytest.raises(ValueError, match=r"\(query_lengths\): lengths must lie in \[0, T\] = \[0, 4\], got \[5\]"):
        attention(q, k, v, query_lengths=torch.tensor([5]))
    with pytest.raises(ValueError, match="valid: auto, chunked, reference"):
        attention(q, k, v, backend="cuda")
    with pytest.raises(ValueError, match=r"lengths must be int64 \[1\]"):
        attention(q, k, v, lengths=torch.tensor([4.0]))
    with pytest.raises(ValueError, match="a scale per query"):
        attention(q, k, v, scale=torch.ones(3))
