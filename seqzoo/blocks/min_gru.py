from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import diagonal_scan
from ..kernels.common import accumulation_dtype
from ..kernels.documents import Documents, starts_of
from ..valid import Factor, Range
from .base import Block, advance
from .states import state_of

CELLS = ("gru", "lstm")
Bias = Annotated[float, Range(-64, 64)]


@state_of()
class MinGRUState(NamedTuple):
    hidden: Tensor  # [B, E]
    position: Tensor  # int64 [B]


class MinGRU(Block):
    """Minimal gated recurrent unit: h_t = (1 - z_t)∘h_{t-1} + z_t∘g(W_h x_t), z_t = σ(W_z x_t), gates without h.

    With cell="lstm", the minimal LSTM, z = i / (f + i) of two gates f and i, which are σ of x_t's projections. g(x) is
    x + ½ above 0 and σ(x) below, so that h stays positive. Bidirectional: the same recurrence also runs from the end,
    both include the present step and are added.

    Args:
        d_model: width.
        causal: one direction only.
        cell: "gru" or "lstm".
        expand: width of h, E, times `d_model`. Where the two differ, a projection leads back.
        gate_bias: a trained bias of the gates, such that z starts at σ of this number where x is 0. None is none, as
            published: z starts at ½ and h is half forgotten in a step; at -4 that takes 38 steps.

    Source: Feng et al., "Were RNNs All We Needed?" (2024), arXiv 2410.01201, section 3 and appendix B; the scan is the
    plain one, and no logarithm is taken.
    """

    def __init__(
        self,
        d_model: int,
        *,
        causal: bool = False,
        cell: Literal["gru", "lstm"] = "gru",
        expand: Factor = 1.0,
        gate_bias: Bias | None = None,
    ) -> None:
        super().__init__(d_model, causal=causal)
        if cell not in CELLS:
            raise ValueError(f"MinGRU: cell={cell!r}; valid: {', '.join(CELLS)}")
        E = self.width = int(expand * d_model)
        if E < 1:
            raise ValueError(f"MinGRU: expand={expand} (width {E}); valid: expand · d_model of 1 or more")
        self.gates = 1 if cell == "gru" else 2  # z, or i and f
        self.in_proj = nn.Linear(d_model, E, bias=False)
        self.gate_proj = nn.Linear(d_model, self.gates * E, bias=gate_bias is not None)
        self.out_proj = None if d_model == E else nn.Linear(E, d_model, bias=False)
        if gate_bias is not None:
            with torch.no_grad():  # σ(-b) + σ(b) = 1
                for bias, start in zip(self.gate_proj.bias.chunk(self.gates), (gate_bias, -gate_bias), strict=False):
                    bias.fill_(start)

    def initial_state(self, batch_size, *, device=None, dtype=None) -> MinGRUState:
        device, dtype = self._state_options(device, dtype)
        return MinGRUState(
            torch.zeros(batch_size, self.width, device=device, dtype=accumulation_dtype(dtype)),
            torch.zeros(batch_size, dtype=torch.int64, device=device),
        )

    def mix(
        self, x: Tensor, state: MinGRUState | None, lengths: Tensor | None, documents: Documents | None = None
    ) -> tuple[Tensor, MinGRUState | None]:
        wide = accumulation_dtype(x.dtype)
        gates = self.gate_proj(x).to(wide).chunk(self.gates, -1)
        if self.gates == 2:
            i, f = (F.logsigmoid(gate) for gate in gates)
            gates = (i - f,)
        z = gates[0].sigmoid()
        values = _positive(self.in_proj(x).to(wide))
        y = self.over_time(lambda v: self._recur(v, z, state, lengths, documents), values[..., None])
        if state is not None:
            y, hidden = y
            state = MinGRUState(hidden, advance(state.position, x, lengths, documents))
        y = y.squeeze(-1).to(x.dtype)
        return (y if self.out_proj is None else self.out_proj(y)), state

    def _recur(
        self, v: Tensor, z: Tensor, state: MinGRUState | None, lengths: Tensor | None, documents: Documents | None
    ) -> Any:
        """h of v [B, T, E, any], each channel with its z [B, T, E]; with a state, (h, the last one)."""
        x = (z[..., None] * v).flatten(2)
        a = (1 - z)[..., None].expand_as(v).flatten(2)
        ends: dict[str, Any] = {"lengths": lengths, "cu_seqlens": starts_of(documents)}
        if state is not None:
            h, last = diagonal_scan(x, a, initial_state=state.hidden, output_final_state=True, **ends)
            return h.view_as(v), last
        if self.causal:
            return diagonal_scan(x, a, **ends).view_as(v)
        forth, back = diagonal_scan(x, a, reverse="both", **ends)
        return (forth + back).view_as(v)


def _positive(x: Tensor) -> Tensor:
    return torch.where(x >= 0, x + 0.5, x.sigmoid())
