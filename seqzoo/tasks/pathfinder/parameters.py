"""What shapes a Pathfinder image, and the values Long Range Arena was made with.

Sources: drewlinsley/pathfinder at ab9c130 (`snakes2.py` and its wrapper), and what google-research/long-range-arena
changes of it for each size, in the docstrings of `lra_benchmarks/data/pathfinder.py`. Where they leave something open:

- The docstrings give lengths and numbers of distractors for contours of 14 paddles alone, by divisions that are of
  Python 2: a third of the contour's length, and a fixed number of paddles over that third. They hold for the other
  lengths too. (The wrapper script keeps the number it computed for contours of 6; the released 256 x 256 images show
  7 distractors of 4 paddles, which is 30 // 4 and not 30 // 2.)
- What the docstrings do not name is as in the wrapper script: `padding` and `seed_distance` at 256 x 256, and
  `paddle_length` but for 32 x 32.
- The contrast of distractors is the contour's, that of targets the contour's times the paddle's, and that of markers
  1, as the code has it. Each image is then stretched to 0 ... 255: at 32 x 32, with 2 and 0.75, distractors are the
  brightest, and markers are 255 only where there is none brighter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

DIFFICULTIES = {"curv_baseline": 6, "curv_contour_length_9": 9, "curv_contour_length_14": 14}  # paddles in a contour


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Lengths are in pixels unless they count paddles. The defaults are what all published sizes share.

    Raises:
        ValueError: a value is out of range, or contours of such a size cannot fit into the image.
    """

    size: int  # of the square image, window_size
    seed_distance: int  # between the two contours' first tips, and half the distance of the first from the border
    marker_radius: float
    paddle_length: int
    paddle_thickness: float  # times `antialias_scale` a whole number
    paddle_margins: tuple[int, ...]  # half the gap between paddles; one is drawn for each image
    continuity: float  # how straight contours are: a turn of 90 degrees / continuity and more is impossible
    num_distractors: int  # fewer where there is no room
    contour_length: int  # paddles in a target
    distractor_length: int  # paddles in a distractor
    padding: int = 1  # width of the border that is kept free
    antialias_scale: int = 2  # how much larger strokes are drawn before they are scaled down
    target_contrast: float = 1.0  # brightness where a marker's is 1
    distractor_contrast: float = 1.0

    def __post_init__(self) -> None:
        for name in (
            "size",
            "seed_distance",
            "paddle_length",
            "contour_length",
            "distractor_length",
            "antialias_scale",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"Pathfinder: {name} is {getattr(self, name)}; valid: 1 and more")
        for name in ("num_distractors", "padding"):
            if getattr(self, name) < 0:
                raise ValueError(f"Pathfinder: {name} is {getattr(self, name)}; valid: 0 and more")
        for name in ("marker_radius", "paddle_thickness", "continuity", "target_contrast", "distractor_contrast"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Pathfinder: {name} is {getattr(self, name)}; valid: above 0")
        if not self.paddle_margins or min(self.paddle_margins) < 1:
            raise ValueError(
                f"Pathfinder: paddle_margins are {self.paddle_margins}; valid: one or more, each 1 and more"
            )
        if self.paddle_thickness * self.antialias_scale % 1:
            raise ValueError(
                f"Pathfinder: paddle_thickness {self.paddle_thickness} times antialias_scale {self.antialias_scale} is "
                "no whole number of pixels; valid: multiples of 1 / antialias_scale"
            )
        if self.size <= 4 * self.seed_distance or self.size <= 2 * self.padding:
            raise ValueError(
                f"Pathfinder: size {self.size} leaves no room with seed_distance {self.seed_distance} and padding "
                f"{self.padding}; valid: above four times the one and twice the other"
            )


# size: parameters of contours of any length, and how many paddles the distractors have in all
_PUBLISHED: dict[int, tuple[dict[str, Any], int]] = {
    32: (
        dict(
            seed_distance=7,
            marker_radius=1.5,
            paddle_length=2,
            paddle_thickness=0.5,
            paddle_margins=(1,),
            continuity=1.0,
            target_contrast=2 * 0.75,
            distractor_contrast=2.0,
        ),
        20,
    ),
    64: (
        dict(
            seed_distance=12,
            marker_radius=2.5,
            paddle_length=5,
            paddle_thickness=1.0,
            paddle_margins=(1,),
            continuity=1.8,
            target_contrast=0.8,
            distractor_contrast=0.8,
        ),
        22,
    ),
    128: (
        dict(
            seed_distance=20,
            marker_radius=3.0,
            paddle_length=5,
            paddle_thickness=1.5,
            paddle_margins=(2, 3),
            continuity=1.8,
            target_contrast=0.9,
            distractor_contrast=0.9,
        ),
        35,
    ),
    256: (
        dict(
            seed_distance=27,
            marker_radius=5.0,
            paddle_length=5,
            paddle_thickness=2.0,
            paddle_margins=(3,),
            continuity=1.8,
            padding=22,
        ),
        30,
    ),
}
SIZES = tuple(_PUBLISHED)

# Of this project: markers, paddles and gaps of 32 x 32 pixels in less room, and as many distractors for the area. How
# long contours may be is what a tracer allows: it tells the labels of 99.5 and 99.2 % of images at 24 x 24 with 6 and
# 9 paddles, and of 96.8 % at 16 x 16 with 6: `benchmarks/pathfinder.py --small`.
_SMALLER: dict[int, tuple[dict[str, Any], int]] = {
    24: (_PUBLISHED[32][0] | dict(seed_distance=5), 11),
    16: (_PUBLISHED[32][0] | dict(seed_distance=3), 5),
}
_LONGEST = {24: 9, 16: 6}  # paddles in a contour
SMALLER_SIZES = tuple(_SMALLER)


def published(size: int, difficulty: str = "curv_contour_length_14") -> Parameters:
    """The parameters of Long Range Arena's images of `size` x `size` pixels.

    Raises:
        ValueError: there are no such images.
    """
    return _parameters(_PUBLISHED, size, difficulty)


def parameters_of(size: int, difficulty: str = "curv_contour_length_14") -> Parameters:
    """As `published`, and of smaller images of this project's own.

    Raises:
        ValueError: there are no such images, or contours of such a length do not fit.
    """
    if size in _SMALLER and DIFFICULTIES.get(difficulty, 0) > _LONGEST[size]:
        valid = [name for name, paddles in DIFFICULTIES.items() if paddles <= _LONGEST[size]]
        raise ValueError(
            f"Pathfinder: difficulty is {difficulty!r}, for which {size} x {size} pixels have no room; valid: "
            f"{', '.join(valid)}"
        )
    return _parameters(_SMALLER | _PUBLISHED, size, difficulty)


def _parameters(sizes: dict[int, tuple[dict[str, Any], int]], size: int, difficulty: str) -> Parameters:
    if size not in sizes:
        raise ValueError(f"Pathfinder: size is {size}; valid: {', '.join(map(str, sizes))}")
    if difficulty not in DIFFICULTIES:
        raise ValueError(f"Pathfinder: difficulty is {difficulty!r}; valid: {', '.join(DIFFICULTIES)}")
    parameters, distractor_paddles = sizes[size]
    contour_length = DIFFICULTIES[difficulty]
    distractor_length = contour_length // 3
    return Parameters(
        size=size,
        contour_length=contour_length,
        distractor_length=distractor_length,
        num_distractors=distractor_paddles // distractor_length,
        **parameters,
    )
