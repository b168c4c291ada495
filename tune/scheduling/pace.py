"""Seconds per step and per benchmark of a study, measured from the reports of its trials. Pure.

Only trials in lanes are kept one by one; those that have left are added up, so that no look costs more as trials end.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, field

#: The newest trials whose starts count.
STARTS = 101


@dataclass(frozen=True)
class Pace:
    """Measured seconds of a step, of a trial's start and of a benchmark; None where nothing is measured yet."""

    step: float | None
    start: float
    benchmark: float | None


@dataclass
class Mark:
    """Reports of a trial since a lane took it: (step, time) of the first and the newest."""

    begun: float
    stale: int | None
    first: tuple[int, float] | None = None
    newest: tuple[int, float] | None = None

    def see(self, step: int | None, now: float) -> None:
        """Take the step of the trial's newest report, None without one."""
        if step is None or (self.first is None and step == self.stale):
            return
        if self.newest is not None and step < self.newest[0]:  # replayed after a lost lane
            self.first = self.newest = (step, now)
        elif self.newest is None or step > self.newest[0]:
            self.first, self.newest = self.first or (step, now), (step, now)


@dataclass
class _Sums:
    """Steps and their seconds: between the first and the newest reports of trials, and since lanes took them."""

    steps: int = 0
    seconds: float = 0.0
    steps_since: int = 0
    seconds_since: float = 0.0

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def add(self, mark: Mark) -> None:
        if mark.first is not None and mark.newest is not None:
            self.steps += mark.newest[0] - mark.first[0]
            self.seconds += mark.newest[1] - mark.first[1]
            self.steps_since += mark.newest[0]
            self.seconds_since += mark.newest[1] - mark.begun


@dataclass
class Measured:
    """Measurements of one study."""

    live: dict[str, Mark] = field(default_factory=dict)
    benchmarks: int = 0
    benchmark_s: float = 0.0
    _past: _Sums = field(default_factory=_Sums)
    #: Of trials that have left: seconds from the lane's taking them to their first report, and its step.
    _starts: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=STARTS))

    def leave(self, trial: str) -> None:
        """Add up a trial that has left its lane."""
        if (mark := self.live.pop(trial, None)) is not None:
            self._past.add(mark)
            self._starts += _starts([mark])

    def scored(self, seconds: float) -> None:
        """Take the seconds of a benchmark."""
        self.benchmarks += 1
        self.benchmark_s += seconds


def pace(study: Measured, others: Sequence[Measured]) -> Pace:
    """Return what was measured on a study, or on all where nothing was on it."""
    which = [study]
    if (step := _step_seconds(which)) is None:
        which = [study, *others]
        step = _step_seconds(which)
    starts = [start for each in which for start in (*each._starts, *_starts(each.live.values()))]
    seconds = [max(0.0, since - first * (step or 0.0)) for since, first in starts]
    scored = [study] if study.benchmarks else [study, *others]
    benchmarks = sum(each.benchmarks for each in scored)
    benchmark = sum(each.benchmark_s for each in scored) / benchmarks if benchmarks else None
    return Pace(step, statistics.median(seconds) if seconds else 0.0, benchmark)


def _step_seconds(studies: Sequence[Measured]) -> float | None:
    """Return the seconds per step: between the reports of trials that have two, else since their lanes took them."""
    sums = _Sums()
    for study in studies:
        sums += study._past
        for mark in study.live.values():
            sums.add(mark)
    if sums.steps:
        return sums.seconds / sums.steps
    return sums.seconds_since / sums.steps_since if sums.steps_since else None


def _starts(marks: Iterable[Mark]) -> list[tuple[float, int]]:
    return [(mark.first[1] - mark.begun, mark.first[0]) for mark in marks if mark.first is not None]
