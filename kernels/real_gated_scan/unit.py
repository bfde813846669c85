"""RG-LRU's scan together with the layers of its gates, on a CPU: of these it keeps nothing.

What the way back needs are the inputs and the states. Both gates are made from the inputs again, as products with small
matrices, and decays and roots from the gates by the compiled loop, as on the way there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common import accumulation_dtype, autocast_dtype, without_autocast
from ..derivatives import gradient
from ..documents import Documents, starts_of
from .plain import real_gated_scan_plain


class Gate(NamedTuple):
    """A layer in H blocks of the channels, each of which sees itself alone."""

    weight: Tensor  # [H, D / H, D / H], from and to
    bias: Tensor  # [D]

    def of(self, u: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, T, D], multiplied in `dtype`, in single precision at least."""
        out = u.new_empty(u.shape, dtype=dtype)
        torch.bmm(_blocks(u.to(dtype), self), self.weight.to(dtype), out=_blocks(out, self))
        return out.to(accumulation_dtype(dtype)).add_(self.bias)

    def plainly(self, u: Tensor, dtype: torch.dtype) -> Tensor:
        """The same, for PyTorch to differentiate."""
        y = torch.einsum("...hi,hio->...ho", u.to(dtype).unflatten(-1, self.weight.shape[:2]), self.weight.to(dtype))
        return y.flatten(-2).to(accumulation_dtype(dtype)) + self.bias


def _blocks(x: Tensor, gate: Gate) -> Tensor:
    """[B, T, D] -> [H, B T, D / H]."""
    return x.reshape(-1, *gate.weight.shape[:2]).transpose(0, 1)


def real_gated_unit_in_loop(
    u: Tensor,  # [B, T, D]
    recurrence_gate: Gate,
    input_gate: Gate,
    rate: Tensor,  # [D]
    initial_state: Tensor | None,  # [R, D], of R sequences
    begins: Tensor | None,  # [R]
    reverse: bool,
    lengths: Tensor | None,  # [B]
    documents: Documents | None,
) -> tuple[Tensor, Tensor]:
    """h [B, T, D] and the final state [R, D], at least float32."""
    inputs = u, *recurrence_gate, *input_gate, rate, initial_state
    return _Unit.apply(*inputs, begins, reverse, lengths, documents, autocast_dtype(u))


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        from . import loop  # imports Numba

        inputs, (begins, *ends, ctx.dtype) = arguments[:7], arguments[7:]
        ctx.reverse, lengths, ctx.documents = ends
        u, gates, others = _given(*inputs)
        with without_autocast(u.device):
            made: Any = [gate.of(u, ctx.dtype) for gate in gates]
            its = *others, begins, ctx.reverse, lengths, starts_of(ctx.documents)
            h, state = loop.scan(u.to(accumulation_dtype(u.dtype)), *made, *its)
        ctx.save_for_backward(*inputs, begins, lengths, h)
        return h, state

    @staticmethod
    def backward(ctx: Any, dh: Tensor, d_state: Tensor) -> Sequence[Tensor | None]:
        from . import loop

        *inputs, begins, lengths, h = ctx.saved_tensors
        ends = begins, ctx.reverse, lengths

        def form(*inputs: Any) -> tuple[Tensor, Tensor]:
            u, gates, others = _given(*inputs)
            with without_autocast(u.device):
                made: Any = [gate.plainly(u, ctx.dtype) for gate in gates]
                its: Any = (*made, *others, *ends, ctx.documents)
                return real_gated_scan_plain(u.to(h.dtype), *its)

        def written() -> tuple[Tensor | None, ...]:
            u, gates, (rate, initial_state) = _given(*inputs)
            with without_autocast(u.device):
                made = [gate.of(u, ctx.dtype) for gate in gates]
                its = u.to(h.dtype), *made, rate, initial_state, *ends, starts_of(ctx.documents)
                du, d_rate, d_initial = loop.scan_backward(dh, d_state, h, *its)  # and `made` are their gradients
                of_gates = []
                for gate, d in zip(gates, made, strict=True):
                    d_of_blocks = _blocks(d.to(ctx.dtype), gate)
                    of_gates += [_blocks(u.to(ctx.dtype), gate).mT @ d_of_blocks, d.sum((0, 1))]
                    weight = gate.weight.mT.to(ctx.dtype)
                    if ctx.dtype == du.dtype:
                        _blocks(du, gate).baddbmm_(d_of_blocks, weight)
                    else:
                        _blocks(du, gate).add_(d_of_blocks @ weight)
            gradients = du, *of_gates, d_rate, d_initial
            return tuple(None if x is None else g.to(x.dtype) for g, x in zip(gradients, inputs, strict=True))

        return *gradient(written, form, inputs, (dh, d_state)), *(None,) * 5


def _given(
    u: Tensor, weight: Tensor, bias: Tensor, input_weight: Tensor, input_bias: Tensor, *others: Any
) -> tuple[Tensor, tuple[Gate, Gate], tuple[Any, ...]]:
    return u, (Gate(weight, bias), Gate(input_weight, input_bias)), others
