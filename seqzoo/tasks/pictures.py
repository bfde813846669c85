"""Tasks of published pictures, read pixel by pixel from the top left; validation is held out from those of training.

Smaller ones, of `max_length` pixels, are means of squares of pixels, rounded to whole levels. In a permuted task pixels
stand in one random order, the same in every picture, so that neighbours in time are none in the picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..spec import TaskSpec
from .config import TaskConfig
from .data import Task, assemble, hold_out, split_arrays
from .store.cache import Stored, cached

ORDER_SEED = 0  # of the one order that permuted tasks have


class Pictures(NamedTuple):
    pixels: np.ndarray  # uint8 [N, num_pixels], or [N, num_pixels, channels]
    labels: np.ndarray  # int64 [N]


def build(
    config: TaskConfig,
    read: Callable[[], tuple[Pictures, Pictures]],
    *,
    num_pixels: int,
    num_classes: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    source: str,
    cache_dir: Path,
) -> Task:
    """A task of pictures, one pixel a position; validation is a stratified part of training.

    Args:
        read: gives the pictures to train on and those to test on; not called where the task is in the cache.
        mean, std: of each channel, of 1.
        source: what `read` reads, for the manifest.

    Raises:
        DataError: as `read` does.
        ValueError: a key of `config` is missing, does not belong to this task, or asks for a number of pixels that
            pictures of `num_pixels` cannot be made into.
    """
    settings = config.settings("val_fraction", "split_seed", optional=("permuted",))
    length, permuted = config.max_length, settings.pop("permuted")
    full, side = math.isqrt(num_pixels), math.isqrt(length)
    if side * side != length or full % side:
        smaller = ", ".join(str(n * n) for n in range(full // 2, 1, -1) if full % n == 0)
        raise ValueError(
            f"task {config.name}: max_length is {length}; a picture has {num_pixels} pixels; valid: {num_pixels}, or "
            f"{smaller} for smaller pictures"
        )
    request, notes = dict(settings), []
    if side != full:
        request["side"] = side
        notes.append(f"pictures of {side} x {side}")
    if permuted:
        request["permuted"] = True
        notes.append("pixels in one random order")

    def prepare(work: Path) -> Stored:
        trained, tested = (_arranged(pictures, side, permuted) for pictures in read())
        train, val = hold_out(trained.labels, settings["val_fraction"], settings["split_seed"])
        arrays = {
            **split_arrays("train", trained.pixels[train], trained.labels[train], np.uint8),
            **split_arrays("val", trained.pixels[val], trained.labels[val], np.uint8),
            **split_arrays("test", *tested, np.uint8),
        }
        return Stored(arrays, {}, source)

    stored = cached(cache_dir, config.name, request, prepare)
    spec = TaskSpec(
        name=config.name,
        kind="pixels",
        vocab_size=256,
        max_length=length,
        num_classes=num_classes,
        channels=len(mean),
        mean=mean,
        std=std,
        mask_ratio=config.mask_ratio,
    )
    return assemble(spec, stored.arrays, note=", ".join(notes))


def _arranged(pictures: Pictures, side: int, permuted: bool | None) -> Pictures:
    """Pictures of `side` x `side` pixels made of larger ones or as large, in their order or the permuted one."""
    pixels = pictures.pixels
    if side * side != pixels.shape[1]:
        pixels = shrink(pixels, side)
    if permuted:
        order = torch.randperm(pixels.shape[1], generator=torch.Generator().manual_seed(ORDER_SEED))
        pixels = pixels[:, order.numpy()]
    return pictures._replace(pixels=pixels)


def shrink(pixels: np.ndarray, side: int) -> np.ndarray:
    """Means of squares, halves rounded up: uint8 [N, T, ...] -> uint8 [N, side * side, ...]."""
    from einops import rearrange

    factor = math.isqrt(pixels.shape[1]) // side
    sizes = {"row": side, "column": side, "down": factor, "right": factor}
    squares = rearrange(pixels, "n (row down column right) ... -> n (row column) (down right) ...", **sizes)
    return ((squares.sum(2, dtype=np.uint32) + factor * factor // 2) // (factor * factor)).astype(np.uint8)
