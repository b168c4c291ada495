"""Factors by which an attack multiplies perplexity, with their intervals over blocks of text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from macdrop.bootstrap import mean_interval

MIN_BLOCKS = 5  # fewer give no interval to stand on


@dataclass(frozen=True)
class Factor:
    """A ratio of perplexities and its 95 % interval: exp of the mean, over blocks, of the paired difference in loss.

    inf stands for overflow and NaN. With fewer than MIN_BLOCKS blocks there is no interval: `low` and `high` are nan.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, losses: np.ndarray, untouched: np.ndarray, *, seed: int = 0) -> Factor:
        """Factor of `losses` over `untouched`, both (n,): mean loss a token of the same blocks, all of one length.

        The interval is the BCa interval of a paired bootstrap over blocks (Efron 1987), the same for the same seed;
        Student's t of the differences where there are few (`macdrop.bootstrap.mean_interval`).
        """
        differences = losses - untouched
        if not np.isfinite(differences).all():
            return cls(math.inf, math.inf, math.inf)
        value = _exp(float(differences.mean()))
        if differences.size < MIN_BLOCKS:
            return cls(value, math.nan, math.nan)
        low, high = mean_interval(differences, seed=seed)
        return cls(value, _exp(low), _exp(high))

    def __str__(self) -> str:
        """For example "x2.16 (1.7 to 2.8)"; "x2.16" without an interval."""
        if math.isnan(self.low):
            return f"x{self.value:.3g}"
        return f"x{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"

    def to_list(self) -> list[float | str | None]:
        """Value, low and high as JSON types; an infinite one is the string "inf", a missing one None."""
        return [json_number(value) for value in (self.value, self.low, self.high)]

    @classmethod
    def from_list(cls, values: list) -> Factor:
        """The inverse of `to_list`. Raises `ValueError` or `TypeError` for anything else."""
        value, low, high = (math.nan if each is None else float(each) for each in values)
        return cls(value, low, high)


def json_number(value: float) -> float | str | None:
    """Return a number as JSON has it: "inf" for an infinite one, None for nan."""
    return None if math.isnan(value) else value if math.isfinite(value) else "inf"


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
