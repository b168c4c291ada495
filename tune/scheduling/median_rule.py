"""Median stopping rule of the Vizier paper, with the means of earlier reports kept. Pure; no Ray.

Ray Tune's `MedianStoppingRule` (2.60, with hard stops) decides the same, and computes every mean again at each report.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass, field

import numpy as np


@dataclass
class _Reports:
    """The reports of a trial, by rising steps, with the mean up to each."""

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    means: list[float] = field(default_factory=list)

    def mean(self, step: int) -> float:
        """Return the mean of the losses up to a step; not a number if there is none."""
        number = bisect_right(self.steps, step)
        return self.means[number - 1] if number else math.nan


class MedianRule:
    """Stops a trial whose best loss is above the median of the other trials' means.

    The means are those up to the trial's step, of the trials that have come so far. There must be `least` of them.
    """

    def __init__(self, least: int) -> None:
        self._least = least
        self._trials: dict[str, _Reports] = {}
        #: The steps of all reports, rising, and for each the sorted means of the trials that have come so far.
        self._steps: list[int] = []
        self._means: dict[int, list[float]] = {}

    def last(self, trial: str) -> int | None:
        """Return the step of a trial's last report."""
        return self._trials[trial].steps[-1] if trial in self._trials else None

    def stops(self, trial: str, step: int, loss: float) -> bool:
        """Enter a report, and return whether it is the trial's last.

        Raises:
            ValueError: the loss is not a finite number, or the step does not follow the trial's last one.
        """
        last = self.last(trial)
        if not math.isfinite(loss):
            raise ValueError(f"trial {trial} at step {step}: a loss of {loss} cannot be compared")
        if last is not None and step <= last:
            raise ValueError(f"trial {trial} has reported step {last}: step {step} comes too late")
        others = self._others(step)
        median = _median(others) if len(others) >= self._least else None
        reports = self._trials.setdefault(trial, _Reports())
        reports.steps.append(step)
        reports.losses.append(loss)
        reports.means.append(float(np.mean(reports.losses)))
        begin = 0 if last is None else bisect_right(self._steps, last)
        for reached in self._steps[begin : bisect_right(self._steps, step)]:
            if math.isfinite(mean := reports.mean(reached)):
                insort(self._means[reached], mean)
        return median is not None and min(reports.losses) > median

    def _others(self, step: int) -> list[float]:
        """Return the sorted means at a step, of the trials that have come so far."""
        if step not in self._means:
            reached = (each.mean(step) for each in self._trials.values() if each.steps[-1] >= step)
            self._means[step] = sorted(mean for mean in reached if math.isfinite(mean))
            self._steps.insert(bisect_left(self._steps, step), step)
        return self._means[step]


def _median(ordered: list[float]) -> float:
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
