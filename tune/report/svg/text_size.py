"""Widths of texts, in the font that comes with matplotlib: browsers show fonts of about that width."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.ft2font import FT2Font

ASCENT, DESCENT = 0.76, 0.24
"""Above and below the baseline, per size of the font."""


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
    """Width in pixels of one line of text."""
    return _advance(text, bold) * size / 100
