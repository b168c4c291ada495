"""A figure of panels one below another, and its SVG: every panel gets the room that its texts leave.

Figures of the page are painted on it under the few names of matplotlib's `Figure` and `Axes` that they use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any

import numpy as np

from tune.report.svg_marks import ASCENT, AXES, DESCENT, Mark, Pen, Words, short, text_svg, width
from tune.report.svg_panel import Panel
from tune.report.svg_scale import Scale

PAD = 4.0
"""Pixels around each panel."""
TICK, TITLE, LABEL = 10.0, 11.0, 10.5
"""Sizes of texts: at ticks and in the legend, above a panel, and along an axis."""
APART, ABOVE, TICK_ROOM = 4.0, 7.0, 3.5
"""From ticks to the axis' label, from a panel to its title, from a tick to its label."""
HANDLE, GAP, BETWEEN, ROW = 22.0, 5.0, 12.0, 16.5
"""Of a legend: width of a line, from line to text, between columns, height of a row."""
PASSES = 3
"""Times that the room for texts is measured: more room for some leaves less for others."""


@dataclass
class Place:
    """The place of a panel, in pixels from the upper left corner."""

    left: float
    top: float
    right: float
    bottom: float

    def x(self, shares: np.ndarray) -> np.ndarray:
        return self.left + shares * (self.right - self.left)

    def y(self, shares: np.ndarray) -> np.ndarray:
        return self.bottom - shares * (self.bottom - self.top)


class Canvas:
    """An empty figure, of the part of matplotlib's `Figure` that figures of the page use."""

    def __init__(self, width: float, height: float, name: str, colour: Callable[[str], str]) -> None:
        """Make an empty one. name: prefix of the ids in the SVG; colour: gives the CSS of a name (`html.palette`)."""
        self._width, self._height, self._name, self._colour = width, height, name, colour
        self._panels: list[Panel] = []
        self._ratios: list[float] = []
        self._legend: list[list[tuple[str, Pen, str | None, Pen, float]]] = []
        self._below = 0.0
        self._strip: list[str] = []

    def subplots(
        self,
        rows: int = 1,
        columns: int = 1,
        *,
        squeeze: bool = True,
        sharex: bool = False,
        sharey: bool = False,
        height_ratios: Sequence[float] | None = None,
    ) -> Any:
        """Add panels one below another; one, a list of them, or for `squeeze=False` an array with one column."""
        assert columns == 1, columns
        x, y = Scale(), Scale()
        for number in range(rows):
            panel = Panel(x if sharex else Scale(), y if sharey else Scale(), self._colour("ink"))
            panel.outer = number == rows - 1 or not sharex
            self._panels.append(panel)
        self._ratios = list(height_ratios or [1.0] * rows)
        if squeeze:
            return self._panels[0] if rows == 1 else self._panels
        found = np.empty((rows, 1), dtype=object)
        found[:, 0] = self._panels
        return found

    def legend(self, panel: Panel, columns: int) -> None:
        """Write the names of a panel's lines below everything, column by column."""
        share, more = divmod(len(panel.entries), columns)
        start = 0
        for number in range(columns):
            end = start + share + (number < more)
            self._legend += [panel.entries[start:end]] if end > start else []
            start = end
        self._below = ROW * max(map(len, self._legend), default=0) + 7.0 if self._legend else 0.0

    def strip(self, colours: Sequence[str], texts: tuple[str, str]) -> None:
        """Draw a scale of colours below everything, with a text at each end."""
        self._below, wide = 26.0, 0.44 * self._width / len(colours)
        left, top = 0.28 * self._width, self._height - 18
        for number, colour in enumerate(colours):
            style = f'style="fill:{colour}" width="{short(wide + 0.3)}" height="10"'
            self._strip.append(f'<rect x="{short(left + number * wide)}" y="{short(top)}" {style}/>')
        for text, at, ha in zip(texts, (left - 4, left + 0.44 * self._width + 4), ("right", "left"), strict=True):
            self._strip.append(text_svg(text, at, top + 8.5, TICK, self._colour("soft"), ha=ha))

    def svg(self, says: str) -> str:
        """The figure as an inline SVG, labelled for screen readers."""
        places = self._places()
        body = [self._panel(number, panel, places[number]) for number, panel in enumerate(self._panels)]
        body += [*self._strip, *self._legend_svg()]
        size = f"{self._width:g} {self._height:g}"
        content = "\n".join(part for part in body if part)
        label = escape(says, quote=True)
        return f'<svg class="plot" role="img" aria-label="{label}" viewBox="0 0 {size}">{content}</svg>\n'

    # --- room ---

    def _places(self) -> list[Place]:
        """Divide the height by the ratios of the panels, and align their sides."""
        tops, bottoms = [0.0] * len(self._panels), [0.0] * len(self._panels)
        left = right = 0.0
        places: list[Place] = []
        for _ in range(PASSES):
            room = self._height - self._below - 2 * PAD * len(self._panels) - sum(tops) - sum(bottoms)
            each, y, places = max(room, 10.0) / sum(self._ratios), 0.0, []
            for top, bottom, ratio in zip(tops, bottoms, self._ratios, strict=True):
                y += PAD + top
                places.append(Place(PAD + left, y, max(self._width - PAD - right, PAD + left + 10), y + ratio * each))
                y += ratio * each + bottom + PAD
            over = [self._overhang(panel, place) for panel, place in zip(self._panels, places, strict=True)]
            left, right = max(each[0] for each in over), max(each[2] for each in over)
            tops, bottoms = [each[1] for each in over], [each[3] for each in over]
        return places

    def _overhang(self, panel: Panel, place: Place) -> tuple[float, float, float, float]:
        """Pixels that the texts of a panel need to its left, above it, to its right and below it."""
        left, top, right, bottom = place.left, place.top, place.right, place.bottom
        boxes = [word.box(*self._where(panel, place, word)) for word in panel.words]
        boxes += [word.box(word.x, word.y) for word in self._around(panel, place)]
        for box in boxes:
            left, top = min(left, box[0]), min(top, box[1])
            right, bottom = max(right, box[2]), max(bottom, box[3])
        if panel.ylabel:
            left -= APART + LABEL
        return place.left - left, place.top - top, right - place.right, bottom - place.bottom

    def _where(self, panel: Panel, place: Place, word: Words) -> tuple[float, float]:
        x, y = _points(panel, place, word.across, [word.x], [word.y])
        return float(x[0]), float(y[0])

    def _around(self, panel: Panel, place: Place) -> list[Words]:
        """The texts at ticks, the title, and the label of the x axis, at their pixels; the y axis has its own."""
        found: list[Words] = []
        soft, ink = self._colour("soft"), self._colour("ink")
        room = panel.tick + TICK_ROOM
        if panel.shown:
            for at, text in _labelled(panel.x, _spaces(place)[0]) if panel.outer else []:
                x = float(place.x(panel.x.share([at]))[0])
                found.append(Words(text, x, place.bottom + room, soft, TICK, ha="center", va="top"))
            for at, text in _labelled(panel.y, _spaces(place)[1]):
                y = float(place.y(panel.y.share([at]))[0])
                found.append(Words(text, place.left - room, y, soft, TICK, ha="right", va="center"))
        if panel.xlabel:
            below = room + TICK if panel.outer and any(word.va == "top" for word in found) else 0.0
            y = place.bottom + below + APART
            found.append(Words(panel.xlabel, (place.left + place.right) / 2, y, soft, LABEL, ha="center", va="top"))
        if panel.title:
            found.append(Words(panel.title, place.left, place.top - ABOVE, ink, TITLE, bold=True))
        return found

    # --- elements ---

    def _panel(self, number: int, panel: Panel, place: Place) -> str:
        parts = [self._grid(panel, place)] if panel.shown else []
        clip = f"{self._name}-c{number}"
        wide, tall = short(place.right - place.left), short(place.bottom - place.top)
        rectangle = f'<rect x="{short(place.left)}" y="{short(place.top)}" width="{wide}" height="{tall}"/>'
        marks = sorted(panel.marks, key=lambda mark: mark.front)
        if any(mark.clip for mark in marks):
            parts.insert(0, f'<clipPath id="{clip}">{rectangle}</clipPath>')
        for clipped, group in groupby(marks, key=lambda mark: mark.clip):
            drawn = "".join(_mark(panel, place, mark) for mark in group)
            parts.append(f'<g clip-path="url(#{clip})">{drawn}</g>' if clipped else drawn)
        if panel.shown:
            parts.append(self._frame(panel, place))
        around = self._around(panel, place)
        parts += [word.svg(word.x, word.y) for word in around]
        parts += [word.svg(*self._where(panel, place, word)) for word in panel.words]
        if panel.ylabel:
            edge = min([place.left, *(word.box(word.x, word.y)[0] for word in around if word.va == "center")])
            x, y = edge - APART - DESCENT * LABEL, (place.top + place.bottom) / 2
            parts.append(text_svg(panel.ylabel, x, y, LABEL, self._colour("soft"), ha="center", turned=True))
        return "".join(parts)

    def _grid(self, panel: Panel, place: Place) -> str:
        across, up = _spaces(place)
        lines = []
        if panel.gridded in ("x", "both"):
            xs = place.x(panel.x.share([at for at, _ in panel.x.marks(across)]))
            lines += [f"M{short(x)} {short(place.top)}V{short(place.bottom)}" for x in xs.tolist()]
        if panel.gridded in ("y", "both"):
            ys = place.y(panel.y.share([at for at, _ in panel.y.marks(up)]))
            lines += [f"M{short(place.left)} {short(y)}H{short(place.right)}" for y in ys.tolist()]
        return _path(lines, Pen(self._colour("grid"), 0.8))

    def _frame(self, panel: Panel, place: Place) -> str:
        """The spines, and the ticks outside them."""
        hidden, (across, up) = panel.spines.hidden, _spaces(place)
        ends = {
            "left": f"M{short(place.left)} {short(place.top)}V{short(place.bottom)}",
            "right": f"M{short(place.right)} {short(place.top)}V{short(place.bottom)}",
            "top": f"M{short(place.left)} {short(place.top)}H{short(place.right)}",
            "bottom": f"M{short(place.left)} {short(place.bottom)}H{short(place.right)}",
        }
        soft, ticks = self._colour("soft"), []
        for scale, along_x, space in ((panel.x, True, across), (panel.y, False, up)):
            for marks, length in ((scale.marks(space), panel.tick), (scale.minor(), 2 * panel.tick / 3)):
                shares = scale.share([at for at, _ in marks])
                for at in (place.x(shares) if along_x else place.y(shares)).tolist() if length else []:
                    start = f"{short(at)} {short(place.bottom)}V{short(place.bottom + length)}"
                    other = f"{short(place.left)} {short(at)}H{short(place.left - length)}"
                    ticks.append(f"M{start if along_x else other}")
        spines = [path for side, path in ends.items() if side not in hidden]
        return _path(spines, Pen(soft, 0.7)) + _path(ticks, Pen(soft, 0.8))

    def _legend_svg(self) -> list[str]:
        found, x = [], PAD + 2.0
        for column in self._legend:
            y = self._height - self._below + 4.0 + ROW / 2
            for label, line, shape, dot, size in column:
                if line.colour != "none":
                    found.append(Mark("line", [], [], line, 0).svg(np.array([x, x + HANDLE]), np.array([y, y])))
                if shape:
                    found.append(Mark(shape, [], [], dot, 0, size).svg(np.array([x + HANDLE / 2]), np.array([y])))
                base = y + (ASCENT - DESCENT) / 2 * TICK
                found.append(text_svg(label, x + HANDLE + GAP, base, TICK, self._colour("ink")))
                y += ROW
            x += HANDLE + GAP + max(width(entry[0], TICK) for entry in column) + BETWEEN
        return found


def _labelled(scale: Scale, space: int) -> list[tuple[float, str]]:
    return [(at, text) for at, text in (*scale.marks(space), *scale.minor()) if text]


def _spaces(place: Place) -> tuple[int, int]:
    """Number of ticks that fit along both axes, by matplotlib's measure."""
    return int((place.right - place.left) / (3 * TICK)), int((place.bottom - place.top) / (2 * TICK))


def _points(
    panel: Panel, place: Place, across: tuple[str, str], x: Sequence[float], y: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    xs = np.asarray(x, dtype=float) if across[0] == AXES else panel.x.share(x)
    ys = np.asarray(y, dtype=float) if across[1] == AXES else panel.y.share(y)
    return place.x(xs), place.y(ys)


def _mark(panel: Panel, place: Place, mark: Mark) -> str:
    return mark.svg(*_points(panel, place, mark.across, mark.x, mark.y))


def _path(parts: list[str], pen: Pen) -> str:
    return f'<path d="{"".join(parts)}" style="{pen.line()}"/>' if parts else ""
