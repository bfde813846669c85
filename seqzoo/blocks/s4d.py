from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import diagonal_scan
from ..kernels.common import accumulation_dtype, valid_positions
from .base import Block, advance
from .lru import RecurrentState

CHUNK = 64


class S4D(Block):
    """Diagonal state space: per channel N/2 conjugate pairs of states, h' = A h + x, y = 2 Re(C h) + D x.

    Discretised with a zero-order hold of step Δ; A starts at -1/2 + iπn (S4D-Lin). Then GELU and a gated linear unit.
    Chunks of a sequence are small Toeplitz products, the states between chunks one `diagonal_scan`, so that the N
    states of every position never reach memory. Bidirectional: a second C reads the states of what follows a step.

    Args:
        d_model: width.
        causal: one direction only.
        state_dim: real states per channel, N, even.
        dt_min, dt_max: Δ starts log-uniformly between them.
        dropout: of the activations between GELU and gate.

    Source: Gu et al., "On the Parameterization and Initialization of Diagonal State Space Models" (2022).
    """

    recurrence = ("log_dt", "log_neg_real", "imag")

    def __init__(
        self,
        d_model: int,
        *,
        causal: bool = False,
        state_dim: int = 64,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(d_model, causal=causal)
        if state_dim < 2 or state_dim % 2:
            raise ValueError(f"S4D: state_dim={state_dim}; valid: an even number of 2 or more")
        if not 0 < dt_min < dt_max:
            raise ValueError(f"S4D: dt_min={dt_min}, dt_max={dt_max}; valid: 0 < dt_min < dt_max")
        P = self.pairs = state_dim // 2
        self.log_dt = nn.Parameter(
            math.log(dt_min) + torch.rand(d_model) * (math.log(dt_max) - math.log(dt_min))
        )  # [D]
        self.log_neg_real = nn.Parameter(torch.full((d_model, P), math.log(0.5)))
        self.imag = nn.Parameter(math.pi * torch.arange(P).repeat(d_model, 1))
        self.C = nn.Parameter(torch.randn(1 if causal else 2, d_model, P, 2) * math.sqrt(0.5))
        self.skip = nn.Parameter(torch.randn(d_model))  # D
        self.gate = nn.Sequential(nn.GELU(), nn.Dropout(dropout), nn.Linear(d_model, 2 * d_model), nn.GLU())

    def initial_state(self, batch_size, *, device=None, dtype=None) -> RecurrentState:
        self._require_causal("initial_state")
        wide = accumulation_dtype(dtype or torch.get_default_dtype())
        return RecurrentState(
            torch.zeros(batch_size, self.d_model, self.pairs, 2, device=device, dtype=wide),
            torch.zeros(batch_size, dtype=torch.int64, device=device),
        )

    def mix(
        self, x: Tensor, state: RecurrentState | None, lengths: Tensor | None
    ) -> tuple[Tensor, RecurrentState | None]:
        wide = accumulation_dtype(x.dtype)
        A = torch.complex(self.log_neg_real.to(wide).exp().neg(), self.imag.to(wide))  # [D, P]
        step = A * self.log_dt.to(wide).exp()[:, None]
        C = 2 * torch.view_as_complex(self.C.to(wide)) * torch.expm1(step) / A  # [directions, D, P]
        inputs = x.to(wide)
        before = None if state is None else torch.view_as_complex(state.hidden)
        y, after = convolve(inputs, step, C[0], before, lengths)
        if state is not None and after is not None:
            state = RecurrentState(torch.view_as_real(after), advance(state.position, x, lengths))
        if not self.causal:
            # Padding is zero and comes first in the flipped sequence, where it leaves the state at zero.
            later, _ = convolve(inputs.flip(1), step, C[1], None, None)
            y = y + F.pad(later.flip(1)[:, 1:], (0, 0, 0, 1))
        return self.gate(y.to(x.dtype) + self.skip * x), state


def convolve(
    x: Tensor, step: Tensor, C: Tensor, before: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """y_t = Re Σ_p C_p h_tp with h_t = exp(step) h_{t-1} + x_t, by chunks.

    Args:
        x: [B, T, D], real.
        step: [D, P], complex.
        C: [D, P], complex.
        before: h before the first step, [B, D, P]; None is zero, and then no state is returned.
        lengths: int64 [B], at which step the returned state is taken; None is T.

    Returns:
        y [B, T, D], and h after `lengths` steps [B, D, P].
    """
    (B, T, D), P, L = x.shape, step.shape[1], min(CHUNK, x.shape[1])
    x_c = F.pad(x, (0, 0, 0, -T % L)).unflatten(1, (-1, L)).permute(3, 0, 1, 2)  # [D, B, N, L]
    N = x_c.shape[2]
    powers = torch.exp(step[..., None] * torch.arange(L + 1, device=x.device))  # [D, P, L + 1], exp(step)^l

    kernel = torch.einsum("dp,dpl->dl", C, powers[..., :L]).real  # [D, L]
    lag = torch.arange(L, device=x.device)[:, None] - torch.arange(L, device=x.device)
    toeplitz = torch.where(lag >= 0, kernel[:, lag.clamp(min=0)], 0)  # [D, L, L]
    flat = x_c.reshape(D, B * N, L)

    # What each chunk leaves behind at its end, carried over the chunks: h at the start of chunks 0..N.
    decayed = torch.view_as_real(powers[..., :L].flip(-1)).permute(0, 2, 1, 3).flatten(2)  # [D, L, 2P]
    left = torch.view_as_complex((flat @ decayed).reshape(D, B, N, P, 2)).permute(1, 2, 0, 3).flatten(2)  # [B, N, DP]
    first = x.new_zeros(B, D * P, dtype=step.dtype) if before is None else before.flatten(1)
    ends = diagonal_scan(left, powers[..., L].flatten(), initial_state=first)
    starts = torch.cat([first[:, None], ends], 1).unflatten(-1, (D, P))  # [B, N + 1, D, P]

    reads = (
        torch.view_as_real((C[..., None] * powers[..., 1:]).conj_physical()).permute(0, 1, 3, 2).flatten(1, 2)
    )  # [D, 2P, L]
    carried = torch.view_as_real(starts[:, :N]).permute(2, 0, 1, 3, 4).reshape(D, B * N, 2 * P)
    y = flat @ toeplitz.transpose(1, 2) + carried @ reads
    y = _ContiguousGradient.apply(y).reshape(D, B, N * L).permute(1, 2, 0)[:, :T]
    if before is None:
        return y, None

    end = torch.full((B,), T, device=x.device) if lengths is None else lengths
    chunk, rest = end // L, end % L
    start = starts[torch.arange(B, device=x.device), chunk]
    part = x_c[:, torch.arange(B, device=x.device), chunk.clamp(max=N - 1)].transpose(0, 1)  # [B, D, L]
    since = (rest[:, None] - 1 - torch.arange(L, device=x.device)).clamp(min=0)  # [B, L]
    kept = torch.where(valid_positions(rest, L)[:, None], part, 0).to(step.dtype)
    after = start * torch.exp(step * rest[:, None, None]) + torch.einsum("bdl,dpbl->bdp", kept, powers[..., since])
    return y, after


class _ContiguousGradient(torch.autograd.Function):
    """The identity, whose gradient is laid out anew: batched products of a permuted one fall back to a loop."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.contiguous()
