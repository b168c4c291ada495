"""The comparison of two arms on one column: scores and item differences in, a `Comparison` out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tune.analysis.stats import LEVEL, Paired, bootstrap, holm, mcnemar, over_seeds, paired
from tune.evaluation.item_values import RATIOS
from tune.evaluation.score_names import Column

HELPS, HURTS, CANNOT_TELL = "helps", "hurts", "cannot tell"
SAME = "identical on every item"
SPANS = {"chrf": 100.0, "judge_score": 4.0}
"""Widths of scales other than 0 to 1."""


@dataclass(frozen=True)
class Sample:
    """The scores of two arms on one column, with the same seeds.

    plain, value: one score per seed. differences: (seeds, items), value minus plain; of the logarithm for perplexities
    (`tune.analysis.stats.linearised`); None where items were not kept. note: a qualification, for reports.
    """

    column: Column
    seeds: tuple[int, ...]
    plain: tuple[float, ...]
    value: tuple[float, ...]
    differences: np.ndarray | None
    note: str = ""

    @property
    def relative(self) -> bool:
        """True if arms are compared by the ratio of their scores, as perplexities are."""
        return _metric(self.column) in RATIOS

    def of(self, seeds: Sequence[int]) -> Sample:
        """The sample restricted to some of the seeds."""
        kept = [self.seeds.index(seed) for seed in seeds]
        cut = None if self.differences is None else self.differences[kept]
        plain, value = (tuple(scores[i] for i in kept) for scores in (self.plain, self.value))
        return Sample(self.column, tuple(seeds), plain, value, cut, self.note)


@dataclass(frozen=True)
class Comparison:
    """One arm against plain on one column.

    plain, value: means over the seeds that both have (of perplexities the geometric ones); delta = value - plain in
    the column's own unit, with its 95 % interval; `mde` is the minimum detectable difference at 80 % power.
    Perplexities are tested on the logarithm of their ratio; delta, low, high, mde and per_seed are then converted at
    `plain`. `p_holm` is Holm-corrected over the tasks of the column's family, clean or attacked. Unknown numbers are
    nan.
    """

    column: Column
    arm: str
    label: str
    against: str
    seeds: tuple[int, ...]
    items: int
    plain: float
    value: float
    delta: float
    low: float
    high: float
    p: float
    p_holm: float
    mde: float
    per_seed: tuple[float, ...]
    verdict: str
    words: str
    note: str = ""

    @property
    def amount(self) -> str:
        """The difference with its interval, such as "+0.4 points [-1.9, +2.7]"; empty where unknown."""
        if math.isnan(self.delta):
            return ""
        delta, low, high = (_formatted(self, x) for x in (self.delta, self.low, self.high))
        unit = unit_of(self)
        interval = "" if math.isnan(self.low) else f" [{low}, {high}]"
        return f"{delta}{'' if unit in ('', '%') else ' '}{unit}{interval}"

    @property
    def sensitivity(self) -> str:
        """The sentence on the minimum detectable difference."""
        unit = unit_of(self)
        if unit == "points" and self.mde > SPANS.get(_metric(self.column), 1.0):
            return "no difference, however large, is detectable with 80 % power"
        return f"differences of {self.detectable} or more are detectable with 80 % power"

    @property
    def detectable(self) -> str:
        """`mde` with its unit, such as "3.3 points"; empty where unknown."""
        unit = unit_of(self)
        size = f"{_formatted(self, self.mde).lstrip('+')}{'' if unit in ('', '%') else ' '}{unit}"
        return "" if math.isnan(self.mde) else size


def compare(
    samples: Sequence[Sample], column: Column, *, arm: str, label: str, against: str, family: int = 1
) -> Comparison:
    """Compare on one column, or on the mean over the columns of several samples.

    With one seed the verdict is always "cannot tell": the p-value (McNemar's for hits and misses, else the paired
    bootstrap's) then concerns these two adapters, not the method.

    Args:
        column: names the comparison; the sample's own column where there is one sample.
        family: number of comparisons that Holm will correct for; the detectable difference allows for it.
    """
    shared = [seed for seed in samples[0].seeds if all(seed in sample.seeds for sample in samples)]
    samples = [sample.of(shared) for sample in samples]
    relative = samples[0].relative
    plain, value = (np.array([getattr(s, side) for s in samples], dtype=float) for side in ("plain", "value"))
    average = (lambda x: float(np.exp(np.log(x).mean()))) if relative else (lambda x: float(x.mean()))
    if not (shared and np.isfinite(plain).all() and np.isfinite(value).all()):
        words = "a score is not finite" if shared else "no seed has all tasks"
        return unknown(column, words, arm=arm, label=label, against=against, seeds=tuple(shared))
    level = average(plain)
    by_seed = (np.log(value) - np.log(plain) if relative else value - plain).mean(axis=0)
    found, low, high, p = _tested(samples, plain, value)
    known = len(shared) > 1
    mde = found.detectable(LEVEL / family) if known else math.nan
    numbers = [found.delta, low, high, mde]
    if relative:
        numbers = [level * math.expm1(min(x, 700.0)) for x in numbers]
        by_seed = level * np.expm1(np.minimum(by_seed, 700.0))
    elif (scale := _scale(column, plain, value)) is not None:  # no difference is larger than the scale
        numbers[1:3] = [min(max(x, -scale), scale) for x in numbers[1:3]]
    items = sum(s.differences.shape[1] for s in samples if s.differences is not None)
    same = all(s.differences is not None and not s.differences.any() for s in samples)
    made = Comparison(
        column=column,
        arm=arm,
        label=label,
        against=against,
        seeds=tuple(shared),
        items=items,
        plain=level,
        value=level + numbers[0],
        delta=numbers[0],
        low=numbers[1],
        high=numbers[2],
        p=1.0 if same else p,
        p_holm=math.nan,
        mde=numbers[3],
        per_seed=tuple(by_seed.tolist()),
        verdict=CANNOT_TELL,
        words=SAME if same else "",
    )
    note = "; ".join(dict.fromkeys(s.note for s in samples if s.note))
    return judge(replace(made, note=note), made.p, 1)


def _tested(samples: Sequence[Sample], plain: np.ndarray, value: np.ndarray) -> tuple[Paired, float, float, float]:
    """The difference (of logarithms for perplexities), its interval and p-value."""
    relative, blocks = samples[0].relative, [s.differences for s in samples if s.differences is not None]
    if len(blocks) < len(samples):
        by_seed = (np.log(value) - np.log(plain) if relative else value - plain).mean(axis=0)
        found = over_seeds(by_seed)
    else:
        spans = [_span(s, block) for s, block in zip(samples, blocks, strict=True)]
        found = paired(blocks, spans=None if relative else spans)
    margin, p = found.margin(), found.p()
    interval = (found.delta - margin, found.delta + margin)
    if len(samples[0].seeds) > 1 or len(samples) > 1 or not blocks or blocks[0].shape[1] < 2:
        return found, *interval, p
    (differences,) = blocks[0]
    if set(np.unique(differences)) <= {-1.0, 0.0, 1.0}:
        return found, *interval, mcnemar(int((differences > 0).sum()), int((differences < 0).sum()))
    drawn = bootstrap(differences)
    return found, drawn.low, drawn.high, drawn.p


def _scale(column: Column, plain: np.ndarray, value: np.ndarray) -> float | None:
    """Width of the scale of the scores; None where unknown."""
    known = SPANS.get(_metric(column))
    lowest, highest = min(plain.min(), value.min()), max(plain.max(), value.max())
    return known or (1.0 if 0 <= lowest and highest <= 1 else None)


def _span(sample: Sample, differences: np.ndarray) -> float:
    """The largest possible difference of an item: the width of its scale, else the largest observed."""
    largest = float(np.abs(differences).max())
    scale = _scale(sample.column, np.array(sample.plain), np.array(sample.value))
    return largest if scale is None else max(scale, largest)


def unknown(
    column: Column, words: str, *, arm: str, label: str, against: str, seeds: tuple[int, ...] = ()
) -> Comparison:
    """A comparison that cannot be made; `words` says why."""
    return Comparison(
        column=column,
        arm=arm,
        label=label,
        against=against,
        seeds=seeds,
        items=0,
        plain=math.nan,
        value=math.nan,
        delta=math.nan,
        low=math.nan,
        high=math.nan,
        p=math.nan,
        p_holm=math.nan,
        mde=math.nan,
        per_seed=(),
        verdict=CANNOT_TELL,
        words=f"{CANNOT_TELL}: {words}",
    )


def corrected(found: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons of one family, judged after Holm correction; impossible ones do not count."""
    made = [c for c in found if not math.isnan(c.p)]
    p_values = dict(zip(map(id, made), holm([c.p for c in made]), strict=True))
    return [judge(c, p_values[id(c)], len(made)) if id(c) in p_values else c for c in found]


def judge(found: Comparison, p_holm: float, family: int) -> Comparison:
    """The verdict at `LEVEL`, with its reason."""
    better, note = found.column.higher_is_better, f"; {found.note}" if found.note else ""
    if len(found.seeds) < 2:
        return replace(found, p_holm=p_holm, words=f"{CANNOT_TELL}: one seed{note}")
    if p_holm > LEVEL or better is None:
        reason = SAME if SAME in found.words else found.sensitivity
        if found.p <= LEVEL < p_holm:
            reason = f"p {found.p:.2g} uncorrected, {p_holm:.2g} after Holm over {family}"
        return replace(found, p_holm=p_holm, verdict=CANNOT_TELL, words=f"{CANNOT_TELL}: {reason}{note}")
    verdict = HELPS if (found.delta > 0) == better else HURTS
    alike = sum((d > 0) == (found.delta > 0) and d != 0 for d in found.per_seed)
    scope = "" if found.items else ", for these items only"
    words = f"{verdict}: {'higher' if found.delta > 0 else 'lower'} in {alike} of {len(found.seeds)} seeds{scope}{note}"
    return replace(found, p_holm=p_holm, verdict=verdict, words=words)


def unit_of(found: Comparison) -> str:
    """The unit of differences: % of plain for perplexities, points (of 100) for proportions and chrF, else none."""
    metric = _metric(found.column)
    if metric in RATIOS:
        return "%"
    share = 0 <= min(found.plain, found.value) and max(found.plain, found.value) <= 1
    return "points" if metric == "chrf" or (share and metric != "judge_score") else ""


def _formatted(found: Comparison, x: float) -> str:
    unit = unit_of(found)
    if unit == "%":
        x = 100 * x / found.plain
    elif unit == "points" and found.column.metric != "chrf":
        x *= 100
    if unit == "%" and abs(x) >= 1000:
        return f"{x:+,.0f}"
    text = f"{x:+.1f}" if unit and abs(x) < 1000 else f"{x:+.3g}"
    return "0.0" if text in ("-0.0", "+0.0") else text


def _metric(column: Column) -> str:
    """The metric's name without lm-eval's filter."""
    return column.metric.partition(",")[0]
