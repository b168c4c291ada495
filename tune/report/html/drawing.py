"""Inline SVGs for the page, in colours that are CSS custom properties of it, and the same drawings as files.

Figures of the page are written by `tune.report.svg_canvas` in `var(--name)`, which follows the reader's light or dark
scheme (`tune.report.html.palette`): one drawing serves both. matplotlib draws the few that are saved as PNG, SVG or
PDF: its artists and layout cost about thirty times the CPU, and a run may have thousands of figures.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from tune.report.html.palette import DARK, LIGHT
from tune.report.svg_canvas import PAD, Canvas
from tune.report.svg_panel import Panel
from tune.storage.atomic import atomic_write_bytes

WIDTH = 360
"""Width of every figure in CSS pixels: a card on a laptop, most of a phone's screen."""
LEGEND = 17
Grid = Literal["", "x", "y", "both"]
NAMES = tuple(DARK)
_PAGE = MappingProxyType({name: f"var(--{name})" for name in NAMES})
_PAINT: ContextVar[Mapping[str, str]] = ContextVar("paint", default=_PAGE)


def colour(name: str) -> str:
    """The CSS of one of `NAMES`; while a file is saved, its colour on white."""
    return _PAINT.get()[name]


def draw(name: str, height: float, paint: Callable[[Canvas], None], *, says: str = "") -> str:
    """Call `paint` with an empty figure of WIDTH x `height` CSS pixels and return it as an inline SVG.

    The output is deterministic.

    Args:
        name: prefix of the ids in the SVG, unique on the page.
        says: the label for screen readers.
    """
    canvas = Canvas(WIDTH, height, name, colour)
    paint(canvas)
    return canvas.svg(says or name)


def save(file: Path, height: float, paint: Callable[[Any], None]) -> None:
    """Call `paint` as `draw` does, and write the figure on white to a file; its ending says whether PNG, SVG or PDF.

    The file is written whole or not at all, its folder made as needed.

    Raises:
        ResourceError: it cannot be written.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    token = _PAINT.set(LIGHT)
    try:
        with matplotlib.style.context(["default", _settings(file.stem)]):
            canvas = Figure(figsize=(2 * WIDTH / 72, height / 72), dpi=150)
            canvas.set_layout_engine("constrained", w_pad=PAD / 72, h_pad=PAD / 72)
            paint(canvas)
            ending, out = file.suffix.lower(), io.BytesIO()
            metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(ending, {})
            canvas.savefig(out, format=ending.removeprefix("."), facecolor="white", metadata=metadata)
    finally:
        _PAINT.reset(token)
    atomic_write_bytes(file, out.getvalue())


def tidy(axes: Any, *, x: str = "", y: str = "", title: str = "", grid: Grid = "y") -> None:
    """Set axis labels, a title at the left, a light grid, and no box."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if title:
        axes.set_title(title, loc="left")
    if grid != "":
        axes.grid(axis=grid)
    axes.spines[["top", "right"]].set_visible(False)


def plain_log(axes: Any, which: Literal["x", "y"] = "y") -> None:
    """Use a log axis with plain numbers as ticks: 0.01, 1, 1000, 1e+06."""
    if isinstance(axes, Panel):
        axes.set_log(which)
        return
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set(**{f"{which}scale": "log"})
    axis = axes.yaxis if which == "y" else axes.xaxis
    low, high = sorted(axis.get_view_interval())
    few = high / low < 30  # less than about one and a half decades: ticks between the powers of ten need labels too
    written = FuncFormatter(lambda value, _: f"{value:g}")
    axis.set_major_formatter(written)
    axis.set_minor_formatter(written if few else NullFormatter())
    if few:
        from matplotlib.ticker import LogLocator

        axis.set_minor_locator(LogLocator(subs=(2, 3, 5) if high / low > 3 else (1.5, 2, 3, 4, 5, 7)))
        axes.tick_params(axis=which, which="minor", labelsize=10)


def legend(canvas: Canvas, axes: Panel, columns: int = 3) -> None:
    """Write the legend of `axes` below the figure; each of its rows takes LEGEND pixels."""
    canvas.legend(axes, columns)


def signed(value: float, scale: float) -> str:
    """Format a signed difference to three significant digits of `scale`, the largest number nearby."""
    digits = max(0, min(4, 2 - math.floor(math.log10(scale)))) if scale > 0 else 1
    text = f"{value:+.{digits}f}"
    return ("±" + text[1:] if float(text) == 0 else text).replace("-", "−")


def _settings(name: str) -> dict[str, object]:
    ink, soft, grid = colour("ink"), colour("soft"), colour("grid")
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.parse_math": False,
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 11,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlepad": 7,
        "axes.labelsize": 10.5,
        "axes.labelcolor": soft,
        "axes.titlecolor": ink,
        "axes.edgecolor": soft,
        "axes.linewidth": 0.7,
        "axes.axisbelow": True,
        "xtick.labelsize": 10,
        "ytick.labelsize": 10,
        "xtick.color": soft,
        "ytick.color": soft,
        "xtick.major.size": 3,
        "ytick.major.size": 3,
        "text.color": ink,
        "grid.color": grid,
        "grid.linewidth": 0.8,
        "lines.linewidth": 1.8,
        "lines.solid_capstyle": "round",
        "legend.frameon": False,
        "legend.fontsize": 10,
        "axes.unicode_minus": True,
        "axes.formatter.useoffset": False,
    }
