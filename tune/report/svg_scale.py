"""Axes of a figure: limits, ticks and their labels; rules and numbers are matplotlib's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

STEPS = (1, 2, 2.5, 5, 10)
MOST = 9
"""Intervals between ticks, at most."""


class Scale:
    """One direction of one or several panels. `low`, `high`: of the data so far; `fixed`: limits that were set."""

    def __init__(self) -> None:
        self.low, self.high, self.least = math.inf, -math.inf, math.inf
        self.fixed: tuple[float, float] | None = None
        self.log = self.integer = self.few = False
        self.margin, self.most = 0.05, MOST
        self.ticks: list[float] | None = None
        self.names: list[str] | None = None
        self.small: tuple[float, ...] | None = None

    def add(self, values: Iterable[float]) -> None:
        """Make room for values; those that are not finite are left out."""
        for value in values:
            if math.isfinite(value):
                self.low, self.high = min(self.low, value), max(self.high, value)
                if value > 0:
                    self.least = min(self.least, value)

    def limits(self) -> tuple[float, float]:
        """The ends of the axis, in its direction."""
        if self.fixed is not None:
            return self.fixed
        if self.low > self.high:
            return (1.0, 10.0) if self.log else (0.0, 1.0)
        if self.log:
            return self._log_limits()
        low, high = self.low, self.high
        if low == high:  # as matplotlib does
            low, high = low - 0.05 * (abs(low) or 1.0), high + 0.05 * (abs(high) or 1.0)
        room = self.margin * (high - low)
        return float(low - room), float(high + room)

    def _log_limits(self) -> tuple[float, float]:
        if not math.isfinite(self.least):
            return 1.0, 10.0
        low, high = max(self.low, self.least), max(self.high, self.least)
        if low == high:
            low, high = 10.0 ** (math.ceil(math.log10(low)) - 1), 10.0 ** (math.floor(math.log10(high)) + 1)
        room = self.margin * math.log10(high / low)
        return low / 10**room, high * 10**room

    def share(self, values: Sequence[float]) -> np.ndarray:
        """Places of values on the axis, 0 to 1; nan for what it has no place for."""
        found, ends = np.asarray(values, dtype=float), np.array(self.limits())
        if self.log:
            with np.errstate(invalid="ignore", divide="ignore"):
                found, ends = np.log10(np.where(found > 0, found, np.nan)), np.log10(ends)
        return (found - ends[0]) / (ends[1] - ends[0])

    def marks(self, space: int) -> list[tuple[float, str]]:
        """Ticks with their labels, for an axis with space for so many."""
        low, high = sorted(self.limits())
        if self.ticks is not None:
            names = self.names or _numbers(self.ticks, low, high)
            return [(at, name) for at, name in zip(self.ticks, names, strict=True) if low <= at <= high]
        if self.log:
            return [(at, f"{at:g}") for at in _log_ticks(low, high, (1.0,), min(max(space, 2), MOST))]
        most = self.most if self.integer or self.most != MOST else min(max(space, 1), MOST)
        return list(_ticks(low, high, most, self.integer))

    def minor(self) -> list[tuple[float, str]]:
        """Ticks between those of a log axis, labelled where there are few of the others."""
        if not self.log or self.ticks is not None:
            return []
        low, high = sorted(self.limits())
        if high / low > 1e7 and not self.few:
            return []
        found = _log_ticks(low, high, self.small or tuple(range(2, 10)), MOST)
        return [(at, f"{at:g}" if self.few else "") for at in found]


@lru_cache(maxsize=4096)
def _ticks(low: float, high: float, most: int, integer: bool) -> tuple[tuple[float, str], ...]:
    from matplotlib.ticker import MaxNLocator

    locator: Any = MaxNLocator(nbins=most, steps=STEPS, integer=integer)
    found = _inside(locator.tick_values(low, high), low, high)
    return tuple(zip(found, _numbers(found, low, high), strict=True))


@lru_cache(maxsize=4096)
def _log_ticks(low: float, high: float, parts: tuple[float, ...], most: int) -> tuple[float, ...]:
    from matplotlib.ticker import LogLocator

    locator: Any = LogLocator(subs=parts, numticks=most)
    return tuple(_inside(locator.tick_values(low, high), low, high))


def _inside(values: Iterable[float], low: float, high: float) -> list[float]:
    slack = 1e-10 * (high - low)
    return [float(value) for value in values if low - slack <= value <= high + slack]


def _numbers(values: Sequence[float], low: float, high: float) -> list[str]:
    from matplotlib.ticker import ScalarFormatter

    formatter: Any = ScalarFormatter(useOffset=False)
    formatter.set_scientific(False)
    formatter.create_dummy_axis()
    formatter.axis.set_view_interval(low, high)
    return list(formatter.format_ticks(values))
