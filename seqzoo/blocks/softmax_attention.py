from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..kernels import attention
from ..kernels.common import accumulation_dtype
from ..kernels.documents import Documents
from .base import Block, advance, grow, head_dim, in_a_row, places
from .rotary import rotate


class AttentionState(NamedTuple):
    keys: Tensor  # [B, S, G, D]; the first `position` of each sequence are filled
    values: Tensor  # [B, S, G, D]
    position: Tensor  # int64 [B]


class SoftmaxAttention(Block):
    """Multi-head softmax attention (Vaswani et al. 2017).

    Args:
        d_model: width.
        causal: hide what comes later.
        num_heads: query heads, H; divides `d_model`.
        num_kv_heads: key/value heads, G, each shared by H / G query heads (Ainslie et al. 2023); None is `num_heads`.
        rotary: rotary positions on queries and keys; without them the block knows no order unless its input does.
        entropy_length: scale scores by log n / log(entropy_length), n the number of keys a query sees (16 at least),
            so that attention stays as sharp on lengths it was not trained on (Su, post 8823: 512). None: no factor.
        bias: biases in the projections.
    """

    def __init__(
        self,
        d_model: int,
        *,
        causal: bool = False,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        rotary: bool = True,
        entropy_length: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__(d_model, causal=causal)
        self.num_heads = num_heads
        self.head_dim = head_dim("SoftmaxAttention", d_model, num_heads)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if self.num_kv_heads < 1 or num_heads % self.num_kv_heads:
            raise ValueError(f"SoftmaxAttention: num_kv_heads={num_kv_heads} does not divide num_heads={num_heads}")
        if entropy_length is not None and entropy_length < 2:
            raise ValueError(f"SoftmaxAttention: entropy_length={entropy_length}; valid: 2 or more, or None")
        self.rotary = rotary
        self.entropy_length = entropy_length
        self.qkv_proj = nn.Linear(d_model, (num_heads + 2 * self.num_kv_heads) * self.head_dim, bias=bias)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)

    def initial_state(self, batch_size, *, device=None, dtype=None) -> AttentionState:
        device, dtype = self._state_options(device, dtype)
        empty = torch.zeros(batch_size, 0, self.num_kv_heads, self.head_dim, device=device, dtype=dtype)
        return AttentionState(empty, empty, torch.zeros(batch_size, dtype=torch.int64, device=device))

    def mix(
        self, x: Tensor, state: AttentionState | None, lengths: Tensor | None, documents: Documents | None = None
    ) -> tuple[Tensor, AttentionState | None]:
        H, G = self.num_heads, self.num_kv_heads
        q, k, v = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim)).split((H, G, G), dim=2)  # [B, T, H or G, D]
        place = places(x, state, documents)
        if self.rotary:
            q, k = rotate(q, place), rotate(k, place)
        scale = self._scale(place, lengths, documents, x)
        extent = {"lengths": lengths} if documents is None else {"cu_seqlens": documents.starts}
        if state is not None:
            start = state.position
            keys, values = grow(state.keys, k, start, documents), grow(state.values, v, start, documents)
            state = AttentionState(keys, values, advance(start, x, lengths, documents))
            k, v = keys.to(q.dtype), values.to(q.dtype)
            extent = {"lengths": state.position, "position": start}
            if documents is not None:
                (k, v), extent = in_a_row((k, v), state.position, documents)
        y = self.over_time(lambda v: attention(q, k, v, causal=self.causal, scale=scale, **extent), v)
        return self.out_proj(y.flatten(2)), state

    def _scale(self, place: Tensor, lengths: Tensor | None, documents: Documents | None, x: Tensor) -> Tensor | None:
        if self.entropy_length is None:
            return None
        if self.causal:
            seen = place + 1
        elif documents is not None:
            seen = documents.lengths[documents.of_steps()]
        elif lengths is not None:
            seen = lengths[:, None].expand(-1, x.shape[1])
        else:
            seen = torch.full_like(place, x.shape[1])
        seen = seen.clamp(min=16).to(accumulation_dtype(x.dtype))
        return seen.log() / (math.log(self.entropy_length) * math.sqrt(self.head_dim))
