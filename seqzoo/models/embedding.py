from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks import Part
from ..blocks.wide import default_dtype
from ..kernels.common import can_be_looked_at
from ..kernels.documents import Documents
from ..spec import TaskSpec

POSITIONS = ("none", "sinusoidal", "learned")


class TokenEmbedding(nn.Module):
    """Ids [B, T] -> [B, T, d_model]; where `mask` [B, T] is true, the id is replaced by <mask>.

    Raises:
        ValueError: an id outside the vocabulary (checked on a CPU only: a GPU would have to wait for it).
    """

    def __init__(self, spec: TaskSpec, d_model: int) -> None:
        super().__init__()
        self.mask_id = spec.mask_id
        self.table = nn.Embedding(spec.vocab_size, d_model)

    @property
    def dtype(self) -> torch.dtype:
        return self.table.weight.dtype

    def forward(self, inputs: Tensor, mask: Tensor | None) -> Tensor:
        if inputs.numel() and can_be_looked_at(inputs):
            low, high = inputs.aminmax()
            size = self.table.num_embeddings
            if low < 0 or high >= size:
                worst = (high if high >= size else low).item()
                raise ValueError(f"token id {worst} is outside the vocabulary; valid: 0 to {size - 1}")
        if mask is not None and self.mask_id is not None:
            inputs = inputs.masked_fill(mask, self.mask_id)
        return self.table(inputs)


class PixelEmbedding(nn.Module):
    """Intensities [B, T, channels] -> [B, T, d_model], linear in the normalised values and a flag for masked positions.

    A masked position has value zero after normalisation, which is the mean, and its flag set.
    """

    def __init__(self, spec: TaskSpec, d_model: int) -> None:
        super().__init__()
        self.spec = spec
        self.proj = nn.Linear(spec.channels + 1, d_model)

    @property
    def dtype(self) -> torch.dtype:
        return self.proj.weight.dtype

    def normalise(self, inputs: Tensor) -> Tensor:
        """[B, T, channels] of integers -> what `proj` takes, of mean zero and unit variance over the data."""
        return self.spec.normalise(inputs).to(self.dtype)

    def forward(self, inputs: Tensor, mask: Tensor | None) -> Tensor:
        values = self.normalise(inputs)
        if mask is None:
            return self.proj(F.pad(values, (0, 1)))
        values = values.masked_fill(mask[..., None], 0)
        return self.proj(torch.cat([values, mask[..., None].to(values.dtype)], -1))


class Embedding(nn.Module):
    """The input of the first layer: tokens or pixels, and absolute positions if there are any.

    Args:
        position: "none", "sinusoidal" (Vaswani et al. 2017, section 3.5) or "learned".
    """

    def __init__(self, spec: TaskSpec, d_model: int, position: str) -> None:
        super().__init__()
        if position not in POSITIONS:
            raise ValueError(f"position={position!r}; valid: {', '.join(POSITIONS)}")
        self.d_model = d_model
        self.position = position
        self.max_length = spec.max_length
        self.inputs = TokenEmbedding(spec, d_model) if spec.kind == "tokens" else PixelEmbedding(spec, d_model)
        if position == "learned":
            self.learned = nn.Parameter(0.02 * torch.randn(spec.max_length, d_model))

    def forward(
        self,
        inputs: Tensor,
        mask: Tensor | None,
        documents: Documents | None = None,
        position: Tensor | None = None,
        lengths: Tensor | None = None,
        part: Part | None = None,
    ) -> Tensor:
        """What the first layer reads, [B, T, d_model].

        Args:
            inputs, mask: as of a `SequenceModel`.
            documents: where each begins anew, in a row.
            position: int64 [B], how many steps of each sequence are ahead of these; None: none.
            lengths: of sequences with a position, so that padding may lie past the last one that there is.
            part: what inputs and mask are of.

        Raises:
            ValueError: a sequence is longer than absolute positions are valid.
        """
        x = self.inputs(inputs, mask)
        if self.position == "none":
            return x
        if position is not None:
            return x + self._from(position, inputs.shape[1], lengths)
        T = inputs.shape[1] if part is None else part.T
        longest = T
        if documents is not None:
            longest = documents.longest if can_be_looked_at(documents.starts) else min(T, self.max_length)
        self.check_length(longest)
        table = self._table(longest, x.device)
        if part is not None:
            table = table[part.start : part.stop]
        return x + (table if documents is None else table[documents.positions()])

    def check_length(self, steps: int) -> None:
        """Raises ValueError where a sequence of so many is longer than absolute positions are valid."""
        if self.position != "none" and self.max_length < steps:
            raise ValueError(f"a sequence of {steps} steps; absolute positions are valid up to {self.max_length}")

    def _table(self, steps: int, device: torch.device) -> Tensor:
        """Of the first positions, [steps, d_model]."""
        if self.position == "learned":
            return self.learned[:steps]
        return sinusoids(steps, self.d_model, device=device).to(self.inputs.dtype)

    def _from(self, position: Tensor, T: int, lengths: Tensor | None) -> Tensor:
        """Of T steps behind the first `position`: [B, T, d_model]."""
        if can_be_looked_at(position) and len(position):
            self.check_length(int((position + (T if lengths is None else lengths)).max()))
        place = (position[:, None] + torch.arange(T, device=position.device)).clamp(max=self.max_length - 1)
        if self.position == "learned":
            return self.learned[place]
        return _sinusoids(place, self.d_model).to(self.inputs.dtype)


def sinusoids(length: int, d_model: int, *, device: torch.device | None = None) -> Tensor:
    """[length, d_model], in single precision at least, sines in the even channels and cosines in the odd ones."""
    return _sinusoids(torch.arange(length, device=device), d_model)


def _sinusoids(place: Tensor, d_model: int) -> Tensor:
    """[...] -> [..., d_model]."""
    frequency = 10_000.0 ** (-torch.arange(0, d_model, 2, device=place.device, dtype=default_dtype()) / d_model)
    angle = place[..., None] * frequency
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)[..., :d_model]
