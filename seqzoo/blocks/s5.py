from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from ..valid import BelowOne, Count
from .lru import ComplexRecurrence
from .timescales import log_steps
from .wide import Wide, default_dtype

DISCRETIZATIONS = ("zoh", "bilinear")


class S5(ComplexRecurrence):
    """Simplified state space layer: h' = Λ h + B x, y = Re(C h) + D∘x, sampled with a step Δ of each state's own.

    All channels drive and read one diagonal system. Λ starts at the eigenvalues of `num_blocks` HiPPO-N matrices, B in
    their eigenbasis; of each conjugate pair one state is kept and counts twice. Then GELU and a gated linear unit.
    Bidirectional: the same recurrence also runs from the end, both include the present step, and each is read by a C of
    its own. Λ = -exp(·) + iω is damped whatever is learnt, where the authors cut Re Λ at -10⁻⁴. Λ and Δ stay in single
    precision when the block is cast to half.

    Args:
        d_model: width.
        causal: one direction only.
        state_dim: real states, P, as many as those in conjugate pairs; None is `d_model`.
        num_blocks: matrices of which Λ starts as the eigenvalues, J; P / J is even.
        dt_min, dt_max: Δ starts log-uniformly between them.
        discretization: "zoh", λ = e^ΛΔ and B (λ - 1) / Λ, or "bilinear", λ = (1 + ΛΔ/2) / (1 - ΛΔ/2) and
            B Δ / (1 - ΛΔ/2).
        dropout: of the activations between GELU and gate.

    Source: Smith et al., "Simplified State Space Layers for Sequence Modeling" (2023), arXiv 2208.04933, section 3 and
    appendix B.
    """

    recurrence = ("dynamics.log_neg_real", "dynamics.imag", "dynamics.log_dt", "in_proj.weight")

    def __init__(
        self,
        d_model: int,
        *,
        causal: bool = False,
        state_dim: Count | None = None,
        num_blocks: Count = 4,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        discretization: Literal["zoh", "bilinear"] = "zoh",
        dropout: BelowOne = 0.0,
    ) -> None:
        P = d_model if state_dim is None else state_dim
        if P % (2 * num_blocks):
            raise ValueError(
                f"S5: state_dim={P} is not num_blocks={num_blocks} times an even number; valid: multiples of "
                f"{2 * num_blocks}"
            )
        if discretization not in DISCRETIZATIONS:
            raise ValueError(f"S5: discretization={discretization!r}; valid: {', '.join(DISCRETIZATIONS)}")
        imag, basis = hippo_n(P // num_blocks)
        dynamics = S5Dynamics(imag.repeat(num_blocks), log_steps("S5", P // 2, dt_min, dt_max), discretization)
        super().__init__(d_model, causal=causal, states=P // 2, dynamics=dynamics, dropout=dropout)
        B = torch.randn(num_blocks, P // num_blocks, d_model, dtype=basis.real.dtype) / math.sqrt(d_model)
        B = torch.view_as_real(basis.mH @ B.to(basis.dtype))  # [J, R / 2, d_model, 2]
        with torch.no_grad():
            self.in_proj.weight.copy_(B.permute(0, 1, 3, 2).flatten(0, 2))
        self._draw_readers(math.sqrt(0.5))


def hippo_n(R: int) -> tuple[Tensor, Tensor]:
    """The half of the spectrum of HiPPO-N, [R, R], that lies above the real axis.

    The matrix is -½ on its diagonal, -√(n + ½)√(k + ½) below and as much with the other sign above: -½ and a
    skew-symmetric one. Imaginary parts [R / 2], and eigenvectors of length 1, complex [R, R / 2].
    """
    root = (torch.arange(R, dtype=torch.float64) + 0.5).sqrt()
    skew = (root[:, None] * root).triu(1)
    imag, vectors = torch.linalg.eigh(-1j * (skew - skew.mT))
    imag, vectors = imag[R // 2 :], vectors[:, R // 2 :]
    return imag, vectors * vectors[:1].sgn().conj()  # of which any multiple by a phase is one: the first entry is real


class S5Dynamics(Wide):
    """λ of N states and what their inputs are multiplied by."""

    def __init__(self, imag: Tensor, log_dt: Tensor, discretization: str) -> None:
        super().__init__()
        dtype = default_dtype()
        self.discretization = discretization
        self.log_neg_real = nn.Parameter(torch.full(imag.shape, math.log(0.5), dtype=dtype))
        self.imag = nn.Parameter(imag.to(dtype))
        self.log_dt = nn.Parameter(log_dt)

    def forward(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """λ, and twice the factor of B, as a state stands for its conjugate too: complex [N], for `dtype`."""
        Lambda = torch.complex(self.log_neg_real.to(dtype).exp().neg(), self.imag.to(dtype))
        dt = self.log_dt.to(dtype).exp()
        step = Lambda * dt
        if self.discretization == "zoh":
            return step.exp(), 2 * torch.expm1(step) / Lambda
        return (1 + step / 2) / (1 - step / 2), 2 * dt / (1 - step / 2)
