"""Charts as pictures, drawn with matplotlib."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from .charts import MATCHED, ONE_PHASE, PRETRAINED, SCRATCH, Chart, Panel, Point, Series, short
from .comparison import Comparison
from .gains import scratch_against_pretrained

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
COLOURS = 256  # of a picture: a third as large, and not to be told from all it had
WIDTH, HEIGHT = 11.0, 3.7  # inches, of a row of panels at most
BAR = 0.32  # inches, with the number over it
NUMBER = 0.25  # inches, under which the number stands upright
LETTER, LINE = 0.07, 0.14  # inches
EDGE, NUMBERS = 0.12, 0.42  # inches: free, and of the numbers at an axis
NAME = 40  # letters of a name under bars
SLANT = math.radians(30)
STAGES = {SCRATCH: "#9aa5b1", MATCHED: "#d08a2e", PRETRAINED: "#1f5fa8", ONE_PHASE: "#2f8f6b"}
# Paul Tol's "bright" and two of his "vibrant" colours: told apart with any colour vision.
PALETTE = ("#4477aa", "#ee6677", "#228833", "#aa3377", "#66ccee", "#ccbb44", "#ee7733", "#009988", "#555555")
MARKERS = "osD^vPX<>"


def comparison_figure(comparisons: Sequence[Comparison]) -> bytes:
    """The comparisons as bars, a PNG: mean test accuracies in percent with a dotted line at the majority class, or bits
    per character, with 95 % intervals. Variants that other studies are about are left out if there is anything else."""
    plain = [comparison for comparison in comparisons if comparison.conditions.plain]
    chart = scratch_against_pretrained(plain or comparisons)
    assert chart, "a comparison has rows"
    return to_png(chart)


@lru_cache(maxsize=1)  # the page begins with the figure that was drawn beside the tables
def to_png(chart: Chart) -> bytes:
    """The chart as a PNG file; equal charts give equal bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(draw(chart))
    canvas.draw()
    size, picture = canvas.get_width_height(), io.BytesIO()
    image = Image.frombuffer("RGBA", size, canvas.buffer_rgba(), "raw", "RGBA", 0, 1).convert("RGB")
    image = image.quantize(COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    image.save(picture, "PNG", dpi=(DPI, DPI), compress_level=4)
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
    of_stages = _stage_colours(hues)
    free = iter((PALETTE[1:] if of_stages else PALETTE) * len(hues))  # its first is much like that of a stage
    colours = {hue: of_stages.get(hue) or next(free) for hue in hues}
    markers = {hue: MARKERS[place % len(MARKERS)] for place, hue in enumerate(hues)}

    rows = _rows(chart)
    width = max(WIDTH / 1.5 if len(chart.panels) == 1 else 0, *(sum(map(_width, row)) for row in rows))
    labels = {series.label for panel in chart.panels for series in panel.series}
    columns = max(1, min(len(labels) + 1, int(width / (0.6 + LETTER * max(map(len, labels))))))
    legend = 0.2 * math.ceil((len(labels) + 1) / columns)
    height = HEIGHT * len(rows) + legend
    figure = Figure(figsize=(width, height), dpi=DPI)
    FigureCanvasAgg(figure)
    entries: dict[str, Any] = {}
    for number, row in enumerate(rows, start=1):
        left = 0.0
        for panel in row:
            frame = _frame(panel, width if len(chart.panels) == 1 else _width(panel))
            corner = (left + frame.left) / width, (HEIGHT * (len(rows) - number) + frame.bottom) / height
            axes = figure.add_axes((*corner, frame.across / width, frame.up / height))
            left += frame.width
            if panel.kind == "bars":
                _draw_bars(axes, panel, colours, frame)
            else:
                for series in panel.series:
                    _draw_line(axes, panel, series, colours[series.hue], markers[series.hue])
            _dress(axes, panel, frame)
            entries |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    levels = {panel.level[1] for panel in chart.panels if panel.level}
    names = sorted(entries, key=lambda name: (name in levels, _stages_first(name)))
    figure.legend(
        [entries[name] for name in names],
        names,
        loc="upper center",
        borderaxespad=0.2,
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


class Frame(NamedTuple):
    """Where the axes of a panel are, in inches of the panel: what stands around them is known beforehand, and measuring
    it took as long as drawing it."""

    width: float  # of the panel
    left: float
    bottom: float
    across: float  # of the axes
    up: float
    slanted: bool  # names under bars
    title: str  # in lines that fit


def _frame(panel: Panel, width: float) -> Frame:
    letters = int(width / LETTER)
    title = "\n".join(textwrap.fill(line, letters) for line in panel.title.splitlines())
    left = EDGE + NUMBERS + LINE * len(panel.y_label.splitlines())
    bottom, slanted = EDGE + 2.8 * LINE, False
    if panel.kind == "bars":
        categories = _categories(panel)
        longest = LETTER * max(len(_fitting(name)) for name in categories)
        slanted = longest > 0.8 * width / len(categories)
        bottom = EDGE + LINE + (longest * math.sin(SLANT) if slanted else LINE)
        if slanted:  # the first name reaches to the left
            left = max(left, longest * math.cos(SLANT) - 0.4 * (width - left) / len(categories))
    top = EDGE + LINE * (1 + len(title.splitlines()))
    return Frame(width, left, bottom, width - left - EDGE, HEIGHT - bottom - top, slanted, title)


def _stage_colours(hues: Sequence[str]) -> dict[str, str]:
    """Of those that are stages; where one phase has only names that say more, of the first of them."""
    one_phase = [hue for hue in hues if hue.startswith(ONE_PHASE)]
    first = ONE_PHASE if ONE_PHASE in one_phase or not one_phase else one_phase[0]
    colours = STAGES | {first: STAGES[ONE_PHASE]}
    return {hue: colours[hue] for hue in hues if hue in colours}


def _draw_bars(axes: Axes, panel: Panel, colours: dict[str, str], frame: Frame) -> None:
    from matplotlib.transforms import ScaledTranslation

    categories = _categories(panel)
    width = 0.8 / len(panel.series)
    upright = frame.across * width / len(categories) < NUMBER
    highest = 0.0
    above = axes.transData + ScaledTranslation(0, 2 / 72, axes.figure.dpi_scale_trans)
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
            text = f"{text}\n{point.note}" if point.note else text
            how: dict[str, Any] = {"rotation": 90, "va": "bottom"} if upright else {"va": "baseline"}
            axes.text(place, top, text, transform=above, ha="center", fontsize=6.5, **how)
    axes.set_xticks(
        range(len(categories)),
        [_fitting(name) for name in categories],
        rotation=math.degrees(SLANT) if frame.slanted else 0,
        ha="right" if frame.slanted else "center",
        rotation_mode="anchor",
    )
    if panel.in_percent:
        axes.set_ylim(0, 112)
        axes.set_yticks(range(0, 101, 20))
    else:
        axes.set_ylim(0, 1.12 * highest)


def _draw_line(axes: Axes, panel: Panel, series: Series, colour: str, marker: str) -> None:
    style: dict[str, Any] = {
        "color": colour,
        "marker": marker,
        "markersize": 6 if panel.kind == "scatter" else 3,
        "markerfacecolor": colour if series.filled else "white",
        "linestyle": "none" if panel.kind == "scatter" else ("-" if series.filled else "--"),
        "linewidth": 1.3,
        "label": series.label,
    }
    places, heights = [point.x for point in series.points], [point.y for point in series.points]
    if any(point.interval for point in series.points):
        errors = list(zip(*map(_error, series.points), strict=True))
        axes.errorbar(places, heights, yerr=errors, elinewidth=0.8, capsize=2, **style)
    else:
        axes.plot(places, heights, **style)


def _dress(axes: Axes, panel: Panel, frame: Frame) -> None:
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
        axes.xaxis.set_label_coords(0.5, (EDGE - frame.bottom) / frame.up + LINE / frame.up)
        axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_ylabel(panel.y_label, fontsize=8)
    axes.yaxis.set_label_coords(-NUMBERS / frame.across, 0.5)
    axes.set_title(frame.title, x=(frame.width / 2 - frame.left) / frame.across, y=1.0, fontsize=8)
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


def _fitting(name: str) -> str:
    """A name under bars, with its middle left out where there is no room for it."""
    return name if len(name) <= NAME else f"{name[: NAME // 2]}…{name[-(NAME // 2) + 1 :]}"


def _error(point: Point) -> tuple[float, float]:
    """How far the interval reaches below and above; NaN, which draws nothing, without one."""
    if point.interval is None:
        return math.nan, math.nan
    return point.y - point.interval.low, point.interval.high - point.y
