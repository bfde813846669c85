from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import diagonal_scan
from ..kernels.common import accumulation_dtype, zero_padding
from ..kernels.derivatives import by_hand
from ..kernels.documents import Documents, starts_of
from ..valid import Between, Count
from .base import Block, advance, places
from .block_diagonal import BlockDiagonal
from .depthwise import short_convolution
from .states import state_of
from .wide import Wide, default_dtype

RATE = 8.0
STEEPEST = 1000.0  # slope of the root, at most


@state_of("inputs")
class RGLRUState(NamedTuple):
    hidden: Tensor  # [B, N]
    inputs: Tensor  # [B, conv_width - 1, N], the last ones of the convolution
    position: Tensor  # int64 [B]


class RGLRU(Block):
    """Real-gated linear recurrent unit in the recurrent block of Hawk and Griffin.

        u = conv(W_x x + b),   r, i = σ(W u + b) with block-diagonal W,   log a = -8 r softplus(Λ)
        h_t = a_t∘h_{t-1} + √(1 - a_t²)∘(i_t∘u_t),   y = W_o(GELU(W_y x + b)∘h) + b

    At a sequence's first step a is 0, and so the root 1. The root's slope by 1 - a² is cut at 1,000, which happens only
    where a is 1 but for 10⁻⁷. The convolution moves values beside `over_time`. Bidirectional: it looks at both sides;
    the recurrence also runs from the end, where the last step is the first, both include the present step and are added
    before the gate. Λ stays in single precision when the block is cast to half.

    Λ starts as the paper says it: a is uniform in [r_min, r_max] where r is 1. The authors' code puts e^-softplus(Λ)
    there in place of a, its 8th root, and so forgets eight times as fast.

    Args:
        d_model: width.
        causal: one direction only.
        state_dim: channels of the recurrence, N; None is `d_model`.
        num_heads: blocks of the gates' W; divides `state_dim`.
        conv_width: positions of the convolution's kernels; in both directions the next odd number.
        r_min, r_max: where a starts if r is 1, 0 < r_min < r_max < 1.

    Source: De et al., "Griffin" (2024), arXiv 2402.19427, equations 1 to 4.
    """

    def __init__(
        self,
        d_model: int,
        *,
        causal: bool = False,
        state_dim: Count | None = None,
        num_heads: Count = 4,
        conv_width: Count = 4,
        r_min: Between = 0.9,
        r_max: Between = 0.999,
    ) -> None:
        super().__init__(d_model, causal=causal)
        N = self.state_dim = d_model if state_dim is None else state_dim
        if N % num_heads:
            raise ValueError(f"RGLRU: num_heads={num_heads} does not divide state_dim={N}; valid: a divisor")
        self.dynamics = RGLRUDynamics(N, r_min, r_max)
        self.in_proj = nn.Linear(d_model, N)  # W_x
        self.gate_proj = nn.Linear(d_model, N)  # W_y
        self.conv = short_convolution(N, conv_width, causal=causal, bias=True)
        self.recurrence_gate = BlockDiagonal(N, num_heads, bias=True)  # r
        self.input_gate = BlockDiagonal(N, num_heads, bias=True)  # i
        self.out_proj = nn.Linear(N, d_model)
        for layer in (self.in_proj, self.gate_proj, self.out_proj):
            nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.in_features))
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.conv.weight, std=math.sqrt(0.01 / self.conv.width))
        nn.init.zeros_(self.conv.get_parameter("bias"))

    def initial_state(self, batch_size, *, device=None, dtype=None) -> RGLRUState:
        device, dtype = self._state_options(device, dtype)
        N = self.state_dim
        return RGLRUState(
            torch.zeros(batch_size, N, device=device, dtype=accumulation_dtype(dtype)),
            torch.zeros(batch_size, self.conv.width - 1, N, device=device, dtype=dtype),
            torch.zeros(batch_size, dtype=torch.int64, device=device),
        )

    def mix(
        self, x: Tensor, state: RGLRUState | None, lengths: Tensor | None, documents: Documents | None = None
    ) -> tuple[Tensor, RGLRUState | None]:
        wide = accumulation_dtype(x.dtype)
        before = None if state is None else state.inputs
        u, after = self.conv(zero_padding(self.in_proj(x), lengths), before, lengths, documents)
        log_a = self.dynamics(self.recurrence_gate(u).to(wide).sigmoid())
        ahead = places(x, state, documents)
        firsts = (ahead == 0,) if self.causal else (ahead == 0, ahead == _steps(x, lengths, documents) - 1)
        gates = [decay(log_a.masked_fill(first[..., None], -math.inf)) for first in firsts]  # of each direction
        values = self.input_gate(u).to(wide).sigmoid() * u
        y = self.over_time(lambda v: self._recur(v, gates, state, lengths, documents), values[..., None])
        if state is not None:
            y, hidden = y
            state = RGLRUState(hidden, after, advance(state.position, x, lengths, documents))
        gate = F.gelu(self.gate_proj(x), approximate="tanh")
        return self.out_proj(gate * y.squeeze(-1).to(gate.dtype)), state

    def _recur(
        self,
        v: Tensor,
        gates: list[tuple[Tensor, Tensor]],
        state: RGLRUState | None,
        lengths: Tensor | None,
        documents: Documents | None,
    ) -> Any:
        """h of v [B, T, N, any], each channel with its a and root [B, T, N]; with a state, (h, the last one)."""

        def scan(a: Tensor, root: Tensor, **options: Any) -> Any:
            x = (root[..., None] * v).flatten(2)
            a = a[..., None].expand_as(v).flatten(2)
            return diagonal_scan(x, a, lengths=lengths, cu_seqlens=starts_of(documents), **options)

        if state is not None:
            h, last = scan(*gates[0], initial_state=state.hidden, output_final_state=True)
            return h.view_as(v), last
        h = scan(*gates[0])
        if not self.causal:
            h = h + scan(*gates[1], reverse=True)
        return h.view_as(v)


def _steps(x: Tensor, lengths: Tensor | None, documents: Documents | None) -> Any:
    """How many its sequence has, of each step of `x` [B, T, ...]: an integer, int64 [T] or [B, 1]."""
    if documents is not None:
        return documents.lengths[documents.of_steps()]
    return x.shape[1] if lengths is None else lengths[:, None]


class RGLRUDynamics(Wide):
    """Λ of N channels."""

    def __init__(self, N: int, r_min: float, r_max: float) -> None:
        super().__init__()
        if not 0 < r_min < r_max < 1:
            raise ValueError(f"RGLRU: r_min={r_min}, r_max={r_max}; valid: 0 < r_min < r_max < 1")
        a = r_min + torch.rand(N, dtype=default_dtype()) * (r_max - r_min)
        self.Lambda = nn.Parameter((a.log() / -RATE).expm1().log())

    def forward(self, r: Tensor) -> Tensor:
        """log a: [..., N] -> [..., N]."""
        return r * (-RATE * F.softplus(self.Lambda.to(r.dtype)))


class _Decay(torch.autograd.Function):
    """Keeps what it gives, and nothing else."""

    @staticmethod
    def forward(ctx: Any, log_a: Tensor) -> tuple[Tensor, Tensor]:
        a, root = log_a.exp(), (2 * log_a).expm1_().neg_().sqrt_()
        ctx.save_for_backward(a, root)
        return a, root

    @staticmethod
    def backward(ctx: Any, da: Tensor, d_root: Tensor) -> Tensor:
        a, root = ctx.saved_tensors
        return a * (da - d_root * a / root.clamp(min=0.5 / STEEPEST))


def decay(log_a: Tensor) -> tuple[Tensor, Tensor]:
    """a and √(1 - a²), whose slope by 1 - a² is `STEEPEST` at most."""
    if by_hand():
        return _Decay.apply(log_a)
    x, bend = -torch.expm1(2 * log_a), 1 / (2 * STEEPEST) ** 2
    straight = x.detach().sqrt() + STEEPEST * (x - x.detach())
    return log_a.exp(), torch.where(x > bend, x.clamp(min=bend).sqrt(), straight)
