from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.common import accumulation_dtype, steps_in_cache, zero_padding
from ..kernels.derivatives import by_hand, gradient
from ..kernels.documents import Documents, starts_of
from ..kernels.real_gated_scan import Gate, real_gated_scan, real_gated_unit
from ..valid import Between, Count
from .base import Block, advance
from .block_diagonal import BlockDiagonal, joined
from .depthwise import short_convolution
from .states import state_of
from .wide import Wide, default_dtype

RATE = 8.0


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
    where a is 1 but for 10⁻⁷. The convolution moves values beside `over_time`, whose values are u. Bidirectional: it
    looks at both sides; the recurrence also runs from the end, where the last step is the first, both include the
    present step and are added before the gate. Λ stays in single precision when the block is cast to half.

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
        before = None if state is None else state.inputs
        u, after = self.conv(zero_padding(self.in_proj(x), lengths), before, lengths, documents)
        values = u[..., None]
        y = self.over_time(lambda v: self._recur(v, u, v is values, state, lengths, documents), values)
        if state is not None:
            y, hidden = y
            state = RGLRUState(hidden, after, advance(state.position, x, lengths, documents))
        gate = self.gate_proj(x)
        return self.out_proj(gated(y.squeeze(-1).to(gate.dtype), gate)), state

    def _recur(
        self,
        v: Tensor,
        u: Tensor,
        own: bool,
        state: RGLRUState | None,
        lengths: Tensor | None,
        documents: Documents | None,
    ) -> Any:
        """h of v [B, T, N, any], each channel with the gates that u [B, T, N] has there, and whether v is its `own`;
        with a state, (h, the last one)."""
        rates = self.dynamics(accumulation_dtype(u.dtype))
        gates: tuple[Any, ...] = (self.recurrence_gate, self.input_gate)
        scan: Any
        if own and all(gate.unhooked for gate in gates):
            recurrence, inputs = (Gate(joined(gate.weight), gate.bias) for gate in gates)
            scan = partial(real_gated_unit, u, recurrence, inputs, rates)
        else:
            forgets, takes = (gate(u)[..., None].expand_as(v).flatten(2) for gate in gates)
            scan = partial(real_gated_scan, v.flatten(2), forgets, takes, rates[:, None].expand(v.shape[2:]).flatten())
        ends: dict[str, Any] = {"lengths": lengths, "cu_seqlens": starts_of(documents)}
        if state is not None:
            before = {"initial_state": state.hidden, "begins": state.position == 0}
            h, last = scan(**before, output_final_state=True, **ends)
            return h.view_as(v), last
        h = scan(**ends)
        if not self.causal:
            h = h + scan(reverse=True, **ends)
        return h.view_as(v)


class RGLRUDynamics(Wide):
    """Λ of N channels."""

    def __init__(self, N: int, r_min: float, r_max: float) -> None:
        super().__init__()
        if not 0 < r_min < r_max < 1:
            raise ValueError(f"RGLRU: r_min={r_min}, r_max={r_max}; valid: 0 < r_min < r_max < 1")
        a = r_min + torch.rand(N, dtype=default_dtype()) * (r_max - r_min)
        self.Lambda = nn.Parameter((a.log() / -RATE).expm1().log())

    def forward(self, dtype: torch.dtype) -> Tensor:
        """-log a where r is 1: [N]."""
        return RATE * F.softplus(self.Lambda.to(dtype))


def gated(h: Tensor, z: Tensor) -> Tensor:
    """h ∘ GELU(z), [B, T, N]."""
    return _Gated.apply(h, z) if by_hand() else _gated(h, z)


def _gated(h: Tensor, z: Tensor) -> Tensor:
    return F.gelu(z, approximate="tanh") * h


class _Gated(torch.autograd.Function):
    """Keeps nothing that is not kept anyway, and goes through it while steps are cached."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, z: Tensor) -> Tensor:
        ctx.save_for_backward(h, z)
        y = torch.empty_like(z)
        for t in steps_in_cache(z):
            torch.mul(F.gelu(z[:, t], approximate="tanh"), h[:, t], out=y[:, t])
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Sequence[Tensor | None]:
        h, z = ctx.saved_tensors

        def written() -> tuple[Tensor, Tensor]:
            dh, dz = torch.empty_like(h), torch.empty_like(z)
            for t in steps_in_cache(z):
                torch.mul(F.gelu(z[:, t], approximate="tanh"), dy[:, t], out=dh[:, t])
                dz[:, t] = torch.ops.aten.gelu_backward(dy[:, t] * h[:, t], z[:, t], approximate="tanh")
            return dh, dz

        return gradient(written, lambda h, z: (_gated(h, z),), (h, z), (dy,))
