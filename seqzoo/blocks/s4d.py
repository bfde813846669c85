from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import diagonal_scan
from ..kernels.common import (
    accumulation_dtype,
    autocast_dtype,
    chunk_of,
    product_dtype,
    valid_positions,
    without_autocast,
)
from ..kernels.derivatives import transformed
from ..kernels.documents import Documents, Pieces, documents_from, starts_of
from ..kernels.nodes import as_node, as_one
from ..valid import BelowOne, Positive
from .base import Block, advance
from .forward_mode import GLU
from .lru import RecurrentState
from .parts import Part, carried
from .timescales import log_steps
from .wide import Wide, default_dtype

CHUNK = 64
INITS = ("lin", "ft", "dfout")


class S4D(Block):
    """Diagonal state space: per channel N/2 conjugate pairs of states, h' = A h + x, y = 2 Re(C h) + D x.

    Discretised with a zero-order hold of step Δ; A starts at -1/2 + iω. Then GELU and a gated linear unit. Chunks of a
    sequence are small Toeplitz products, the states between chunks one `diagonal_scan`, so that the N states of every
    position never reach memory. Bidirectional: a second C reads the states of what follows a step. Δ and A stay in
    single precision when the block is cast to half.

    Args:
        d_model: width.
        causal: one direction only.
        state_dim: real states per channel, N, even.
        dt_min, dt_max: Δ starts log-uniformly between them.
        init: where the frequencies ω of the pairs n = 0, 1, ... of channel d = 0, 1, ... start.

            - "lin": πn, S4D-Lin.
            - "ft": απn with α = `frequency_scale`, the scaling of S4D-FT. Its other half, a trained filter of each
              channel's spectrum, is no initialisation, and is not here.
            - "dfout": 2π (n + d / d_model) / (state_dim Δ), S4D-DFouT: one step turns the pairs of all channels by
              angles that divide the half circle evenly, whatever Δ is. Its damping ξ is Δ.
        frequency_scale: α of "ft". The authors take 3, but on Text and Path-X 5.
        dropout: of the activations between GELU and gate.

    Sources: Gu et al., "On the Parameterization and Initialization of Diagonal State Space Models" (2022); Yu et al.,
    "Tuning Frequency Bias of State Space Models" (2025), α as in AnnanYu/FreqBiasSSM at b21e52a; Solozabal et al.,
    "Uncovering the Spectral Bias in Diagonal State Space Models" (2025), section 4.2.
    """

    convolves = True
    recurrence = ("dynamics.log_dt", "dynamics.log_neg_real", "dynamics.imag")

    def __init__(
        self,
        d_model: int,
        *,
        causal: bool = False,
        state_dim: int = 64,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        init: Literal["lin", "ft", "dfout"] = "lin",
        frequency_scale: Positive = 3.0,
        dropout: BelowOne = 0.0,
    ) -> None:
        super().__init__(d_model, causal=causal)
        if state_dim < 2 or state_dim % 2:
            raise ValueError(f"S4D: state_dim={state_dim}; valid: an even number of 2 or more")
        if init not in INITS:
            raise ValueError(f"S4D: init={init!r}; valid: {', '.join(INITS)}")
        P = self.pairs = state_dim // 2
        self.dynamics = S4DDynamics(d_model, P, dt_min, dt_max, init, frequency_scale)
        self.C = nn.Parameter(torch.randn(1 if causal else 2, d_model, P, 2) * math.sqrt(0.5))
        self.skip = nn.Parameter(torch.randn(d_model))  # D
        self.gate = nn.Sequential(nn.GELU(), nn.Dropout(dropout), nn.Linear(d_model, 2 * d_model), GLU())

    def initial_state(self, batch_size, *, device=None, dtype=None) -> RecurrentState:
        device, dtype = self._state_options(device, dtype)
        wide = accumulation_dtype(dtype)
        return RecurrentState(
            torch.zeros(batch_size, self.d_model, self.pairs, 2, device=device, dtype=wide),
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
        wide = accumulation_dtype(x.dtype)
        A, step = self.dynamics(wide)  # [D, P]
        C = 2 * torch.view_as_complex(self.C.to(wide)) * torch.expm1(step) / A  # [directions, D, P]
        before = None if state is None else torch.view_as_complex(state.hidden)
        values = x.to(autocast_dtype(x))
        with without_autocast(x.device):
            form = _convolve_as_node if as_one() else partial(convolve, part=part)
            y, after = self.over_time(
                lambda x: form(x, step, C, before, lengths, documents), values.to(product_dtype(values))
            )
        if state is not None and after is not None:
            state = RecurrentState(torch.view_as_real(after), advance(state.position, x, lengths, documents))
        return self.gate(y.to(x.dtype) + self.skip * x), state

    def upgrade(self, weights: dict[str, Any], prefix: str) -> None:
        for name in ("log_dt", "log_neg_real", "imag"):
            if prefix + name in weights:
                weights[f"{prefix}dynamics.{name}"] = weights.pop(prefix + name)


class S4DDynamics(Wide):
    """A and its product with Δ, of P states in each of D channels."""

    def __init__(self, D: int, P: int, dt_min: float, dt_max: float, init: str, frequency_scale: float) -> None:
        super().__init__()
        dtype = default_dtype()
        self.log_dt = nn.Parameter(log_steps("S4D", D, dt_min, dt_max))  # [D]
        self.log_neg_real = nn.Parameter(torch.full((D, P), math.log(0.5), dtype=dtype))
        imag = math.pi * torch.arange(P, dtype=dtype).repeat(D, 1)
        if init == "ft":
            imag *= frequency_scale
        elif init == "dfout":
            turn = math.pi / P * (torch.arange(P, dtype=dtype) + torch.arange(D, dtype=dtype)[:, None] / D)
            imag = turn / self.log_dt.detach().exp()[:, None]
        self.imag = nn.Parameter(imag)

    def forward(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and A Δ, complex [D, P], for computing in `dtype`."""
        A = torch.complex(self.log_neg_real.to(dtype).exp().neg(), self.imag.to(dtype))
        return A, A * self.log_dt.to(dtype).exp()[:, None]


def convolve(
    x: Tensor,
    step: Tensor,
    C: Tensor,
    before: Tensor | None,
    lengths: Tensor | None,
    documents: Documents | None = None,
    part: Part | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y_t = Re Σ_p C_0p h_tp with h_t = exp(step) h_{t-1} + x_t, by chunks.

    With two rows of C, what follows a step is added: Re Σ_p C_1p g_{t+1,p} with g_t = exp(step) g_{t+1} + x_t.

    Args:
        x: [B, T, D], real.
        step: [D, P], complex.
        C: [1 or 2, D, P], complex.
        before: h before the first step, [B, D, P]; None is zero, and then no state is returned.
        lengths: int64 [B], at which step the returned state is taken; None is T.
        documents: in place of lengths, with B = 1; states have a row for each.
        part: x is of this part of the time, and zero past lengths; then there are no states.

    Returns:
        y [B, T, D], and h after `lengths` steps [B, D, P].
    """
    if x.shape[1] == 1 and before is not None and documents is None:
        return _one_step(x, step, C[0], before, lengths)
    (B, T, D), P, L, ways = x.shape, step.shape[1], chunk_of(x.shape[1], CHUNK), len(C)
    pieces = None if documents is None else documents.pieces(L)
    if pieces is None:
        N = -(-T // L)
        x_c = F.pad(x, (0, 0, 0, N * L - T))
    else:
        N = len(pieces.document)
        x_c = pieces.lay_out(x)
    x_c = _transpose(x_c.flatten(0, 1)).view(D, B * N, L)
    lag = torch.arange(L, device=x.device)
    size, angle = (step.real[..., None] * lag).exp(), step.imag[..., None] * lag
    re, im = size * angle.cos(), size * angle.sin()  # [D, P, L], of exp(step)^lag
    over_chunk = (L * step).exp().flatten()  # [DP]

    # What each chunk leaves behind, for what follows and for what comes before, is carried over the chunks.
    rising = torch.stack([re, im], 2).flatten(1, 2)  # [D, 2P, L]
    leaving = torch.cat([rising.flip(-1), rising][:ways], 1).to(x.dtype)
    left_in = (x_c @ leaving.mT).to(step.real.dtype)
    left_in = left_in.unflatten(1, (B, N)).unflatten(-1, (ways, -1, 2))  # [D, B, N, ways, P, 2]
    left, *back = left_in.permute(3, 1, 2, 0, 4, 5).flatten(3, 4)  # [B, N, DP, 2] each
    carry = _carry if pieces is None else partial(_carry_in_documents, pieces=pieces)
    if part is not None:
        rest = T - (N - 1) * L  # steps of the last chunk
        last = x_c.view(D, B, N, L)[:, :, -1, :rest] @ leaving[:, : 2 * P, L - rest :].mT  # [D, B, 2P]
        last = last.to(step.real.dtype).unflatten(-1, (-1, 2)).transpose(0, 1).flatten(1, 2).contiguous()  # [B, DP, 2]
        carry = partial(_carry_in_parts, last=torch.view_as_complex(last), step=step.flatten(), rest=rest, part=part)
    reached = carry(left, back, over_chunk, None if before is None else before.flatten(1, 2))

    C_re, C_im = torch.view_as_real(torch.stack([C[0] * step.exp(), *C[1:]]))[..., None, :].unbind(-1)
    read_re, read_im = C_re * re - C_im * im, -C_re * im - C_im * re  # [ways, D, P, L]
    taps = read_re.sum(2)  # [ways, D, L], of lags 1 to L
    read = torch.stack([read_re, read_im], 3).flatten(2, 3)  # [ways, D, 2P, L]
    now = C[0].real.sum(-1, keepdim=True)  # [D, 1], of lag 0
    earlier = taps[1, :, :-1].flip(-1) if ways == 2 else taps.new_zeros(D, L - 1)
    kernel = torch.cat([earlier, now, taps[0, :, :-1]], -1)  # [D, 2L - 1], of lags 1 - L to L - 1
    reading = torch.cat([read[0], *(later.flip(-1) for later in read[1:])], 1).to(x.dtype)  # [D, ways 2P, L]
    parts = [
        torch.view_as_real(h[:, :N]).to(x.dtype).unflatten(2, (D, -1)).permute(2, 0, 1, 3, 4).flatten(3).flatten(1, 2)
        for h in reached[:ways]
    ]  # [D, BN, 2P]
    y = torch.baddbmm(torch.cat(parts, -1) @ reading, x_c, kernel.unfold(-1, L, 1).flip(1).to(x.dtype))  # [D, BN, L]
    for following in reached[ways:]:  # of other parts, for the last chunk, which may be shorter than the rest
        later = torch.view_as_real(following).to(x.dtype).unflatten(1, (D, -1)).transpose(0, 1).flatten(2)  # [D, B, 2P]
        y.view(D, B, N, L)[:, :, -1, :rest] += later @ read[1, ..., :rest].flip(-1).to(x.dtype)
    y = _transpose(y.view(D, -1)).view(B, N * L, D)
    y = y[:, :T] if pieces is None else pieces.take_up(y)
    if before is None:
        return y, None

    if pieces is None:
        end = torch.full((B,), T, device=x.device) if lengths is None else lengths
        batch, chunk, steps = torch.arange(B, device=x.device), end // L, end % L
    else:
        last = pieces.before[1:] - 1  # of each document, or, if that has none, of another
        batch, chunk = torch.zeros_like(last), last.clamp(min=0)
        steps = pieces.steps[chunk]
    start = reached[0].unflatten(-1, (D, P))[batch, chunk]
    within = x_c.view(D, B, N, L)[:, batch, chunk.clamp(max=N - 1)].transpose(0, 1)  # [B, D, L]
    since = (steps[:, None] - 1 - torch.arange(L, device=x.device)).clamp(min=0)  # [B, L]
    kept = torch.where(valid_positions(steps, L)[:, None], within, 0).to(step.dtype)
    after = start * torch.exp(step * steps[:, None, None]) + torch.einsum(
        "bdl,dpbl->bdp", kept, torch.complex(re, im)[..., since]
    )
    if documents is not None:
        after = torch.where((documents.lengths > 0)[:, None, None], after, before)
    return y, after


def _one_step(x: Tensor, step: Tensor, C: Tensor, before: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """`convolve` of x [B, 1, D] and C [D, P]."""
    after = step.exp() * before + x[:, 0, :, None]
    y = (C * after).real.sum(-1).to(x.dtype)
    if lengths is not None:
        after = torch.where((lengths > 0)[:, None, None], after, before)
    return y[:, None], after


def _convolve_as_node(
    x: Tensor, step: Tensor, C: Tensor, before: Tensor | None, lengths: Tensor | None, documents: Documents | None
) -> tuple[Tensor, Tensor | None]:
    parts = (None if z is None else torch.view_as_real(z) for z in (step, C, before))
    y, after = _node(x, *parts, lengths, starts_of(documents))
    return y, None if before is None else torch.view_as_complex(after)


def _run(
    x: Tensor, step: Tensor, C: Tensor, before: Tensor | None, lengths: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    step, C = (torch.view_as_complex(z.contiguous()) for z in (step, C))
    past = None if before is None else torch.view_as_complex(before.contiguous())
    documents = documents_from(starts, x.shape[1])
    y, after = convolve(x, step, C, past, lengths, documents)
    return y.contiguous(), step.real.new_empty(0) if after is None else torch.view_as_real(after)


def _empty(x, step, C, before, lengths, starts):
    return x.new_empty(x.shape), step.new_empty(0) if before is None else before.new_empty(before.shape)


_node = as_node("s4d_convolve", _run, _empty, shared={"step": 3, "C": 4})


def _carry(left: Tensor, back: list[Tensor], over_chunk: Tensor, before: Tensor | None) -> list[Tensor]:
    """h where each chunk begins, and where the last ends; and g where each ends, if there is what goes back.

    Args:
        left: what each chunk leaves behind for those that follow: [B, N, DP, 2].
        back: the same for those before, or nothing.
        over_chunk: by what h is multiplied on its way over a chunk, complex [DP].
        before: h before the first, complex [B, DP]; None is zero.

    Returns:
        Complex [B, N + 1, DP], and [B, N, DP].
    """
    first = torch.zeros_like(left[:, :1]) if before is None else torch.view_as_real(before)[:, None]
    reached = [diagonal_scan(torch.view_as_complex(torch.cat([first, left], 1)), over_chunk)]
    for leaving in back:
        ends = torch.view_as_complex(F.pad(leaving[:, 1:], (0, 0, 0, 0, 0, 1)))
        reached.append(diagonal_scan(ends, over_chunk, reverse=True))
    return reached


def _carry_in_documents(
    left: Tensor, back: list[Tensor], over_chunk: Tensor, before: Tensor | None, pieces: Pieces
) -> list[Tensor]:
    """The same where chunks are pieces of documents: `before` [N, DP], returns [1, P, DP]."""
    # Those that are behind all documents are a last one.
    ends = F.pad(pieces.before, (0, 1), value=left.shape[1])
    if before is not None:
        before = F.pad(torch.view_as_real(before), (0, 0, 0, 0, 0, 1))
    begins = pieces.begin()[:, None, None]
    initial = None if before is None else torch.view_as_complex(before)
    h = diagonal_scan(torch.view_as_complex(left), over_chunk, initial_state=initial, cu_seqlens=ends)
    ahead = F.pad(torch.view_as_real(h)[:, :-1], (0, 0, 0, 0, 1, 0))
    first = torch.zeros_like(ahead) if before is None else before[pieces.document][None]
    reached = [torch.view_as_complex(torch.where(begins, first, ahead))]
    for leaving in back:
        following = F.pad(torch.where(begins, 0, leaving)[:, 1:], (0, 0, 0, 0, 0, 1))
        reached.append(diagonal_scan(torch.view_as_complex(following), over_chunk, reverse=True, cu_seqlens=ends))
    return reached


def _carry_in_parts(
    left: Tensor,
    back: list[Tensor],
    over_chunk: Tensor,
    before: None,
    *,
    last: Tensor,
    step: Tensor,
    rest: int,
    part: Part,
) -> list[Tensor]:
    """The same of a part of the time; and behind it g at the first step of the next part, complex [B, DP], which what
    there is for the last chunk leaves out.

    Args:
        last: what the last chunk leaves at the end of its own steps, complex [B, DP].
        step: complex [DP].
        rest: steps of the last chunk.
    """
    wide = step.to(torch.complex128)  # angles of many turns
    over_rest, over_all = ((wide * steps).exp().to(step.dtype) for steps in (rest, part.stop - part.start))
    state = last.shape, last.dtype

    def behind(h: Tensor) -> Tensor:
        first = torch.view_as_complex(F.pad(left[:, :-1], (0, 0, 0, 0, 1, 0)))  # there may be one chunk alone
        ahead_of_last = diagonal_scan(first, over_chunk, output_final_state=True)[1]
        return over_all * h + over_rest * ahead_of_last + last

    def ahead(g: Tensor, leaving: Tensor) -> Tensor:
        own = diagonal_scan(torch.view_as_complex(leaving), over_chunk, reverse=True, output_final_state=True)[1]
        return over_all * g + own

    reached = carried(part, left, *state, behind)
    following = [carried(part, left, *state, partial(ahead, leaving=leaving), back=True) for leaving in back]
    for n, g in enumerate(following):
        beyond = torch.view_as_real(over_rest * g)[:, None]
        back[n] = torch.cat([back[n][:, :-1], back[n][:, -1:] + beyond], 1)
    return _carry(left, back, over_chunk, reached) + following


def _transpose(x: Tensor) -> Tensor:
    return x.t().contiguous() if transformed() else _Transpose.apply(x)


class _Transpose(torch.autograd.Function):
    """[M, N] -> [N, M], value and gradient laid out anew: batched products of permuted tensors fall back to loops."""

    @staticmethod
    def forward(ctx, x):
        return x.t().contiguous()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.t().contiguous()
