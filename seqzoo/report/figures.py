"""The comparisons as one picture: a panel each, bars from scratch and after self-pretraining by model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .comparison import Cell, Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 3
BARS = (("from scratch", "#9aa5b1"), ("self-pretrained", "#1f5fa8"))
BAR_WIDTH = 0.38


def save_figure(comparisons: Sequence[Comparison], path: Path) -> None:
    """Draws mean test accuracies in percent with a dotted line at the majority class, or bits per character, each with
    error bars of one sample standard deviation where there are several seeds, and writes them to `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(comparisons))
    rows = math.ceil(len(comparisons) / columns)
    models = max(len(comparison.rows) for comparison in comparisons)
    figure = Figure(figsize=(columns * max(3.2, 1.0 + 0.75 * models), 3.6 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, comparison in zip(panels, comparisons, strict=False):
        _draw(panel, comparison)
    for panel in panels[len(comparisons) :]:
        panel.set_axis_off()
    # Of all panels: one of bits has no line at the majority class.
    shown = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(shown.values(), shown.keys(), loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)


def _draw(axes: Axes, comparison: Comparison) -> None:
    conditions, pretraining = comparison.conditions, comparison.pretraining
    in_percent = conditions.metric == "accuracy"
    scale, digits = (100, 1) if in_percent else (1, 2)
    highest = 0.0
    for side, (label, colour) in enumerate(BARS):
        cells = [(row.scratch, row.pretrained)[side] for row in comparison.rows]
        positions = [place + (side - 0.5) * BAR_WIDTH for place in range(len(cells))]
        heights = [scale * cell.mean if cell else math.nan for cell in cells]
        spreads = [scale * _spread(cell) for cell in cells]
        axes.bar(positions, heights, BAR_WIDTH, yerr=spreads, color=colour, label=label, capsize=2)
        for position, height, spread in zip(positions, heights, spreads, strict=True):
            if not math.isnan(height):
                top = height + (0 if math.isnan(spread) else spread)
                highest = max(highest, top)
                axes.annotate(
                    f"{height:.{digits}f}", (position, top), (0, 2), textcoords="offset points", ha="center", fontsize=7
                )
    axes.set_xticks(range(len(comparison.rows)), [row.model for row in comparison.rows], rotation=30, ha="right")
    if in_percent:
        axes.axhline(100 * conditions.majority, color="black", linestyle=":", linewidth=1, label="majority class")
        axes.set_ylim(0, 108)
        axes.set_yticks(range(0, 101, 20))
        axes.set_ylabel("test accuracy (%)")
    else:
        axes.set_ylim(0, 1.08 * highest)
        axes.set_ylabel("test bits per character\n(fewer are better)")
    axes.spines[["top", "right"]].set_visible(False)
    objective = f"{pretraining.objective} pretraining" if pretraining else "no pretraining"
    direction = "causal" if conditions.causal else "bidirectional"
    axes.set_title(f"{conditions.task}\n{conditions.recipe}, {direction}, {objective}", fontsize=9)


def _spread(cell: Cell | None) -> float:
    """One standard deviation; NaN, which draws no error bar, without several seeds."""
    return math.nan if cell is None or cell.std is None else cell.std
