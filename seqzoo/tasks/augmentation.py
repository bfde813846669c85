"""Training examples changed at random into others with the same answer; `AUGMENTATIONS` says which task allows which.

- Pictures move by up to an eighth of their side, 4 pixels of 32, up or down and to a side. What comes in is level 0, as
  is usual on CIFAR-10 (He et al. 2016, "Deep Residual Learning for Image Recognition", section 4.2: pad by 4 pixels,
  crop the picture or its mirror image), and as the background of MNIST is. Half of them are mirrored left to right, but
  for digits, which would be others or none.
- Those of Pathfinder are mirrored, and do not move: contours reach to the border. Of 1,500 of 32 pixels a side, the
  tracer found 39 % of the connecting contours once they had moved by up to 4 pixels, and 80 % by up to 1.
- Of a text stays a window of at least half of its characters, closed by <eos> as the text was; of these, `NOISE` become
  others of the alphabet, all equally likely. Both texts of a pair are changed, each for itself.

ListOps, recall, language modelling and sound have none: there, a change like these is another answer, or none known.
Nor have permuted pictures, whose neighbours are not known.

A batch keeps its shape. What happens to it is decided by the seed alone.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from ..draws import uniform
from ..spec import Batch, TaskSpec
from .characters import SPECIALS
from .data import Augmentation

REACH = 1 / 8  # of a picture's side, how far it moves
NOISE = 0.03  # of a text's characters


def move(batch: Batch, spec: TaskSpec, *, seed: int, reach: float = REACH, mirror: bool = False) -> Batch:
    """Pictures of one pixel a position, row by row, moved by up to `reach` of their side and half of them mirrored, if
    `mirror`."""
    inputs = batch.inputs  # [B, T, channels]
    side = math.isqrt(spec.max_length)
    far = math.floor(reach * side)
    steps = torch.arange(side, device=inputs.device)
    down, right, mirrored = uniform((3, len(inputs), 1), seed, inputs.device)
    rows = steps + _below(down, 2 * far + 1) - far  # [B, side]: where what is shown there comes from
    columns = steps + _below(right, 2 * far + 1) - far
    if mirror:
        columns = torch.where(mirrored < 0.5, side - 1 - columns, columns)
    inside = ((rows >= 0) & (rows < side))[:, :, None] & ((columns >= 0) & (columns < side))[:, None, :]
    source = side * rows.clamp(0, side - 1)[:, :, None] + columns.clamp(0, side - 1)[:, None, :]
    moved = inputs.gather(1, source.flatten(1)[..., None].expand_as(inputs))
    return batch._replace(inputs=moved.masked_fill(~inside.flatten(1)[..., None], 0))


def crop(batch: Batch, spec: TaskSpec, *, seed: int) -> Batch:
    """Texts closed by <eos>, cut to a window in which some characters are others."""
    inputs, lengths = batch.inputs.flatten(0, -2), batch.lengths.flatten()  # of pairs, text by text
    steps = torch.arange(inputs.shape[1], device=inputs.device)
    drawn = uniform((len(inputs), 2 + 2 * len(steps)), seed, inputs.device)
    (shorter, later), (noise, others) = drawn[:, :2].split(1, 1), drawn[:, 2:].chunk(2, 1)
    characters = lengths[:, None] - 1
    window = characters - _below(shorter, characters // 2 + 1)
    start = _below(later, characters - window + 1)
    inside = steps < window
    cut = inputs.gather(1, torch.where(inside, start + steps, characters))  # <eos> stands behind the characters
    symbol = len(SPECIALS) + _below(others, spec.vocab_size - len(SPECIALS))
    cut = torch.where(inside & (noise < NOISE), symbol, torch.where(steps <= window, cut, spec.pad_id))
    return batch._replace(inputs=cut.view_as(batch.inputs), lengths=(window + 1).view_as(batch.lengths))


def _below(drawn: Tensor, n: Tensor | int) -> Tensor:
    """int64 from 0 up to `n`, which is left out, from numbers of `uniform`."""
    return (drawn * n).long().clamp(max=n - 1)


AUGMENTATIONS: dict[str, Augmentation] = {
    "acl_retrieval": crop,
    "lra_image": partial(move, mirror=True),
    "lra_pathfinder": partial(move, reach=0.0, mirror=True),
    "lra_pathx": partial(move, reach=0.0, mirror=True),
    "lra_pathx256": partial(move, reach=0.0, mirror=True),
    "lra_retrieval": crop,
    "lra_text": crop,
    "scifar": partial(move, mirror=True),
    "smnist": move,
}
