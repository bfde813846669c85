"""What blocks of the delta rule share."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels.common import accumulation_dtype, steps_in_cache
from ..kernels.derivatives import by_hand, gradient
from ..kernels.documents import Documents
from .base import Block, advance
from .depthwise import short_convolution
from .directions import Directions
from .gated_norm import NormThenGate
from .over_parts import delta_rule
from .parts import Part
from .states import state_of

NORM_EPS = 1e-5


@state_of("inputs")
class DeltaState(NamedTuple):
    memory: Tensor  # [B, H, Dk, Dv]
    inputs: Tensor  # [B, conv_width - 1, 2 G Dk + H Dv], the convolution's last ones
    position: Tensor  # int64 [B]


class DeltaBlock(Block):
    """Projections, a short convolution, a memory under the delta rule, and a norm of what is read from it.

    A subclass says in `gates` what decays, and what multiplies the outputs.

    Args:
        d_model: width.
        causal: see no later step.
        num_heads: heads of values, H.
        num_key_heads: heads of queries and keys, G; divides H.
        key_dim, value_dim: of a head, Dk and Dv.
        gate_dim: how many numbers of a step `gates` takes.
        conv_width: positions of the convolution, its own included; one more where both sides are seen and it is even.
        negative_eigenvalues: β lies in [0, 2] rather than in [0, 1].
    """

    gate: ClassVar[str | None] = None
    """The function of the outputs' gate, by its name in `NormThenGate`, if they have one."""

    def __init__(
        self,
        d_model: int,
        *,
        causal: bool,
        num_heads: int,
        num_key_heads: int,
        key_dim: int,
        value_dim: int,
        gate_dim: int,
        conv_width: int,
        negative_eigenvalues: bool,
    ) -> None:
        super().__init__(d_model, causal=causal)
        keys, values = num_key_heads * key_dim, num_heads * value_dim
        self.num_heads, self.key_dim, self.value_dim = num_heads, key_dim, value_dim
        self.negative_eigenvalues = negative_eigenvalues
        self.qkv_widths = keys, keys, values
        self.widths = sum(self.qkv_widths), num_heads, gate_dim
        self.in_proj = nn.Linear(d_model, sum(self.widths), bias=False)  # q, k and v, β, and what `gates` takes
        self.conv = short_convolution(sum(self.qkv_widths), conv_width, causal=causal, bias=False, silu=True)
        if self.gate is None:
            self.norm: nn.Module = nn.RMSNorm(value_dim, eps=NORM_EPS)
        else:
            self.norm = NormThenGate(value_dim, self.gate, eps=NORM_EPS)
        self.out_proj = nn.Linear(values, d_model, bias=False)

    def gates(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The logarithm of the decay, [B, T, H] or [B, T, H, Dk], and what `gate` makes to a multiplier of the outputs,
        [B, T, H Dv], of projections `x` [B, T, gate_dim]; None is no decay, and no gate."""
        return None, None

    def initial_state(self, batch_size, *, device=None, dtype=None) -> DeltaState:
        device, dtype = self._state_options(device, dtype)
        shape = batch_size, self.num_heads, self.key_dim, self.value_dim
        return DeltaState(
            torch.zeros(shape, device=device, dtype=accumulation_dtype(dtype)),
            torch.zeros(batch_size, self.conv.width - 1, sum(self.qkv_widths), device=device, dtype=dtype),
            torch.zeros(batch_size, dtype=torch.int64, device=device),
        )

    def mix(
        self,
        x: Tensor,
        state: DeltaState | None,
        lengths: Tensor | None,
        documents: Documents | None = None,
        part: Part | None = None,
    ) -> tuple[Tensor, DeltaState | None]:
        qkv, beta, gates = self.in_proj(x).split(self.widths, -1)
        qkv, inputs = self.conv(qkv, None if state is None else state.inputs, lengths, documents, part)
        q, k, v = qkv.split(self.qkv_widths, -1)
        q, k = (unit(y.unflatten(-1, (-1, self.key_dim))) for y in (q, k))
        beta = beta.to(accumulation_dtype(beta.dtype)).sigmoid() * (2 if self.negative_eigenvalues else 1)
        log_decay, gate = self.gates(gates)
        ways = Directions(x, lengths, documents, both=not self.causal)
        q, k, beta = (ways.doubled(y) for y in (q * self.key_dim**-0.5, k, beta))
        log_decay = None if log_decay is None else ways.doubled(log_decay)

        before = None if state is None else state.memory
        remember = partial(delta_rule, part, q, k, beta=beta, log_decay=log_decay, turned=ways.both)
        v = v.unflatten(-1, (self.num_heads, -1))
        o = self.over_time(lambda v: ways.through(remember, v, before), v)
        if state is not None:
            o, memory = o
            state = DeltaState(memory, inputs, advance(state.position, x, lengths, documents))
        o = self.norm(o).flatten(2) if gate is None else self.norm(o, gate)
        return self.out_proj(o), state


def unit(x: Tensor, *, eps: float = 1e-6) -> Tensor:
    """x / √(|x|² + eps) over the last dimension, whose gradient has a bound where x is 0."""
    return _Unit.apply(x, eps) if by_hand() and x.dim() == 4 else _unit(x, eps)[0]


def _unit(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.to(accumulation_dtype(x.dtype))
    inverse = (wide.square().sum(-1, keepdim=True) + eps).rsqrt()
    return (wide * inverse).to(x.dtype), inverse


class _Unit(torch.autograd.Function):
    """Keeps its input and lengths, and goes through it while steps are cached."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        inverse = x.new_empty(*x.shape[:-1], 1, dtype=accumulation_dtype(x.dtype))
        for t in steps_in_cache(x):
            y[:, t], inverse[:, t] = _unit(x[:, t], eps)
        ctx.save_for_backward(x, inverse)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, inverse = ctx.saved_tensors

        def written() -> tuple[Tensor]:
            dx = torch.empty_like(x, memory_format=torch.contiguous_format)
            for t in steps_in_cache(x):
                y, d = x[:, t] * inverse[:, t], dy[:, t].to(inverse.dtype)
                dx[:, t] = d.addcmul(y, (y * d).sum(-1, keepdim=True), value=-1).mul_(inverse[:, t])
            return (dx,)

        return *gradient(written, lambda x: _unit(x, ctx.eps)[:1], (x,), (dy,)), None
