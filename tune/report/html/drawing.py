"""Inline SVGs from matplotlib figures, in colours that are CSS custom properties of the page.

Figures are painted in *sentinel* colours, one for each name in `NAMES`; in the SVG each becomes `var(--name)`, which
follows the reader's light or dark scheme (`tune.report.html.palette`). Text stays text and takes the page's font.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tune.report.html.palette import DARK, LIGHT
from tune.storage.atomic import atomic_write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

WIDTH = 360
"""Width of every figure in CSS pixels: a card on a laptop, most of a phone's screen."""
LEGEND = 17
PAD = 4 / 72
"""Inches around each panel."""
Grid = Literal["", "x", "y", "both"]
NAMES = tuple(DARK)
_FIRST = 0xA1B200
_SENTINELS = {name: f"#{_FIRST + number:06x}" for number, name in enumerate(NAMES)}


_PAINT: ContextVar[Mapping[str, str]] = ContextVar("paint", default=_SENTINELS)


def colour(name: str) -> str:
    """The sentinel of one of `NAMES`; while a file is saved, its colour on white."""
    return _PAINT.get()[name]


def draw(name: str, height: float, paint: Callable[[Canvas], None], *, says: str = "") -> str:
    """Call `paint` with an empty figure of WIDTH x `height` CSS pixels and return it as an inline SVG.

    The output is deterministic, and matplotlib's settings are restored.

    Args:
        name: prefix of the ids in the SVG, unique on the page.
        says: the label for screen readers.
    """
    import matplotlib.style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    with matplotlib.style.context(["default", _settings(name)]):
        canvas = Canvas(figsize=(WIDTH / 72, height / 72))
        canvas.set_layout_engine("constrained", w_pad=PAD, h_pad=PAD)
        FigureCanvasSVG(canvas)
        paint(canvas)
        # Before `savefig`, which would draw everything once more only to place it; at the resolution of an SVG.
        canvas.set_dpi(72)
        if engine := canvas.get_layout_engine():
            engine.execute(canvas)
        canvas.set_layout_engine("none")
        out = io.StringIO()
        canvas.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return _inline(out.getvalue(), name, says)


def save(file: Path, height: float, paint: Callable[[Canvas], None]) -> None:
    """Call `paint` as `draw` does, and write the figure on white to a file; its ending says whether PNG, SVG or PDF.

    The file is written whole or not at all, its folder made as needed.

    Raises:
        ResourceError: it cannot be written.
    """
    import matplotlib.style
    from matplotlib.figure import Figure as Canvas

    token = _PAINT.set(LIGHT)
    try:
        with matplotlib.style.context(["default", _settings(file.stem)]):
            canvas = Canvas(figsize=(2 * WIDTH / 72, height / 72), dpi=150)
            canvas.set_layout_engine("constrained", w_pad=PAD, h_pad=PAD)
            paint(canvas)
            ending, out = file.suffix.lower(), io.BytesIO()
            metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(ending, {})
            canvas.savefig(out, format=ending.removeprefix("."), facecolor="white", metadata=metadata)
    finally:
        _PAINT.reset(token)
    atomic_write_bytes(file, out.getvalue())


def tidy(axes: Axes, *, x: str = "", y: str = "", title: str = "", grid: Grid = "y") -> None:
    """Set axis labels, a title at the left, a light grid, and no box."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if title:
        axes.set_title(title, loc="left")
    if grid != "":
        axes.grid(axis=grid)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def plain_log(axes: Axes, which: Literal["x", "y"] = "y") -> None:
    """Use a log axis with plain numbers as ticks: 0.01, 1, 1000, 1e+06."""
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


def legend(canvas: Canvas, axes: Axes, columns: int = 3) -> None:
    """Draw the legend of `axes` below the figure; each of its rows takes LEGEND pixels."""
    handles, labels = axes.get_legend_handles_labels()
    canvas.legend(
        handles,
        labels,
        loc="outside lower left",
        ncols=columns,
        handlelength=2.2,
        columnspacing=1.2,
        handletextpad=0.5,
        borderaxespad=0.2,
    )


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


def _inline(svg: str, name: str, says: str) -> str:
    """Reduce to the `<svg>` element, with the page's colours, unique ids, and only a viewBox for its size."""
    svg = svg[svg.index("<svg ") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style\b.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = svg.replace("xlink:href=", "href=")
    head, end = svg[: svg.index(">") + 1], svg.index(">") + 1
    (box,) = re.findall(r'viewBox="[^"]*"', head)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    body = re.sub(r'\sid="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg[end:])
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", body)
    body = re.sub(r"\s*font-family: [^;\"]*;?", "", body)
    body = re.sub(r"(font: (?:\w+ )*[\d.]+px) [^;\"]*", r"\1 inherit", body)
    body = re.sub(r'\sd="[^"]*"', lambda m: re.sub(r"(\.\d\d)\d+", r"\1", m[0]), body)
    for key, sentinel in _SENTINELS.items():
        body = body.replace(sentinel, f"var(--{key})")
    label = escape(says or name, quote=True)
    return f'<svg class="plot" role="img" aria-label="{label}" {box}>{body.strip()}\n'
