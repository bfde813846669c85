from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..kernels.common import accumulation_dtype
from ..kernels.documents import Documents
from ..valid import Count, Factor
from .base import Block, advance
from .decays import Decay, rates
from .depthwise import short_convolution
from .directions import Directions
from .gated_norm import GatedRMSNorm
from .over_parts import linear_attention
from .parts import Part
from .states import state_of
from .timescales import step_bias


@state_of("inputs")
class Mamba2State(NamedTuple):
    memory: Tensor  # [B, H, N, P]
    inputs: Tensor  # [B, conv_width - 1, E + 2 G N], the convolution's last ones
    position: Tensor  # int64 [B]


class Mamba2(Block):
    """Mamba-2: a state space with one decay a head, which is linear attention (state space duality, SSD).

    [z, x, B, C, δ] are one projection of the input; x, B and C pass a short convolution and SiLU together. In each
    head, with a step Δ = softplus(δ + b) and a rate A of its own,

        S_t = exp(-A Δ_t) S_{t-1} + Δ_t B_t x_tᵀ        y_t = S_tᵀ C_t + D x_t

    and the output is W_o rms(y ∘ SiLU(z)), with the norm over all heads of a group.

    Values move in the convolution too, ahead of what goes through `over_time`. Bidirectional: the same recurrence also
    runs from the end, both include the present step, and their sum is gated and normalised; the convolution is centred,
    and one position wider where its width has no middle. A and b stay in single precision when the block is cast to
    half.

    Args:
        d_model: width.
        causal: one direction only.
        num_heads: H, each with a decay; divides the inner width E = `expand` · `d_model`, of which each has P = E / H.
        state_dim: N, states of each channel.
        num_groups: G, of heads that share B and C; divides `num_heads`.
        expand: E by `d_model`.
        conv_width: positions that the convolution sees.
        dt_min, dt_max: Δ starts log-uniformly between them where the input is 0.

    Source: Dao and Gu, "Transformers are SSMs" (2024), arXiv 2405.21060, listing 1 and section 7; A starts uniformly in
    [1, 16] as in state-spaces/mamba.
    """

    def __init__(
        self,
        d_model: int,
        *,
        causal: bool = False,
        num_heads: Count = 8,
        state_dim: Count = 64,
        num_groups: Count = 1,
        expand: Factor = 2.0,
        conv_width: Count = 4,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
    ) -> None:
        super().__init__(d_model, causal=causal)
        E = inner_width("Mamba2", d_model, expand, num_heads, num_groups)
        self.num_heads, self.num_groups, self.state_dim = num_heads, num_groups, state_dim
        self.widths = E + 2 * num_groups * state_dim, num_heads  # what the convolution takes, δ
        self.in_proj = nn.Linear(d_model, sum(self.widths), bias=False)
        self.gate_proj = nn.Linear(d_model, E, bias=False)  # a layer of its own: z is kept for longer than the rest
        self.conv = short_convolution(self.widths[0], conv_width, causal=causal, bias=True, silu=True)
        dt_bias = step_bias("Mamba2", num_heads, dt_min, dt_max)
        self.dynamics = Decay(rates(num_heads, 1, 16), dt_bias)
        self.skip = nn.Parameter(torch.ones(num_heads))  # D
        self.norm = GatedRMSNorm(E, num_groups)
        self.out_proj = nn.Linear(E, d_model, bias=False)

    def initial_state(self, batch_size, *, device=None, dtype=None) -> Mamba2State:
        device, dtype = self._state_options(device, dtype)
        (C, H), N = self.widths, self.state_dim
        return Mamba2State(
            torch.zeros(
                batch_size, H, N, (C - 2 * self.num_groups * N) // H, device=device, dtype=accumulation_dtype(dtype)
            ),
            torch.zeros(batch_size, self.conv.width - 1, C, device=device, dtype=dtype),
            torch.zeros(batch_size, dtype=torch.int64, device=device),
        )

    def mix(
        self,
        x: Tensor,
        state: Mamba2State | None,
        lengths: Tensor | None,
        documents: Documents | None = None,
        part: Part | None = None,
    ) -> tuple[Tensor, Mamba2State | None]:
        H, G = self.num_heads, self.num_groups
        xBC, delta = self.in_proj(x).split(self.widths, -1)
        xBC, inputs = self.conv(xBC, None if state is None else state.inputs, lengths, documents, part)
        values, BC = xBC.tensor_split((-2 * G * self.state_dim,), -1)
        values = values.unflatten(-1, (H, -1))  # [B, T, H, P]
        dt, log_decay = (y[..., 0] for y in self.dynamics(delta))  # [B, T, H]
        ways = Directions(x, lengths, documents, both=not self.causal)
        log_decay = ways.doubled(log_decay)
        k, q = ways.doubled(BC).unflatten(-1, (2, G, -1)).unbind(2)  # [B, T, G, N]

        before = None if state is None else state.memory
        scan = partial(linear_attention, part, q, k, log_decay=log_decay, causal=True, turned=ways.both)
        y = self.over_time(lambda v: ways.through(scan, (v * dt[..., None]).to(v.dtype), before), values)
        if state is not None:
            y, memory = y
            state = Mamba2State(memory, inputs, advance(state.position, x, lengths, documents))
        z = self.gate_proj(x)
        y = (y + self.skip[:, None] * values).flatten(2).to(z.dtype)
        return self.out_proj(self.norm(y, z)), state


def inner_width(block: str, d_model: int, expand: float, num_heads: int, num_groups: int) -> int:
    """expand · d_model.

    Raises:
        ValueError: the heads do not divide it, or the groups do not divide the heads.
    """
    E = int(expand * d_model)
    if E < 1 or E % num_heads:
        divisors = [n for n in range(1, E + 1) if E % n == 0]
        raise ValueError(
            f"{block}: num_heads={num_heads} does not divide expand · d_model = {E}; "
            f"valid: {divisors or 'expand · d_model of 1 or more'}"
        )
    if num_heads % num_groups:
        raise ValueError(f"{block}: num_groups={num_groups} does not divide num_heads={num_heads}")
    return E
