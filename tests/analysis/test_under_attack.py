"""Scores under attack: intervals equal textbook ones, differences are paired by item."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from macdrop.errors import DataError
from tune.analysis.stats import mcnemar, mean_interval, paired
from tune.analysis.under_attack import Scored, change


def scored(values: list, attack: str = "none", metric: str = "acc") -> Scored:
    items = {f"qa/{number}": value for number, value in enumerate(values)}
    value = np.mean(values) if metric == "acc" else math.exp(sum(v[0] for v in values) / sum(v[1] for v in values))
    place = {"benchmark": "zero_shot", "task": "qa", "metric": metric, "higher_is_better": metric == "acc"}
    under = {"attack": attack, "attack_on": None if attack == "none" else "base"}
    return Scored({**place, **under, "value": float(value), "n": len(values)}, items)


@pytest.mark.parametrize(("hits", "n"), [(0, 8), (3, 8), (53, 100), (100, 100)])
def test_the_interval_of_an_accuracy_is_wilsons(hits, n):
    """The formula of Wilson (1927), written out."""
    z, p = scipy.stats.norm.ppf(0.975), hits / n
    centre, half = (p + z**2 / (2 * n)), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    expected = [(centre + side * half) / (1 + z**2 / n) for side in (-1, 1)]
    assert mean_interval([1.0] * hits + [0.0] * (n - hits)) == pytest.approx(expected, abs=1e-12)


def test_the_interval_of_other_values_is_students():
    values = [0.2, 0.9, 0.4, 0.35, 0.7]
    expected = scipy.stats.t.interval(0.95, 4, np.mean(values), scipy.stats.sem(values))
    assert mean_interval(values) == pytest.approx(expected)


def test_no_interval_without_values_or_spread():
    with pytest.raises(ValueError, match="one or more"):
        mean_interval([])
    assert scored([0.3]).interval is None
    assert Scored(scored([1.0]).row, None).interval is None
    assert scored([(2.0, 3.0)] * 4, metric="word_perplexity").interval is None


def test_a_difference_is_paired_by_item():
    before, after = [1.0] * 53 + [0.0] * 47, [1.0] * 30 + [0.0] * 65 + [1.0] * 5
    found = change(scored(before), scored(after, "zeroing@2"))
    differences = np.subtract(after, before)
    margin = paired([differences[None]], spans=[1.0]).margin()
    assert (found.delta, found.low, found.high) == pytest.approx((-0.18, -0.18 - margin, -0.18 + margin))
    assert found.p == mcnemar(5, 23) and found.amount.startswith("-18.0 points [-2")
    shuffled = Scored(scored(after, "zeroing@2").row, dict(reversed(scored(after).items.items())))
    assert change(scored(before), shuffled) == found


def test_perplexities_are_compared_by_their_ratio():
    before, after = [(2.0, 2.0), (3.0, 2.0), (2.5, 2.0)], [(4.0, 2.0), (5.1, 2.0), (4.4, 2.0)]
    found = change(scored(before, metric="perplexity"), scored(after, "zeroing@2", "perplexity"))
    assert found.amount.startswith(f"{100 * math.expm1(6.0 / 6):+.1f}%")


def test_other_items_are_refused():
    with pytest.raises(DataError, match="different items"):
        change(scored([1.0, 0.0]), scored([1.0], "zeroing@2"))
