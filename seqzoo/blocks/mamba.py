from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.common import accumulation_dtype
from ..kernels.documents import Documents, starts_of
from ..kernels.selective_scan import selective_scan
from ..valid import Count, Factor
from .base import Block, advance
from .depthwise import short_convolution
from .states import state_of
from .timescales import step_bias
from .wide import Wide, default_dtype


@state_of("inputs")
class MambaState(NamedTuple):
    hidden: Tensor  # [B, E, N]
    inputs: Tensor  # [B, conv_width - 1, E], the last ones of the convolution
    position: Tensor  # int64 [B]


class Mamba(Block):
    """Selective state spaces (S6): N states in each of E channels, with steps, inputs and outputs that x sets.

        [x, z] = W_in u,   x = SiLU(conv(x)),   [δ, B, C] = W_x x,   Δ = softplus(W_Δ δ + b)
        h_t = e^(Δ_t A) ∘ h_{t-1} + Δ_t x_t B_tᵀ,   y_t = h_t C_t + D∘x_t,   W_out (y ∘ SiLU(z))

    B is discretised by Euler's rule, as in the authors' code. The convolution moves values beside `over_time`.
    Bidirectional: it looks at both sides; the recurrence also runs from the end, both include the present step and are
    added. A and b stay in single precision when the block is cast to half.

    Args:
        d_model: width.
        causal: one direction only.
        state_dim: states per channel, N; A starts at -1 to -N in each.
        expand: channels, E, times `d_model`.
        dt_rank: numbers of which Δ is made, the size of δ; None is a 16th of `d_model`, rounded up.
        conv_width: positions of the convolution's kernels; in both directions the next odd number.
        dt_min, dt_max: Δ starts log-uniformly between them where x is 0.

    Source: Gu and Dao, "Mamba" (2023), arXiv 2312.00752, algorithm 2 and section 3.6.
    """

    undecayed = ("dynamics.A_log",)

    def __init__(
        self,
        d_model: int,
        *,
        causal: bool = False,
        state_dim: Count = 16,
        expand: Factor = 2.0,
        dt_rank: Count | None = None,
        conv_width: Count = 4,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
    ) -> None:
        super().__init__(d_model, causal=causal)
        E = self.width = int(expand * d_model)
        if E < 1:
            raise ValueError(f"Mamba: expand={expand} (width {E}); valid: expand · d_model of 1 or more")
        N = self.state_dim = state_dim
        R = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        self.parts = (R, N, N)  # δ, B and C
        self.dynamics = MambaDynamics(E, N, dt_min, dt_max)
        self.in_proj = nn.Linear(d_model, 2 * E, bias=False)
        self.conv = short_convolution(E, conv_width, causal=causal, bias=True, silu=True)
        self.x_proj = nn.Linear(E, sum(self.parts), bias=False)
        self.dt_proj = nn.Linear(R, E, bias=False)
        self.skip = nn.Parameter(torch.ones(E))  # D
        self.out_proj = nn.Linear(E, d_model, bias=False)
        nn.init.uniform_(self.dt_proj.weight, -1 / math.sqrt(R), 1 / math.sqrt(R))

    def initial_state(self, batch_size, *, device=None, dtype=None) -> MambaState:
        device, dtype = self._state_options(device, dtype)
        wide = accumulation_dtype(dtype)
        return MambaState(
            torch.zeros(batch_size, self.width, self.state_dim, device=device, dtype=wide),
            torch.zeros(batch_size, self.conv.width - 1, self.width, device=device, dtype=dtype),
            torch.zeros(batch_size, dtype=torch.int64, device=device),
        )

    def mix(
        self, x: Tensor, state: MambaState | None, lengths: Tensor | None, documents: Documents | None = None
    ) -> tuple[Tensor, MambaState | None]:
        u, z = self.in_proj(x).chunk(2, -1)
        u, after = self.conv(u, None if state is None else state.inputs, lengths, documents)
        low, B, C = self.x_proj(u).split(self.parts, -1)
        dt, A = self.dynamics(self.dt_proj(low), accumulation_dtype(x.dtype))
        y = self.over_time(lambda v: self._recur(v, dt, A, B, C, state, lengths, documents), (dt * u)[..., None])
        if state is not None:
            y, hidden = y
            state = MambaState(hidden, after, advance(state.position, x, lengths, documents))
        y = y.squeeze(-1).to(u.dtype) + self.skip * u
        return self.out_proj(y * F.silu(z)), state

    def _recur(
        self,
        v: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        state: MambaState | None,
        lengths: Tensor | None,
        documents: Documents | None,
    ) -> Any:
        """y of v [B, T, E, any], each channel with its dt [B, T, E] and A [E, N]; with a state, (y, the last)."""
        more = v.shape[-1]  # values of one channel
        inputs = (
            v.flatten(2),
            dt[..., None].expand_as(v).flatten(2),
            A[:, None].expand(-1, more, -1).flatten(0, 1),
            B,
            C,
        )
        ends: dict[str, Any] = {"lengths": lengths, "cu_seqlens": starts_of(documents)}
        if state is not None:
            y, hidden = selective_scan(*inputs, initial_state=state.hidden, output_final_state=True, **ends)
            return y.view_as(v), hidden
        y = selective_scan(*inputs, **ends)
        if not self.causal:
            y = y + selective_scan(*inputs, reverse=True, **ends)
        return y.view_as(v)


class MambaDynamics(Wide):
    """Δ and A of N states in each of E channels."""

    def __init__(self, E: int, N: int, dt_min: float, dt_max: float) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.arange(1, N + 1, dtype=default_dtype()).log().repeat(E, 1))
        self.dt_bias = nn.Parameter(step_bias("Mamba", E, dt_min, dt_max))

    def forward(self, dt: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Δ [..., E] of what is projected for it, and A [E, N], for computing in `dtype`."""
        return F.softplus(dt.to(dtype) + self.dt_bias.to(dtype)), -self.A_log.to(dtype).exp()
