"""Paired statistics of two arms on the same seeds and items: arrays in, numbers out.

Two arms are compared by `Paired`: a difference has two sources of noise, the sampled seeds and the sampled items, and
an interval that holds for other seeds *and* other items has to account for both.

Textbook methods are scipy's; the rule itself, `Paired`, is ours. Only `bootstrap` draws at random, from a seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.stats  # type: ignore[import-untyped]  # scipy ships no types
from scipy.special import gammaincinv, ndtr, ndtri, poch, stdtrit  # type: ignore[import-untyped]

from macdrop.bootstrap import LEVEL, no_spread, resample

Numbers = float | np.ndarray
POWER = 0.8
SMALLEST_P = 1e-16
SEED_NODES = (np.arange(128) + 0.5) / 128
_Z, _W = np.polynomial.hermite_e.hermegauss(5)
ITEM_NODES, ITEM_WEIGHTS = ndtr(_Z), np.outer(_W, _W) / _W.sum() ** 2


def mcnemar(first_only: int, second_only: int) -> float:
    """Exact two-sided McNemar test that two arms are right equally often (McNemar 1947).

    The arguments count the items that only one of the two arms answered correctly; 1.0 without any.

    Raises:
        ValueError: a count is negative.
    """
    if first_only < 0 or second_only < 0:
        raise ValueError(f"counts of items cannot be negative: {first_only}, {second_only}")
    n = first_only + second_only
    return float(scipy.stats.binomtest(first_only, n, 0.5).pvalue) if n else 1.0


def mean_interval(values: Sequence[float], *, level: float = LEVEL) -> tuple[float, float]:
    """Interval of level 1 - `level` of a mean over items, for other items of the same kind.

    Of hits and misses (1 and 0) Wilson's score interval (Wilson 1927), of other values Student's. One value that is not
    a hit or a miss has an interval of nan.

    Raises:
        ValueError: there is no value.
    """
    if not len(values):
        raise ValueError("an interval needs one or more values")
    if set(values) <= {0.0, 1.0}:
        tested = scipy.stats.binomtest(round(math.fsum(values)), len(values))
        found = tested.proportion_ci(1 - level, method="wilson")
        return float(found.low), float(found.high)
    mean, margin = math.fsum(values) / len(values), paired([np.array([values])]).margin(level)
    return mean - margin, mean + margin


def sign_test(values: Sequence[float]) -> tuple[int, int, float]:
    """Count the values above and below zero; the p-value is that of the exact two-sided sign test.

    Zeros are left out (Conover 1999, section 3.4).
    """
    above, below = sum(value > 0 for value in values), sum(value < 0 for value in values)
    return above, below, mcnemar(above, below)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given (Holm 1979); controls the family-wise error rate.

    Raises:
        ValueError: a value outside [0, 1].
    """
    p = np.asarray(p_values, dtype=float)
    if p.size and not ((p >= 0) & (p <= 1)).all():  # also refuses nan
        raise ValueError(f"p-values must lie in [0, 1]; got {list(p_values)}")
    order = np.argsort(p, kind="stable")
    adjusted = np.minimum(1.0, np.maximum.accumulate((p.size - np.arange(p.size)) * p[order]))
    found = np.empty_like(adjusted)
    found[order] = adjusted
    return found.tolist()


@dataclass(frozen=True)
class Resampled:
    """An estimate, its interval, and the two-sided p-value of zero."""

    estimate: float
    low: float
    high: float
    p: float


def bootstrap(
    differences: Sequence[float] | np.ndarray, *, seed: int = 0, resamples: int = 10_000, level: float = LEVEL
) -> Resampled:
    """Paired bootstrap over items of the mean difference, with scipy's BCa interval (Efron 1987).

    The p-value is the smallest level whose interval excludes zero, at least 2 / (resamples + 1). Deterministic for a
    given seed.

    Raises:
        ValueError: fewer than two items, or a value that is not finite.
    """
    d = np.asarray(differences, dtype=float)
    if d.ndim != 1 or d.size < 2 or not np.isfinite(d).all():
        raise ValueError(f"a bootstrap needs two or more finite differences; got shape {d.shape}")
    estimate, smallest = float(d.mean()), 2 / (resamples + 1)
    if no_spread(d):
        return Resampled(estimate, estimate, estimate, 1.0 if estimate == 0 else smallest)
    drawn = resample(d, seed=seed, resamples=resamples, level=level)

    def excludes_zero(at: float) -> bool:
        again = resample(d, seed=seed, level=at, drawn=drawn)
        return not again.confidence_interval.low <= 0 <= again.confidence_interval.high

    low, high = smallest, 1.0
    if excludes_zero(low):
        high = low
    while high - low > smallest / 2:
        middle = (low + high) / 2
        low, high = (low, middle) if excludes_zero(middle) else (middle, high)
    interval = drawn.confidence_interval
    return Resampled(estimate, float(interval.low), float(interval.high), high)


@dataclass(frozen=True)
class Paired:
    """The mean difference of two arms over seeds and items, with its variance by source.

    The difference of item i under seed s is modelled as delta + seed_s + item_i + rest_si with random seeds and items
    (the crossed two-way layout of generalizability theory; Brennan 2001). `v_seed` and `v_item` are the observed
    variances of the grand mean over seeds and over items; each includes the residual variance `v_rest` once.

    The margin of error combines the margins of both sources (Howe 1974; Zou and Donner 2008, "square and add"):

        margin^2 = t(seeds - 1)^2 v_seed + t(items - 1)^2 max(v_item - v_rest, 0),  at least t(items - 1)^2 v_item

    with Student's t at each source's own degrees of freedom. Interval, p-value and detectable difference all derive
    from this one margin (`_square`), so they never contradict each other. For any ratio of the true variances and 2 to
    10 seeds its error rate is at most 5 %, where Satterthwaite's degrees of freedom reach 13 % (2 seeds) and requiring
    both single tests to be significant reaches 11 % (10 seeds, items that favour one arm); where those two hold their
    level, it has the same power or more (rates: tests/benchmarks/calibration.py).

    With one seed `v_seed` is nan and the margin covers these adapters only; without items `v_item` is nan.
    """

    delta: float
    v_seed: float
    df_seed: float
    v_item: float
    df_item: float
    v_rest: float

    def margin(self, level: float = LEVEL) -> float:
        """Half the width of the interval of level 1 - `level`; nan where the noise is unknown."""
        t_seed, t_item = _t(self.df_seed, level / 2), _t(self.df_item, level / 2)
        return math.sqrt(_square(self.v_seed, self.v_item, self.v_rest, t_seed, t_item))

    def detectable(self, level: float = LEVEL, power: float = POWER) -> float:
        """Estimate the true difference that a test at `level` detects with `power`, from the run's own noise.

        The square root of an unbiased variance of df degrees of freedom is too small by a factor c4(df) on average, by
        20 % for two seeds (Holtzman 1950). Each source is divided by its factor, so that the estimate is on average not
        below the value at the true variances.
        """
        v_seed, v_item = self.v_seed / _c4(self.df_seed) ** 2, self.v_item / _c4(self.df_item) ** 2
        return minimum_detectable(replace(self, v_seed=v_seed, v_item=v_item), level, power)

    def p(self) -> float:
        """Two-sided p-value: the level at which the margin just reaches the difference."""
        if self.delta == 0:
            return 1.0
        if not self.margin() >= 0:
            return math.nan
        if self.margin(SMALLEST_P) <= abs(self.delta):
            return SMALLEST_P
        low, high = math.log(SMALLEST_P), 0.0  # bisection on the log scale
        while high - low > 1e-8:
            middle = (low + high) / 2
            reached = self.margin(math.exp(middle)) <= abs(self.delta)
            low, high = (low, middle) if reached else (middle, high)
        return math.exp(high)


def minimum_detectable(true: Paired, level: float = LEVEL, power: float = POWER) -> float:
    """The smallest true difference that exceeds its margin of error, on its side, with probability `power`.

    The variances of `true` are the true ones. The variances that a run measures are independent of its difference and
    of each other: each is its true variance times chi-square / df (mean squares of the two-way layout with normal
    noise; Searle, Casella and McCulloch 1992), where the residual's df is the product of the other two. So the margin
    M is random, and

        power(difference) = E[ Phi((difference - M) / sigma) ],  sigma^2 = true variance of the average,

    which is solved for the difference. With seeds alone this is the power of Student's test (noncentral t; Cohen 1988).
    The expectation is a quadrature: midpoints of the seeds' chi-square, Gauss-Hermite nodes of the other two (power
    within 0.002; within 0.02 with five items; up to 0.15 too high with fewer).
    """
    sigma = math.sqrt(_square(true.v_seed, true.v_item, true.v_rest))
    if not sigma > 0:
        return sigma
    seed = true.v_seed * _chi_square(true.df_seed, SEED_NODES)[:, None, None]  # axes: seeds, items, rest
    item = true.v_item * _chi_square(true.df_item, ITEM_NODES)[:, None]
    rest = true.v_rest * _chi_square(true.df_seed * true.df_item, ITEM_NODES)
    t_seed, t_item = _t(true.df_seed, level / 2), _t(true.df_item, level / 2)
    margins = np.sqrt(_square(seed, item, rest, t_seed, t_item)) / sigma
    low, high = 0.0, float(margins.max()) + float(ndtri(power))
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        reached = np.vdot(ndtr(middle - margins).sum(axis=0), ITEM_WEIGHTS) >= power * SEED_NODES.size
        low, high = (low, middle) if reached else (middle, high)
    return high * sigma


def paired(blocks: Sequence[np.ndarray], *, spans: Sequence[float] | None = None) -> Paired:
    """`Paired` of one task, or of the mean over several tasks, from differences per item.

    Tasks are fixed effects: the mean over tasks has no variance between tasks. Tasks are averaged within each seed
    first, so a seed's effect on all tasks counts in full.

    Args:
        blocks: the differences (seeds, items) of each task.
        spans: the largest possible difference of an item of each task, for bounded scores. Each such task gets two
            pseudo-items, one in favour of each arm, as large as the typical non-zero difference (Bonett and Price 2012;
            for hits and misses of one seed, their adjusted Wald interval), or as large as the span where no item
            differs. Without them, arms that agree on all items would have zero variance. None: use continuous values as
            measured.

    Raises:
        ValueError: no block, unequal numbers of seeds, a block without items, or a value that is not finite.
    """
    arrays = [np.asarray(block, dtype=float) for block in blocks]
    if not arrays or any(block.ndim != 2 or 0 in block.shape for block in arrays):
        raise ValueError("differences must be (seeds, items) with at least one of each, of at least one task")
    seeds = arrays[0].shape[0]
    if any(block.shape[0] != seeds for block in arrays):
        raise ValueError(f"tasks have different numbers of seeds: {[block.shape[0] for block in arrays]}")
    if not all(np.isfinite(block).all() for block in arrays):
        raise ValueError("a difference is not finite")
    per_seed = np.mean([block.mean(axis=1) for block in arrays], axis=0)
    v_seed = float(per_seed.var(ddof=1)) / seeds if seeds > 1 else math.nan
    k = len(arrays)
    items = [_of_items(block, spans[i] if spans else 0.0) for i, block in enumerate(arrays)]
    v_item = math.fsum(v for v, _ in items) / k**2
    freedoms = [max(block.shape[1] - 1, 1) for block in arrays]  # Satterthwaite's, over the tasks
    squares = math.fsum((v / k**2) ** 2 / df for (v, _), df in zip(items, freedoms, strict=True))
    df_item = v_item**2 / squares if squares else float(sum(freedoms))
    v_rest = math.fsum(v for _, v in items) / k**2
    return Paired(float(per_seed.mean()), v_seed, seeds - 1, v_item, df_item, v_rest)


def over_seeds(differences: Sequence[float]) -> Paired:
    """`Paired` from each seed's difference alone, where items were not recorded.

    Raises:
        ValueError: no difference, or one that is not finite.
    """
    d = np.asarray(differences, dtype=float)
    if d.size == 0 or not np.isfinite(d).all():
        raise ValueError(f"one or more finite differences are needed; got {list(differences)}")
    v_seed = float(d.var(ddof=1)) / d.size if d.size > 1 else math.nan
    return Paired(float(d.mean()), v_seed, d.size - 1, math.nan, math.nan, math.nan)


def linearised(differences: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Per-item values (seeds, items) whose mean over items is each seed's sum(differences) / sum(weights).

    Their variance over items is the ratio's by the delta method (Cochran 1977, section 6.4): a log-perplexity ratio is
    a mean over windows weighted by their tokens. All seeds share `weights` (items).

    Raises:
        ValueError: the weights do not match the items, or their sum is not positive.
    """
    d, w = np.asarray(differences, dtype=float), np.asarray(weights, dtype=float)
    if d.ndim != 2 or w.shape != d.shape[1:] or not w.sum() > 0:
        raise ValueError(f"weights {w.shape} with a positive sum do not fit differences {d.shape}")
    ratio = d.sum() / (w.sum() * d.shape[0])
    return ratio + w.size * (d - ratio * w) / w.sum()


def _of_items(block: np.ndarray, span: float) -> tuple[float, float]:
    """Variances of one task's mean over items and of its residual; nan for a single item without a span."""
    seeds, n = block.shape
    items = block.mean(axis=0)
    if span:
        differing = block[block != 0]
        size = math.sqrt(float((differing**2).mean())) if differing.size else span
        padded = np.concatenate([items, [size, -size]])
        v_item = float(padded.var()) / (n + 2)
    else:
        v_item = float(items.var(ddof=1)) / n if n > 1 else math.nan
    if seeds == 1 or n == 1:
        return v_item, 0.0
    rest = block - block.mean(axis=1, keepdims=True) - items + items.mean()
    return v_item, float((rest**2).sum()) / ((seeds - 1) * (n - 1)) / (seeds * n)


def _square(seed: Numbers, item: Numbers, rest: Numbers, t_seed: float = 1.0, t_item: float = 1.0) -> Numbers:
    """The squared margin of `Paired`; with t = 1 the variance of the mean. Unknown variances are nan."""
    if isinstance(seed, float) and isinstance(item, float) and isinstance(rest, float):
        return _fmax(t_seed**2 * seed + _fmax(t_item**2 * (item - rest), 0.0), t_item**2 * item)
    of_items = t_item**2 * item
    own = np.fmax(t_item**2 * (item - rest), 0.0)
    return np.fmax(t_seed**2 * seed + own, of_items)


def _fmax(one: float, other: float) -> float:
    """`numpy.fmax` of two numbers, which costs ten times as much: the larger one, or the one that is not nan."""
    return other if math.isnan(one) or other > one else one


def _chi_square(df: float, shares: np.ndarray) -> np.ndarray:
    """Quantiles of chi-square / df, whose mean is 1."""
    return gammaincinv(df / 2, shares) * 2 / df if df > 0 else np.full_like(shares, math.nan)


def _c4(df: float) -> float:
    """The mean of sqrt(chi-square / df)."""
    return math.sqrt(2 / df) * float(poch(df / 2, 0.5)) if df > 0 else math.nan


def _t(df: float, tail: float) -> float:
    """The upper quantile of Student's t for the probability `tail`."""
    return -float(stdtrit(df, tail))
