from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels.common import accumulation_dtype
from ..kernels.documents import Documents, starts_of
from ..valid import BelowOne, Count
from .base import Block, advance
from .forward_mode import GLU
from .over_parts import diagonal_scan
from .parts import Part
from .states import state_of
from .wide import Wide, default_dtype


@state_of()
class RecurrentState(NamedTuple):
    hidden: Tensor  # [B, ..., 2], real and imaginary parts
    position: Tensor  # int64 [B]


class ComplexRecurrence(Block):
    """y_t = Re(C h_t) + D∘x_t with h_t = λ∘h_{t-1} + γ∘(B x_t), then GELU and a gated linear unit.

    Parameters are real, complex numbers exist inside the scan only. Bidirectional: the same recurrence also runs from
    the end, both include the present step, and each is read by a C of its own.

    Args:
        d_model: width.
        causal: one direction only.
        states: complex states, N.
        dynamics: gives λ, complex [N], and γ [N], for computing in a dtype.
        dropout: of the activations between GELU and gate.
    """

    convolves = True

    def __init__(self, d_model: int, *, causal: bool, states: int, dynamics: Wide, dropout: float) -> None:
        super().__init__(d_model, causal=causal)
        self.states = states
        self.dynamics = dynamics
        self.in_proj = nn.Linear(d_model, 2 * states, bias=False)  # B
        self.out_proj = nn.Linear(2 * states, d_model, bias=False)  # C
        self.out_proj_reverse = None if causal else nn.Linear(2 * states, d_model, bias=False)
        self.skip = nn.Parameter(torch.randn(d_model))  # D
        self.gate = nn.Sequential(nn.GELU(), nn.Dropout(dropout), nn.Linear(d_model, 2 * d_model), GLU())

    def _draw_readers(self, std: float) -> None:
        readers = [layer.weight for layer in (self.out_proj, self.out_proj_reverse) if layer is not None]
        C = nn.init.normal_(torch.empty_like(torch.cat(readers, 1)), std=std)
        with torch.no_grad():
            for weight, part in zip(readers, C.chunk(len(readers), 1), strict=True):
                weight.copy_(part)

    def initial_state(self, batch_size, *, device=None, dtype=None) -> RecurrentState:
        device, dtype = self._state_options(device, dtype)
        wide = accumulation_dtype(dtype)
        return RecurrentState(
            torch.zeros(batch_size, self.states, 2, device=device, dtype=wide),
            torch.zeros(batch_size, dtype=torch.int64, device=device),
        )

    def mix(
        self,
        x: Tensor,
        state: RecurrentState | None,
        lengths: Tensor | None,
        documents: Documents | None = None,
        part: Part | None = None,
    ) -> tuple[Tensor, RecurrentState | None]:
        y, state = self.over_time(lambda x: self._recur(x, state, lengths, documents, part), x)
        return self.gate(y + self.skip * x), state

    def _recur(
        self,
        x: Tensor,
        state: RecurrentState | None,
        lengths: Tensor | None,
        documents: Documents | None,
        part: Part | None,
    ) -> tuple[Tensor, RecurrentState | None]:
        """Re(C h): [B, T, d_model] -> [B, T, d_model]."""
        wide = accumulation_dtype(x.dtype)
        lam, gamma = self.dynamics(wide)
        u = torch.view_as_complex(self.in_proj(x).to(wide).unflatten(-1, (self.states, 2)))  # [B, T, N]
        if gamma.is_complex():
            u, gamma = gamma * u, None
        scan = partial(
            diagonal_scan,
            part,
            u,
            lam,
            factor=gamma,
            lengths=lengths,
            cu_seqlens=starts_of(documents),
        )
        if self.out_proj_reverse is not None:
            h, g = scan(reverse="both")
            return self.out_proj(_parts(h, x.dtype)) + self.out_proj_reverse(_parts(g, x.dtype)), None
        if state is None:
            h = scan()
        else:
            h, last = scan(reverse=False, initial_state=torch.view_as_complex(state.hidden), output_final_state=True)
            state = RecurrentState(torch.view_as_real(last), advance(state.position, x, lengths, documents))
        return self.out_proj(_parts(h, x.dtype)), state


class LRU(ComplexRecurrence):
    """Linear recurrent unit: h_t = λ∘h_{t-1} + γ∘(B x_t), y_t = Re(C h_t) + D∘x_t, then GELU and a gated linear unit.

    λ = exp(-exp(ν) + i exp(θ)) lies inside the unit circle whatever ν is; γ starts at √(1 - |λ|²), which keeps h as
    large as its input. Parameters are real, complex numbers exist inside the scan only. Bidirectional: the same
    recurrence also runs from the end, both include the present step, and each is read by a C of its own. λ and γ stay
    in single precision when the block is cast to half.

    Args:
        d_model: width.
        causal: one direction only.
        state_dim: complex states, N; None is `d_model`.
        r_min, r_max: λ starts uniformly on the ring between these radii, 0 <= r_min < r_max < 1.
        max_phase: angles of λ start uniformly in [0, max_phase], radians.
        dropout: of the activations between GELU and gate.

    Source: Orvieto et al., "Resurrecting Recurrent Neural Networks for Long Sequences" (2023), section 3, appendix A.
    """

    recurrence = ("dynamics.nu_log", "dynamics.theta_log", "dynamics.gamma_log", "in_proj.weight")

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
        N = d_model if state_dim is None else state_dim
        if not 0 <= r_min < r_max < 1:
            raise ValueError(f"LRU: r_min={r_min}, r_max={r_max}; valid: 0 <= r_min < r_max < 1")
        dynamics = LRUDynamics(N, r_min, r_max, max_phase)
        super().__init__(d_model, causal=causal, states=N, dynamics=dynamics, dropout=dropout)
        nn.init.normal_(self.in_proj.weight, std=1 / math.sqrt(2 * d_model))
        self._draw_readers(1 / math.sqrt(N))

    def upgrade(self, weights: dict[str, Any], prefix: str) -> None:
        for name in ("nu_log", "theta_log", "gamma_log"):
            if prefix + name in weights:
                weights[f"{prefix}dynamics.{name}"] = weights.pop(prefix + name)
        old, new = f"{prefix}out_proj.", f"{prefix}out_proj_reverse."
        if self.causal or any(name.startswith(new) for name in weights):
            return
        for name in [name for name in weights if name.startswith(old)]:  # of one layer that read both directions
            weight = weights[name]
            both = weight.chunk(2, 1) if weight.shape[1] == 4 * self.states else (weight, weight)
            weights[name], weights[new + name.removeprefix(old)] = both


def _parts(h: Tensor, dtype: torch.dtype) -> Tensor:
    """Real and imaginary parts beside each other: complex [B, T, N] -> [B, T, 2N]."""
    return torch.view_as_real(h).flatten(-2).to(dtype)


class LRUDynamics(Wide):
    """λ and γ of N states."""

    def __init__(self, N: int, r_min: float, r_max: float, max_phase: float) -> None:
        super().__init__()
        dtype = default_dtype()
        radius_squared = r_min**2 + torch.rand(N, dtype=dtype) * (r_max**2 - r_min**2)
        rate = -radius_squared.log() / 2  # |λ| = exp(-rate)
        self.nu_log = nn.Parameter(rate.log())
        self.theta_log = nn.Parameter((max_phase * torch.rand(N, dtype=dtype)).clamp(min=1e-8).log())
        self.gamma_log = nn.Parameter(torch.expm1(-2 * rate).neg().log() / 2)

    def forward(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """λ, complex [N], and γ [N], for computing in `dtype`."""
        lam = torch.polar(self.nu_log.to(dtype).exp().neg().exp(), self.theta_log.to(dtype).exp())
        return lam, self.gamma_log.to(dtype).exp()
