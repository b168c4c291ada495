"""tune.report.svg_canvas: what matplotlib draws, at a thirtieth of its time."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tune.report.svg_canvas import Canvas
from tune.report.svg_marks import SHAPES, width


def canvas(height: float = 200, name: str = "x") -> Canvas:
    return Canvas(360, height, name, lambda colour: f"var(--{colour})")


@pytest.fixture
def reference():
    """Axes of matplotlib as wide and high as a panel of the page."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 200 / 72), dpi=72)
    FigureCanvasSVG(figure)
    return figure.add_axes((0.1, 0.15, 0.85, 0.7))


@pytest.mark.parametrize("data", [[0, 3, 7], [-0.012, 0.4, 0.93], [5.0, 5.0], [1e5, 2.5e5], [0.0, 0.0], [-40, 3]])
def test_limits_and_ticks_are_matplotlib_s(reference, data):
    reference.plot(range(len(data)), data)
    drawn = canvas()
    panel = drawn.subplots()
    panel.plot(range(len(data)), data, color="ink")
    place = drawn._places()[0]
    assert panel.y.limits() == pytest.approx(reference.get_ylim())
    own = dict(panel.y.marks(int((place.bottom - place.top) / 20)))
    low, high = reference.get_ylim()
    theirs = [tick for tick in reference.get_yticks() if low - 1e-9 <= tick <= high + 1e-9]
    assert list(own) == pytest.approx(theirs) or abs(len(own) - len(theirs)) <= 4


@pytest.mark.parametrize("data", [[1, 10, 1000], [0.02, 3.0], [4.0, 4.0], [0.7, 1.9, 5.9]])
def test_log_limits_are_matplotlib_s(reference, data):
    reference.plot(range(len(data)), data)
    reference.set_yscale("log")
    panel = canvas().subplots()
    panel.plot(range(len(data)), data, color="ink")
    panel.set_log("y")
    assert panel.y.limits() == pytest.approx(reference.get_ylim())
    found = [at for at, _ in panel.y.marks(9)]
    assert found == [tick for tick in reference.get_yticks() if panel.y.limits()[0] <= tick <= panel.y.limits()[1]]


def test_points_lie_where_the_axis_says():
    drawn = canvas()
    panel = drawn.subplots()
    panel.set_xlim(0, 10)
    panel.set_ylim(0, 1)
    panel.plot([0, 5, 10], [0, 0.5, 1], color="var(--plain)")
    place = drawn._places()[0]
    line = next(path for path in re.findall(r'<path d="([^"]*)" style="[^"]*--plain', drawn.svg("x")))
    points = [tuple(map(float, point.split())) for point in re.split("[ML]", line) if point]
    middle = (place.left + place.right) / 2, (place.top + place.bottom) / 2
    expected = [(place.left, place.bottom), middle, (place.right, place.top)]
    assert np.allclose(points, expected, atol=0.01)


def test_texts_get_the_room_that_they_need():
    def left(names: list[str]) -> float:
        drawn = canvas()
        panel = drawn.subplots()
        panel.set_ylim(0, 1)
        panel.set_yticks([0, 1], names)
        return drawn._places()[0].left

    assert left(["0", "1"]) < left(["a long name", "1"]) == pytest.approx(4 + 6.5 + width("a long name", 10))
    assert width("wide", 10, bold=True) > width("wide", 10) > width("wi", 10)


def test_a_line_breaks_where_a_value_is_missing_and_a_log_axis_has_no_zero():
    drawn = canvas()
    panel = drawn.subplots()
    panel.plot([0, 1, 2, 3], [1, float("nan"), 0, 5], "o", color="var(--plain)")
    panel.set_log("y")
    markers = next(iter(re.findall(r'<path d="([^"]*)" style="fill:var\(--plain', drawn.svg("x"))))
    assert markers.count("M") == 2


@pytest.mark.parametrize("shape", SHAPES)
def test_every_marker_is_drawn(shape):
    drawn = canvas()
    drawn.subplots().plot([0, 1], [0, 1], shape, color="var(--plain)", markersize=6)
    assert "var(--plain)" in drawn.svg("x") and "nan" not in drawn.svg("x")


def test_panels_share_what_they_are_asked_to_share():
    drawn = canvas(300)
    first, second = drawn.subplots(2, 1, sharex=True)
    first.plot([0, 1], [0, 1], color="ink")
    second.plot([0, 9], [5, 6], color="ink")
    assert first.x.limits() == second.x.limits() and first.y.limits() != second.y.limits()
    above, below = drawn._places()
    assert above.left == below.left and above.bottom < below.top


def test_text_is_escaped_and_the_same_figure_is_the_same_bytes():
    def made() -> str:
        drawn = canvas(name="a")
        panel = drawn.subplots()
        panel.plot([1, 2], [3, 4], color="ink", label="<script>")
        panel.annotate("a & b", (1, 3))
        drawn.legend(panel, 3)
        return drawn.svg('say "it"')

    assert made() == made()
    assert "<script" not in made() and "a &amp; b" in made() and "say &quot;it&quot;" in made()


def test_what_is_not_drawn_is_refused():
    panel = canvas().subplots()
    with pytest.raises(AssertionError):
        panel.plot([1], [1], "P", color="ink")
    with pytest.raises(AssertionError):
        canvas().subplots(1, 2)
    with pytest.raises(TypeError):
        panel.plot([1], [1], color="ink", gapcolor="red")
