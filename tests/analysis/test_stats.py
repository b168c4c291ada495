"""stats: against slow references, on what is claimed of it, and on simulated runs with and without an effect."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
from helpers.simulated import Design, found, harm, tell
from scipy.special import ndtr, ndtri

from tune.analysis.stats import (
    LEVEL,
    POWER,
    Paired,
    bootstrap,
    holm,
    linearised,
    mcnemar,
    minimum_detectable,
    over_seeds,
    paired,
    sign_test,
)


def draws(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# --- McNemar, sign, Holm ---


def test_mcnemar_equals_the_binomial_sum():
    for b, c in itertools.product(range(12), repeat=2):
        n, k = b + c, min(b, c)
        slow = min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n) if n else 1.0
        assert mcnemar(b, c) == pytest.approx(slow, rel=1e-12)
        assert mcnemar(b, c) == mcnemar(c, b)


def test_mcnemar_errs_in_at_most_five_percent():
    for n in range(1, 60):
        wrong = sum(math.comb(n, b) for b in range(n + 1) if mcnemar(b, n - b) <= LEVEL) / 2**n
        assert wrong <= LEVEL


def test_signs_are_counted_without_zeros():
    assert sign_test([0.1, -0.2, 0.3, 0.0]) == (2, 1, 1.0)
    assert sign_test([1.0] * 6) == (6, 0, pytest.approx(2 / 64))


def test_holm_is_the_closure_of_bonferroni():
    """The adjusted p of a hypothesis is the largest Bonferroni p of all sets of hypotheses that hold it."""
    for seed in range(20):
        p = draws(seed).uniform(0, 0.2, 5)
        sets = [s for size in range(1, 6) for s in itertools.combinations(range(5), size)]
        slow = [max(min(1.0, len(s) * min(p[j] for j in s)) for s in sets if i in s) for i in range(5)]
        assert holm(p) == pytest.approx(slow)
    assert holm([]) == [] and holm([0.03]) == [0.03]


@pytest.mark.parametrize(
    "call",
    [
        lambda: mcnemar(-1, 2),
        lambda: holm([0.5, math.nan]),
        lambda: holm([1.2]),
        lambda: bootstrap([1.0]),
        lambda: bootstrap([1.0, math.inf]),
        lambda: bootstrap([[1.0, 2.0]]),
        lambda: paired([]),
        lambda: paired([np.zeros((2, 0))]),
        lambda: paired([np.zeros((2, 3)), np.zeros((3, 3))]),
        lambda: paired([np.array([[0.0, math.nan]])]),
        lambda: over_seeds([]),
        lambda: over_seeds([1.0, math.inf]),
        lambda: linearised(np.zeros((2, 3)), np.ones(2)),
        lambda: linearised(np.zeros((2, 3)), np.zeros(3)),
    ],
)
def test_unusable_values_are_refused(call):
    with pytest.raises(ValueError):
        call()


# --- bootstrap ---


def slow_bca(d: np.ndarray, resamples: int, seed: int) -> tuple[float, float, float]:
    """BCa by hand (Efron 1987): the 95 % interval, and the level whose bound is zero in closed form."""
    rng = np.random.default_rng(seed)
    sums = np.sort([rng.choice(d, d.size).mean() for _ in range(resamples)])
    jackknife = np.array([np.delete(d, i).mean() for i in range(d.size)])
    spread = jackknife.mean() - jackknife
    acceleration = (spread**3).sum() / (6 * (spread**2).sum() ** 1.5)
    bias = ndtri((sums < d.mean()).mean() + (sums == d.mean()).mean() / 2)

    def bound(quantile: float) -> float:
        z = bias + ndtri(quantile)
        return float(np.quantile(sums, ndtr(bias + z / (1 - acceleration * z))))

    z = ndtri(((sums < 0).sum() + 0.5 * (sums == 0).sum() + 0.5) / (resamples + 1)) - bias
    tail = ndtr(z / (1 + acceleration * z) - bias)
    return bound(LEVEL / 2), bound(1 - LEVEL / 2), 2 * min(tail, 1 - tail)


@pytest.mark.parametrize("seed", range(5))
def test_bootstrap_equals_bca_by_hand_up_to_the_draw(seed):
    d = draws(seed).exponential(1, 60) - 0.7
    found, (low, high, p) = bootstrap(d, seed=3, resamples=20_000), slow_bca(d, 20_000, seed=4)
    assert found.estimate == pytest.approx(d.mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.03 * (high - low))
    assert found.p == pytest.approx(p, rel=0.1, abs=0.004)


def test_bootstrap_repeats_and_its_p_agrees_with_its_interval():
    for seed in range(20):
        d = draws(seed).normal(0.25, 1, 40)
        found = bootstrap(d, resamples=2000)
        assert found == bootstrap(d, resamples=2000)
        assert (found.p > LEVEL) == (found.low < 0 < found.high)


def test_bootstrap_of_degenerate_differences():
    same, none = bootstrap([0.5] * 10), bootstrap([0.0] * 10)
    assert (same.low, same.high) == (0.5, 0.5) and same.p < 0.001
    assert (none.low, none.high, none.p) == (0.0, 0.0, 1.0)
    for few in ([1.0, 2.0], [0.0, 1.0], [0.0] * 59 + [1.0]):
        found = bootstrap(few)
        assert found.low <= found.estimate <= found.high and 0 < found.p <= 1


# --- the rule ---


def slow_paired(block: np.ndarray) -> tuple[float, float, float, float]:
    """Mean squares of the crossed two-way layout without replication, over the number of values."""
    seeds, items = block.shape
    grand = block.mean()
    of_seeds = sum(items * (row.mean() - grand) ** 2 for row in block) / (seeds - 1)
    of_items = sum(seeds * (column.mean() - grand) ** 2 for column in block.T) / (items - 1)
    rest = 0.0
    for s, i in itertools.product(range(seeds), range(items)):
        rest += (block[s, i] - block[s].mean() - block[:, i].mean() + grand) ** 2
    rest /= (seeds - 1) * (items - 1)
    return grand, of_seeds / block.size, of_items / block.size, rest / block.size


def test_paired_equals_the_analysis_of_variance():
    block = draws().normal(0.3, 1, (4, 9)) + draws(1).normal(0, 1, (4, 1)) + draws(2).normal(0, 1, (1, 9))
    found = paired([block])
    assert (found.delta, found.v_seed, found.v_item, found.v_rest) == pytest.approx(slow_paired(block))
    assert (found.df_seed, found.df_item) == (3, pytest.approx(8))
    both = paired([block, block])  # tasks that move together with the seed keep all of its noise
    assert both.v_seed == pytest.approx(found.v_seed) and both.v_item == pytest.approx(found.v_item / 2)


def test_one_seed_of_hits_has_bonett_and_prices_interval():
    differences = np.array([[1.0] * 7 + [-1.0] * 3 + [0.0] * 50])
    found = paired([differences], spans=[1.0])
    up, down, n = 8 / 62, 4 / 62, 62
    assert found.v_item == pytest.approx((up + down - (up - down) ** 2) / n)
    assert math.isnan(found.v_seed) and found.margin() == pytest.approx(2.0010 * math.sqrt(found.v_item), rel=1e-4)


def test_arms_that_agree_on_all_items_are_not_certain():
    found = paired([np.zeros((3, 60))], spans=[1.0])
    assert found.p() == 1 and 0.03 < found.margin() < 0.05 < found.detectable() < 0.08
    up = np.zeros((3, 60))
    up[:, 0] = 1.0  # one item, with all three seeds: between seeds there is no noise at all
    assert paired([up], spans=[1.0]).p() > 0.3


def test_interval_p_value_and_detectable_difference_agree():
    for seed in range(20):
        found = paired([draws(seed).normal(0.2, 1, (3, 30))])
        assert found.margin(found.p()) == pytest.approx(abs(found.delta), rel=1e-6)
        assert (found.p() <= LEVEL) == (abs(found.delta) >= found.margin())
        assert found.detectable(0.01) > found.detectable() > found.margin() > found.margin(0.2)
    assert over_seeds([0.1, 0.2, 0.4]).p() == pytest.approx(scipy.stats.ttest_1samp([0.1, 0.2, 0.4], 0).pvalue)
    assert math.isnan(over_seeds([0.1]).margin()) and math.isnan(over_seeds([0.1]).p())


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_the_margin_errs_in_at_most_five_percent_whatever_the_noise_is_made_of(seeds):
    rng, n, times = draws(seeds), 60, 4000
    mixtures = [(0, 0, 1), (4, 0, 1), (50, 0, 1), (0, 1, 0.3), (1, 1, 0.3), (1, 1, 0), (0.3, 1, 0)]
    for of_seeds, of_items, rest in mixtures:
        delta = rng.normal(0, math.sqrt(of_seeds + of_items + rest), times)
        v_seed = (of_seeds + rest) * rng.chisquare(seeds - 1, times) / (seeds - 1)
        v_item = (of_items + rest) * rng.chisquare(n - 1, times) / (n - 1)
        found = [Paired(d, s, seeds - 1, i, n - 1, rest) for d, s, i in zip(delta, v_seed, v_item, strict=True)]
        wrong = sum(abs(one.delta) > one.margin() for one in found)
        assert scipy.stats.binomtest(wrong, times, LEVEL, alternative="greater").pvalue > 0.001


@pytest.mark.parametrize("level", [LEVEL, LEVEL / 10])
@pytest.mark.parametrize("df", [1, 2, 4, 9, 59])
def test_with_one_source_of_noise_the_power_is_that_of_students_test(df, level):
    t = scipy.stats.t.isf(level / 2, df)
    seeds = Paired(0.0, 0.04, df, math.nan, math.nan, math.nan)
    items = Paired(0.0, math.nan, 0, 0.04, df, 0.0)
    assert scipy.stats.nct.sf(t, df, minimum_detectable(seeds, level) / 0.2) == pytest.approx(POWER, abs=0.001)
    assert scipy.stats.nct.sf(t, df, minimum_detectable(seeds, level, 0.5) / 0.2) == pytest.approx(0.5, abs=0.001)
    if df > 2:
        assert scipy.stats.nct.sf(t, df, minimum_detectable(items, level) / 0.2) == pytest.approx(POWER, abs=0.02)


def test_a_detectable_difference_needs_noise_that_is_known():
    assert minimum_detectable(over_seeds([0.2, 0.2])) == 0
    assert math.isnan(over_seeds([0.1]).detectable())
    one = paired([draws().normal(0, 1, (1, 50))])
    assert one.detectable() == pytest.approx(one.margin() + 0.85 * math.sqrt(one.v_item), rel=0.02)
    assert one.detectable() == one.detectable()


SOURCES = {"items": (0.05, 1.0, 0.3), "seeds": (1.0, 0.05, 0.1), "both": (0.5, 0.5, 0.2), "neither": (0.0, 0.0, 1.0)}
"""Variances of the average by seeds, by items and by the rest."""


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_the_detectable_difference_is_found_in_four_of_five_runs(seeds, source):
    """Runs drawn value by value and judged by the rule; and the run's own estimate of it, which is not too small."""
    (of_seeds, of_items, of_rest), n, times = SOURCES[source], 30, 1000
    true = Paired(0.0, of_seeds + of_rest, seeds - 1, of_items + of_rest, n - 1, of_rest)
    size, rng = minimum_detectable(true), draws(seeds)

    def noise(variance, *shape):
        return math.sqrt(variance) * rng.normal(0, 1, shape)

    made = [
        paired(
            [
                size
                + noise(of_seeds * seeds, seeds, 1)
                + noise(of_items * n, 1, n)
                + noise(of_rest * seeds * n, seeds, n)
            ]
        )
        for _ in range(times)
    ]
    found = sum(run.delta > run.margin() for run in made)
    assert scipy.stats.binomtest(found, times, POWER).pvalue > 0.002, found / times
    named = [run.detectable() for run in made[:150]]
    assert np.mean(named) > size - 3 * np.std(named) / math.sqrt(150)


def test_ratios_are_means_of_linearised_windows():
    losses, tokens = draws().normal(3, 1, (2, 40)), draws(1).integers(10, 64, 40).astype(float)
    values = linearised(losses, tokens)
    assert values.mean(axis=1) == pytest.approx(losses.sum(axis=1) / tokens.sum())
    one = linearised(losses[:1], tokens)
    ratio = losses[0].sum() / tokens.sum()
    delta_method = np.sum((losses[0] - ratio * tokens) ** 2) / 39 * 40 / tokens.sum() ** 2
    assert one.var(ddof=1) / 40 == pytest.approx(delta_method)


# --- calibration: the larger version is tests/benchmarks/calibration.py ---

NOISE = {
    "hits": Design(3, 60),
    "near the ceiling": Design(3, 60, rate=0.98),
    "seeds that differ": Design(2, 200, seed_sd=0.04),
    "items that suit one arm": Design(5, 60, interaction=0.39, seed_sd=0.01),
    "perplexity": Design(3, 60, perplexity=True, seed_sd=0.03),
}


@pytest.mark.parametrize("name", NOISE)
def test_without_an_effect_little_is_said_to_help_or_hurt(name):
    rates = tell(NOISE[name], 400, seed=1)
    for rate in (rates.headline, rates.any_task):
        assert rate.interval[0] <= LEVEL, rate.show()


@pytest.mark.parametrize("name", ["hits", "perplexity"])
def test_the_difference_that_is_called_detectable_is_found(name):
    effect = harm(NOISE[name], 100, seed=2)
    assert effect == harm(NOISE[name], 100, seed=2)
    for times in (1, 2):
        rate = found(replace(NOISE[name], effect=times * effect), 200, seed=3)
        assert rate.share >= POWER if times == 2 else rate.interval[1] >= POWER, rate.show()
