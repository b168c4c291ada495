"""Side-by-side measuring and its printing, for the benchmarks of this folder: no torch, no Ray."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

WALL, CPU = 0, 1


class Spent(NamedTuple):
    """Seconds that something took: wall, and CPU of the process that did it."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Variant:
    """A variant to time: `run` is timed, entering and leaving `around` is not.

    A run that returns `Spent` has timed itself, as one in another process does.
    """

    run: Callable[[], object]
    around: Callable[[], AbstractContextManager] = nullcontext


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles of a sample."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, sample: Sequence[float]) -> Quartiles:
        """Quartiles by linear interpolation; of a single value, that value three times."""
        if len(sample) == 1:
            return cls(sample[0], sample[0], sample[0])
        return cls(*statistics.quantiles(sample, n=4, method="inclusive"))

    def show(self, digits: int = 3) -> str:
        return f"{self.median:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


@dataclass
class Timings:
    """Seconds of every variant in every round: `seconds[name][round]` is (wall, CPU of this process)."""

    seconds: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def median(self, name: str, clock: int = WALL) -> float:
        return statistics.median(pair[clock] for pair in self.seconds[name])

    def ratio(self, name: str, reference: str, clock: int = CPU) -> Quartiles:
        """Quartiles over the rounds of `name` / `reference`, each pair from the same round."""
        pairs = zip(self.seconds[name], self.seconds[reference], strict=True)
        return Quartiles.of([mine[clock] / theirs[clock] for mine, theirs in pairs])

    def best(self, name: str, reference: str, clock: int = WALL) -> float:
        """The fastest round of `name` over the fastest of `reference`: the least disturbed comparison."""
        fastest = [min(pair[clock] for pair in self.seconds[key]) for key in (name, reference)]
        return fastest[0] / fastest[1]


def interleave(variants: Mapping[str, Variant], rounds: int, *, warm_up: int = 1, seed: int = 0) -> Timings:
    """Run every variant once per round, in a new random order, so that drift of the machine affects all alike."""
    timings = Timings({name: [] for name in variants})
    shuffle = random.Random(seed)
    for number in range(-warm_up, rounds):
        for name in shuffle.sample(list(variants), len(variants)):
            with variants[name].around():
                wall, cpu = time.perf_counter(), time.process_time()
                found = variants[name].run()
                spent = Spent(time.perf_counter() - wall, time.process_time() - cpu)
            if number >= 0:
                timings.seconds[name].append(found if isinstance(found, Spent) else spent)
    return timings


def machine() -> str:
    """CPUs and load averages: to be printed before and after, as nothing here means much on a busy machine."""
    loads = " ".join(f"{load:.1f}" for load in os.getloadavg())
    return f"{len(os.sched_getaffinity(0))} CPUs, load {loads} (1, 5, 15 minutes)"


def verdict(what: str, measured: float, target: float, *, at_least: bool = False, unit: str = "") -> str:
    """A line that reports whether a target is met."""
    met = measured >= target if at_least else measured <= target
    sign = ">=" if at_least else "<="
    return f"target {what} {sign} {target:g}{unit}: {'met' if met else 'not met'} ({measured:.3f}{unit})"


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A text table with fitted columns, the first one flush left."""
    cells = [list(headings), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        first, *others = zip(row, widths, strict=True)
        lines.append("  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]))
    return "\n".join(lines)
