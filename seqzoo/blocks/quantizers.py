"""Keys to codes and back, for attention over quantised keys.

A quantizer maps keys [B, T, H, D] to `Quantized`: the keys to take the straight-through gradient, the codebook, and the
index of the code that stands for each key.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import nearest_code
from ..kernels.common import valid_positions, without_autocast, zero_padding
from .wide import Wide, default_dtype, widened

SAMPLE = 4096  # keys per head kept of a training pass, to start or restart codes from
LLOYD_STEPS = 10


class Quantized(NamedTuple):
    keys: Tensor  # [B, T, H, D]
    codebook: Tensor  # [H, S, D]
    codes: Tensor  # int64 [B, T, H]
    loss: Tensor | None  # scalar, to be added to the training loss


class VectorQuantizer(Wide):
    """The nearest of S learned vectors per head, each the running mean of the keys it stood for (Lingle 2024).

    Running sums and counts are in single precision at least; new counts are integers.

    Args:
        num_heads, size, dim: H, S, D.
        length: the length of keys; codes start as long. (The authors' start near zero, from where most are never used.)
        ema: share of a code's running count and sum that a step keeps.
        commitment: weight of the loss |k - code|², averaged over valid positions and summed over heads.
        start: "random" directions, or "kmeans": k-means over keys of the first step, from k-means++ seeds.
        restart: after a step, codes whose running count is below this are placed on keys of that step; 0: never.
    """

    counts: Tensor
    sums: Tensor

    def __init__(
        self,
        num_heads: int,
        size: int,
        dim: int,
        *,
        length: float,
        ema: float,
        commitment: float,
        start: str,
        restart: float,
    ) -> None:
        super().__init__()
        if not 0 <= ema < 1:
            raise ValueError(f"ema={ema}; valid: 0 <= ema < 1")
        if start not in ("random", "kmeans"):
            raise ValueError(f"codebook_start={start!r}; valid: random, kmeans")
        if restart < 0:
            raise ValueError(f"restart={restart}; valid: 0 or more")
        self.ema, self.commitment, self.restart = ema, commitment, restart
        dtype = default_dtype()
        self.register_buffer("counts", torch.ones(num_heads, size, dtype=dtype))
        directions = F.normalize(torch.randn(num_heads, size, dim, dtype=dtype), dim=-1)
        self.register_buffer("sums", directions * length)
        self._gather_anew()
        self.started = start == "random"
        self._samples_keys = start == "kmeans" or restart > 0
        self._sample: Tensor | None = None  # [H, n, D]
        self._sampled = torch.zeros(())  # of how many keys
        self._health: dict[str, Tensor] = {}

    @property
    def codebook(self) -> Tensor:
        """[H, S, D]."""
        return self.sums / self.counts.clamp(min=0.01)[..., None]

    def forward(self, k: Tensor, lengths: Tensor | None, *, record: bool) -> Quantized:
        """`k` [B, T, H, D] in single precision or more; with `record`, the pass counts for the next `after_step`."""
        codebook = self.codebook.to(k.dtype)
        codes = nearest_code(k, codebook)
        if not (self.training and torch.is_grad_enabled()):
            return Quantized(k, codebook, codes, None)
        B, T, H, _ = k.shape
        valid = torch.ones(B, T, dtype=torch.bool, device=k.device) if lengths is None else valid_positions(lengths, T)
        row = torch.arange(H, device=k.device) * codebook.shape[1] + codes  # [B, T, H], of all heads' codes
        error = (_squared_norm(k - F.embedding(row, codebook.flatten(0, 1))) * valid[..., None]).sum()
        if record:
            self._settle()
            with torch.no_grad():
                present = valid[..., None].expand_as(codes)
                self.new_counts.view(-1).index_add_(0, row.flatten(), present.flatten().to(self.new_counts.dtype))
                shown = zero_padding(k, lengths).to(self.new_sums.dtype)
                self.new_sums.flatten(0, 1).index_add_(0, row.flatten(), shown.flatten(0, 2))
                size = (_squared_norm(k) * present).sum()
                self.errors += torch.stack([error, size]).to(self.errors.dtype)
                if self._samples_keys and B:
                    # Valid positions at even distances. Not at random: a pass recomputed in backward takes no sample,
                    # and has to draw the same dropout as this one.
                    n = min(SAMPLE, B * T)
                    self._sampled = valid.sum()
                    chosen = torch.arange(n, device=k.device) * self._sampled // n
                    order = (~valid).flatten().int().argsort(stable=True)[chosen]
                    self._sample = k.flatten(0, 1)[order].transpose(0, 1).to(self.sums.dtype)
        return Quantized(k, codebook, codes, self.commitment * error / valid.sum().clamp(min=1))

    @torch.no_grad()
    def after_step(self) -> None:
        """Moves each code towards the mean of the keys it stood for since the last call, over all ranks."""
        self._settle()
        gathered = (self.new_counts, self.new_sums, self.errors)
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed:
            for part in gathered:
                torch.distributed.all_reduce(part)
        if self._sample is not None and not self.started and self._sampled:
            with without_autocast(self.sums.device):
                self.sums.copy_(kmeans(self._sample, self.sums.shape[1]))
            self.started = True
        else:
            self.counts.lerp_(self.new_counts.to(self.counts.dtype), 1 - self.ema)
            self.sums.lerp_(self.new_sums, 1 - self.ema)
            if self.restart and self._sample is not None:
                self._place_dead_codes(self._sample, self._sampled > 0)
        if distributed and self._samples_keys:  # samples differ between ranks
            for part in (self.counts, self.sums):
                torch.distributed.broadcast(part, 0)
        self._sample = None
        share = self.counts / self.counts.sum(-1, keepdim=True).clamp(min=1e-30)
        self._health = {
            "codebook_perplexity": torch.special.entr(share).sum(-1).exp().mean(),
            "codes_used": (self.new_counts > 0).float().mean(),
            "relative_error": (self.errors[0] / self.errors[1].clamp(min=1e-30)).sqrt(),
        }
        for part in gathered:
            part.zero_()

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.started)

    def set_extra_state(self, state: Tensor) -> None:
        self.started = bool(state)

    def _place_dead_codes(self, sample: Tensor, is_any: Tensor) -> None:
        H, S, _ = self.sums.shape
        chosen = torch.randint(sample.shape[1], (H, S), device=sample.device)
        fresh = sample[torch.arange(H, device=sample.device)[:, None], chosen]  # [H, S, D]
        dead = (self.counts < self.restart) & is_any
        self.sums.copy_(torch.where(dead[..., None], fresh, self.sums))
        self.counts.masked_fill_(dead, 1.0)

    def health(self) -> dict[str, float]:
        """At the last step: perplexity of the codes and the share of them used (means of heads), |k - code| / |k|."""
        return {name: value.item() for name, value in self._health.items()}

    def _gather_anew(self) -> None:
        """Plain tensors, not buffers: what no file holds, loaders leave unwritten."""
        self.new_counts = torch.zeros_like(self.counts, dtype=torch.int64)
        self.new_sums = torch.zeros_like(self.sums)
        self.errors = self.sums.new_zeros(2)  # sums of |k - code|² and |k|²

    def _settle(self) -> None:
        """Gathers where the codebook is, and as it is: it may have been moved, cast, or loaded over the meta device."""
        if (self.new_sums.device, self.new_sums.dtype) != (self.sums.device, self.sums.dtype):
            self._gather_anew()

    def _apply(self, fn: Any, recurse: bool = True) -> VectorQuantizer:
        super()._apply(fn, recurse)
        self._settle()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sample": None}


class FiniteScalarQuantizer(nn.Module):
    """A grid in a few learned directions: z = σ(k W) rounded to `levels` steps an axis, keys and codes W'(z) (FSQ).

    As many axes as the grid's points stay within `size`. No codebook is learned and there is no loss of its own.

    Args:
        num_heads, size, dim: H, the largest number of codes, D.
        length: the length of keys, and of the codes at the corners of the grid to begin with.
        levels: steps per axis, 5 or more as recommended.

    Source: Mentzer et al., "Finite Scalar Quantization" (2023), in the sigmoid form of Su, post 9826.
    """

    def __init__(self, num_heads: int, size: int, dim: int, *, length: float, levels: int = 5) -> None:
        super().__init__()
        if size < levels:
            raise ValueError(f"codebook_size={size}; valid with quantizer=fsq: {levels} or more")
        axes = 1
        while levels ** (axes + 1) <= size:
            axes += 1
        self.levels = levels
        self.down = nn.Parameter(torch.randn(num_heads, dim, axes) * 2 / length)
        self.up = nn.Parameter(F.normalize(torch.randn(num_heads, axes, dim), dim=-1) * length / axes**0.5)

    @property
    def codebook(self) -> Tensor:
        """[H, S, D], every point of the grid, the last axis fastest."""
        up = self.up.to(widened(self.up.dtype))
        point = torch.arange(self.levels ** up.shape[1], device=up.device)[:, None]
        grid = point // self._place_values(up.device) % self.levels  # [S, axes]
        return torch.einsum("sa,had->hsd", 2 * grid.to(up.dtype) / (self.levels - 1) - 1, up)

    def _place_values(self, device: torch.device) -> Tensor:
        """levels^(axes - 1) down to 1, what a step along each axis adds to a code."""
        return self.levels ** torch.arange(self.up.shape[1] - 1, -1, -1, device=device)

    def forward(self, k: Tensor, lengths: Tensor | None, *, record: bool) -> Quantized:
        """`k` [B, T, H, D]."""
        top = self.levels - 1
        z = torch.einsum("bthd,hda->btha", k, self.down.to(k.dtype)).sigmoid() * top  # [B, T, H, axes]
        codes = (z.detach().round().long() * self._place_values(k.device)).sum(-1)
        keys = torch.einsum("btha,had->bthd", 2 * z / top - 1, self.up.to(k.dtype))
        return Quantized(keys, self.codebook.to(k.dtype), codes, None)

    def after_step(self) -> None:
        """Nothing is learned beside the gradient."""

    def health(self) -> dict[str, float]:
        return {}


def _squared_norm(x: Tensor) -> Tensor:
    """|x|² over the last axis. Other than square and sum, makes no tensor of x's size, forward or backward."""
    return torch.linalg.vector_norm(x, dim=-1).square()


def kmeans(points: Tensor, k: int) -> Tensor:
    """`k` centres of each head's `points` [H, n, D], from k-means++ seeds and Lloyd steps: [H, k, D].

    Source: Arthur and Vassilvitskii (2007); Lloyd (1982).
    """
    H, n, _ = points.shape
    heads = torch.arange(H, device=points.device)
    centres = points[heads, torch.randint(n, (H,), device=points.device)][:, None]
    nearest = torch.full((H, n), torch.inf, device=points.device, dtype=points.dtype)
    for _ in range(k - 1):
        nearest = torch.minimum(nearest, (points - centres[:, -1:]).square().sum(-1))
        chosen = torch.multinomial(nearest.clamp(min=1e-12), 1)[:, 0]
        centres = torch.cat([centres, points[heads, chosen][:, None]], 1)
    for _ in range(LLOYD_STEPS):
        member = F.one_hot(torch.cdist(points, centres).argmin(-1), k).to(points.dtype)  # [H, n, k]
        counts = member.sum(1)[..., None]
        centres = torch.where(counts > 0, member.mT @ points / counts.clamp(min=1), centres)
    return centres
