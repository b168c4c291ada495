"""Scores of one model under attacks, with intervals over items, and their differences from the untouched model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tune.analysis.comparison import Comparison, Sample, compare
from tune.analysis.items import matched
from tune.analysis.stats import linearised, mean_interval
from tune.evaluation.item_values import RATIOS, Values
from tune.evaluation.score_names import Column


@dataclass(frozen=True)
class Scored:
    """A score row (`tune.evaluation.scorer.Row`), and the values of its items by id; None where they were not kept."""

    row: Mapping[str, Any]
    items: Values | None

    @property
    def column(self) -> Column:
        """The column of the score."""
        return Column.of(self.row)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval over items of a mean over them; None for other scores, and where it is unknown."""
        values = [] if self.items is None else list(self.items.values())
        plain = [value for value in values if not isinstance(value, tuple)]
        low, high = mean_interval(plain) if plain and len(plain) == len(values) else (math.nan, math.nan)
        return None if math.isnan(low) else (low, high)


def change(untouched: Scored, attacked: Scored) -> Comparison:
    """Compare a score under attack with the same model's untouched one, item by item.

    Its interval holds for other items of the same kind, with this very model: there is one seed.

    Raises:
        DataError: the two were scored on different items.
    """
    column, attack = attacked.column, str(attacked.row["attack"])
    values = (untouched.row["value"],), (attacked.row["value"],)
    sample = Sample(column, (0,), *values, _differences(untouched, attacked))
    return compare([sample], column, arm=attack, label=attack, against=str(untouched.row["attack"]))


def _differences(untouched: Scored, attacked: Scored) -> np.ndarray | None:
    """Differences (1, items), attacked minus untouched, of logarithms for perplexities; None without items."""
    if untouched.items is None or attacked.items is None:
        return None
    first, second = untouched.items, attacked.items
    keys = matched(first, second, f"{attacked.column.name}, untouched and attacked")
    before, after = (np.array([side[key] for key in keys], dtype=float) for side in (first, second))
    if attacked.column.metric.partition(",")[0] in RATIOS:
        return linearised((after - before)[None, :, 0], before[:, 1])
    return (after - before)[None, :]
