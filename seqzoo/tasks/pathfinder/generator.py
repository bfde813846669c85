"""Pathfinder images (Linsley et al. 2018, Kim et al. 2020): two winding dashed contours, shorter ones, two marked tips.

The label says whether the marked tips are the two ends of one contour. The contours grow in lockstep, paddle by paddle,
each turning at random but not onto what has been drawn; should one of them find no way, both are drawn anew. Then come
distractors, up to five attempts each, and the markers. What is published, and how its gaps are filled, stands in
`seqzoo.tasks.pathfinder.parameters`. Three habits of the original are kept, since its images show them:

- A contour's newest paddle is not yet in the mask that others avoid, so paddles that grow in the same step may cross,
  and distractors may cross the last paddle of the first contour.
- Coordinates are rounded up, but the circle's pixels down, which lets contours drift towards the upper left.
- A first paddle that needs room can only have directions in which some of that room is in the image wherever it starts.
  At 32 x 32 these are a twelfth of all, to the upper left, and leave 1.1 of 5 distractors on average; at 64 x 64 they
  are a quarter, from 128 x 128 on nearly all.

The work is cut into shards of a fixed number of images, each with a random stream of its own: a seed gives the same
images on any number of workers. Workers are threads: the compiled loop holds no interpreter lock.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import njit

from ..store.random_stream import below, stream, uniform
from ..store.shards import fill, num_shards
from .parameters import Parameters
from .strokes import DEGREES, markers, moved, strokes

PADDLE_TRIALS = 3  # for a paddle that meets what has been drawn, or a first one that leaves the image
DISTRACTOR_TRIALS = 5

_FULL = 255  # of a mask
_OVERLAP = 459  # 1.8 of a mask: two strokes may share so much and no more
_FREE = 76  # 0.3 of a mask
_ROOM = 0.01  # share of the image that must be free for another distractor
_DEAD_END = 1e-4


def generate(
    parameters: Parameters,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    seed: tuple[int, ...],
    workers: int | None,
    done: np.ndarray | None = None,
    finished: Callable[[int], object] = lambda images: None,
) -> None:
    """Fill `images` and `labels`.

    Args:
        images: uint8 [N, size, size], written to; may be memory-mapped.
        labels: int64 [N], written to: 1 where the marked tips are of one contour.
        seed: integers from 0; every tuple is a stream of its own.
        workers: how many threads, None for one a core; the images do not depend on it.
        done: see `seqzoo.tasks.store.shards.fill`; None fills everything.
        finished: called with the number of new images whenever there are some.
    """
    tables = tuple(strokes(parameters, margin) for margin in parameters.paddle_margins)
    discs = markers(parameters)

    def write(shard: int, rows: slice) -> None:
        drawn = np.empty(images[rows].shape, np.uint8)
        labels[rows] = _draw_shard(
            stream(*seed, shard),
            drawn,
            tables,
            discs,
            parameters.contour_length,
            parameters.distractor_length,
            parameters.num_distractors,
            parameters.seed_distance,
            parameters.padding,
        )
        images[rows] = drawn

    done = np.zeros(num_shards(len(images)), dtype=bool) if done is None else done
    fill(write, (images, labels), done, workers=workers, finished=finished)


@njit(nogil=True)
def _draw_shard(
    state,
    images,
    tables,
    discs,
    contour_length,
    distractor_length,
    num_distractors,
    seed_distance,
    padding,
):
    """Fill `images` and return their labels, int64 [N]."""
    size = images.shape[1]
    labels = np.empty(len(images), np.int64)
    mask = np.empty((size, size), np.uint8)
    before = np.empty_like(mask)
    brightness = np.empty((size, size))
    targets = np.empty((2, contour_length, 3), np.int64)
    distractor = np.empty((distractor_length, 3), np.int64)
    pivots = np.empty((2, 2), np.int64)
    for i in range(len(images)):
        labels[i] = below(state, 2)
        table = tables[below(state, len(tables))]
        while not _grow_targets(state, table, mask, targets, pivots, seed_distance, padding):
            pass
        brightness[:] = 0
        for contour in targets:
            _draw_contour(brightness, table.targets, contour)

        for _ in range(num_distractors):
            for _ in range(DISTRACTOR_TRIALS):
                before[:] = mask
                if _grow_distractor(state, table, mask, distractor, pivots[0]):
                    _draw_contour(brightness, table.distractors, distractor)
                    break
                mask[:] = before

        first = below(state, 2)
        second = first if labels[i] == 1 else 1 - first
        for tip in (targets[first, 0], targets[second, -1]):
            _draw_marker(brightness, discs, tip[1], tip[2])
        stretch = _FULL / brightness.max()
        for y in range(size):
            for x in range(size):
                images[i, y, x] = np.uint8(brightness[y, x] * stretch + 0.5)
    return labels


@njit(nogil=True)
def _grow_targets(state, table, mask, contours, pivots, seed_distance, padding):
    """Grow two contours into `contours`, int64 [2, n, 3] (stroke, y, x), and `mask`; False where there is no way on."""
    size = len(mask)
    mask[:] = 0
    mask[:padding] = mask[size - padding :] = _FULL
    mask[:, :padding] = mask[:, size - padding :] = _FULL
    if not _place_first(state, table, mask, 2 * seed_distance, contours[0], pivots[0]):
        return False
    for trial in range(PADDLE_TRIALS):
        stroke = below(state, DEGREES)
        angle = below(state, 360) * np.pi / 180
        y = np.int64(np.rint(contours[0, 0, 1] + seed_distance * np.sin(angle)))
        x = np.int64(np.rint(contours[0, 0, 2] + seed_distance * np.cos(angle)))
        if _fits(table, size, stroke, y, x, contours[1], pivots[1]):
            break
        if trial == PADDLE_TRIALS - 1:
            return False
    for n in range(1, contours.shape[1]):
        for c in range(2):
            if not _extend(state, table, mask, contours[c], n, pivots[c]):
                return False
    last = contours[1, -1]
    _lighten(mask, table.masks[last[0]], last[1], last[2])
    return True


@njit(nogil=True)
def _grow_distractor(state, table, mask, contour, pivot):
    """Grow one contour into `contour`, int64 [n, 3], and `mask`; False where there is no room or no way on."""
    if (mask <= _FREE).sum() < _ROOM * mask.size:
        return False
    if not _place_first(state, table, mask, 1, contour, pivot):
        return False
    for n in range(1, len(contour)):
        if not _extend(state, table, mask, contour, n, pivot):
            return False
    last = contour[-1]
    _lighten(mask, table.masks[last[0]], last[1], last[2])
    return True


@njit(nogil=True)
def _place_first(state, table, mask, border, contour, pivot):
    """A first paddle in a random direction, where its core meets neither `mask` nor the outer `border` pixels.

    Any such place is as likely; as many are tried as there are pixels, so only the very last may be missed.
    """
    size = len(mask)
    for _ in range(PADDLE_TRIALS):
        stroke = below(state, DEGREES)
        if not table.possible[stroke]:
            return False
        core = table.core[stroke, : table.core_sizes[stroke]]
        for _ in range(mask.size):
            y, x = below(state, size), below(state, size)
            if _is_free(mask, core, y, x, border):
                break
        else:
            return False
        if _fits(table, size, stroke, y, x, contour, pivot):
            return True
    return False


@njit(nogil=True)
def _is_free(mask, core, y, x, border):
    size = len(mask)
    for i in range(len(core)):
        row, column = y + core[i, 0], x + core[i, 1]
        if 0 <= row < size and 0 <= column < size:
            inside = border <= row < size - border and border <= column < size - border
            if not inside or mask[row, column] > _FREE:
                return False
    return True


@njit(nogil=True)
def _fits(table, size, stroke, y, x, contour, pivot):
    """Begin `contour` with a stroke whose tail is (y, x), if its head and its pivot are in the image."""
    head_y, head_x = moved(y, x, table.heads[stroke])
    pivot[0], pivot[1] = moved(head_y, head_x, table.back[stroke])
    contour[0, 0], contour[0, 1], contour[0, 2] = stroke, y, x
    return 0 <= head_y < size and 0 <= head_x < size and 0 <= pivot[0] < size and 0 <= pivot[1] < size


@njit(nogil=True)
def _extend(state, table, mask, contour, n, pivot):
    """Append paddle `n`; the paddle before it enters `mask`."""
    size = len(mask)
    circle, preference, disc = table.circle, table.weights, table.disc
    stroke, y, x = contour[n - 1]
    pivot[0], pivot[1] = moved(pivot[0], pivot[1], table.onward[stroke])
    ladder = np.empty(len(circle))  # cumulative weights
    total = 0.0
    for k in range(len(circle)):
        weight = preference[stroke, k]
        row, column = pivot[0] + circle[k, 0], pivot[1] + circle[k, 1]
        if weight > 0 and 0 <= row < size and 0 <= column < size:
            total += weight * (_FULL - _largest(mask, row, column, disc)) / _FULL
        ladder[k] = total
    if total < _DEAD_END:
        return False
    for _ in range(PADDLE_TRIALS):
        drawn = uniform(state) * total
        k = 0
        while k + 1 < len(ladder) and ladder[k] <= drawn:
            k += 1
        head_y, head_x = pivot[0] + circle[k, 0], pivot[1] + circle[k, 1]
        if not _overlaps(mask, table.masks[DEGREES + k], head_y, head_x):
            _lighten(mask, table.masks[stroke], y, x)
            contour[n, 0], contour[n, 1], contour[n, 2] = DEGREES + k, head_y, head_x
            return True
    return False


@njit(nogil=True)
def _largest(mask, y, x, disc):
    size = len(mask)
    largest = 0
    for i in range(len(disc)):
        row, column = y + disc[i, 0], x + disc[i, 1]
        if 0 <= row < size and 0 <= column < size:
            largest = max(largest, mask[row, column])
    return largest


@njit(nogil=True)
def _overlaps(mask, patch, y, x):
    under, patch = _overlay(mask, patch, y, x)
    largest = 0
    for row in range(under.shape[0]):
        for column in range(under.shape[1]):
            largest = max(largest, np.int64(under[row, column]) + patch[row, column])
    return largest >= _OVERLAP


@njit(nogil=True)
def _draw_contour(brightness, lines, contour):
    for i in range(len(contour)):
        _lighten(brightness, lines[contour[i, 0]], contour[i, 1], contour[i, 2])


@njit(nogil=True)
def _draw_marker(brightness, discs, y, x):
    size, reach = len(brightness), len(discs) // 2
    row, column = max(min(y, reach), 2 * reach + 1 - size + y), max(min(x, reach), 2 * reach + 1 - size + x)
    _lighten(brightness, discs[row, column], y - row + reach, x - column + reach)


@njit(nogil=True)
def _lighten(image, patch, y, x):
    """Make `image` at least as bright as `patch`, centred on (y, x)."""
    under, patch = _overlay(image, patch, y, x)
    for row in range(under.shape[0]):
        for column in range(under.shape[1]):
            under[row, column] = max(under[row, column], patch[row, column])


@njit(nogil=True)
def _overlay(image, patch, y, x):
    """The parts of `image` and of `patch`, centred on (y, x), that lie on each other."""
    size, half = len(image), len(patch) // 2
    top, left = y - half, x - half
    rows, columns = slice(max(0, top), min(size, y + half + 1)), slice(max(0, left), min(size, x + half + 1))
    return image[rows, columns], patch[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
