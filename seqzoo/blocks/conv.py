from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..kernels.documents import Documents
from ..valid import BelowOne, Count
from .base import Block, advance
from .depthwise import Depthwise
from .forward_mode import GLU
from .parts import Part
from .states import state_of


@state_of("inputs")
class ConvState(NamedTuple):
    inputs: Tensor  # [B, width - 1, D], the last ones
    position: Tensor  # int64 [B]


class Conv(Block):
    """Gated convolution: each channel with a kernel of `width` positions, then GELU and a gated linear unit.

    What S4D and the LRU do with kernels over the whole sequence, with short ones of which every number is learnt:
    beside them it shows what a task asks of neighbours alone.

    Args:
        d_model: width of the model.
        causal: see no later position; otherwise kernels reach equally far to both sides.
        width: positions of a kernel, its own included; odd unless `causal`.
        dropout: of the activations between GELU and gate.

    Source: widths 5 and 61 are those that arXiv 2501.14850 holds against long-range models, as others quote it.
    """

    convolves = True

    def __init__(self, d_model: int, *, causal: bool = False, width: Count = 5, dropout: BelowOne = 0.0) -> None:
        super().__init__(d_model, causal=causal)
        self.conv = Depthwise(d_model, width, causal=causal)
        self.reach = self.conv.past
        self.gate = nn.Sequential(nn.GELU(), nn.Dropout(dropout), nn.Linear(d_model, 2 * d_model), GLU())

    def initial_state(self, batch_size, *, device=None, dtype=None) -> ConvState:
        device, dtype = self._state_options(device, dtype)
        return ConvState(
            torch.zeros(batch_size, self.conv.width - 1, self.d_model, device=device, dtype=dtype),
            torch.zeros(batch_size, dtype=torch.int64, device=device),
        )

    def mix(
        self,
        x: Tensor,
        state: ConvState | None,
        lengths: Tensor | None,
        documents: Documents | None = None,
        part: Part | None = None,
    ) -> tuple[Tensor, ConvState | None]:
        before = None if state is None else state.inputs
        y, after = self.over_time(lambda x: self.conv(x, before, lengths, documents, part), x)
        if state is not None:
            state = ConvState(after, advance(state.position, x, lengths, documents))
        return self.gate(y), state
