from __future__ import annotations

import math
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import diagonal_scan
from ..kernels.common import accumulation_dtype
from ..valid import BelowOne, Count
from .base import Block, advance


class RecurrentState(NamedTuple):
    hidden: Tensor  # [B, ..., 2], real and imaginary parts
    position: Tensor  # int64 [B]


class LRU(Block):
    """Linear recurrent unit: h_t = λ∘h_{t-1} + γ∘(B x_t), y_t = Re(C h_t) + D∘x_t, then GELU and a gated linear unit.

    λ = exp(-exp(ν) + i exp(θ)) lies inside the unit circle whatever ν is; γ starts at √(1 - |λ|²), which keeps h as
    large as its input. Parameters are real, complex numbers exist inside the scan only. Bidirectional: the same
    recurrence also runs from the end, both include the present step, and C reads both.

    Args:
        d_model: width.
        causal: one direction only.
        state_dim: complex states, N; None is `d_model`.
        r_min, r_max: λ starts uniformly on the ring between these radii, 0 <= r_min < r_max < 1.
        max_phase: angles of λ start uniformly in [0, max_phase], radians.
        dropout: of the activations between GELU and gate.

    Source: Orvieto et al., "Resurrecting Recurrent Neural Networks for Long Sequences" (2023), section 3, appendix A.
    """

    convolves = True
    recurrence = ("nu_log", "theta_log", "gamma_log", "in_proj.weight")

    def __init__(
        self,
        d_model: int,
        *,
        causal: bool = False,
        state_dim: Count | None = None,
        r_min: float = 0.9,
        r_max: float = 0.999,
        max_phase: float = 2 * math.pi,
        dropout: BelowOne = 0.0,
    ) -> None:
        super().__init__(d_model, causal=causal)
        N = self.state_dim = d_model if state_dim is None else state_dim
        if not 0 <= r_min < r_max < 1:
            raise ValueError(f"LRU: r_min={r_min}, r_max={r_max}; valid: 0 <= r_min < r_max < 1")
        radius_squared = r_min**2 + torch.rand(N) * (r_max**2 - r_min**2)
        rate = -radius_squared.log() / 2  # |λ| = exp(-rate)
        self.nu_log = nn.Parameter(rate.log())
        self.theta_log = nn.Parameter((max_phase * torch.rand(N)).clamp(min=1e-8).log())
        self.gamma_log = nn.Parameter(torch.expm1(-2 * rate).neg().log() / 2)
        self.in_proj = nn.Linear(d_model, 2 * N, bias=False)  # B
        self.out_proj = nn.Linear((1 if causal else 2) * 2 * N, d_model, bias=False)  # C
        self.skip = nn.Parameter(torch.randn(d_model))  # D
        self.gate = nn.Sequential(nn.GELU(), nn.Dropout(dropout), nn.Linear(d_model, 2 * d_model), nn.GLU())
        nn.init.normal_(self.in_proj.weight, std=1 / math.sqrt(2 * d_model))
        nn.init.normal_(self.out_proj.weight, std=1 / math.sqrt(N))

    def initial_state(self, batch_size, *, device=None, dtype=None) -> RecurrentState:
        self._require_causal("initial_state")
        wide = accumulation_dtype(dtype or torch.get_default_dtype())
        return RecurrentState(
            torch.zeros(batch_size, self.state_dim, 2, device=device, dtype=wide),
            torch.zeros(batch_size, dtype=torch.int64, device=device),
        )

    def mix(
        self, x: Tensor, state: RecurrentState | None, lengths: Tensor | None
    ) -> tuple[Tensor, RecurrentState | None]:
        y, state = self.over_time(lambda x: self._recur(x, state, lengths), x)
        return self.gate(y + self.skip * x), state

    def _recur(
        self, x: Tensor, state: RecurrentState | None, lengths: Tensor | None
    ) -> tuple[Tensor, RecurrentState | None]:
        """Re(C h): [B, T, d_model] -> [B, T, d_model]."""
        N, wide = self.state_dim, accumulation_dtype(x.dtype)
        # γ multiplies the rows of B: they are fewer than the steps.
        weight = self.in_proj.weight * self.gamma_log.exp().repeat_interleave(2)[:, None]
        u = torch.view_as_complex(F.linear(x, weight).to(wide).unflatten(-1, (N, 2)))  # [B, T, N]
        lam = torch.polar(self.nu_log.to(wide).exp().neg().exp(), self.theta_log.to(wide).exp())
        if not self.causal:
            h = diagonal_scan(u, lam, reverse="both", lengths=lengths)
        elif state is None:
            h = (diagonal_scan(u, lam, lengths=lengths),)
        else:
            before = torch.view_as_complex(state.hidden)
            outputs, last = diagonal_scan(u, lam, initial_state=before, output_final_state=True, lengths=lengths)
            h = (outputs,)
            state = RecurrentState(torch.view_as_real(last), advance(state.position, x, lengths))
        parts = zip(h, self.out_proj.weight.split(2 * N, 1), strict=True)
        return reduce(
            torch.add, (F.linear(torch.view_as_real(part).flatten(-2).to(x.dtype), weight) for part, weight in parts)
        ), state
