"""The median stopping rule: equal to Ray's, which it replaces; the same twice; what it stops; what it refuses."""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass

import pytest

from tune.scheduling.early_stopping import MEDIAN_OF
from tune.scheduling.median_rule import MedianRule

Report = tuple[str, int, float]


def reports(seed: int) -> list[Report]:
    """Reports of trials that validate at steps of their own, in a random order; often with equal losses."""
    draws = random.Random(seed)
    scale = draws.choice([0.1, 1.0, 1e3])
    waiting = {}
    for number in range(draws.randint(1, 25)):
        every, begin = draws.choice([1, 2, 3, 5]), draws.randint(1, 12)
        steps = [step for step in range(begin, 41, every) if draws.random() < 0.9]
        level = draws.choice([0.1, 0.3, draws.random()])
        rounded = draws.choice([1, 2, 17])
        waiting[str(number)] = [
            (step, scale * round(level + draws.choice([0.0, draws.random() / (1 + step)]), rounded)) for step in steps
        ]
    made: list[Report] = []
    while waiting := {name: rows for name, rows in waiting.items() if rows}:
        name = draws.choice(sorted(waiting)[: draws.choice([1, 3, 25])])  # one after the other, or side by side
        for _ in range(min(draws.randint(1, 4), len(waiting[name]))):
            made.append((name, *waiting[name].pop(0)))
    return made


def stopped(made: list[Report], stops) -> list[tuple[str, int]]:
    """The trials that are stopped, with their steps, in that order: a trial that was stopped reports no more."""
    ended: dict[str, int] = {}
    for name, step, loss in made:
        if name not in ended and stops(name, step, loss):
            ended[name] = step
    return list(ended.items())


def by_ray():
    from ray.tune.schedulers import MedianStoppingRule, TrialScheduler

    @dataclass(frozen=True)
    class Trial:
        trial_id: str

    class Rule(MedianStoppingRule):
        def _on_insufficient_samples(self, *args) -> str:
            return TrialScheduler.CONTINUE

    rule = Rule(time_attr="step", metric="loss", mode="min", grace_period=1, min_samples_required=MEDIAN_OF)
    return lambda name, step, loss: (
        rule.on_trial_result(None, Trial(name), {"step": step, "loss": loss}) == TrialScheduler.STOP
    )


def test_it_stops_what_the_rule_of_ray_stops():
    found = 0
    for seed in range(60):
        made = reports(seed)
        ours = stopped(made, MedianRule(MEDIAN_OF).stops)
        assert ours == stopped(made, by_ray()), seed
        found += len(ours)
    assert found > 100, "the reports are such that trials are stopped"


def test_it_decides_the_same_twice_and_whatever_the_names():
    for seed in range(30):
        made = reports(seed)
        first = stopped(made, MedianRule(MEDIAN_OF).stops)
        assert first == stopped(made, MedianRule(MEDIAN_OF).stops)
        renamed = stopped([(f"another {name}", step, loss) for name, step, loss in made], MedianRule(MEDIAN_OF).stops)
        assert renamed == [(f"another {name}", step) for name, step in first]


def test_a_trial_ends_when_its_best_is_above_the_median_of_the_means_of_enough_others():
    rule = MedianRule(3)
    for name, losses in (("a", (1.0, 3.0)), ("b", (2.0, 4.0))):
        assert not any(rule.stops(name, step, loss) for step, loss in zip((5, 10), losses, strict=True))
    assert not rule.stops("c", 10, 99.0), "two others are too few"
    assert not rule.stops("d", 5, 2.0), "at step 5 there are two others"
    assert not rule.stops("d", 10, 4.0), "its best, 2, is not above the median of 2, 3 and 99"
    assert rule.stops("e", 10, 3.5), "the median of 2, 3, 3 and 99 is 3"
    assert not rule.stops("f", 10, 3.0)
    assert rule.last("f") == 10 and rule.last("g") is None


def test_many_trials_cost_little():
    """Ray's rule takes half a minute for 800 trials, and sixteen times as long for these."""
    rule, begin = MedianRule(MEDIAN_OF), time.process_time()
    for number in range(3200):
        for step in range(1, 6):
            rule.stops(str(number), step, 0.0 - number)
    assert time.process_time() - begin < 10


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_cannot_be_compared_is_refused(loss):
    with pytest.raises(ValueError, match="trial a at step 5"):
        MedianRule(MEDIAN_OF).stops("a", 5, loss)


@pytest.mark.parametrize("step", [4, 5])
def test_a_step_that_does_not_follow_is_refused_and_changes_nothing(step):
    rule = MedianRule(1)
    rule.stops("a", 5, 1.0)
    with pytest.raises(ValueError, match="has reported step 5"):
        rule.stops("a", step, 9.0)
    assert rule.last("a") == 5 and rule.stops("b", 5, 1.5) and not rule.stops("c", 5, 1.2)
