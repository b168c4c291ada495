"""One pair of axes under matplotlib's names: what is drawn is kept, and placed once the room for it is known."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tune.report.svg_marks import AXES, DATA, SHAPES, Dashes, Mark, Pen, Words
from tune.report.svg_scale import Scale

Numbers = Iterable[float] | float
LINE = 1.8
SIZE = 11.0
"""Of texts, in pixels, where no other is asked for."""


class Spines:
    """The lines around a panel; those of `hidden` are not drawn."""

    def __init__(self) -> None:
        self.hidden: set[str] = set()

    def __getitem__(self, names: str | list[str]) -> Spines:
        self._named = [names] if isinstance(names, str) else list(names)
        return self

    def set_visible(self, shown: bool) -> None:
        """Show or hide those that were named."""
        self.hidden = self.hidden - set(self._named) if shown else self.hidden | set(self._named)


class Panel:
    """The part of matplotlib's `Axes` that figures of the page use, with the same arguments and defaults."""

    def __init__(self, x: Scale, y: Scale, ink: str) -> None:
        self.x, self.y, self.ink, self.spines = x, y, ink, Spines()
        self.marks: list[Mark] = []
        self.words: list[Words] = []
        self.entries: list[tuple[str, Pen, str | None, Pen, float]] = []
        self.xlabel = self.ylabel = self.title = self.gridded = ""
        self.tick = 3.0
        self.shown, self.outer = True, True

    # --- what is drawn ---

    def plot(
        self,
        x: Numbers,
        y: Numbers,
        fmt: str = "",
        *,
        color: str | None = None,
        linestyle: Dashes = "-",
        linewidth: float = LINE,
        marker: str | None = None,
        markersize: float = 6.0,
        markerfacecolor: str | None = None,
        markeredgecolor: str | None = None,
        markeredgewidth: float = 1.0,
        label: str | None = None,
        alpha: float = 1.0,
        zorder: float = 2.0,
        clip_on: bool = True,
    ) -> None:
        """Draw a line, with a marker at each point if one is named; `fmt`: a marker, and no line."""
        xs, ys, shape, color = _several(x), _several(y), marker or fmt or None, color or self.ink
        assert shape is None or shape in SHAPES, shape
        line = Pen(color, linewidth, linestyle, alpha, round=True)
        face, edge = color if markerfacecolor is None else markerfacecolor, markeredgecolor or color
        dot = Pen(color if shape == "x" else face, markeredgewidth, alpha=alpha, edge=edge)
        if not fmt:
            self._add(Mark("line", xs, ys, line, zorder, clip=clip_on))
        if shape:
            self._add(Mark(shape, xs, ys, dot, zorder, markersize, clip=clip_on))
        if label is not None:
            self.entries.append((label, Pen("none") if fmt else line, shape, dot, markersize))

    def step(self, x: Numbers, y: Numbers, *, where: str, **line: Any) -> None:
        """Draw a line of steps: "post" keeps a value up to the next point, "pre" from the last one."""
        xs, ys = _several(x), _several(y)
        turned_x, turned_y = xs[:1], ys[:1]
        for left, right, low, high in zip(xs, xs[1:], ys, ys[1:], strict=False):
            turned_x += [right, right] if where == "post" else [left, right]
            turned_y += [low, high] if where == "post" else [high, high]
        self.plot(turned_x, turned_y, **line)

    def fill_between(
        self, x: Numbers, low: Numbers, high: Numbers, *, color: str, alpha: float, linewidth: float, zorder: float
    ) -> None:
        """Fill the area between two lines; its own line has no width."""
        xs, lows, highs = _several(x), _several(low), _several(high)
        self._add(Mark("area", xs + xs[::-1], lows + highs[::-1], Pen(color, linewidth, alpha=alpha), zorder))

    def barh(self, y: float, width: float, *, left: float, height: float, color: str, zorder: float) -> None:
        """Draw a bar around the height `y`."""
        self._rectangle(left, y - height / 2, width, height, Pen(color), zorder)

    def rectangle(
        self, x: float, y: float, width: float, height: float, *, fill: str, edge: str = "none", linewidth: float = 0.0,
        zorder: float = 1.0,
    ) -> None:  # fmt: skip
        """Draw a rectangle from its lowest corner."""
        self._rectangle(x, y, width, height, Pen(fill, linewidth, edge=edge), zorder)

    def vlines(self, x: Iterable[float], low: Numbers, high: Numbers, *, color: str, linewidth: float) -> None:
        """Draw a vertical line at each x."""
        xs = _several(x)
        lows, highs = (_several(end) * (1 if isinstance(end, Iterable) else len(xs)) for end in (low, high))
        nan = float("nan")
        across = [each for at in xs for each in (at, at, nan)]
        along = [each for pair in zip(lows, highs, strict=True) for each in (*pair, nan)]
        self._add(Mark("line", across, along, Pen(color, linewidth), 2.0))

    def axhline(
        self, y: float, *, color: str, linewidth: float = LINE, linestyle: Dashes = "-", zorder: float = 2.0
    ) -> None:
        """Draw a horizontal line from side to side."""
        self._add(Mark("line", [0, 1], [y, y], Pen(color, linewidth, linestyle), zorder, across=(AXES, DATA)))

    def axvline(
        self, x: float, *, color: str, linewidth: float = LINE, linestyle: Dashes = "-", zorder: float = 2.0
    ) -> None:
        """Draw a vertical line from bottom to top."""
        self._add(Mark("line", [x, x], [0, 1], Pen(color, linewidth, linestyle), zorder, across=(DATA, AXES)))

    def annotate(
        self,
        text: str,
        xy: tuple[float, float],
        xytext: tuple[float, float] = (0.0, 0.0),
        *,
        xycoords: str | tuple[str, str] = DATA,
        textcoords: str = "offset points",
        ha: str = "left",
        va: str = "baseline",
        fontsize: float = SIZE,
        color: str | None = None,
        weight: str = "normal",
    ) -> None:
        """Write a text at a place, moved by `xytext` points."""
        assert textcoords == "offset points", textcoords
        across = (xycoords, xycoords) if isinstance(xycoords, str) else xycoords
        bold = weight == "bold"
        self.words.append(Words(text, *xy, color or self.ink, fontsize, across, xytext, ha, va, bold))

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        """Write a text at a place of the data."""
        self.annotate(text, (x, y), **style)

    # --- axes ---

    def set_xlim(self, left: float, right: float) -> None:
        self.x.fixed = (left, right)

    def set_ylim(self, bottom: float | None = None, top: float | None = None) -> None:
        """Set the ends of the y axis; one that is not given stays what it is."""
        ends = self.y.limits()
        self.y.fixed = (ends[0] if bottom is None else bottom, ends[1] if top is None else top)

    def get_xlim(self) -> tuple[float, float]:
        return self.x.limits()

    def invert_xaxis(self) -> None:
        self.x.fixed = self.x.limits()[::-1]

    def set_xticks(self, ticks: Iterable[float], labels: Sequence[str] | None = None) -> None:
        self._set_ticks(self.x, ticks, labels)

    def set_yticks(self, ticks: Iterable[float], labels: Sequence[str] | None = None) -> None:
        self._set_ticks(self.y, ticks, labels)

    def _set_ticks(self, scale: Scale, ticks: Iterable[float], labels: Sequence[str] | None) -> None:
        scale.ticks, scale.names = list(ticks), None if labels is None else list(labels)
        if scale.fixed is None:
            scale.add(scale.ticks)
        elif scale.ticks:  # as matplotlib does: limits that were set are widened
            low, high = scale.fixed
            least, most = min(scale.ticks), max(scale.ticks)
            scale.fixed = (min(low, least), max(high, most)) if low <= high else (max(low, most), min(high, least))

    def locator_params(self, axis: str, nbins: int | None = None, integer: bool = False) -> None:
        """Choose ticks: of `nbins` intervals at most, or of whole numbers."""
        scale = self.x if axis == "x" else self.y
        scale.most, scale.integer = nbins or scale.most, integer or scale.integer

    def margins(self, both: float | None = None, *, x: float | None = None) -> None:
        """Set the room around the data, in shares of it."""
        if both is not None:
            self.y.margin = both
        self.x.margin = x if x is not None else self.x.margin if both is None else both

    def tick_params(self, *, length: float) -> None:
        self.tick = length

    def axis(self, shown: str) -> None:
        """Take "off" for a panel without axes."""
        self.shown = shown != "off"

    def set_log(self, which: str) -> None:
        """Make an axis logarithmic, with plain numbers (`tune.report.html.drawing.plain_log`)."""
        scale = self.y if which == "y" else self.x
        scale.log = True
        low, high = sorted(scale.limits())
        scale.few = high / low < 30
        if scale.few:
            scale.small = (2, 3, 5) if high / low > 3 else (1.5, 2, 3, 4, 5, 7)

    # --- words around it ---

    def set_xlabel(self, text: str) -> None:
        self.xlabel = text

    def set_ylabel(self, text: str) -> None:
        self.ylabel = text

    def set_title(self, text: str, loc: str = "left") -> None:
        assert loc == "left", loc
        self.title = text

    def grid(self, axis: str) -> None:
        self.gridded = axis

    def _rectangle(self, x: float, y: float, width: float, height: float, pen: Pen, front: float) -> None:
        xs, ys = [x, x + width, x + width, x], [y, y, y + height, y + height]
        self._add(Mark("area", xs, ys, pen, front))

    def _add(self, mark: Mark) -> None:
        self.marks.append(mark)
        if mark.across[0] == DATA:
            self.x.add(mark.x)
        if mark.across[1] == DATA:
            self.y.add(mark.y)


def _several(values: Numbers) -> list[float]:
    return [float(value) for value in values] if isinstance(values, Iterable) else [float(values)]
