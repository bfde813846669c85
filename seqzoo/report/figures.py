"""Charts as pictures, drawn with matplotlib."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_bytes
from .charts import MATCHED, PRETRAINED, SCRATCH, Chart, Panel, Point, Series, short
from .comparison import Comparison
from .gains import scratch_against_pretrained

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
WIDTH, HEIGHT = 11.0, 3.7  # inches, of a row of panels at most
BAR = 0.32  # inches, with the number over it
LETTER = 0.07  # inches
STAGES = {SCRATCH: "#9aa5b1", MATCHED: "#d08a2e", PRETRAINED: "#1f5fa8"}
# Paul Tol's "bright" and two of his "vibrant" colours: told apart with any colour vision.
PALETTE = ("#4477aa", "#ee6677", "#228833", "#aa3377", "#66ccee", "#ccbb44", "#ee7733", "#009988", "#555555")
MARKERS = "osD^vPX<>"


def save_figure(comparisons: Sequence[Comparison], path: Path) -> None:
    """Draws the comparisons as bars: mean test accuracies in percent with a dotted line at the majority class, or bits
    per character, with 95 % intervals. Variants that other studies are about are left out if there is anything else."""
    plain = [comparison for comparison in comparisons if comparison.conditions.plain]
    chart = scratch_against_pretrained(plain or comparisons)
    assert chart, "a comparison has rows"
    write_bytes(path, to_png(chart))


def to_png(chart: Chart) -> bytes:
    """The chart as a PNG file; equal charts give equal bytes."""
    picture = io.BytesIO()
    draw(chart).savefig(picture, dpi=DPI, format="png")
    return picture.getvalue()


def draw(chart: Chart) -> Figure:
    """The chart, its panels in rows, under one legend."""
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False}):  # a dollar in a name is a dollar
        return _draw(chart)


def _draw(chart: Chart) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    hues = sorted({series.hue: None for panel in chart.panels for series in panel.series}, key=_stages_first)
    free = iter(PALETTE * len(hues))
    colours = {hue: STAGES.get(hue) or next(free) for hue in hues}
    markers = {hue: MARKERS[place % len(MARKERS)] for place, hue in enumerate(hues)}

    rows = _rows(chart)
    width = max(WIDTH / 1.5 if len(chart.panels) == 1 else 0, *(sum(map(_width, row)) for row in rows))
    labels = {series.label for panel in chart.panels for series in panel.series}
    columns = max(1, min(len(labels) + 1, int(width / (0.6 + LETTER * max(map(len, labels))))))
    legend = 0.2 * math.ceil((len(labels) + 1) / columns)
    figure = Figure(figsize=(width, HEIGHT * len(rows) + legend), layout="constrained")
    FigureCanvasAgg(figure)
    entries: dict[str, Any] = {}
    for strip, row in zip(figure.subfigures(len(rows), 1, squeeze=False).flat, rows, strict=True):
        widths = [width] if len(chart.panels) == 1 else [*map(_width, row)]
        widths += [width - sum(widths)] if width - sum(widths) > 0.1 else []
        # A figure for each panel, so that panels of a width look alike whatever stands beside them.
        parts = strip.subfigures(1, len(widths), width_ratios=widths, squeeze=False).flat
        for part, panel in zip(parts, row, strict=False):
            axes = part.subplots()
            if panel.kind == "bars":
                _draw_bars(axes, panel, colours)
            else:
                for series in panel.series:
                    _draw_line(axes, panel, series, colours[series.hue], markers[series.hue])
            _dress(axes, panel)
            entries |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    levels = {panel.level[1] for panel in chart.panels if panel.level}
    names = sorted(entries, key=lambda name: (name in levels, _stages_first(name)))
    figure.legend(
        [entries[name] for name in names],
        names,
        loc="outside upper center",
        ncols=columns,
        frameon=False,
        fontsize=8,
    )
    return figure


def _stages_first(label: str) -> int:
    return list(STAGES).index(label) if label in STAGES else len(STAGES)


def _rows(chart: Chart) -> list[list[Panel]]:
    """The panels, as many in a row as fit."""
    rows: list[list[Panel]] = [[]]
    for panel in chart.panels:
        if rows[-1] and sum(map(_width, rows[-1])) + _width(panel) > WIDTH:
            rows.append([])
        rows[-1].append(panel)
    return rows


def _width(panel: Panel) -> float:
    """Of a panel, in inches; with room for a number over every bar."""
    if panel.kind != "bars":
        return WIDTH / 3 if panel.narrow else WIDTH / 2
    return min(WIDTH, max(WIDTH / 3, 1.0 + BAR * len(_categories(panel)) * len(panel.series)))


def _draw_bars(axes: Axes, panel: Panel, colours: dict[str, str]) -> None:
    categories = _categories(panel)
    width = 0.8 / len(panel.series)
    highest = 0.0
    for side, series in enumerate(panel.series):
        shift = (side - (len(panel.series) - 1) / 2) * width
        places = [categories.index(str(point.x)) + shift for point in series.points]
        heights = [point.y for point in series.points]
        errors = list(zip(*map(_error, series.points), strict=True))
        axes.bar(
            places,
            heights,
            width,
            yerr=errors,
            color=colours[series.hue],
            label=series.label,
            error_kw={"capsize": 2, "elinewidth": 0.8, "capthick": 0.8, "ecolor": "#333333"},
        )
        for place, point in zip(places, series.points, strict=True):
            top = point.interval.high if point.interval else point.y
            highest = max(highest, top)
            text = f"{point.y:.1f}" if panel.in_percent else f"{point.y:,.0f}" if point.y >= 100 else f"{point.y:.4g}"
            axes.annotate(
                f"{text}\n{point.note}" if point.note else text,
                (place, top),
                (0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=6.5,
            )
    slanted = LETTER * max(map(len, categories)) > 0.8 * _width(panel) / len(categories)
    axes.set_xticks(
        range(len(categories)),
        categories,
        rotation=30 if slanted else 0,
        ha="right" if slanted else "center",
        rotation_mode="anchor",
    )
    if panel.in_percent:
        axes.set_ylim(0, 112)
        axes.set_yticks(range(0, 101, 20))
    else:
        axes.set_ylim(0, 1.12 * highest)


def _draw_line(axes: Axes, panel: Panel, series: Series, colour: str, marker: str) -> None:
    axes.errorbar(
        [point.x for point in series.points],
        [point.y for point in series.points],
        yerr=list(zip(*map(_error, series.points), strict=True)) if any(p.interval for p in series.points) else None,
        color=colour,
        marker=marker,
        markersize=6 if panel.kind == "scatter" else 3,
        markerfacecolor=colour if series.filled else "white",
        linestyle="none" if panel.kind == "scatter" else ("-" if series.filled else "--"),
        linewidth=1.3,
        elinewidth=0.8,
        capsize=2,
        label=series.label,
    )


def _dress(axes: Axes, panel: Panel) -> None:
    if panel.level is not None:
        height, label = panel.level
        axes.axhline(height, color="black", linestyle=":", linewidth=1, label=label)
    if panel.log_x:
        ticks = _ticks(panel)
        axes.set_xscale("log")
        axes.set_xticks(ticks, map(short, ticks))
        axes.minorticks_off()
    elif panel.kind == "scatter":
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(lambda value, _: short(value))
    if panel.kind != "bars":
        axes.set_xlabel(panel.x_label, fontsize=8)
        axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_ylabel(panel.y_label, fontsize=8)
    letters = int(_width(panel) / LETTER)
    axes.set_title("\n".join(textwrap.fill(line, letters) for line in panel.title.splitlines()), fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _ticks(panel: Panel) -> list[float]:
    """Every x of a logarithmic axis, but those that would stand in the label of the one before."""
    places = sorted({float(point.x) for series in panel.series for point in series.points})
    label = (places[-1] / places[0]) ** (1 / 12)
    ticks: list[float] = []
    for place in places:
        if not ticks or place > label * ticks[-1]:
            ticks.append(place)
    return ticks


def _categories(panel: Panel) -> list[str]:
    return list(dict.fromkeys(str(point.x) for series in panel.series for point in series.points))


def _error(point: Point) -> tuple[float, float]:
    """How far the interval reaches below and above; NaN, which draws nothing, without one."""
    if point.interval is None:
        return math.nan, math.nan
    return point.y - point.interval.low, point.interval.high - point.y
