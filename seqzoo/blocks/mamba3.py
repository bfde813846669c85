from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import diagonal_scan, linear_attention
from ..kernels.common import accumulation_dtype, query_heads
from ..kernels.documents import Documents, starts_of
from ..valid import Count, Factor
from .base import Block, advance, last_steps
from .directions import Directions
from .mamba2 import inner_width
from .rotary import turned
from .states import state_of
from .timescales import step_bias
from .wide import Wide

SLOWEST = 1e-4  # decay of a unit of time, at least


@state_of("key", "value")
class Mamba3State(NamedTuple):
    memory: Tensor  # [B, H, N, P], of all steps but the last, as that leaves it
    phase: Tensor  # [B, H, N // 4], in [0, 2π)
    key: Tensor  # [B, H, N], of the last step, rotated
    value: Tensor  # [B, H, P], of the last step
    own: Tensor  # [B, H], λΔ of the last step
    position: Tensor  # int64 [B]


class Mamba3(Block):
    """Mamba-3, with one input and one output a head (SISO): a trapezoidal rule, and rotations that add up.

    [z, v, B, C, δ, a, l, ω] are one projection of the input. In each head, with a step Δ = softplus(δ + b), a share
    λ = σ(l) and phases φ_t = φ_{t-1} + Δ_t π tanh(ω_t), keys k and queries q are rms(B) and rms(C), each plus a vector
    of the head, with their first N/2 channels rotated by φ, and

        S_t = α_t S_{t-1} + (1 - λ_t) Δ_t α_t k_{t-1} v_{t-1}ᵀ + λ_t Δ_t k_t v_tᵀ        y_t = S_tᵀ q_t + D v_t

    with α = exp(-Δ max(f(a), 10⁻⁴)), f(a) = 1 + a above 0 and 1 / (1 - a) below. The output is W_o (y ∘ SiLU(z)). A
    key and its value enter at their own step and at the next, and both parts decay alike from there on: one linear
    attention takes them together at the next step, and what the present step adds to it counts by itself.

    There is no convolution: that one operation moves all values, and beside it only phases add up over time.
    Bidirectional: the same recurrence, phases included, also runs from the end, both include the present step, and
    their sum is gated. b stays in single precision when the block is cast to half.

    Args:
        d_model: width.
        causal: one direction only.
        num_heads: H; divides the inner width E = `expand` · `d_model`, of which each has P = E / H.
        state_dim: N, states of each channel, 4 or more.
        num_groups: G, of heads that share B and C; divides `num_heads`.
        expand: E by `d_model`.
        dt_min, dt_max: Δ starts log-uniformly between them where the input is 0.

    Source: Lahoti et al., "Mamba-3" (2026), arXiv 2603.15569; constants as in state-spaces/mamba at e9594ce.
    """

    undecayed = ("q_bias", "k_bias")

    def __init__(
        self,
        d_model: int,
        *,
        causal: bool = False,
        num_heads: Count = 8,
        state_dim: Count = 64,
        num_groups: Count = 1,
        expand: Factor = 2.0,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
    ) -> None:
        super().__init__(d_model, causal=causal)
        E = inner_width("Mamba3", d_model, expand, num_heads, num_groups)
        if state_dim < 4:
            raise ValueError(f"Mamba3: state_dim={state_dim}; valid: 4 or more, of which every fourth is an angle")
        H, G, N = num_heads, num_groups, state_dim
        self.num_heads, self.num_groups, self.state_dim = H, G, N
        self.widths = E, E, G * N, G * N, H, H, H, N // 4  # z, v, B, C, δ, a, l, ω
        self.in_proj = nn.Linear(d_model, sum(self.widths), bias=False)
        self.q_norm, self.k_norm = (nn.RMSNorm(N, eps=1e-5) for _ in range(2))
        self.q_bias, self.k_bias = (nn.Parameter(torch.ones(H, N)) for _ in range(2))
        self.dynamics = Mamba3Dynamics(step_bias("Mamba3", H, dt_min, dt_max))
        self.skip = nn.Parameter(torch.ones(H))  # D
        self.out_proj = nn.Linear(E, d_model, bias=False)

    def initial_state(self, batch_size, *, device=None, dtype=None) -> Mamba3State:
        device, dtype = self._state_options(device, dtype)
        wide = accumulation_dtype(dtype)
        H, N, P = self.num_heads, self.state_dim, self.widths[0] // self.num_heads
        return Mamba3State(
            torch.zeros(batch_size, H, N, P, device=device, dtype=wide),
            torch.zeros(batch_size, H, N // 4, device=device, dtype=wide),
            torch.zeros(batch_size, H, N, device=device, dtype=dtype),
            torch.zeros(batch_size, H, P, device=device, dtype=dtype),
            torch.zeros(batch_size, H, device=device, dtype=wide),
            torch.zeros(batch_size, dtype=torch.int64, device=device),
        )

    def mix(
        self, x: Tensor, state: Mamba3State | None, lengths: Tensor | None, documents: Documents | None = None
    ) -> tuple[Tensor, Mamba3State | None]:
        H, E = self.num_heads, self.widths[0]
        z, values, rest = self.in_proj(x).split((E, E, sum(self.widths[2:])), -1)
        values = values.unflatten(-1, (H, -1))  # [B, T, H, P]
        ways = Directions(x, lengths, documents, both=not self.causal)
        k, q, *gates = ways.doubled(rest).split(self.widths[2:], -1)
        k, q = self._of_heads(k, self.k_norm, self.k_bias), self._of_heads(q, self.q_norm, self.q_bias)
        own, carried, log_decay, turns = self.dynamics(*gates)
        memory, phase_0, k_0, v_0, own_0 = (None,) * 5 if state is None else state[:5]
        phase = _phases(turns, phase_0, ways.lengths, ways.documents)
        turn = torch.polar(torch.ones_like(phase), phase)
        k, q = (turned(y, turn).to(values.dtype) for y in (k, q))  # [B, T, H, N]
        k_before, own_before = _previous(k, k_0, ways.documents), _previous(own, own_0, ways.documents)
        weight = (own_before + carried) * log_decay.exp()  # of what a step finds of the one ahead
        here = own * (q.to(own.dtype) * k).sum(-1)

        def scan(values: Tensor) -> Any:
            v = ways.doubled(values)
            y = linear_attention(
                q,
                k_before,
                (_previous(v, v_0, ways.documents) * weight[..., None]).to(v.dtype),
                log_decay=log_decay,
                causal=True,
                initial_state=memory,
                output_final_state=state is not None,
                lengths=ways.lengths,
                cu_seqlens=starts_of(ways.documents),
            )
            y, *after = y if state is not None else (y,)
            y = ways.summed((y + here[..., None] * v).to(v.dtype))
            return (y, *after) if after else y

        y = self.over_time(scan, values)
        if state is not None:
            y, memory = y
            state = Mamba3State(
                memory,
                last_steps(phase, state.phase, lengths, documents),
                last_steps(k, state.key, lengths, documents),
                last_steps(values, state.value, lengths, documents),
                last_steps(own, state.own, lengths, documents),
                advance(state.position, x, lengths, documents),
            )
        y = (y + self.skip[:, None] * values).flatten(2) * F.silu(z)
        return self.out_proj(y.to(x.dtype)), state

    def _of_heads(self, x: Tensor, norm: nn.Module, bias: Tensor) -> Tensor:
        """[B, T, G · N] -> [B, T, H, N]."""
        return query_heads(norm(x.unflatten(-1, (self.num_groups, -1))), self.num_heads) + bias


class Mamba3Dynamics(Wide):
    """What is done to the states of H heads by gates, [B, T, H] each but for ω [B, T, N // 4].

    Args:
        dt_bias: b, [H].
    """

    def __init__(self, dt_bias: Tensor) -> None:
        super().__init__()
        self.dt_bias = nn.Parameter(dt_bias)

    def forward(self, delta: Tensor, a: Tensor, share: Tensor, omega: Tensor) -> tuple[Tensor, ...]:
        """λΔ, (1 - λ)Δ and log α [B, T, H], and Δ π tanh(ω) [B, T, H, N // 4], in single precision at least."""
        dtype = accumulation_dtype(delta.dtype)
        delta, a, share, omega = (x.to(dtype) for x in (delta, a, share, omega))
        dt = F.softplus(delta + self.dt_bias.to(dtype))
        rate = torch.where(a >= 0, 1 + a, 1 / (1 - a.clamp(max=0))).clamp(min=SLOWEST)
        own, carried = dt * share.sigmoid(), dt * share.neg().sigmoid()
        return own, carried, -rate * dt, dt[..., None] * (math.pi * omega.tanh())[:, :, None]


def _phases(turns: Tensor, before: Tensor | None, lengths: Tensor | None, documents: Documents | None) -> Tensor:
    """Sums of `turns` [B, T, H, R] up to each step of a sequence, from `before` [B, H, R] or 0 on; in [0, 2π)."""
    lanes = turns.double().flatten(2)
    phase = diagonal_scan(
        lanes,
        lanes.new_ones(lanes.shape[-1]),
        initial_state=None if before is None else before.to(lanes.dtype).flatten(1),
        lengths=lengths,
        cu_seqlens=starts_of(documents),
    )
    return phase.remainder(2 * math.pi).to(turns.dtype).view_as(turns)


def _previous(x: Tensor, before: Tensor | None, documents: Documents | None) -> Tensor:
    """What the step ahead has of x [B, T, ...], and `before` [B, ...], or 0, of that of a sequence's first step."""
    if documents is None:
        first = torch.zeros_like(x[:, :1]) if before is None else before[:, None].to(x.dtype)
        return torch.cat([first, x], 1)[:, :-1]
    begins = (documents.positions() == 0).reshape(-1, *[1] * (x.dim() - 2))
    moved = x.roll(1, 1)
    if before is None:
        return torch.where(begins, 0, moved)
    return torch.where(begins, before.to(x.dtype)[documents.of_steps()], moved)
