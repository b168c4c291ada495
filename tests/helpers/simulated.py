"""Two simulated arms on a few tasks, and how often the verdict's rule tells them apart."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri
from scipy.stats import binomtest

from tune.analysis.comparison import CANNOT_TELL, HELPS, HURTS, Comparison, Sample, compare, corrected
from tune.analysis.stats import linearised
from tune.evaluation.score_names import Column

TOKENS = 63


@dataclass(frozen=True)
class Design:
    """What is simulated.

    rate: share of items that an adapter answers right (hits), or nothing (perplexity). seed_sd: of an adapter's true
    rate, or log-perplexity, around its arm's. correlation: of two adapters' answers to an item. interaction: the part
    of an item's noise that all adapters of one arm share: items that suit one arm, though neither is better on all
    items there are. effect: the second arm's true rate, or log-perplexity, more than the first one's.
    """

    seeds: int
    items: int
    rate: float = 0.7
    seed_sd: float = 0.0
    correlation: float = 0.6
    interaction: float = 0.0
    effect: float = 0.0
    perplexity: bool = False
    tasks: int = 2

    def samples(self, draws: np.random.Generator) -> list[Sample]:
        """One experiment: a sample for each task."""
        shift = self.seed_sd * draws.standard_normal((2, self.seeds)) + [[0.0], [self.effect]]
        return [self._sample(f"task{task}", draws, shift) for task in range(self.tasks)]

    def _sample(self, task: str, draws: np.random.Generator, shift: np.ndarray) -> Sample:
        own = 1 - self.correlation - self.interaction
        z = math.sqrt(self.correlation) * draws.standard_normal((1, 1, self.items))
        z = z + math.sqrt(self.interaction) * draws.standard_normal((2, 1, self.items))
        z = z + math.sqrt(own) * draws.standard_normal((2, self.seeds, self.items))
        seeds = tuple(range(1, self.seeds + 1))
        if self.perplexity:
            tokens = draws.integers(TOKENS // 3, TOKENS + 1, self.items).astype(float)
            losses = tokens * (2.6 + 0.2 * z + shift[:, :, None])
            scores = np.exp(losses.sum(axis=2) / tokens.sum())
            column = Column("perplexity", task, "perplexity", higher_is_better=False)
            return Sample(column, seeds, *map(tuple, scores), linearised(losses[1] - losses[0], tokens))
        hits = (z < ndtri(np.clip(self.rate + shift, 0.0, 1.0))[:, :, None]).astype(float)
        column = Column("zero_shot", task, "acc", higher_is_better=True)
        return Sample(column, seeds, *map(tuple, hits.mean(axis=2)), hits[1] - hits[0])


@dataclass(frozen=True)
class Rate:
    """A rate with its exact binomial 95 % interval."""

    count: int
    n: int

    @property
    def share(self) -> float:
        return self.count / self.n

    @property
    def interval(self) -> tuple[float, float]:
        found = binomtest(self.count, self.n).proportion_ci(method="exact")
        return float(found.low), float(found.high)

    def show(self) -> str:
        low, high = self.interval
        return f"{100 * self.share:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


@dataclass(frozen=True)
class VerdictRates:
    """Rates at which the headline, and any task after Holm, says helps or hurts over many experiments."""

    headline: Rate
    any_task: Rate


def about(samples: list[Sample]) -> dict[str, str]:
    return {"arm": "macdrop", "label": "MacDrop", "against": "plain LoRA"}


def headline(samples: list[Sample]) -> Comparison:
    """The comparison on the mean over the tasks."""
    return compare(samples, samples[0].column, **about(samples))


def tasks(samples: list[Sample]) -> list[Comparison]:
    """The comparisons on each task, after Holm."""
    return corrected([compare([s], s.column, **about(samples), family=len(samples)) for s in samples])


def tell(design: Design, experiments: int, seed: int = 0) -> VerdictRates:
    """Run `experiments` experiments; repeats for a seed."""
    draws = np.random.default_rng(seed)
    made = [design.samples(draws) for _ in range(experiments)]
    return VerdictRates(
        headline=Rate(sum(headline(samples).verdict != CANNOT_TELL for samples in made), experiments),
        any_task=Rate(sum(any(c.verdict != CANNOT_TELL for c in tasks(samples)) for samples in made), experiments),
    )


def harm(design: Design, experiments: int, seed: int = 0) -> float:
    """The effect that hurts as much as such runs call detectable on average; of perplexities a logarithm."""
    draws = np.random.default_rng(seed)
    made = [headline(design.samples(draws)) for _ in range(experiments)]
    sizes = [math.log1p(c.mde / c.plain) if design.perplexity else -c.mde for c in made]
    return float(np.mean(sizes))


def found(design: Design, experiments: int, seed: int = 0) -> Rate:
    """The rate at which the headline detects the effect."""
    draws = np.random.default_rng(seed)
    wanted = HELPS if (design.effect > 0) != design.perplexity else HURTS
    return Rate(sum(headline(design.samples(draws)).verdict == wanted for _ in range(experiments)), experiments)
