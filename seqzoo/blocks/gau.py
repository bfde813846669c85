from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import GatedAttentionState, attention, gated_attention
from ..kernels.common import accumulation_dtype, without_autocast, zero_padding
from ..kernels.documents import Documents, starts_of
from ..valid import Factor
from .base import Block, places
from .cache import KeyValueCache, check_room, in_a_row
from .offset_scale import offset_scale
from .states import state_of

ATTENTIONS = ("flash", "relu2_n2", "relu2_ns", "softmax")
GAMMA_STD = 3.0  # z starts at about a third of it

state_of()(GatedAttentionState)


class GAU(Block):
    """The gated attention unit, (u ∘ A v) W_o: attention with one head, and the feed-forward layer in it.

    Source: Hua et al., "Transformer Quality in Linear Time" (2022), sections 2.2 and 3.2.

    u, v and z are silu projections of the input. Queries and keys are z scaled and shifted per channel, and rotated. A
    is, with n the number of keys a query sees (the sequence's own length, or the position if causal):

    - "flash": relu²(q kᵀ / √(chunk_len · key_dim) + b) inside chunks of `chunk_len`, b learnt by distance, and linear
      attention with queries and keys of its own over the whole sequence, or over earlier chunks if causal, as a mean.
      Linear in time.
    - "relu2_n2": relu²(q kᵀ / n), the paper's.
    - "relu2_ns": relu²(q kᵀ) / (n · key_dim) (Su, post 8934).
    - "softmax": softmax(log n / log 512 · q kᵀ / √key_dim), n at least 16 (Su, post 9019).

    The last three are quadratic in time; of them, those with relu² hold weights of [B, T, T].

    Unlike the paper's code, "flash" divides by `key_dim` inside chunks, and causal linear attention by the number of
    keys that it sums, not by `chunk_len`; and it has a bias for every distance, not for 32 ranges of them. Biases start
    as |N(0, 1 / chunk_len)|, so that the weights of a full chunk sum to about one and relu cuts off no distance; scales
    of queries and keys as N(0, 3²), which makes q and k about 1 in size, and what they add to a bias as large as it is.
    From N(0, 0.02²) or N(0, 1), squares of weights hardly depend on what is compared, and relu² learns no look-up.

    Args:
        d_model: width.
        causal: hide what comes later.
        attention: "flash", "relu2_n2", "relu2_ns" or "softmax".
        expand: width of u and v, times `d_model`.
        key_dim: width of z, queries and keys, S.
        chunk_len: positions in a chunk; "flash" only.
        distance_bias: learn a bias by distance inside chunks; "flash" only.
        rotary: rotary positions on queries and keys.
        bias: biases in the projections.
    """

    undecayed = ("gamma", "beta", "distance_bias")

    def __init__(
        self,
        d_model: int,
        *,
        causal: bool = False,
        attention: Literal["flash", "relu2_n2", "relu2_ns", "softmax"] = "flash",
        expand: Factor = 2.0,
        key_dim: int = 128,
        chunk_len: int = 256,
        distance_bias: bool = True,
        rotary: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__(d_model, causal=causal)
        if attention not in ATTENTIONS:
            raise ValueError(f"GAU: attention={attention!r}; valid: {', '.join(ATTENTIONS)}")
        self.value_dim = int(expand * d_model)
        if self.value_dim < 1 or key_dim < 1 or chunk_len < 1:
            raise ValueError(
                f"GAU: expand={expand} (width {self.value_dim}), key_dim={key_dim}, chunk_len={chunk_len}; "
                "valid: 1 or more, and expand · d_model of 1 or more"
            )
        self.attention = attention
        self.key_dim = key_dim
        self.chunk_len = chunk_len
        self.rotary = rotary
        self.uvz_proj = nn.Linear(d_model, 2 * self.value_dim + key_dim, bias=bias)
        self.out_proj = nn.Linear(self.value_dim, d_model, bias=bias)
        rows = 4 if attention == "flash" else 2  # q_quad, q_lin, k_quad, k_lin; or q, k
        self.gamma = nn.Parameter(GAMMA_STD * torch.randn(rows, key_dim))
        self.beta = nn.Parameter(torch.zeros(rows, key_dim))
        self.distance_bias = None
        if distance_bias and attention == "flash":
            offsets = chunk_len if causal else 2 * chunk_len - 1  # of a key, j - i
            self.distance_bias = nn.Parameter(torch.randn(offsets).abs() / math.sqrt(chunk_len))

    def initial_state(
        self, batch_size, *, device=None, dtype=None, max_length=None
    ) -> GatedAttentionState | KeyValueCache:
        """As of any block; a cache with room for `max_length` steps is not copied before it is longer."""
        device, dtype = self._state_options(device, dtype)
        S, E, room = self.key_dim, self.value_dim, check_room("GAU", max_length)
        if self.attention == "flash":
            wide = accumulation_dtype(dtype)
            return GatedAttentionState.empty(batch_size, S, E, self.chunk_len, device=device, dtype=wide)
        return KeyValueCache.empty(batch_size, room, (S,), (E,), device=device, dtype=dtype)

    def mix(
        self, x: Tensor, state: Any, lengths: Tensor | None, documents: Documents | None = None
    ) -> tuple[Tensor, Any]:
        E, S = self.value_dim, self.key_dim
        u, v, z = (F.silu(y) for y in self.uvz_proj(x).split((E, E, S), -1))  # [B, T, E or S], each dense
        place = places(x, state, documents)
        qk = offset_scale(z, self.gamma, self.beta, place if self.rotary else None)  # 4 or 2 of [B, T, S]
        if self.attention == "flash":
            y, state = self._flash(u, qk, v, state, lengths, documents)
        else:
            y, state = self._quadratic(qk, v, place, state, lengths, documents)
            y = u * y
        return self.out_proj(y), state

    def _flash(
        self,
        u: Tensor,
        qk: tuple[Tensor, ...],
        v: Tensor,
        state: GatedAttentionState | None,
        lengths: Tensor | None,
        documents: Documents | None,
    ) -> tuple[Tensor, GatedAttentionState | None]:
        q_quad, q_lin, k_quad, k_lin = qk
        y = self.over_time(
            lambda v, u: gated_attention(
                u,
                q_quad,
                k_quad,
                q_lin,
                k_lin,
                v,
                chunk_len=self.chunk_len,
                bias=self.distance_bias,
                causal=self.causal,
                initial_state=state,
                output_final_state=state is not None,
                lengths=lengths,
                cu_seqlens=starts_of(documents),
            ),
            v,
            u,
        )
        return y if state is not None else (y, None)

    def _quadratic(
        self,
        qk: tuple[Tensor, ...],
        v: Tensor,
        place: Tensor,
        state: KeyValueCache | None,
        lengths: Tensor | None,
        documents: Documents | None,
    ) -> tuple[Tensor, KeyValueCache | None]:
        q, k = qk
        if self.causal:
            n = place + 1  # [T] or [B, T]
        elif documents is not None:
            n = documents.lengths[documents.of_steps()]
        elif lengths is not None:
            n = lengths[:, None].clamp(min=1).expand(-1, q.shape[1])
        else:
            n = torch.full_like(place, q.shape[1])
        n = n.to(accumulation_dtype(q.dtype))
        start = None if state is None else state.position
        if state is not None:
            k, v, lengths, state = state.append(k, v, lengths, documents)

        if self.attention == "softmax":
            scale = n.clamp(min=16).log() / (math.log(512) * math.sqrt(self.key_dim))
            q, k, v = q[:, :, None], k[:, :, None], v[:, :, None]  # [B, T or N, 1, S or E]
            extent: dict[str, Any] = {"lengths": lengths, "position": start}
            if documents is not None:
                extent = {"cu_seqlens": documents.starts}
                if state is not None:
                    (k, v), extent = in_a_row((k, v), state.position, documents)
            y = self.over_time(lambda v: attention(q, k, v, causal=self.causal, scale=scale, **extent), v)
            return y[:, :, 0], state
        scale = 1 / n if self.attention == "relu2_n2" else (n * self.key_dim).rsqrt()
        last = place if self.causal else None
        if documents is not None and state is None:
            k, v = documents.padded(k), documents.padded(v)
        values = zero_padding(v, lengths)
        return self.over_time(lambda v: relu2_attention(q, k, v, scale, last, documents), values), state


def relu2_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: Tensor, last: Tensor | None, documents: Documents | None = None
) -> Tensor:
    """relu²(scale · q kᵀ) v, in single precision at least: squares of small weights would vanish in half.

    Args:
        q: [B, T, S].
        k: [B, N, S].
        v: [B, N, E], zero where a key is padding.
        scale: [T] or [B, T], one per query.
        last: int64 [T] or [B, T], the last key each query sees; None is all.
        documents: of the queries, with B = 1; keys and values have a row for each. Queries are padded to the longest:
            a GPU is waited for.

    Returns:
        [B, T, E] in v's dtype.

    Source: Hua et al. 2022, section 2.2.
    """
    if documents is not None:
        last = None if last is None else documents.padded(last.view(1, -1))
        y = relu2_attention(documents.padded(q), k, v, documents.padded(scale.view(1, -1)), last)
        return documents.unpadded(y)
    dtype = accumulation_dtype(v.dtype)
    with without_autocast(q.device):
        weights = (q.to(dtype) * scale[..., None]) @ k.to(dtype).mT  # [B, T, N]
        if last is not None:
            weights = weights.masked_fill(torch.arange(k.shape[1], device=k.device) > last[..., None], 0)
        return (weights.relu().square() @ v.to(dtype)).to(v.dtype)
