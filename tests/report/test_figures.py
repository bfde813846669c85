import pytest
from matplotlib.colors import to_hex

from seqzoo.report.charts import Chart, Panel, Point, Series
from seqzoo.report.figures import draw, to_png
from seqzoo.report.intervals import Interval


def chart(*panels):
    return Chart("name", "Title", "Caption.", panels)


def line(points, **changes):
    series = Series("a", tuple(Point(x, y, ()) for x, y in points), "a")
    return Panel("one", "x", "y (%)", (series,), **changes)


def bars(models, sides=2, note=""):
    series = tuple(
        Series(
            f"side {side}",
            tuple(Point(f"model {m}", 50.0, (), Interval(40, 65, "t"), note) for m in range(models)),
            f"{side}",
        )
        for side in range(sides)
    )
    return Panel(f"{models} models", "model", "test accuracy (%)", series, kind="bars", level=(10.0, "majority class"))


def test_lines_bars_and_levels():
    left, right = draw(chart(line([(1, 2.0), (3, 4.0)]), bars(2))).get_axes()
    assert list(left.lines[0].get_xdata()) == [1, 3]
    assert [bar.get_height() for bar in right.patches] == [50] * 4
    assert any(line.get_label() == "majority class" for line in right.lines)


def test_ticks_of_a_logarithmic_axis_are_its_points_where_they_fit():
    (axes,) = draw(
        chart(line([(10_000, 1.0), (100_000, 1.0), (101_000, 1.0), (1_000_000, 1.0)], log_x=True))
    ).get_axes()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["10k", "100k", "1M"]


def test_a_point_alone_on_a_logarithmic_axis():
    (axes,) = draw(chart(line([(48, 1.0)], log_x=True))).get_axes()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["48"]


def test_one_legend_without_repetitions():
    figure = draw(chart(bars(2), bars(3)))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["side 0", "side 1", "majority class"]


@pytest.mark.parametrize(
    ("models", "sides", "note"), [(1, 2, "100k"), (2, 2, "100k"), (7, 2, "100k"), (12, 2, "100k"), (12, 4, "")]
)
def test_numbers_over_bars_do_not_meet(models, sides, note):
    figure = draw(chart(bars(models, sides, note), bars(2, note=note)))
    figure.canvas.draw()
    boxes = [text.get_window_extent() for axes in figure.get_axes() for text in axes.texts]
    assert len(boxes) == sides * models + 4
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_a_legend_is_no_wider_than_the_figure():
    series = tuple(Series("a label of a good length " * 2 + str(i), (Point(1, 2, ()),), str(i)) for i in range(9))
    figure = draw(chart(Panel("one", "x", "y", series)))
    figure.canvas.draw()
    box, legend = figure.bbox, figure.legends[0].get_window_extent()
    assert legend.x0 >= box.x0
    assert legend.x1 <= box.x1


def test_a_dollar_is_no_formula():
    points = (Point("$\\frac{$", 2.0, ()),)
    assert to_png(chart(Panel("$\\frac{$", "x", "y", (Series("$x^$", points, "a"),), kind="bars")))


def test_equal_charts_give_equal_bytes():
    assert to_png(chart(bars(2))) == to_png(chart(bars(2)))


def test_a_long_name_leaves_room_for_bars():
    points = tuple(Point(name * 90, 50.0, ()) for name in "ab")
    (axes,) = draw(chart(Panel("task", "model", "test accuracy (%)", (Series("x", points, "x"),), "bars"))).get_axes()
    assert axes.get_position().height > 0.3
    assert axes.get_xticklabels()[0].get_text() == f"{'a' * 20}…{'a' * 19}"


def test_one_phase_has_its_colour_whatever_else_its_name_says():
    names = ("from scratch", "self-pretrained", "one phase, 0.5 of inputs whole", "one phase, augmented")
    series = tuple(Series(name, (Point("lru", 50.0, ()),), name) for name in names)
    (axes,) = draw(chart(Panel("one", "x", "y (%)", series, kind="bars"))).get_axes()
    colours = [to_hex(bar.get_facecolor()) for bar in axes.patches]
    assert colours[:3] == ["#9aa5b1", "#1f5fa8", "#2f8f6b"]
    assert colours[3] not in ("#4477aa", *colours[:3]), "not a second blue"
