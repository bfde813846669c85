"""GAU: its forms of attention against other code and against the formulas, its initial values, its reach, its state."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_close

import seqzoo.blocks.gau
from seqzoo.blocks.gau import GAU
from seqzoo.blocks.rotary import rotate
from seqzoo.kernels.gated_attention import gated_attention

D = 16
QUADRATIC = ("relu2_n2", "relu2_ns", "softmax")


def make(attention, causal, **options):
    torch.manual_seed(0)
    block = GAU(D, causal=causal, attention=attention, **options).double()
    with torch.no_grad():  # as large as after some training, so that every term counts
        block.gamma.normal_()
        block.beta.normal_(std=0.3)
    return block


def sequences(B, T, seed=1):
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(block, y):
    w = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    return dict(zip(dict(block.named_parameters()), torch.autograd.grad(y, list(block.parameters()), w), strict=True))


def test_parameters():
    torch.manual_seed(0)
    block = GAU(D, expand=1.5, key_dim=2000, bias=True)
    shapes = {name: list(p.shape) for name, p in block.named_parameters()}
    assert shapes == {
        "gamma": [4, 2000],
        "beta": [4, 2000],
        "distance_bias": [511],
        "uvz_proj.weight": [2048, D],
        "uvz_proj.bias": [2048],
        "out_proj.weight": [D, 24],
        "out_proj.bias": [D],
    }
    assert block.gamma.std().item() == pytest.approx(3, rel=0.2)
    assert (block.beta == 0).all()
    assert block.distance_bias.square().mean().item() == pytest.approx(1 / 256, rel=0.2)
    assert (block.distance_bias >= 0).all()
    assert GAU(D, attention="softmax").gamma.shape == (2, 128)
    assert GAU(D, attention="softmax").distance_bias is None


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("attention", QUADRATIC)
@pytest.mark.parametrize("padded", [False, True])
def test_quadratic_forms_by_formula(attention, causal, padded):
    """Weights written out; "relu2_ns" and "softmax" are the normalisations of bert4keras."""
    T, S = 21, 6
    block = make(attention, causal, key_dim=S)
    x = sequences(2, T)
    lengths = torch.tensor([T, 18]) if padded else None
    y = block(x, lengths=lengths)
    for b, n in enumerate([T, 18] if padded else [T, T]):
        u, v, z = F.silu(x[b, :n] @ block.uvz_proj.weight.T).split((32, 32, S), -1)
        q, k = (rotate((z * block.gamma[r] + block.beta[r])[None, :, None], torch.arange(n))[0, :, 0] for r in (0, 1))
        seen = torch.arange(1, n + 1).double()[:, None] if causal else torch.full((n, 1), float(n)).double()
        s = q @ k.T
        hidden = torch.ones(n, n, dtype=torch.bool).triu(1) if causal else torch.zeros(n, n, dtype=torch.bool)
        A = {
            "relu2_n2": lambda s=s, seen=seen: (s / seen).relu() ** 2,
            "relu2_ns": lambda s=s, seen=seen: (s / math.sqrt(S)).relu() ** 2 / seen,
            "softmax": lambda s=s, seen=seen, hidden=hidden: (
                (s / math.sqrt(S) * seen.clamp(min=16).log() / math.log(512)).masked_fill(hidden, -math.inf).softmax(-1)
            ),
        }[attention]()
        expected = (u * (A.masked_fill(hidden, 0) @ v)) @ block.out_proj.weight.T
        assert_close(y[b, :n], expected, 1e-12)
        assert (y[b, n:] == 0).all()


@pytest.mark.parametrize("causal", [False, True])
def test_flash_by_formula(causal):
    """A chunk as long as the sequence: one quadratic weight matrix, and the mean of k vᵀ if bidirectional."""
    T, S = 12, 6
    block = make("flash", causal, key_dim=S, chunk_len=T)
    x = sequences(1, T)
    u, v, z = F.silu(x[0] @ block.uvz_proj.weight.T).split((32, 32, S), -1)
    qk = rotate((z[:, None] * block.gamma + block.beta)[None], torch.arange(T))[0]
    q_quad, q_lin, k_quad, k_lin = qk.unbind(1)
    offset = (torch.arange(T) - torch.arange(T)[:, None]).clamp(
        max=0 if causal else T
    )  # [i, j] -> j - i, if it is seen
    A = (q_quad @ k_quad.T / math.sqrt(T * S) + block.distance_bias[offset + T - 1]).relu() ** 2
    A = A.tril() if causal else A + q_lin @ k_lin.T / T
    assert_close(block(x)[0], (u * (A @ v)) @ block.out_proj.weight.T, 1e-12)


def copy_from_peer(block, peer, offset_scale):
    """FLASH-pytorch's halves are (v, gate); ours (u, v, z) with u the gate."""
    with torch.no_grad():
        hidden, qk = peer.to_hidden[0], peer.to_qk[0]
        out = peer.to_out if isinstance(peer.to_out, torch.nn.Linear) else peer.to_out[0]
        for name in ("weight", "bias"):
            v, gate = getattr(hidden, name).chunk(2)
            getattr(block.uvz_proj, name).copy_(torch.cat([gate, v, getattr(qk, name)]))
            getattr(block.out_proj, name).copy_(getattr(out, name))
        block.gamma.copy_(offset_scale.gamma)
        block.beta.copy_(offset_scale.beta)
        peer.rel_pos_bias.relative_attention_bias.weight.zero_()


def compare_with_peer(block, peer, offset_scale, y, expected):
    assert_close(y, expected, 1e-10)
    ours = gradients(block, y)
    w = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    theirs = torch.autograd.grad(
        expected, [offset_scale.gamma, offset_scale.beta, peer.to_qk[0].weight, peer.to_hidden[0].weight], w
    )
    assert_close(ours["gamma"], theirs[0], 1e-10)
    assert_close(ours["beta"], theirs[1], 1e-10)
    E = block.value_dim
    u, v, z = ours["uvz_proj.weight"].split((E, E, block.key_dim))
    assert_close(z, theirs[2], 1e-10)
    assert_close(torch.cat([v, u]), theirs[3], 1e-10)


def flash_pytorch():
    reason = "compares with FLASH-pytorch, which is not installed (pip install FLASH-pytorch)"
    return pytest.importorskip("flash_pytorch", reason=reason)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_agrees_with_flash_pytorch(causal, rotary, padded, monkeypatch):
    """Its conventions come in from outside: a scale of 1/chunk_len, sums divided by T, or chunk_len if causal."""
    peers = flash_pytorch()
    S, C, T = 8, 7, 30
    embedding = None
    if rotary:
        from rotary_embedding_torch import RotaryEmbedding

        frequencies = 10_000.0 ** (-torch.arange(0, S, 2, dtype=torch.float64) / S)
        embedding = RotaryEmbedding(S, custom_freqs=frequencies, cache_if_possible=False)
    torch.manual_seed(0)
    peer = peers.FLASH(
        dim=D,
        group_size=C,
        query_key_dim=S,
        causal=causal,
        rotary_pos_emb=embedding,
        norm_klass=lambda dim: torch.nn.Identity(),
    ).double()
    peer.qk_offset_scale.gamma.data.normal_()
    peer.qk_offset_scale.beta.data.normal_(std=0.3)
    block = make("flash", causal, key_dim=S, chunk_len=C, rotary=rotary, bias=True)
    copy_from_peer(block, peer, peer.qk_offset_scale)
    with torch.no_grad():
        peer.rel_pos_bias.relative_attention_bias.weight.normal_(std=0.1)
        biases = peer.rel_pos_bias(torch.empty(C, C))
        offsets = range(1 - C, 1 if causal else C)
        block.distance_bias.copy_(torch.stack([biases[max(-n, 0), max(n, 0)] for n in offsets]))
    lengths = torch.tensor([30, 17]) if padded else None

    def theirs(u, q_quad, k_quad, q_lin, k_lin, v, *, chunk_len, lengths, **options):
        chunk = torch.arange(T)[:, None] // chunk_len
        of_all = 1.0 if lengths is None else lengths.double()[:, None, None] / T
        q_lin = q_lin * (chunk if causal else of_all)
        options |= {"chunk_len": chunk_len, "lengths": lengths, "scale": 1 / chunk_len}
        return gated_attention(u, q_quad, k_quad, q_lin, k_lin, v, **options)

    monkeypatch.setattr(seqzoo.blocks.gau, "gated_attention", theirs)
    x = sequences(2, T)
    mask = None if lengths is None else torch.arange(T) < lengths[:, None]
    expected = peer(x, mask=mask) - x
    if padded:
        expected = expected * mask[..., None]
    compare_with_peer(block, peer, peer.qk_offset_scale, block(x, lengths=lengths), expected)


def test_agrees_with_the_gau_of_flash_pytorch():
    peers = flash_pytorch()
    torch.manual_seed(0)
    peer = peers.GAU(dim=D, query_key_dim=8, add_residual=False, norm_klass=lambda dim: torch.nn.Identity()).double()
    peer.offsetscale.gamma.data.normal_()
    block = make("relu2_n2", False, key_dim=8, rotary=False, bias=True)
    copy_from_peer(block, peer, peer.offsetscale)
    x = sequences(2, 30)
    compare_with_peer(block, peer, peer.offsetscale, block(x), peer(x))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("attention", ["flash", *QUADRATIC])
def test_reach(attention, causal):
    """relu² is zero for half of all pairs, so reach is over many sequences: each pair counts in some of them."""
    T = 11
    block = make(attention, causal, key_dim=8, chunk_len=4)
    x = sequences(48, T).requires_grad_()
    y = block(x)
    rows = [torch.autograd.grad(y[:, t].sum(), x, retain_graph=True)[0].abs().amax((0, 2)) for t in range(T)]
    seen = torch.stack(rows) > 0  # [T, T]
    assert torch.equal(seen, torch.ones(T, T, dtype=torch.bool).tril() if causal else torch.ones_like(seen))


@pytest.mark.parametrize("attention", ["flash", *QUADRATIC])
@pytest.mark.parametrize("rotary", [False, True])
def test_ragged_steps_equal_forward_in_gradients_too(attention, rotary):
    block = make(attention, True, key_dim=6, chunk_len=4, rotary=rotary, bias=True)
    x, total = sequences(2, 14), torch.tensor([14, 9])
    valid = torch.arange(14) < total[:, None]
    expected = block(x, lengths=total)
    state, position = block.initial_state(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    pieces: list[list[torch.Tensor]] = [[], []]
    for lengths in ([5, 1], [0, 3], [1, 1], [6, 0], [2, 4]):
        steps = torch.tensor(lengths)
        piece = torch.full((2, 6, D), math.nan, dtype=torch.float64)
        for b, n in enumerate(lengths):
            piece[b, :n] = x[b, position[b] : position[b] + n]
        y, state = block.extend(piece, state, lengths=steps)
        for b, n in enumerate(lengths):
            pieces[b].append(y[b, :n])
            assert (y[b, n:] == 0).all()
        position += steps
    assert torch.equal(state.position, total)
    y = torch.stack([F.pad(torch.cat(p), (0, 0, 0, 14 - sum(map(len, p)))) for p in pieces])
    assert_close(y[valid], expected[valid], 1e-12)
    streamed = gradients(block, y)
    for name, value in gradients(block, expected).items():
        assert_close(streamed[name], value, 1e-10, name)


def test_small_weights_survive_autocast():
    """Squares of weights near 1/n are below the smallest half-precision number."""
    block = make("relu2_n2", False).float()
    with torch.no_grad():
        block.gamma.mul_(0.02)
    x = sequences(1, 64).float()
    expected = block(x)
    with torch.autocast("cpu", torch.float16):
        y = block(x)
    assert_close(y.float(), expected, 0.02, worst_row=100)


def test_errors():
    with pytest.raises(ValueError, match="attention='relu'; valid: flash, relu2_n2, relu2_ns, softmax"):
        GAU(D, attention="relu")
    for wrong in ({"key_dim": 0}, {"chunk_len": 0}, {"expand": 0}):
        with pytest.raises(ValueError, match="valid: 1 or more"):
            GAU(D, **wrong)
    with pytest.raises(ValueError, match="causal=True"):
        GAU(D).initial_state(1)
