from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import VQState, nearest_code, vq_attention
from ..kernels.common import accumulation_dtype, valid_positions
from .base import Block, head_dim


class VQAttention(Block):
    """Gated attention over vector-quantised keys (Transformer-VQ, Lingle 2024), linear in time.

    q and k are RMS-normalised per head to length D^(1/4), v and the gate are silu projections of width
    `expand · d_model`. Scores have Transformer-XL position terms up to a distance of `block_len`. Codes are running
    means of the keys they stand for, updated by `after_step` from exact counts; the commitment loss, averaged over
    valid positions and summed over heads, pulls keys towards their codes.

    Unlike the authors' code, codes start as long as keys are (theirs start near zero, from where most are never used).

    Args:
        d_model: width.
        causal: hide what comes later.
        num_heads: heads, H, each with its own codebook; divides `d_model`. One, as in all published runs, costs least.
        expand: width of the values, times `d_model`.
        codebook_size: codes per head, S.
        block_len: positions in a block; those of a query's own and neighbouring blocks are attended one by one.
        ema: share of a code's running count and sum that each step keeps.
        commitment: weight of the commitment loss.
    """

    code_counts: Tensor
    code_sums: Tensor
    new_counts: Tensor
    new_sums: Tensor
    errors: Tensor

    def __init__(
        self,
        d_model: int,
        *,
        causal: bool = False,
        num_heads: int = 1,
        expand: float = 2.0,
        codebook_size: int = 128,
        block_len: int = 64,
        ema: float = 0.99,
        commitment: float = 1e-4,
    ) -> None:
        super().__init__(d_model, causal=causal)
        D, H, S = head_dim("VQAttention", d_model, num_heads), num_heads, codebook_size
        self.num_heads, self.head_dim, self.block_len = H, D, block_len
        self.value_dim = head_dim("VQAttention (values)", int(expand * d_model), num_heads)
        if codebook_size < 1 or block_len < 1:
            raise ValueError(f"VQAttention: codebook_size={S}, block_len={block_len}; valid: 1 or more")
        if not 0 <= ema < 1:
            raise ValueError(f"VQAttention: ema={ema}; valid: 0 <= ema < 1")
        self.ema = ema
        self.commitment = commitment
        self.qk_proj = nn.Linear(d_model, 2 * H * D, bias=False)
        self.vg_proj = nn.Linear(d_model, 2 * H * self.value_dim, bias=False)
        self.out_proj = nn.Linear(H * self.value_dim, d_model, bias=False)
        self.distance_proj = nn.Linear(d_model, H * D, bias=False)
        self.content_bias = nn.Parameter(torch.zeros(H, D))
        self.distance_bias = nn.Parameter(torch.zeros(H, D))
        self.register_buffer("code_counts", torch.ones(H, S))
        self.register_buffer("code_sums", F.normalize(torch.randn(H, S, D), dim=-1) * D**0.25)
        self.register_buffer("new_counts", torch.zeros(H, S, dtype=torch.int64), persistent=False)
        self.register_buffer("new_sums", torch.zeros(H, S, D), persistent=False)
        self.register_buffer("errors", torch.zeros(2), persistent=False)  # sums of |k - k̂|² and |k|²
        self._health: dict[str, Tensor] = {}

    @property
    def codebook(self) -> Tensor:
        """[H, S, D]."""
        return self.code_sums / self.code_counts.clamp(min=0.01)[..., None]

    def initial_state(self, batch_size, *, device=None, dtype=None) -> VQState:
        self._require_causal("initial_state")
        wide = accumulation_dtype(dtype or torch.get_default_dtype())
        H, S, _ = self.code_sums.shape
        return VQState.empty(batch_size, H, S, self.value_dim, self.block_len, device=device, dtype=wide)

    def mix(self, x: Tensor, state: VQState | None, lengths: Tensor | None) -> tuple[Tensor, VQState | None]:
        H, D = self.num_heads, self.head_dim
        q, k = self.qk_proj(x).unflatten(-1, (2, H, D)).unbind(2)  # [B, T, H, D]
        v, gate = F.silu(self.vg_proj(x)).unflatten(-1, (2, H, self.value_dim)).unbind(2)
        wide = accumulation_dtype(x.dtype)
        q, k = (F.rms_norm(y.to(wide), (D,)) * D**-0.25 for y in (q, k))
        codebook = self.codebook.to(wide)
        codes = nearest_code(k, codebook)
        self._observe(k, codebook, codes, lengths)
        y = vq_attention(
            q + self.content_bias,
            k,
            v.to(wide),
            codebook,
            codes=codes,
            bias=torch.einsum("bthd,nhd->bthn", q + self.distance_bias, self._distances(wide)),
            block_len=self.block_len,
            causal=self.causal,
            initial_state=state,
            output_final_state=state is not None,
            lengths=lengths,
        )
        if state is not None:
            y, state = y
        return self.out_proj((y.to(gate.dtype) * gate).flatten(2)), state

    def _distances(self, dtype: torch.dtype) -> Tensor:
        """A vector for every distance that has a position term: [block_len + 1 or 2 block_len + 1, H, D]."""
        weight = self.distance_proj.weight
        distance = torch.arange(0 if self.causal else -self.block_len, self.block_len + 1, device=weight.device)
        frequency = 1e5 ** (-torch.arange(0, self.d_model, 2, device=weight.device, dtype=dtype) / self.d_model)
        angle = distance[:, None] * frequency
        features = torch.cat([angle.sin(), angle.cos()], -1)[:, : self.d_model].to(weight.dtype)
        return (
            self.distance_proj(features).unflatten(-1, (self.num_heads, self.head_dim)).to(dtype) * self.head_dim**-0.25
        )

    def _observe(self, k: Tensor, codebook: Tensor, codes: Tensor, lengths: Tensor | None) -> None:
        """Gathers what `after_step` applies and the commitment loss, from the valid positions of a training pass."""
        if not (self.training and torch.is_grad_enabled()):
            return
        B, T, H, _ = k.shape
        valid = torch.ones(B, T, dtype=torch.bool, device=k.device) if lengths is None else valid_positions(lengths, T)
        nearest = codebook[torch.arange(H, device=k.device), codes]
        error = ((k - nearest).square().sum(-1) * valid[..., None]).sum()
        loss = self.commitment * error / valid.sum()
        if not self.recording():
            return
        self._auxiliary = loss
        with torch.no_grad():
            S = codebook.shape[1]
            member = (codes[..., None] == torch.arange(S, device=k.device)) & valid[..., None, None]  # [B, T, H, S]
            self.new_counts += member.sum((0, 1))
            self.new_sums += torch.einsum("bths,bthd->hsd", member.to(k.dtype), k)
            self.errors += torch.stack([error, (k.square().sum(-1) * valid[..., None]).sum()])

    @torch.no_grad()
    def after_step(self) -> None:
        """Moves each code towards the mean of the keys it stood for since the last call, over all ranks."""
        gathered = (self.new_counts, self.new_sums, self.errors)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for part in gathered:
                torch.distributed.all_reduce(part)
        self.code_counts.lerp_(self.new_counts.to(self.code_counts.dtype), 1 - self.ema)
        self.code_sums.lerp_(self.new_sums, 1 - self.ema)
        share = self.code_counts / self.code_counts.sum(-1, keepdim=True).clamp(min=1e-30)
        self._health = {
            "codebook_perplexity": torch.special.entr(share).sum(-1).exp().mean(),
            "codes_used": (self.new_counts > 0).float().mean(),
            "relative_error": (self.errors[0] / self.errors[1].clamp(min=1e-30)).sqrt(),
        }
        for part in gathered:
            part.zero_()

    def metrics(self) -> dict[str, float]:
        """Codebook health at the last step: perplexity of the codes, share of them used, |k - k̂| / |k|."""
        return {name: value.item() for name, value in self._health.items()}

    def _apply(self, fn: Any, recurse: bool = True) -> VQAttention:
        """Moves the block as `nn.Module` does, but keeps the running sums in single precision at least."""
        exact = {name: getattr(self, name) for name in ("code_counts", "code_sums", "new_sums", "errors")}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            now = getattr(self, name)
            if now.dtype != accumulation_dtype(now.dtype):
                setattr(self, name, before.to(now.device))
        return self
