"""All that can be drawn in a Pathfinder image, as tables: paddles in every direction, where they lead, and the marker.

A contour's first paddle points in one of 360 whole degrees. Each further one starts near a pivot and ends on a pixel of
a circle around it, so there are only as many of those as the circle has pixels. Strokes are drawn `antialias_scale`
times too large by Pillow, as the original draws them, and scaled down with a Lanczos filter.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np
from numba import njit

from .parameters import Parameters

DEGREES = 360


class Strokes(NamedTuple):
    """The tables of one margin. Coordinates are (y, x). The first O - K = 360 of the O strokes are first paddles.

    A stroke's patch is centred on the tip it is placed by: the tail of a first paddle, the head of any other.
    """

    targets: np.ndarray  # float32 [O, P, P], brightness of a target's paddle, where a marker's is 1
    distractors: np.ndarray  # float32 [O, P, P], of a distractor's
    masks: np.ndarray  # uint8 [O, P, P], what is taken: the line and a margin around it
    core: np.ndarray  # int64 [360, C, 2], displacements from the tail that a first paddle needs free, padded ...
    core_sizes: np.ndarray  # int64 [360], ... and how many there are
    possible: np.ndarray  # bool [360], directions that a first paddle which needs room can have
    heads: np.ndarray  # float64 [360, 2], tail to head of a first paddle
    back: np.ndarray  # float64 [360, 2], from there to its pivot
    onward: np.ndarray  # float64 [O, 2], a paddle's pivot to the next one's
    circle: np.ndarray  # int64 [K, 2], a pivot to the pixels where its paddle may end
    weights: np.ndarray  # float64 [O, K], how much each of them is preferred after each stroke
    disc: np.ndarray  # int64 [D, 2], displacements within the margin


@cache
def strokes(parameters: Parameters, margin: int) -> Strokes:
    """The tables for one of `parameters.paddle_margins`."""
    length = parameters.paddle_length
    degrees = np.deg2rad(np.arange(-180, 180))
    circle = _circle(length + margin)
    directions = np.concatenate([degrees, np.arctan2(circle[:, 0], circle[:, 1])])
    drawn = np.concatenate([degrees, directions[DEGREES:] + np.pi])  # away from the tip a stroke is placed by
    patches = [_paddle(parameters, margin, direction) for direction in drawn]
    lines = np.stack([line for line, _ in patches]) / 255
    masks = np.stack([mask for _, mask in patches])
    cores = [_core(mask, length + margin) for mask in masks[:DEGREES]]
    core = np.zeros((DEGREES, max(map(len, cores)), 2), np.int64)
    for row, displacements in zip(core, cores, strict=True):
        row[: len(displacements)] = displacements

    turn = np.abs(directions[:, None] - directions[DEGREES:])
    turn = np.minimum(turn, 2 * np.pi - turn) * parameters.continuity
    return Strokes(
        targets=(lines * parameters.target_contrast).astype(np.float32),
        distractors=(lines * parameters.distractor_contrast).astype(np.float32),
        masks=masks,
        core=core,
        core_sizes=np.array([len(displacements) for displacements in cores]),
        possible=np.array([_stays_inside(displacements) for displacements in cores]),
        heads=_vectors(degrees, length),
        back=-_vectors(degrees, length + margin),
        onward=_vectors(directions, length + 2 * margin),
        circle=circle,
        weights=np.where(turn < np.pi / 2, np.cos(turn) ** 2, 0.0),
        disc=np.argwhere(_disc(margin)) - margin,
    )


@cache
def markers(parameters: Parameters) -> np.ndarray:
    """Brightness of a marker, float64 [P, P, P, P]: by the row and the column of the tip, patches of P x P pixels.

    P = 2 R + 1, and a tip in row and column R is away from every border. Near one the Lanczos filter has fewer pixels.
    """
    scale = parameters.antialias_scale
    reach = math.ceil(parameters.marker_radius) + 4  # the filter's is three pixels
    side = 2 * reach + 1
    y, x = np.ogrid[: side * scale, : side * scale]
    patches = np.empty((side, side, side, side))
    for row, column in np.ndindex(side, side):
        inside = (y - row * scale) ** 2 + (x - column * scale) ** 2 <= (parameters.marker_radius * scale) ** 2
        patches[row, column] = _scaled_down(np.where(inside, np.uint8(255), np.uint8(0)), side)
    return patches / 255


@njit(nogil=True)
def moved(y, x, displacement):
    """The pixel, (y, x), that a displacement [2] leads to from a pixel: coordinates are rounded up."""
    return np.int64(np.ceil(y + displacement[0])), np.int64(np.ceil(x + displacement[1]))


def _paddle(parameters: Parameters, margin: int, direction: float) -> tuple[np.ndarray, np.ndarray]:
    """Brightness and mask, uint8 [P, P] each, of a paddle from the centre pixel in `direction`, in radians."""
    from PIL import Image, ImageDraw

    scale = parameters.antialias_scale
    half = parameters.paddle_length + math.ceil(parameters.paddle_thickness) + margin
    side = 2 * half * scale + 1
    y, x = np.ceil(half * scale + _vectors(direction, parameters.paddle_length * scale)).astype(int).tolist()
    canvas = Image.new("L", (side, side))
    width = round(parameters.paddle_thickness * scale)
    ImageDraw.Draw(canvas).line([(half * scale, half * scale), (x, y)], fill=255, width=width)
    line = np.asarray(canvas)
    return _scaled_down(line, 2 * half + 1), _scaled_down(_dilated(line, margin * scale), 2 * half + 1)


def _core(mask: np.ndarray, reach: int) -> np.ndarray:
    """Where a paddle must not meet anything, int64 [C, 2]: its full mask within `reach`, a pixel down and to the right.

    The shift is the original's, which takes the patch's centre to be one further than it is.
    """
    displacements = np.argwhere(mask == 255) - mask.shape[0] // 2 + 1
    return displacements[np.abs(displacements).max(1) <= reach]


def _stays_inside(core: np.ndarray) -> bool:
    """Whether some of the core is in the image wherever the tail is, in each of its corners too.

    Where nothing of it is, OpenCV's dilation is -infinity, which the original takes for an image without any room.
    """
    corners = (np.array(corner) for corner in ((-1, -1), (-1, 1), (1, -1), (1, 1)))
    return not any((core * corner >= 1).any(1).all() for corner in corners)


def _circle(radius: int) -> np.ndarray:
    """The pixels of a circle around a pixel, int64 [K, 2], each once: points an arc of a pixel apart, rounded down."""
    angles = np.deg2rad(np.arange(0, 360, 360 / (2 * np.pi * radius)))
    return np.unique(np.floor(_vectors(angles, radius).round(9)).astype(np.int64), axis=0)


def _vectors(directions: np.ndarray | float, length: float) -> np.ndarray:
    return length * np.stack([np.sin(directions), np.cos(directions)], axis=-1)


def _disc(radius: int) -> np.ndarray:
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    return y**2 + x**2 <= radius**2


def _dilated(image: np.ndarray, radius: int) -> np.ndarray:
    """The largest value within `radius` of each pixel."""
    dilated = np.zeros_like(image)
    padded = np.pad(image, radius)
    height, width = image.shape
    for y, x in np.argwhere(_disc(radius)):
        np.maximum(dilated, padded[y : y + height, x : x + width], out=dilated)
    return dilated


def _scaled_down(image: np.ndarray, side: int) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS))
