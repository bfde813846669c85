from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import VQState, vq_attention
from ..kernels.common import accumulation_dtype, product_dtype, valid_positions, without_autocast
from ..kernels.derivatives import by_hand, gradient
from ..kernels.documents import Documents, starts_of
from ..valid import Factor
from .base import Block, head_dim
from .quantizers import FiniteScalarQuantizer, VectorQuantizer
from .states import state_of

state_of()(VQState)


class VQAttention(Block):
    """Gated attention over vector-quantised keys (Transformer-VQ, Lingle 2024), linear in time.

    q and k are RMS-normalised per head to length D^(1/4), v and the gate are silu projections of width
    `expand · d_model`. Scores have Transformer-XL position terms up to a distance of `block_len`.

    Args:
        d_model: width.
        causal: hide what comes later.
        num_heads: heads, H, each with its own codebook; divides `d_model`. One, as in all published runs, costs least.
        expand: width of the values, times `d_model`.
        codebook_size: codes per head, S.
        block_len: positions in a block; those of a query's own and neighbouring blocks are attended one by one.
        quantizer: "vq", see `VectorQuantizer`, or "fsq", see `FiniteScalarQuantizer`.
        ema, commitment, codebook_start, restart: of "vq".
        exact_steps: for so many steps training attends to the keys themselves, in time and memory quadratic in the
            length, while the codes already follow them: what a look-up grows from is small at first, and codes hide it.
            Evaluation and `extend` always use codes.
    """

    undecayed = ("content_bias", "distance_bias")
    quantizer: VectorQuantizer | FiniteScalarQuantizer

    def __init__(
        self,
        d_model: int,
        *,
        causal: bool = False,
        num_heads: int = 1,
        expand: Factor = 2.0,
        codebook_size: int = 128,
        block_len: int = 64,
        quantizer: Literal["vq", "fsq"] = "vq",
        ema: float = 0.99,
        commitment: float = 1e-4,
        codebook_start: Literal["random", "kmeans"] = "random",
        restart: float = 0.0,
        exact_steps: int = 0,
    ) -> None:
        super().__init__(d_model, causal=causal)
        D, H, S = head_dim("VQAttention", d_model, num_heads), num_heads, codebook_size
        self.num_heads, self.head_dim, self.block_len = H, D, block_len
        self.value_dim = head_dim("VQAttention (values)", int(expand * d_model), num_heads)
        if codebook_size < 1 or block_len < 1:
            raise ValueError(f"VQAttention: codebook_size={S}, block_len={block_len}; valid: 1 or more")
        self.qk_proj = nn.Linear(d_model, 2 * H * D, bias=False)
        self.vg_proj = nn.Linear(d_model, 2 * H * self.value_dim, bias=False)
        self.out_proj = nn.Linear(H * self.value_dim, d_model, bias=False)
        self.distance_proj = nn.Linear(d_model, H * D, bias=False)
        self.content_bias = nn.Parameter(torch.zeros(H, D))
        self.distance_bias = nn.Parameter(torch.zeros(H, D))
        if quantizer == "vq":
            self.quantizer = VectorQuantizer(
                H, S, D, length=D**0.25, ema=ema, commitment=commitment, start=codebook_start, restart=restart
            )
        elif quantizer == "fsq":
            self.quantizer = FiniteScalarQuantizer(H, S, D, length=D**0.25)
        else:
            raise ValueError(f"VQAttention: quantizer={quantizer!r}; valid: vq, fsq")
        if exact_steps < 0:
            raise ValueError(f"VQAttention: exact_steps={exact_steps}; valid: 0 or more")
        self.exact_left = exact_steps
        self._exact = exact_steps > 0  # a count that passes looked at would compile them anew for each of its values

    def initial_state(self, batch_size, *, device=None, dtype=None) -> VQState:
        device, dtype = self._state_options(device, dtype)
        wide = accumulation_dtype(dtype)
        H, S, _ = self.quantizer.codebook.shape
        return VQState.empty(batch_size, H, S, self.value_dim, self.block_len, device=device, dtype=wide)

    def mix(
        self, x: Tensor, state: VQState | None, lengths: Tensor | None, documents: Documents | None = None
    ) -> tuple[Tensor, VQState | None]:
        H, D = self.num_heads, self.head_dim
        wide = accumulation_dtype(x.dtype)
        qk = self.qk_proj(x).unflatten(-1, (2, H, D)).to(wide)
        q, k = (_Normalised.apply if by_hand() else _normalised)(qk, D**-0.25).unbind(2)  # [B, T, H, D]
        v, gate = (F.silu(y).unflatten(-1, (H, self.value_dim)) for y in self.vg_proj(x).chunk(2, -1))
        # A grid learns nothing beside the gradient, but is not to be recomputed with codes where keys were exact.
        record = (self._exact or isinstance(self.quantizer, VectorQuantizer)) and self.recording()
        if record:
            self.count_pass()
        with without_autocast(x.device):
            keys, codebook, codes, loss = self.quantizer(k, lengths, record=record)
        if record and loss is not None:
            self.add_loss(loss, k)
        products = product_dtype(v)
        bias = torch.einsum("bthd,nhd->bthn", (q + self.distance_bias).to(products), self._distances(wide).to(products))
        # In v's precision: that of the products, under autocast.
        q, keys = (q + self.content_bias).to(v.dtype), keys.to(v.dtype)
        if self._exact and self.training and torch.is_grad_enabled() and state is None:
            y = self.over_time(
                lambda v: exact_attention(
                    q, keys, v, bias.to(v.dtype), causal=self.causal, lengths=lengths, documents=documents
                ),
                v,
            )
            return self.out_proj((y * gate).flatten(2)), None
        y = self.over_time(
            lambda v: vq_attention(
                q,
                keys,
                v,
                codebook,
                codes=codes,
                bias=bias,
                block_len=self.block_len,
                causal=self.causal,
                initial_state=state,
                output_final_state=state is not None,
                lengths=lengths,
                cu_seqlens=starts_of(documents),
            ),
            v,
        )
        if state is not None:
            y, state = y
        return self.out_proj((y * gate).flatten(2)), state

    def _distances(self, dtype: torch.dtype) -> Tensor:
        """A vector for every distance with a position term, largest first: [block_len + 1 or 2 block_len + 1, H, D]."""
        own, device = self.distance_bias.dtype, self.distance_bias.device
        distance = torch.arange(self.block_len, -1 if self.causal else -self.block_len - 1, -1, device=device)
        frequency = 1e5 ** (-torch.arange(0, self.d_model, 2, device=device, dtype=dtype) / self.d_model)
        angle = distance[:, None] * frequency
        features = torch.cat([angle.sin(), angle.cos()], -1)[:, : self.d_model].to(own)
        projected = self.distance_proj(features).unflatten(-1, (self.num_heads, self.head_dim))
        return projected.to(dtype) * self.head_dim**-0.25

    def after_step(self) -> None:
        """Lets the quantizer learn from the passes since the last call."""
        super().after_step()
        self.quantizer.after_step()
        if self._exact:
            self.exact_left -= 1
            self._exact = self.exact_left > 0

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.exact_left)

    def set_extra_state(self, state: Tensor) -> None:
        self.exact_left = int(state)
        self._exact = self.exact_left > 0

    def metrics(self) -> dict[str, float]:
        """The quantizer's health."""
        return self.quantizer.health()


def _normalised(x: Tensor, size: float) -> Tensor:
    """Rows of root mean square `size`."""
    return F.rms_norm(x, x.shape[-1:]) * size


class _Normalised(torch.autograd.Function):
    """`_normalised` in fewer passes over memory than those that autograd makes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: float) -> Tensor:
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]
        scale = (square + torch.finfo(x.dtype).eps).rsqrt()
        ctx.size = size
        ctx.save_for_backward(x, scale)
        return x * (size * scale)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors

        def written() -> tuple[Tensor]:
            along = (dy * x).mean(-1, keepdim=True) * scale.square()
            return (torch.addcmul(dy, x, along, value=-1).mul_(ctx.size * scale),)

        return *gradient(written, lambda x: (_normalised(x, ctx.size),), (x,), (dy,)), None


def exact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    *,
    causal: bool,
    lengths: Tensor | None,
    documents: Documents | None = None,
) -> Tensor:
    """softmax(q kᵀ + bias) v, what `vq_attention` computes where every key is its own code, in quadratic time.

    Args:
        q, k: [B, T, H, D].
        v: [B, T, H, Dv].
        bias: as in `vq_attention`, one per query: [B, T, H, n].
        causal, lengths: as there.
        documents: in place of lengths, with B = 1. They are padded to the longest: a GPU is waited for.

    Returns:
        [B, T, H, Dv].
    """
    if documents is not None:
        q, k, v, bias = (documents.padded(each) for each in (q, k, v, bias))
        return documents.unpadded(exact_attention(q, k, v, bias, causal=causal, lengths=documents.lengths))
    (B, T, H, _), n = q.shape, bias.shape[-1]
    step = torch.arange(T, device=q.device)
    entry = step - step[:, None] + (n - 1 if causal else n // 2)  # of key j in the terms of query i
    terms = bias.transpose(1, 2).gather(-1, entry.clamp(0, n - 1).expand(B, H, T, T))
    mask = torch.where((entry >= 0) & (entry < n), terms, 0)
    hidden = (step > step[:, None]) if causal else torch.zeros(T, T, dtype=torch.bool, device=q.device)
    if lengths is not None:
        hidden = hidden | ~valid_positions(lengths, T)[:, None, None]
    mask = mask.masked_fill(hidden, -torch.inf)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
    return y.transpose(1, 2)
