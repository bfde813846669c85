"""Labels of Pathfinder images read off their pixels: is there a contour from one marker to the other?

The tracer knows what can be drawn (`seqzoo.tasks.pathfinder.strokes`) and nothing of how an image came about. It finds
the two markers, and from each follows every chain of paddles that the picture shows: a paddle may be there if all its
pixels are as bright as it would make them. The image says "connected" if a chain of the contour's length, begun at one
marker, ends exactly at the other. It errs where paddles of several contours happen to make up such a chain.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .parameters import Parameters
from .strokes import DEGREES, markers, moved, strokes

_BRIGHT = 0.4  # of a marker's pixels, those that tell it from its surroundings
_ROUNDING = 1.5  # of a pixel, and of the brightness of the whole image as the markers show it
_MOST_CHAINS = 4096


def connected(images: np.ndarray, parameters: Parameters) -> np.ndarray:
    """Whether the marked tips are of one contour, bool [N], for `images`, uint8 [N, size, size]."""
    tables = [strokes(parameters, margin) for margin in parameters.paddle_margins]
    disc = lone_marker(parameters)
    found = np.zeros(len(images), dtype=bool)
    for i, image in enumerate(images):
        places, brightness = locate_markers(image, disc)
        found[i] = any(
            _leads(image, table, start, end, parameters.contour_length, brightness)
            for table in tables
            for start, end in (places, places[::-1])
        )
    return found


def lone_marker(parameters: Parameters) -> np.ndarray:
    """A marker away from the borders, float64 [P, P]."""
    patches = markers(parameters)
    return patches[len(patches) // 2, len(patches) // 2]


@njit(nogil=True)
def locate_markers(image, disc):
    """The two places that look most like markers, int64 [2, 2], and the brightness of a marker, of 255."""
    size, half = len(image), len(disc) // 2
    likeness = np.zeros((size, size))
    for y in range(size):
        for x in range(size):
            least = 255.0
            for row in range(max(0, half - y), min(len(disc), half + size - y)):
                for column in range(max(0, half - x), min(len(disc), half + size - x)):
                    if disc[row, column] > _BRIGHT:
                        least = min(least, image[y + row - half, x + column - half] / disc[row, column])
            likeness[y, x] = least
    places = np.empty((2, 2), np.int64)
    brightness = 255.0
    for i in range(2):
        y, x = divmod(int(likeness.argmax()), size)
        places[i, 0], places[i, 1] = y, x
        brightness = min(brightness, likeness[y, x])
        likeness[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2] = 0
    return places, brightness


@njit(nogil=True)
def _leads(image, table, start, end, length, brightness):
    """Whether a chain of `length` paddles goes from one place to the other."""
    chains = np.empty((_MOST_CHAINS, 3), np.int64)  # of each, its last stroke and that one's pivot
    longer = np.empty((_MOST_CHAINS, 3), np.int64)
    count = 0
    for stroke in range(DEGREES):
        if _shows(image, table.targets[stroke], start[0], start[1], brightness):
            head_y, head_x = moved(start[0], start[1], table.heads[stroke])
            chains[count, 0] = stroke
            chains[count, 1], chains[count, 2] = moved(head_y, head_x, table.back[stroke])
            count += 1
    for n in range(1, length):
        extended = 0
        for i in range(count):
            stroke = chains[i, 0]
            y, x = moved(chains[i, 1], chains[i, 2], table.onward[stroke])
            for k in range(len(table.circle)):
                head_y, head_x = y + table.circle[k, 0], x + table.circle[k, 1]
                if table.weights[stroke, k] == 0 or not (0 <= head_y < len(image) and 0 <= head_x < len(image)):
                    continue
                if n == length - 1 and (head_y != end[0] or head_x != end[1]):
                    continue
                if not _shows(image, table.targets[DEGREES + k], head_y, head_x, brightness):
                    continue
                known = False
                for j in range(extended):
                    known |= longer[j, 0] == DEGREES + k and longer[j, 1] == y and longer[j, 2] == x
                if not known and extended < _MOST_CHAINS:
                    longer[extended, 0], longer[extended, 1], longer[extended, 2] = DEGREES + k, y, x
                    extended += 1
        chains, longer = longer, chains
        count = extended
    return count > 0


@njit(nogil=True)
def _shows(image, line, y, x, brightness):
    size, half = len(image), len(line) // 2
    for row in range(max(0, half - y), min(len(line), half + size - y)):
        for column in range(max(0, half - x), min(len(line), half + size - x)):
            if image[y + row - half, x + column - half] + _ROUNDING < line[row, column] * brightness:
                return False
    return True
