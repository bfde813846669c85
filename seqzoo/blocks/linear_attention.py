from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.common import accumulation_dtype
from ..kernels.derivatives import by_hand
from ..kernels.documents import Documents, starts_of
from .base import Block, advance, head_dim, places
from .over_parts import linear_attention
from .parts import Part
from .rotary import rotate
from .states import MemoryState


class _EluPlusOne(torch.autograd.Function):
    """elu(x) + 1, whose slope is itself up to 1. PyTorch's own gradient of elu is several times as slow on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = _elu_plus_one(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return dy * y.clamp(max=1)


def _elu_plus_one(x: Tensor) -> Tensor:
    return x.clamp(max=0).exp() + x.clamp(min=0)  # elu(x) is -1 and a little: 1 more would leave few digits of that


def elu_plus_one(x: Tensor) -> Tensor:
    return _EluPlusOne.apply(x) if by_hand() else _elu_plus_one(x)


FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {"elu": elu_plus_one, "relu": F.relu, "silu": F.silu}


class LinearAttention(Block):
    """Attention with φ(q)·φ(k) for the exponential of q·k, so that the sum over keys can be carried.

    Source: Katharopoulos et al., "Transformers are RNNs" (2020), equations 5 to 9.

    The output is divided either by the sum of the weights, or by its own size in each head (RMS norm; Qin et al. 2022,
    "The Devil in Linear Transformer"), which lets φ be negative.

    Args:
        d_model: width.
        causal: sum over what came before only.
        num_heads: heads, H; divides `d_model`.
        feature_map: φ, "elu" (elu + 1), "relu" or "silu".
        normalize: divide by the sum of the weights; False: RMS norm per head. "silu" needs False, as its weights
            can sum to zero.
        decay: multiply weights at distance n by γ_h^n, γ_h = 1 - 2^(-5 - h) (RetNet, Sun et al. 2023).
        rotary: rotary positions on φ(q) and φ(k); needs `normalize=False`, as rotated weights can sum to zero.
        bias: biases in the projections.
    """

    def __init__(
        self,
        d_model: int,
        *,
        causal: bool = False,
        num_heads: int = 4,
        feature_map: Literal["elu", "relu", "silu"] = "elu",
        normalize: bool = True,
        decay: bool = False,
        rotary: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__(d_model, causal=causal)
        self.head_dim = head_dim("LinearAttention", d_model, num_heads)
        if feature_map not in FEATURE_MAPS:
            raise ValueError(f"LinearAttention: feature_map={feature_map!r}; valid: {', '.join(FEATURE_MAPS)}")
        if normalize and (feature_map == "silu" or rotary):
            signed = "feature_map='silu'" if feature_map == "silu" else "rotary=True"
            raise ValueError(f"LinearAttention: {signed} makes weights that can sum to zero; valid: normalize=False")
        self.num_heads = num_heads
        self.feature_map = feature_map
        self.normalize = normalize
        self.decay = decay
        self.rotary = rotary
        self.qkv_proj = nn.Linear(d_model, 3 * d_model, bias=bias)
        self.norm = None if normalize else nn.RMSNorm(self.head_dim, eps=1e-6)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)

    def initial_state(self, batch_size, *, device=None, dtype=None) -> MemoryState:
        device, dtype = self._state_options(device, dtype)
        # With `normalize`, the normaliser's sum is in the last column.
        memory = self.num_heads, self.head_dim, self.head_dim + self.normalize
        return MemoryState.empty(batch_size, *memory, device=device, dtype=dtype)

    def mix(
        self,
        x: Tensor,
        state: MemoryState | None,
        lengths: Tensor | None,
        documents: Documents | None = None,
        part: Part | None = None,
    ) -> tuple[Tensor, MemoryState | None]:
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)  # [B, T, H, D]
        phi = FEATURE_MAPS[self.feature_map]
        q, k = phi(q), phi(k)
        if self.rotary:
            place = places(x, state, documents, part)
            q, k = rotate(q, place), rotate(k, place)
        log_decay = decay_rates(self.num_heads, x) if self.decay else None
        y = self.over_time(
            lambda v: linear_attention(
                part,
                q,
                k,
                v,
                log_decay=log_decay,
                causal=self.causal,
                normalize=self.normalize,
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
        if self.norm is not None:
            y = self.norm(y)
        return self.out_proj(y.flatten(2)), state


def decay_rates(H: int, x: Tensor) -> Tensor:
    """log γ_h of each head, [H], for computing with `x`, in single precision at least."""
    head = torch.arange(H, device=x.device, dtype=accumulation_dtype(x.dtype))
    return torch.log1p(-(2.0 ** (-5 - head)))
