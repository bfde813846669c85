"""The mixing matrix of every block against its equation, written out, in double precision."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_close

from seqzoo import build_block
from seqzoo.analysis import mixing_matrix
from seqzoo.blocks import Block
from seqzoo.blocks.rotary import rotate

D, T = 8, 13
LENGTHS = torch.tensor([13, 7, 1])


def make(name, causal, **options):
    torch.manual_seed(0)
    return build_block(name, D, causal=causal, **options).double()


def inputs():
    return torch.randn(3, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def visible(causal, lengths):
    """[B, 1, T, T], true where a query's output may hold a key's value."""
    n = torch.full((3,), T) if lengths is None else lengths
    valid = torch.arange(T) < n[:, None]
    mask = valid[:, None, :, None] & valid[:, None, None, :]
    return mask & torch.ones(T, T, dtype=torch.bool).tril() if causal else mask


def normalized(weights, mask):
    weights = torch.where(mask, weights, 0)
    return weights / torch.where(mask.any(-1, keepdim=True), weights.sum(-1, keepdim=True), 1)


def heads(x, parts, H):
    return (y.transpose(1, 2) for y in x.unflatten(-1, (parts, H, -1)).unbind(2))  # [B, H, T, D]


def softmax_attention(block, x, mask, lengths):
    q, k, _ = (rotate(y.transpose(1, 2), torch.arange(T)).transpose(1, 2) for y in heads(block.qkv_proj(x), 3, 4))
    return normalized((q @ k.mT / math.sqrt(q.shape[-1])).exp(), mask)


def linear_attention(block, x, mask, lengths):
    q, k, _ = heads(block.qkv_proj(x), 3, 4)
    return normalized((F.elu(q) + 1) @ (F.elu(k) + 1).mT, mask)


def retention(block, x, mask, lengths):
    q, k, _ = heads(block.qkv_proj(x), 3, 4)
    distance = (torch.arange(T)[:, None] - torch.arange(T)).abs()
    decay = (1 - 2.0 ** (-5 - torch.arange(block.num_heads)))[:, None, None].double() ** distance
    return torch.where(mask, F.silu(q) @ F.silu(k).mT * decay, 0)


def performer(block, x, mask, lengths):
    q, k, _ = (y * y.shape[-1] ** -0.25 for y in heads(block.qkv_proj(x), 3, 4))
    phi_q, phi_k = ((y @ block.projection.double().mT - y.square().sum(-1, keepdim=True) / 2).exp() for y in (q, k))
    return normalized(phi_q @ phi_k.mT, mask)


def vq_attention(block, x, mask, lengths):
    """Softmax over quantised keys, one by one: what codes and windows add up to."""
    q, k = (F.rms_norm(y, y.shape[-1:]) * y.shape[-1] ** -0.25 for y in heads(block.qk_proj(x), 2, 2))
    codebook = block.quantizer.codebook.double()  # [H, S, D]
    codes = torch.cdist(k, codebook[None]).argmin(-1)
    keys = torch.stack([codebook[h][codes[:, h]] for h in range(2)], 1)
    terms = torch.einsum("bhtd,nhd->bhtn", q + block.distance_bias[:, None], block._distances(torch.float64))
    offset = torch.arange(T) - torch.arange(T)[:, None] + block.block_len  # entry of key j for query i
    inside = (offset >= 0) & (offset < terms.shape[-1])
    index = offset.clamp(0, terms.shape[-1] - 1).expand(3, 2, T, T)
    scores = (q + block.content_bias[:, None]) @ keys.mT + torch.where(inside, terms.gather(-1, index), 0)
    return normalized(scores.exp(), mask)


def flash(block, x, mask, lengths):
    C, S = block.chunk_len, block.key_dim
    z = F.silu(block.uvz_proj(x))[..., -S:]
    q_quad, q_lin, k_quad, k_lin = rotate(z[:, :, None] * block.gamma + block.beta, torch.arange(T)).unbind(2)
    i, j = torch.arange(T)[:, None], torch.arange(T)
    bias = block.distance_bias[(j - i + C - 1).clamp(0, len(block.distance_bias) - 1)]
    quad = torch.where(i // C == j // C, (q_quad @ k_quad.mT / math.sqrt(C * S) + bias).relu().square(), 0)
    if block.causal:
        lin = torch.where(j // C < i // C, q_lin @ k_lin.mT, 0) / (i // C * C).clamp(min=1)
    else:
        n = torch.full((3,), T) if lengths is None else lengths
        lin = q_lin @ k_lin.mT / n[:, None, None]
    return torch.where(mask, (quad + lin)[:, None], 0)


def relu2(block, x, mask, lengths):
    q, k = (F.silu(block.uvz_proj(x))[..., None, -6:] * block.gamma + block.beta).unbind(2)
    n = mask.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(mask, (q @ k.mT)[:, None].relu().square() / n**2, 0)


def gau_softmax(block, x, mask, lengths):
    q, k = (F.silu(block.uvz_proj(x))[..., None, -6:] * block.gamma + block.beta).unbind(2)
    n = mask.sum(-1, keepdim=True).clamp(min=16).double()
    return normalized((n.log() / math.log(512) / math.sqrt(6) * (q @ k.mT)[:, None]).exp(), mask)


def lru(block, x, mask, lengths):
    """J = Re(C diag(λ^|t-s|) γ B), C of the direction, both at t = s."""
    lam = torch.polar((-block.dynamics.nu_log.exp()).exp(), block.dynamics.theta_log.exp())
    B = torch.complex(block.in_proj.weight[::2], block.in_proj.weight[1::2])  # [N, D]
    B = block.dynamics.gamma_log.exp()[:, None] * B
    readers = [block.out_proj] if block.causal else [block.out_proj, block.out_proj_reverse]
    C = torch.stack([layer.weight.unflatten(1, (len(lam), 2)) for layer in readers])  # [directions, D, N, 2]
    C = torch.complex(C[..., 0], -C[..., 1])  # the linear layer reads parts: Re(h) W_r + Im(h) W_i
    return gain(lambda direction, lag: (C[direction] * lam**lag @ B).real, x, mask, len(C))


def s5(block, x, mask, lengths):
    """J = 2 Re(C diag(λ^|t-s| (λ - 1) / Λ) B), C of the direction, both at t = s."""
    Lambda = torch.complex(-block.dynamics.log_neg_real.exp(), block.dynamics.imag)
    lam = (Lambda * block.dynamics.log_dt.exp()).exp()
    B = ((lam - 1) / Lambda)[:, None] * torch.complex(block.in_proj.weight[::2], block.in_proj.weight[1::2])
    readers = [block.out_proj] if block.causal else [block.out_proj, block.out_proj_reverse]
    C = [torch.complex(layer.weight[:, ::2], -layer.weight[:, 1::2]) for layer in readers]
    return gain(lambda direction, lag: 2 * (C[direction] * lam**lag @ B).real, x, mask, len(C))


def decayed(a, first, last, causal):
    """Weights of what each step writes, [B, T, E], by the decays a [B, T, E] on its way: [B, E, T, T]."""
    B, T, E = a.shape
    J = torch.zeros(B, E, T, T, dtype=a.dtype)
    for t in range(T):
        for s in range(T):
            if s <= t:
                J[:, :, t, s] += a[:, s + 1 : t + 1].prod(1) * first[:, s]
            if s >= t and not causal:
                J[:, :, t, s] += a[:, t:s].prod(1) * last[:, s]
    return J


def min_gru(block, x, mask, lengths):
    z = block.gate_proj(x).sigmoid()
    return torch.where(mask, decayed(1 - z, z, z, block.causal), 0)


def rg_lru(block, x, mask, lengths):
    """At the step that a direction takes first, the root is 1."""
    n = torch.full((3,), T) if lengths is None else lengths
    x = torch.where((torch.arange(T) < n[:, None])[..., None], x, 0)
    u = block.in_proj(x)
    u = block.conv(torch.where((torch.arange(T) < n[:, None])[..., None], u, 0), None, None)[0]
    gates = block.recurrence_gate, block.input_gate
    r, i = (torch.einsum("bthi,hio->btho", u.unflatten(-1, (4, -1)), g.weight).flatten(2).sigmoid() for g in gates)
    a = (-8 * r * F.softplus(block.dynamics.Lambda)).exp()
    first, last = ((1 - a**2).sqrt() for _ in range(2))
    first[:, 0] = 1
    last[torch.arange(3), n - 1] = 1
    return torch.where(mask, decayed(a, first * i, last * i, block.causal), 0)


def mamba(block, x, mask, lengths):
    n = torch.full((3,), T) if lengths is None else lengths
    u = block.in_proj(torch.where((torch.arange(T) < n[:, None])[..., None], x, 0))[..., : 2 * D]
    u = block.conv(u, None, None)[0]
    low, B, C = block.x_proj(u).split((1, 3, 3), -1)
    dt = F.softplus(block.dt_proj(low) + block.dynamics.dt_bias)
    J = torch.zeros(3, 2 * D, T, T, dtype=x.dtype)
    for k in range(3):
        ones = torch.ones_like(dt)
        a = (-dt * block.dynamics.A_log.exp()[:, k]).exp()
        J += decayed(a, ones, ones, block.causal) * (C[:, :, None, k] * B[:, None, :, k])[:, None]
    return torch.where(mask, J, 0)


def s4d(block, x, mask, lengths):
    """J = diag(Re Σ_p C_p exp(step_p)^|t-s|), one lag less for what follows a step."""
    A = torch.complex(-block.dynamics.log_neg_real.exp(), block.dynamics.imag)
    step = A * block.dynamics.log_dt.exp()[:, None]
    C = 2 * torch.view_as_complex(block.C) * (step.exp() - 1) / A

    def kernel(direction, lag):
        return (C[direction] * (step * (lag - direction)).exp()).sum(-1).real.diag() * (lag >= direction)

    return gain(kernel, x, mask, len(C))


def conv(block, x, mask, lengths):
    """J = diag(weight) of the distance; past the kernel's ends it is zero."""

    def kernel(direction, lag):
        at = block.conv.past + (lag if direction else -lag)
        within = 0 <= at < block.conv.width and lag >= direction  # t = s is in one direction only
        return block.conv.weight[:, at].diag() if within else torch.zeros(D, D, dtype=x.dtype)

    return gain(kernel, x, mask, 1 if block.causal else 2)


def gated(q, k, g, causal):
    """Σ_d q_td k_sd exp(g summed over (s, t]), and from the end over [t, s): [B, H, T, D] -> [B, H, T, T] each way."""
    b, past = g.cumsum(2), torch.ones(T, T, dtype=torch.bool).tril()
    since = b[:, :, :, None] - b[:, :, None]  # [B, H, t, s, D]
    until = (b - g)[:, :, None] - (b - g)[:, :, :, None]
    ways = [(since, past)] if causal else [(since, past), (until, past.T)]
    decays = (torch.where(seen[..., None], decay, -math.inf).exp() for decay, seen in ways)
    return [torch.einsum("bhtd,bhsd,bhtsd->bhts", q, k, decay) for decay in decays]


def gla(block, x, mask, lengths):
    q, k, _, _ = block.in_proj(x).split((D // 2, D // 2, D, D), -1)
    g = F.logsigmoid(block.gate_proj(x) + block.gate_bias.bias) / 16
    q, k, g = (next(heads(y, 1, 4)) for y in (q / math.sqrt(block.key_dim), k, g))
    return torch.where(mask, sum(gated(q, k, g, block.causal)), 0)


def hgrn2(block, x, mask, lengths):
    q, f, _ = block.in_proj(x).chunk(3, -1)
    f = 0.3 + 0.7 * f.sigmoid()
    q, k, g = (next(heads(y, 1, 4)) for y in (F.silu(q), 1 - f, f.log()))
    return torch.where(mask, sum(gated(q, k, g, block.causal)), 0)


def mlstm(block, x, mask, lengths):
    """Of each direction by itself, divided by its sum where that is above 1."""
    valid = mask[:, 0].diagonal(dim1=1, dim2=2)[..., None]
    y, _ = block.in_proj(torch.where(valid, x, 0)).chunk(2, -1)
    u = block.conv(y, None, None)[0]
    qkv = block.q_proj(u), block.k_proj(u), block.v_proj(y)
    gates = sum(layer(z) for layer, z in zip(block.gate_proj, qkv, strict=True)) + block.gate_bias.bias
    i, f = (gate.transpose(1, 2)[..., None] for gate in gates.chunk(2, -1))  # [B, H, T, 1]
    q, k = (next(heads(y, 1, 4)) for y in qkv[:2])
    ways = gated(q, k * i.exp() / math.sqrt(q.shape[-1]), F.logsigmoid(f).expand_as(q), block.causal)
    ways = [torch.where(mask, weights, 0) for weights in ways]
    return sum(weights / weights.sum(-1, keepdim=True).abs().clamp(min=1) for weights in ways)


def erasing(q, k, P, causal, mask):
    """q_t · P_t ... P_{s+1} k_s, and from the end q_t · P_t ... P_{s-1} k_s: [B, T, H, ...] -> [B, H, T, T]."""
    weights = torch.zeros_like(mask.expand(-1, q.shape[2], -1, -1), dtype=q.dtype)
    for s in range(T):
        for way in [range(s, T)] if causal else [range(s, T), range(s, -1, -1)]:
            written = k[:, s]
            for t in way:
                written = written if t == s else (P[:, t] @ written[..., None])[..., 0]
                weights[:, :, t, s] += (q[:, t] * written).sum(-1)
    return torch.where(mask, weights, 0)


def unit(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def of_delta_rule(block, x, mask, *more):
    """What makes a matrix of decays [B, T, H, 1 or Dk], and so many numbers each of the rest of the projection."""
    valid = mask[:, 0].diagonal(dim1=1, dim2=2)[..., None]
    qkv, beta, *rest = block.in_proj(torch.where(valid, x, 0)).split(
        (sum(block.qkv_widths), block.num_heads, *more), -1
    )
    q, k, _ = block.conv(qkv, None, None)[0].split(block.qkv_widths, -1)
    H = block.num_heads
    q, k = (unit(y.unflatten(-1, (-1, block.key_dim))) for y in (q, k))
    q, k = (y.repeat_interleave(H // y.shape[2], 2) for y in (q / math.sqrt(block.key_dim), k))
    beta = beta.sigmoid()[..., None]

    def matrix(decay):
        P = (torch.eye(block.key_dim) - (beta * k)[..., None] * k[..., None, :]) * decay[..., None, :]
        return erasing(q, beta * k, P, block.causal, mask)

    return matrix, *rest


def delta_net(block, x, mask, lengths):
    (matrix,) = of_delta_rule(block, x, mask)
    return matrix(torch.ones(1, dtype=x.dtype))


def gated_delta_net(block, x, mask, lengths):
    matrix, a, _ = of_delta_rule(block, x, mask, block.num_heads, block.num_heads * block.value_dim)
    return matrix(block.decay(a)[1].exp())


def kda(block, x, mask, lengths):
    matrix, a, _ = of_delta_rule(block, x, mask, block.key_dim, block.key_dim)
    return matrix(block.decay(block.decay_proj(a))[1].exp())


def rwkv7(block, x, mask, lengths):
    x = torch.where(mask[:, 0].diagonal(dim1=1, dim2=2)[..., None], x, 0)
    near, _ = block.shift(x, None, None)
    x_r, x_w, x_k, _, x_a, _ = (x + mu * (near - x) for mu in block.mu)
    r, k = block.r_proj(x_r), block.k_proj(x_k)
    w = torch.exp(-math.exp(-0.5) * block.decay_bias(block.decay_proj(x_w)).sigmoid())
    a = block.rate_bias(block.rate_proj(x_a)).sigmoid()
    kappa, k = k * block.k_k, k * (1 + (a - 1) * block.k_a)
    r, k, w, a, kappa = (y.unflatten(-1, (block.num_heads, -1)) for y in (r, k, w, a, kappa))
    kappa = kappa / (kappa.square().sum(-1, keepdim=True) + 1e-12).sqrt()
    P = torch.diag_embed(w) - (a * kappa)[..., None] * kappa[..., None, :]
    return erasing(r, k, P, block.causal, mask)


def gain(kernel, x, mask, directions):
    """√(Σ_r ‖J[t, s] x_r‖² / Σ_r ‖x_r‖²), r over the valid positions of all sequences."""
    J = torch.zeros(T, T, D, D, dtype=torch.float64)
    for t in range(T):
        for s in range(T):
            if s <= t:
                J[t, s] += kernel(0, t - s)
            if s >= t and directions == 2:
                J[t, s] += kernel(1, s - t)
    return torch.where(mask, size_of(J, torch.where(mask[:, 0].diagonal(dim1=1, dim2=2)[..., None], x, 0)), 0)


def size_of(J, x):
    """[T, T, D, D] and [B, T, D], zero where invalid -> [T, T]."""
    moved = torch.einsum("tsij,brj->brtsi", J, x).square().sum((0, 1, 4))
    return (moved / x.square().sum()).sqrt()


CASES = {
    "softmax_attention": (softmax_attention, "softmax_attention", {}),
    "linear_attention": (linear_attention, "linear_attention", {}),
    "retention": (
        retention,
        "linear_attention",
        {"feature_map": "silu", "normalize": False, "decay": True},
    ),
    "performer": (performer, "performer", {"num_features": 9}),
    "vq_attention": (vq_attention, "vq_attention", {"num_heads": 2, "codebook_size": 4, "block_len": 3}),
    "flash": (flash, "gau", {"chunk_len": 4, "key_dim": 6}),
    "relu2": (relu2, "gau", {"attention": "relu2_n2", "key_dim": 6, "rotary": False}),
    "gau_softmax": (gau_softmax, "gau", {"attention": "softmax", "key_dim": 6, "rotary": False}),
    "lru": (lru, "lru", {"state_dim": 5}),
    "s4d": (s4d, "s4d", {"state_dim": 6}),
    "conv": (conv, "conv", {}),
    "gla": (gla, "gla", {}),
    "hgrn2": (hgrn2, "hgrn2", {"lower_bound": 0.3}),
    "mlstm": (mlstm, "mlstm", {}),
    "s5": (s5, "s5", {}),
    "min_gru": (min_gru, "min_gru", {}),
    "rg_lru": (rg_lru, "rg_lru", {}),
    "mamba": (mamba, "mamba", {"state_dim": 3}),
    "delta_net": (delta_net, "delta_net", {"num_heads": 2}),
    "gated_delta_net": (gated_delta_net, "gated_delta_net", {"num_key_heads": 2, "expand_k": 1.0, "dt_max": 2.0}),
    "kda": (kda, "kda", {"num_heads": 2, "dt_max": 2.0}),
    "rwkv7": (rwkv7, "rwkv7", {"num_heads": 2}),
}


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "lengths"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_is_the_equation(case, causal, lengths):
    equation, name, options = CASES[case]
    block, x = make(name, causal, **options), inputs()
    actual = mixing_matrix(block, x, lengths)
    mask = visible(causal, lengths)
    expected = equation(block, x, mask, lengths)
    assert actual.dtype == torch.float64
    assert_close(actual, expected.expand_as(actual), 1e-12)
    assert (actual[~mask.expand_as(actual)] == 0).all()


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("case", [case for case in CASES if case not in ("lru", "s4d", "conv", "s5")])
@torch.no_grad()
def test_moves_the_values_as_the_block_does(case, causal):
    _, name, options = CASES[case]
    block, x = make(name, causal, **options), inputs()
    seen = []
    with block.observed(lambda operation, values, *gates: seen.append((operation(values, *gates), values, *gates))):
        block(x, lengths=LENGTHS)
    ((y, values, *gates),) = seen
    weights = mixing_matrix(block, x, LENGTHS)
    values = values.reshape(3, T, weights.shape[1], -1)
    moved = torch.einsum("bhts,bshe->bthe", weights, values).reshape(y.shape)
    for gate in gates:
        moved = moved * gate
    valid = (torch.arange(T) < LENGTHS[:, None]).view(3, T, *[1] * (y.dim() - 2))
    assert_close(moved, torch.where(valid, y, 0), 1e-12)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("name", ["lru", "s4d", "s5"])
def test_of_a_convolution_is_the_size_of_its_jacobian(name, causal):
    block, x = make(name, causal), inputs()[:1]
    block.gate = torch.nn.Identity()
    with torch.no_grad():
        block.skip.zero_()
    J = torch.autograd.functional.jacobian(block, x)[0, :, :, 0]  # [T, D, T, D]
    assert_close(mixing_matrix(block, x)[0, 0], size_of(J.transpose(1, 2), x), 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["lru", "s4d", "s5", "conv"])
def test_of_a_convolution_in_half_precision(name, dtype):
    block, x = make(name, True).float(), inputs()[:1].float()
    expected = mixing_matrix(block, x)
    assert_close(mixing_matrix(block.to(dtype), x.to(dtype)).float(), expected, 3e-2)


def test_rows_of_normalised_attention_sum_to_one():
    for case in ("softmax_attention", "linear_attention", "performer", "vq_attention", "gau_softmax"):
        _, name, options = CASES[case]
        sums = mixing_matrix(make(name, False, **options), inputs(), LENGTHS).sum(-1)
        valid = (torch.arange(T) < LENGTHS[:, None])[:, None].expand_as(sums)
        torch.testing.assert_close(sums, valid.double(), rtol=0, atol=1e-12)


def test_heads_that_share_values_each_have_a_matrix():
    weights = mixing_matrix(make("softmax_attention", True, num_kv_heads=2), inputs())
    assert weights.shape == (3, 4, T, T)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, T, dtype=torch.float64))


def test_leaves_the_block_as_it_was():
    block = make("vq_attention", False, codebook_size=4, block_len=3).train()
    untouched = copy.deepcopy(block)
    assert not mixing_matrix(block, inputs().requires_grad_()).requires_grad
    assert block.training
    for each in (block, untouched):  # applies what was recorded in between
        each.after_step()
    for tensor, expected in zip(block.buffers(), untouched.buffers(), strict=True):
        torch.testing.assert_close(tensor, expected, rtol=0, atol=0, equal_nan=True)


def test_a_block_that_mixes_unseen_is_refused():
    class Unseen(Block):
        def mix(self, x, state, lengths):
            return x.cumsum(1), state

    with pytest.raises(ValueError, match="Unseen calls over_time 0 times; valid: once"):
        mixing_matrix(Unseen(D, causal=True), inputs())


def test_an_input_of_another_width_is_refused():
    with pytest.raises(ValueError, match="got"):
        mixing_matrix(make("softmax_attention", False), inputs()[..., :3])
