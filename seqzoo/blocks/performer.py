from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..kernels import FavorState, favor_attention
from ..kernels.common import accumulation_dtype
from ..kernels.documents import Documents, starts_of
from .base import Block, advance, head_dim
from .states import state_of


@state_of()
class PerformerState(NamedTuple):
    sums: Tensor  # [B, H, M, D + 1], by feature, relative to exp(log_scale), the normaliser in the last column
    log_scale: Tensor  # [B, H, M]
    position: Tensor  # int64 [B]


class Performer(Block):
    """Softmax attention estimated with M positive random features, so that the sum over keys can be carried.

    Source: Choromanski et al., "Rethinking Attention with Performers" (2021), section 2.

    q·k is scaled by D^(-1/2), D = d_model / H. Each head has features of its own: orthogonal within groups of D,
    uniform in direction and as long as Gaussian vectors are. `after_step` draws new ones every `redraw_every` steps,
    and nothing else does. Those in use are saved with the weights; a state is good only for those it was made with.

    Unlike performer-pytorch and the authors' code, this adds no epsilon to features, so that the weights are those of
    the estimate itself; keeps padding out of the denominator too; and lets no maximum over all keys into a causal
    block, which has none while decoding. Nor do directions lean to one side, as the Q of a QR decomposition does.

    There is no position term, and rotary positions do not go with it: add absolute ones to the input.

    Args:
        d_model: width.
        causal: sum over what came before only.
        num_heads: heads, H; divides `d_model`.
        num_features: features per head, M; by default D ln D, rounded down.
        redraw_every: optimiser steps between two draws of the features; 0: the first ones are kept.
        bias: biases in the projections.
    """

    projection: Tensor

    def __init__(
        self,
        d_model: int,
        *,
        causal: bool = False,
        num_heads: int = 4,
        num_features: int | None = None,
        redraw_every: int = 1000,
        bias: bool = False,
    ) -> None:
        super().__init__(d_model, causal=causal)
        self.head_dim = head_dim("Performer", d_model, num_heads)
        if num_features is None:
            num_features = default_features(self.head_dim)
        if num_features < 1:
            raise ValueError(f"Performer: num_features={num_features}; valid: 1 or more")
        if redraw_every < 0:
            raise ValueError(f"Performer: redraw_every={redraw_every}; valid: a number of steps, or 0 for never")
        self.num_heads = num_heads
        self.num_features = num_features
        self.redraw_every = redraw_every
        self.qkv_proj = nn.Linear(d_model, 3 * d_model, bias=bias)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)
        features = orthogonal_gaussian(num_heads, num_features, self.head_dim)
        self.register_buffer("projection", features.to(torch.get_default_device()))
        self.steps = 0  # of the optimiser

    def initial_state(self, batch_size, *, device=None, dtype=None) -> PerformerState:
        device, dtype = self._state_options(device, dtype)
        H, M, D = self.projection.shape
        wide = accumulation_dtype(dtype)
        empty = FavorState.empty(batch_size, H, M, D, device=device, dtype=wide)
        position = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return PerformerState(empty.sums, empty.log_scale, position)

    def mix(
        self, x: Tensor, state: PerformerState | None, lengths: Tensor | None, documents: Documents | None = None
    ) -> tuple[Tensor, PerformerState | None]:
        if self.redraw_every and self.training and torch.is_grad_enabled():
            self.count_pass()
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)  # [B, T, H, D]
        scale = self.head_dim**-0.25
        q, k = q * scale, k * scale
        y = self.over_time(
            lambda v: favor_attention(
                q,
                k,
                v,
                self.projection,
                causal=self.causal,
                initial_state=None if state is None else FavorState(state.sums, state.log_scale),
                output_final_state=state is not None,
                lengths=lengths,
                cu_seqlens=starts_of(documents),
            ),
            v,
        )
        if state is not None:
            y, memory = y
            state = PerformerState(memory.sums, memory.log_scale, advance(state.position, x, lengths, documents))
        return self.out_proj(y.flatten(2)), state

    @torch.no_grad()
    def after_step(self) -> None:
        """Counts an optimiser step, and draws new features after every `redraw_every`: the same on all ranks."""
        super().after_step()
        self.steps += 1
        if self.redraw_every == 0 or self.steps % self.redraw_every:
            return
        self.projection.copy_(orthogonal_gaussian(*self.projection.shape))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast(self.projection, src=0)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor) -> None:
        self.steps = int(state)


def default_features(D: int) -> int:
    """D ln D, rounded down, for heads of D channels."""
    return max(1, int(D * math.log(D)))


def orthogonal_gaussian(H: int, M: int, D: int) -> Tensor:
    """Rows with the distribution of N(0, I) each, orthogonal within every D of them: float32 [H, M, D].

    Drawn on the CPU from torch's generator, so that a seed gives the same rows on any device; on "meta" none is drawn.
    """
    if torch.get_default_device().type == "meta":
        return torch.empty(H, M, D, dtype=torch.float32)
    blocks = -(-M // D)
    Q, R = torch.linalg.qr(torch.randn(H, blocks, D, D, dtype=torch.float32, device="cpu"))
    # QR leaves the sign of each direction to the algorithm; with these it is the uniform distribution's.
    Q = Q * R.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
    norms = torch.randn(H, M, D, dtype=torch.float32, device="cpu").norm(dim=-1, keepdim=True)
    return Q.mT.flatten(1, 2)[:, :M] * norms
