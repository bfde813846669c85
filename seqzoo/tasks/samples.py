"""A few examples of a task to look at: as text, or as a sheet of pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..files import replacing
from ..messages import printable
from ..spec import IGNORED
from .data import Split, Task, epoch_order

LONGEST = 600  # characters of a sequence that are shown
COLUMNS = 4


def pick(split: Split, n: int) -> list[int]:
    """`n` examples, or all there are, from all over the split: always the same ones."""
    return epoch_order(len(split), seed=0, epoch=0)[:n].tolist()


def as_text(task: Task, split: Split, example: int) -> str:
    """An example's number, label and sequences, each on a line of its own, cut where they are long.

    Of answers at positions, a line with what is asked: `position:answer`.
    """
    labelled = f", label {int(split.labels[example])}" if split.spec.answer == "class" else ""
    lines = [f"example {example}{labelled}"]
    for sequence in sequences(split, example):
        lines.append(f"  {len(sequence):,} positions: {_cut(decode(sequence, task.symbols))}")
    if split.targets is not None:
        start, end = split.offsets[example : example + 2].tolist()
        targets = split.targets[start:end].numpy()
        asked = [f"{at}:{decode(targets[at : at + 1], task.symbols)}" for at in np.flatnonzero(targets != IGNORED)]
        lines.append(f"  {len(asked):,} answers: {_cut(' '.join(asked))}")
    return "\n".join(lines)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


def decode(tokens: np.ndarray, symbols: Sequence[str]) -> str:
    """Ids as what they stand for: characters side by side, anything longer with spaces between; line ends as `\\n`."""
    if not symbols:
        return " ".join(map(str, tokens.tolist()))
    characters = all(len(symbol) == 1 or symbol.startswith("<") for symbol in symbols)
    shown = ("" if characters else " ").join(symbols[token] for token in tokens.tolist())
    return printable(shown)


def save_sheet(task: Task, name: str, examples: Sequence[int], path: Path) -> None:
    """Draw examples of the split `name` with their labels: pictures where they are square, curves where not.

    Raises:
        ValueError: the file's ending names no kind of picture.
        FileNotFoundError: it is to lie in a folder that is not there.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    split: Split = getattr(task, name)
    rows = math.ceil(len(examples) / COLUMNS)
    figure = Figure(figsize=(2.4 * COLUMNS, 2.5 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    for panel in panels:
        panel.set_axis_off()
    for panel, example in zip(panels, examples, strict=False):
        shown = sequences(split, example)
        side = math.isqrt(task.spec.max_length)
        square = all(len(sequence) == side * side == task.spec.max_length for sequence in shown)
        if square and task.spec.vocab_size <= 256:  # sound has more levels
            picture = _picture(shown, side, task.spec.vocab_size - 1)
            panel.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        else:
            for sequence in shown:
                panel.plot(sequence, linewidth=0.5)
        panel.set_title(f"{example}: label {int(split.labels[example])}", fontsize=9)
    figure.suptitle(f"{task.spec.name}, {name}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent}")
    with replacing(path) as file:
        figure.savefig(file, dpi=150, format=path.suffix[1:] or "png")


def _picture(shown: Sequence[np.ndarray], side: int, brightest: int) -> np.ndarray:
    """Sequences [T, channels] beside each other, from 0 to 1; three channels are colours, others pictures each."""
    pictures = [sequence.reshape(side, side, -1) / brightest for sequence in shown]
    if pictures[0].shape[-1] != 3:
        pictures = [picture[..., channel] for picture in pictures for channel in range(picture.shape[-1])]
    return np.concatenate(pictures, 1)


def sequences(split: Split, example: int) -> list[np.ndarray]:
    """The inputs of an example: ids [T], or intensities [T, channels]."""
    spec = split.spec
    found = []
    for row in range(example * spec.num_inputs, (example + 1) * spec.num_inputs):
        start, end = split.offsets[row : row + 2].tolist()
        values = split.values[start * spec.channels : end * spec.channels].numpy()
        found.append(values if spec.kind == "tokens" else values.reshape(-1, spec.channels))
    return found
