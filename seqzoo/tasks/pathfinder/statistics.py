"""What can be measured on Pathfinder images, so that two sets of them can be held against each other."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from .parameters import Parameters
from .tracer import locate_markers, lone_marker

LIT = 20  # brighter pixels are drawn, darker ones the ripples that scaling down leaves around strokes


def measure(images: np.ndarray, parameters: Parameters) -> dict[str, np.ndarray]:
    """Numbers by name, float64 [N] each, of `images`, uint8 [N, size, size].

    Ink is the mean brightness; components are those of lit pixels that touch, also at corners; the largest is given in
    pixels, as is the distance between the markers; marker brightness is 255 where no line is brighter, and marker size
    is the number of pixels around the first that are at least as bright as the darkest of its core.
    """
    disc = lone_marker(parameters)
    half = len(disc) // 2
    rows = []
    for image in images:
        components, largest = _components(image > LIT)
        (first, second), brightness = locate_markers(image, disc)
        around = np.pad(image, half)[first[0] : first[0] + 2 * half + 1, first[1] : first[1] + 2 * half + 1]
        core = (disc > 0.98) & (around > 0)
        rows.append(
            {
                "ink": image.mean(),
                "lit_pixels": (image > LIT).sum(),
                "full_pixels": (image == 255).sum(),
                "components": components,
                "largest_component": largest,
                "marker_distance": math.dist(first, second),
                "marker_brightness": brightness,
                "marker_size": (around[disc > LIT / 255] >= around[core].min()).sum(),
                "row_centre": (image.mean(1) @ np.arange(len(image))) / image.mean(1).sum(),
                "column_centre": (image.mean(0) @ np.arange(len(image))) / image.mean(0).sum(),
            }
        )
    return {name: np.array([row[name] for row in rows], dtype=np.float64) for name in rows[0]}


def histogram(images: np.ndarray) -> np.ndarray:
    """The share of pixels of each brightness, float64 [256]."""
    return np.bincount(images.reshape(-1), minlength=256) / images.size


def largest_gap(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """The Kolmogorov-Smirnov statistic of two samples, and how likely one so large is if both are of one distribution.

    The probability is that of the asymptotic series, too high for values that repeat.
    """
    steps = np.union1d(a, b)
    a, b = np.sort(a), np.sort(b)
    gaps = np.searchsorted(a, steps, side="right") / len(a) - np.searchsorted(b, steps, side="right") / len(b)
    gap = float(np.abs(gaps).max())
    scaled = gap * math.sqrt(len(a) * len(b) / (len(a) + len(b)))
    if scaled < 0.2:
        return gap, 1.0  # where the series has not converged
    return gap, min(1.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * scaled) ** 2) for k in range(1, 101)))


@njit
def _components(lit):
    """How many components there are, and the pixels of the largest."""
    height, width = lit.shape
    seen = np.zeros(lit.shape, np.bool_)
    stack = np.empty((lit.size, 2), np.int64)
    count = largest = 0
    for y in range(height):
        for x in range(width):
            if not lit[y, x] or seen[y, x]:
                continue
            count += 1
            seen[y, x] = True
            stack[0, 0], stack[0, 1] = y, x
            top, pixels = 1, 0
            while top > 0:
                top -= 1
                row, column = stack[top, 0], stack[top, 1]
                pixels += 1
                for i in range(max(0, row - 1), min(height, row + 2)):
                    for j in range(max(0, column - 1), min(width, column + 2)):
                        if lit[i, j] and not seen[i, j]:
                            seen[i, j] = True
                            stack[top, 0], stack[top, 1] = i, j
                            top += 1
            largest = max(largest, pixels)
    return count, largest
