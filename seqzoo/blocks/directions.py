from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.derivatives import by_hand
from ..kernels.documents import Documents, starts_of


class Directions:
    """What a causal operation has to be given to go both ways: sequences, and the same from their ends.

    With parameters and gates of a step the same in both directions, an output is what the causal one gives, plus what
    it gives from the sequence's end. Each sequence is turned within its own length, each document within itself.

    Args:
        x: [B, T, ...], of the sequences.
        lengths: int64 [B], how many steps of each count; None is T.
        documents: that lie in the one row of `x`, in place of `lengths`.
        both: whether to go both ways; if not, everything stays as it is.

    Attributes:
        lengths, documents: of what `doubled` gives.
    """

    def __init__(self, x: Tensor, lengths: Tensor | None, documents: Documents | None, *, both: bool) -> None:
        self.both, self.lengths, self.documents = both, lengths, documents
        self._turned: Tensor | None = None  # [T] or [B, T], the step that each changes places with; None: all turn
        if not both:
            return
        steps = torch.arange(x.shape[1], device=x.device)
        if documents is not None:
            starts, T = documents
            self._turned = starts[:-1][documents.of_steps()] + starts[1:][documents.of_steps()] - 1 - steps
            self.documents = Documents(torch.cat([starts, T + starts[1:]]), 2 * T)
        elif lengths is not None:
            self._turned = torch.where(steps < lengths[:, None], lengths[:, None] - 1 - steps, steps)
            self.lengths = torch.cat([lengths, lengths])

    def doubled(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [2B, T, ...], the second half from the end; of documents [1, T, ...] -> [1, 2T, ...]."""
        return torch.cat([x, self._turn(x)], self._dim) if self.both else x

    def summed(self, y: Tensor) -> Tensor:
        """Both directions of what was `doubled`, each step's in its own place: [2B, T, ...] -> [B, T, ...]."""
        if not self.both:
            return y
        forward, backward = y.unflatten(self._dim, (2, -1)).unbind(self._dim)
        return forward + self._turn(backward)

    def through(self, operation: Callable[..., Any], values: Tensor, memory: Tensor | None) -> Any:
        """`operation` of v = `values` [B, T, ...] in each direction, summed.

        Args:
            operation: causal; takes `v`, `initial_state`, `output_final_state`, `lengths` and `cu_seqlens`, and has
                been given all else as `doubled` gives it.
            values: [B, T, ...].
            memory: what is remembered ahead of the first step, if there is one direction; with it, what is remembered
                after the last one is returned too.
        """
        kept = memory is not None
        ends = {"lengths": self.lengths, "cu_seqlens": starts_of(self.documents)}
        y = operation(v=self.doubled(values), initial_state=memory, output_final_state=kept, **ends)
        return y if kept else self.summed(y)

    @property
    def _dim(self) -> int:
        return 0 if self.documents is None else 1

    def _turn(self, x: Tensor) -> Tensor:
        if self._turned is None:
            return x.flip(1)
        return _Turn.apply(x, self._turned) if by_hand() else _turn(x, self._turned)


def _turn(x: Tensor, turned: Tensor) -> Tensor:
    if turned.dim() == 1:
        return x.index_select(1, turned)
    return x.gather(1, turned.reshape(*turned.shape, *[1] * (x.dim() - 2)).expand_as(x))


class _Turn(torch.autograd.Function):
    """Steps that change places in pairs: the gradient's do too, and nothing has to be summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, turned: Tensor) -> Tensor:
        ctx.save_for_backward(turned)
        return _turn(x, turned)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return _Turn.apply(dy, *ctx.saved_tensors), None
