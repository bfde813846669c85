from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import attention
from ..kernels.common import accumulation_dtype
from ..kernels.documents import Documents
from .base import Block, advance, head_dim, places
from .cache import KeyValueCache, check_room, grow, in_a_row
from .rotary import turned, turns


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
        window: see only what is less than `window` positions away, or all if None. A state then holds no more than the
            last window - 1 keys and values.
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
        window: int | None = None,
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
        if window is not None and window < 1:
            raise ValueError(f"SoftmaxAttention: window={window}; valid: 1 or more, or None")
        self.window = window
        self.reach = None if window is None else window - 1
        self.rotary = rotary
        self.entropy_length = entropy_length
        self.qkv_proj = nn.Linear(d_model, (num_heads + 2 * self.num_kv_heads) * self.head_dim, bias=bias)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)

    def initial_state(self, batch_size, *, device=None, dtype=None, max_length=None) -> KeyValueCache:
        """As of any block; a cache with room for `max_length` steps is not copied before it is longer."""
        device, dtype = self._state_options(device, dtype)
        room = 0 if self.window is not None else check_room("SoftmaxAttention", max_length)
        entry = self.num_kv_heads, self.head_dim
        return KeyValueCache.empty(batch_size, room, entry, entry, device=device, dtype=dtype)

    def mix(
        self, x: Tensor, state: KeyValueCache | None, lengths: Tensor | None, documents: Documents | None = None
    ) -> tuple[Tensor, KeyValueCache | None]:
        H, G = self.num_heads, self.num_kv_heads
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))  # [B, T, H + 2 G, D]
        qk, v = qkv.narrow(2, 0, H + G), qkv.narrow(2, H + G, G)
        place = places(x, state, documents)
        turn = turns(place, self.head_dim, torch.promote_types(qkv.dtype, torch.float32)) if self.rotary else None
        if turn is not None and x.shape[1] == 1:
            qk, turn = turned(qk, turn), None
        q, k = qk.narrow(2, 0, H), qk.narrow(2, H, G)
        if turn is not None:  # of many steps, each by itself in memory
            q, k = turned(q, turn), turned(k, turn)
        scale = self._scale(place, lengths, documents, x)
        extent: dict[str, Any] = {"lengths": lengths} if documents is None else {"cu_seqlens": documents.starts}
        if state is not None:
            k, v, extent, state = self._remember(k, v, state, lengths, documents)
        options = {"causal": self.causal, "window": self.window, **extent}
        y = self.over_time(lambda v: attention(q, k, v, scale=scale, **options), v)
        return self.out_proj(y.flatten(2)), state

    def _remember(
        self, k: Tensor, v: Tensor, state: KeyValueCache, lengths: Tensor | None, documents: Documents | None
    ) -> tuple[Tensor, Tensor, dict[str, Any], KeyValueCache]:
        """Keys and values behind those of the state, what `attention` is told of them, and the state after them."""
        if self.window is None:
            held = state.position
            k, v, filled, state = state.append(k, v, lengths, documents)
        else:
            held = state.position.clamp(max=self.window - 1)
            filled, position = (advance(place, k, lengths, documents) for place in (held, state.position))
            keys, values = grow(state.keys, k, held, documents), grow(state.values, v, held, documents)
            k, v = keys.to(k.dtype), values.to(v.dtype)
            state = KeyValueCache(*self._last(keys, values, filled), position, torch.full_like(position, -1))
        if documents is None:
            return k, v, {"lengths": filled, "position": held}, state
        assert filled is not None
        (k, v), extent = in_a_row((k, v), filled, documents)
        return k, v, extent, state

    def _last(self, keys: Tensor, values: Tensor, filled: Tensor) -> tuple[Tensor, Tensor]:
        """As many of the last of their `filled` entries as later queries see, if there are more."""
        assert self.window is not None
        most = self.window - 1
        if keys.shape[1] <= most:
            return keys, values
        last = (filled - most).clamp(min=0)[:, None] + torch.arange(most, device=keys.device)
        return keys.take_along_dim(last[..., None, None], 1), values.take_along_dim(last[..., None, None], 1)

    def _scale(self, place: Tensor, lengths: Tensor | None, documents: Documents | None, x: Tensor) -> Tensor | None:
        if self.entropy_length is None:
            return None
        T = x.shape[1]
        if self.causal:
            end = place + 1  # [T] or [B, T]
        elif documents is not None:
            end = documents.lengths[documents.of_steps()]
        else:
            end = torch.full_like(place, T) if lengths is None else lengths[:, None].expand(-1, T)
        seen = end
        if self.window is not None:
            seen = torch.minimum(end, place + self.window) - (place - self.window + 1).clamp(min=0)
        seen = seen.clamp(min=16).to(accumulation_dtype(x.dtype))
        return seen.log() / (math.log(self.entropy_length) * math.sqrt(self.head_dim))
