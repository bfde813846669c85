from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels.documents import Documents, starts_of
from ..valid import Factor
from .base import Block, advance, head_dim, places
from .gated_norm import NormThenGate
from .linear_attention import decay_rates
from .over_parts import linear_attention
from .parts import Part
from .rotary import rotate
from .states import MemoryState


class RetNet(Block):
    """Multi-scale retention: linear attention with a constant decay in each head, and a gate.

    With queries q and keys k rotated by their positions and γ_h = 1 - 2^(-5 - h), in each head

        S_t = γ S_{t-1} + k_t v_tᵀ / √Dk        o_t = S_tᵀ q_t

    and the output is W_o (SiLU(W_g x) ∘ rms(o)), the norm per head and without parameters.

    Bidirectional: a pair at distance n has the weight γ^n from either side, and is rotated by n to one side or the
    other. A pass from the end, added to the causal one, would differ in the present step alone, which counts once here.

    Args:
        d_model: width.
        causal: see no later position.
        num_heads: H; divides `d_model`, and the width of keys is Dk = `d_model` / H.
        expand: width of all values and of the gate, by `d_model`.

    Source: Sun et al., "Retentive Network" (2023), arXiv 2307.08621, equations 5 to 8; frequencies, of which the last
    is 1 / 10,000, and initialisation as in microsoft/torchscale. What that divides by beside, its norm undoes.
    """

    def __init__(self, d_model: int, *, causal: bool = False, num_heads: int = 4, expand: Factor = 2.0) -> None:
        super().__init__(d_model, causal=causal)
        self.num_heads = num_heads
        self.key_dim = head_dim("RetNet", d_model, num_heads)
        self.value_dim = max(1, int(expand * self.key_dim))
        E = num_heads * self.value_dim
        self.widths = d_model, d_model, E, E  # q, k, v, gate
        self.in_proj = nn.Linear(d_model, sum(self.widths), bias=False)
        self.norm = NormThenGate(self.value_dim, "silu", eps=1e-6, affine=False)
        self.out_proj = nn.Linear(E, d_model, bias=False)
        with torch.no_grad():
            for weight in self.in_proj.weight.split(self.widths):
                nn.init.xavier_uniform_(weight, gain=2**-2.5)
            nn.init.xavier_uniform_(self.out_proj.weight, gain=2**-1)

    def initial_state(self, batch_size, *, device=None, dtype=None) -> MemoryState:
        device, dtype = self._state_options(device, dtype)
        memory = self.num_heads, self.key_dim, self.value_dim
        return MemoryState.empty(batch_size, *memory, device=device, dtype=dtype)

    def mix(
        self,
        x: Tensor,
        state: MemoryState | None,
        lengths: Tensor | None,
        documents: Documents | None = None,
        part: Part | None = None,
    ) -> tuple[Tensor, MemoryState | None]:
        *qkv, gate = self.in_proj(x).split(self.widths, -1)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)) for y in qkv)  # [B, T, H, Dk or Dv]
        place, pairs = places(x, state, documents, part), self.key_dim // 2
        base = 10_000 ** (pairs / max(pairs - 1, 1))  # frequencies from 1 to 1 / 10,000, both included
        q, k = rotate(q, place, base=base), rotate(k * self.key_dim**-0.5, place, base=base)
        y = self.over_time(
            lambda v: linear_attention(
                part,
                q,
                k,
                v,
                log_decay=decay_rates(self.num_heads, x),
                causal=self.causal,
                initial_state=None if state is None else state.memory,
                output_final_state=state is not None,
                lengths=lengths,
                cu_seqlens=starts_of(documents),
            ),
            v,
        )
        if state is not None:
            y, memory = y
            state = MemoryState(memory, advance(state.position, x, lengths, documents))
        return self.out_proj(self.norm(y, gate)), state
