from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import linear_attention
from ..kernels.documents import Documents
from ..valid import Bias, Count, Positive
from .base import Block, advance
from .directions import Directions
from .gated_norm import NormThenGate
from .gates import GateBias
from .states import MemoryState
from .wide import default_dtype

NORM_EPS = 1e-5


class GLA(Block):
    """Gated linear attention: S_t = diag(α_t) S_{t-1} + k_t v_tᵀ, read by q_t / √Dk, a decay for each channel of k.

    α_t = σ(W₂ W₁ x_t + b)^(1/τ), of low rank. Queries and keys are half as wide as the model, values as wide. What
    comes out is W (silu(r) ∘ RMSNorm(o)), the norm per head and r a projection of x.

    Bidirectional: the same memory also runs from the end, and the two outputs are added ahead of the norm; both include
    the present step.

    The paper norms by mean and variance, and has a bias in r's projection; its authors' code, as here, has neither.

    Args:
        d_model: width.
        causal: see no later step.
        num_heads: heads, H; half the width is a multiple of it.
        gate_rank: between W₁ and W₂.
        gate_temperature: τ; the larger, the longer memories last.
        gate_bias: what b starts at. 0 with τ = 16 halves a memory in 16 steps, 4 in 611.

    Source: Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training" (2023, arXiv
    2312.06635), equations 3 and 4 and section 4.4.
    """

    def __init__(
        self,
        d_model: int,
        *,
        causal: bool = False,
        num_heads: Count = 4,
        gate_rank: Count = 16,
        gate_temperature: Positive = 16.0,
        gate_bias: Bias = 0.0,
    ) -> None:
        super().__init__(d_model, causal=causal)
        if d_model % (2 * num_heads):
            raise ValueError(f"GLA: num_heads={num_heads} of d_model={d_model}; valid: divisors of half the width")
        self.num_heads = num_heads
        self.key_dim = d_model // (2 * num_heads)
        self.gate_temperature = gate_temperature
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=False)  # q, k, v and r
        self.gate_proj = nn.Sequential(
            nn.Linear(d_model, gate_rank, bias=False), nn.Linear(gate_rank, d_model // 2, bias=False)
        )
        self.gate_bias = GateBias(torch.full((d_model // 2,), gate_bias, dtype=default_dtype()))
        self.norm = NormThenGate(2 * self.key_dim, "silu", eps=NORM_EPS)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def initial_state(self, batch_size, *, device=None, dtype=None) -> MemoryState:
        device, dtype = self._state_options(device, dtype)
        memory = self.num_heads, self.key_dim, 2 * self.key_dim
        return MemoryState.empty(batch_size, *memory, device=device, dtype=dtype)

    def mix(
        self, x: Tensor, state: MemoryState | None, lengths: Tensor | None, documents: Documents | None = None
    ) -> tuple[Tensor, MemoryState | None]:
        D, H = self.d_model, self.num_heads
        q, k, v, r = self.in_proj(x).split((D // 2, D // 2, D, D), -1)
        log_decay = F.logsigmoid(self.gate_bias(self.gate_proj(x))) / self.gate_temperature
        q, k, v, log_decay = (y.unflatten(-1, (H, -1)) for y in (q / math.sqrt(self.key_dim), k, v, log_decay))
        ways = Directions(x, lengths, documents, both=not self.causal)
        q, k, log_decay = (ways.doubled(y) for y in (q, k, log_decay))

        before = None if state is None else state.memory
        remember = partial(linear_attention, q, k, log_decay=log_decay, causal=True)
        o = self.over_time(lambda v: ways.through(remember, v, before), v)
        if state is not None:
            o, memory = o
            state = MemoryState(memory, advance(state.position, x, lengths, documents))
        return self.out_proj(self.norm(o, r)), state
