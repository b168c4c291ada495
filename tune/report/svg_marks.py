"""Things drawn on a panel: lines, markers, areas and texts, at places of data, of the axes, or of pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.ft2font import FT2Font


Dashes = Any
"""A line's style by matplotlib: "-", or (offset, lengths of line and gap by its width)."""
DATA, AXES = "data", "axes fraction"
ASCENT, DESCENT = 0.76, 0.24
"""Of a text above and below its baseline, per size of the font."""
_FILLED_X = ((-1, 2), (0, 1), (1, 2), (2, 1), (1, 0), (2, -1), (1, -2), (0, -1), (-1, -2), (-2, -1), (-1, 0), (-2, 1))
_SHAPES: dict[str, tuple[tuple[float, float], ...]] = {
    "s": ((-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)),
    "D": ((0, -0.7071), (0.7071, 0), (0, 0.7071), (-0.7071, 0)),
    "^": ((0, -0.5), (0.5, 0.5), (-0.5, 0.5)),
    "v": ((0, 0.5), (0.5, -0.5), (-0.5, -0.5)),
    "<": ((-0.5, 0), (0.5, 0.5), (0.5, -0.5)),
    ">": ((0.5, 0), (-0.5, 0.5), (-0.5, -0.5)),
    "X": tuple((x / 4, y / 4) for x, y in _FILLED_X),
}
#: Markers by matplotlib's names; of others there are none here.
SHAPES = (*_SHAPES, "o", "x")


def short(value: float) -> str:
    """A number of pixels, to a hundredth."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


@dataclass(frozen=True)
class Pen:
    """The style of something drawn. A colour is CSS, or "none"; `alpha` is of all of it; `edge`: around an area."""

    colour: str
    width: float = 0.0
    dashes: Dashes = "-"
    alpha: float = 1.0
    edge: str = "none"
    round: bool = False

    def line(self) -> str:
        """The style of a line."""
        found = f"fill:none;stroke:{self.colour};stroke-width:{short(self.width)}"
        if isinstance(self.dashes, tuple):
            found += f";stroke-dasharray:{','.join(short(each * self.width) for each in self.dashes[1])}"
        elif self.round:
            found += ";stroke-linecap:round"
        return found + self._faint("stroke-opacity")

    def area(self) -> str:
        """The style of an area."""
        found = f"fill:{self.colour}"
        if self.edge != "none" and self.width:
            found += f";stroke:{self.edge};stroke-width:{short(self.width)}"
        return found + self._faint("opacity")

    def _faint(self, key: str) -> str:
        return "" if self.alpha == 1.0 else f";{key}:{self.alpha:g}"


@dataclass(frozen=True)
class Mark:
    """Points with a pen. `kind`: "line", "area", or a marker of `SHAPES` at each point of `size` pixels."""

    kind: str
    x: Sequence[float]
    y: Sequence[float]
    pen: Pen
    front: float
    size: float = 0.0
    clip: bool = True
    across: tuple[str, str] = (DATA, DATA)

    def svg(self, x: np.ndarray, y: np.ndarray) -> str:
        """The element, with the points in pixels; points without a place are left out, and a line breaks there."""
        there = np.isfinite(x) & np.isfinite(y)
        if self.kind in ("line", "area"):
            path, down = [], False
            for known, left, top in zip(there.tolist(), x.tolist(), y.tolist(), strict=True):
                if known:
                    path.append(f"{'L' if down else 'M'}{short(left)} {short(top)}")
                down = known
            close, style = ("", self.pen.line()) if self.kind == "line" else ("Z", self.pen.area())
            return f'<path d="{"".join(path)}{close}" style="{style}"/>' if path else ""
        path = [self._marker(left, top) for left, top in zip(x[there].tolist(), y[there].tolist(), strict=True)]
        style = self.pen.line() if self.kind == "x" else self.pen.area()
        return f'<path d="{"".join(path)}" style="{style}"/>' if path else ""

    def _marker(self, x: float, y: float) -> str:
        half = self.size / 2
        if self.kind == "o":
            r = short(half)
            return (
                f"M{short(x - half)} {short(y)}a{r} {r} 0 1 0 {short(2 * half)} 0a{r} {r} 0 1 0 {short(-2 * half)} 0Z"
            )
        if self.kind == "x":
            a, b, c, d = (short(each) for each in (x - half, x + half, y - half, y + half))
            return f"M{a} {c}L{b} {d}M{a} {d}L{b} {c}"
        points = [f"{short(x + self.size * dx)} {short(y + self.size * dy)}" for dx, dy in _SHAPES[self.kind]]
        return f"M{'L'.join(points)}Z"


@dataclass(frozen=True)
class Words:
    """A text at a place, moved by `offset` pixels to the right and up."""

    text: str
    x: float
    y: float
    colour: str
    size: float
    across: tuple[str, str] = (DATA, DATA)
    offset: tuple[float, float] = (0.0, 0.0)
    ha: str = "left"
    va: str = "baseline"
    bold: bool = False
    front: float = 3.0

    def box(self, x: float, y: float) -> tuple[float, float, float, float]:
        """Left, top, right and bottom in pixels, where its place is there."""
        wide = width(self.text, self.size, self.bold)
        left = x + self.offset[0] - {"left": 0.0, "center": wide / 2, "right": wide}[self.ha]
        base = self._baseline(y)
        return left, base - ASCENT * self.size, left + wide, base + DESCENT * self.size

    def svg(self, x: float, y: float) -> str:
        """The element, where its place is there."""
        return text_svg(
            self.text, x + self.offset[0], self._baseline(y), self.size, self.colour, ha=self.ha, bold=self.bold
        )

    def _baseline(self, y: float) -> float:
        middle = (ASCENT - DESCENT) / 2
        up = {"baseline": 0.0, "center": middle, "top": ASCENT, "bottom": -DESCENT}[self.va]
        return y - self.offset[1] + up * self.size


def text_svg(
    text: str,
    x: float,
    y: float,
    size: float,
    colour: str,
    *,
    ha: str = "left",
    bold: bool = False,
    turned: bool = False,
) -> str:
    """One line of text with its baseline at `y`; `turned`: it reads upwards."""
    anchor = {"left": "", "center": ";text-anchor:middle", "right": ";text-anchor:end"}[ha]
    weight = ";font-weight:bold" if bold else ""
    place = f'transform="translate({short(x)} {short(y)}) rotate(-90)"' if turned else f'x="{short(x)}" y="{short(y)}"'
    return f'<text {place} style="font-size:{size:g}px;fill:{colour}{anchor}{weight}">{escape(text)}</text>'


@cache
def _font(bold: bool) -> FT2Font:
    from matplotlib import get_data_path
    from matplotlib.ft2font import FT2Font

    font = FT2Font(f"{get_data_path()}/fonts/ttf/DejaVuSans{'-Bold' if bold else ''}.ttf")
    font.set_size(100, 72)
    return font


@lru_cache(maxsize=8192)
def _advance(text: str, bold: bool) -> float:
    font = _font(bold)
    font.set_text(text, 0.0)
    return float(font.get_width_height()[0]) / 64


def width(text: str, size: float, bold: bool = False) -> float:
    """Width in pixels of one line of text, in the font that comes with matplotlib: browsers show some as wide."""
    return _advance(text, bold) * size / 100
