"""The part on time: when each lane and each evaluation actor was held, and for which model it worked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tune.report.sections.subject import Subject
from tune.report.tables import Part, Table
from tune.report.text import hours
from tune.scheduling.time_watch import EVALUATOR, LANE

#: Characters of a bar, and what they say.
COLUMNS = 40
OWN, OTHER, IDLE, AWAY = "#", "=", "-", " "
#: Lanes, and actors, that are listed; runs on machines that come and go may have had any number.
MOST = 24


@dataclass
class _Times:
    """The rows of workers of one role: times held, and times worked.

    A worker is recorded when it ends: one that still is there, or of a run that was killed, counts as held from the
    first to the last time that it worked.
    """

    held: list[dict[str, Any]]
    worked: list[dict[str, Any]]

    @classmethod
    def of(cls, rows: Sequence[dict[str, Any]], role: str) -> _Times:
        mine = [row for row in rows if row["role"] == role]
        held, worked = ([row for row in mine if (row["trial"] is None) == is_held] for is_held in (True, False))
        times: dict[str, list[tuple[float, float]]] = {}
        for row in held:
            times.setdefault(row["name"], []).append((row["begin"], row["end"]))
        unknown: dict[str, dict[str, Any]] = {}
        for row in worked:
            if not any(begin <= row["begin"] <= end for begin, end in times.get(row["name"], ())):
                span = unknown.setdefault(row["name"], {**row, "study": None, "trial": None})
                span |= {"begin": min(span["begin"], row["begin"]), "end": max(span["end"], row["end"])}
        return cls([*held, *unknown.values()], worked)

    @property
    def busy(self) -> str:
        """The share of the time held that was worked."""
        return f"{min(1.0, _seconds(self.worked) / max(_seconds(self.held), 1e-9)):.0%}"

    def of_worker(self, name: str) -> _Times:
        held, worked = ([row for row in rows if row["name"] == name] for rows in (self.held, self.worked))
        return _Times(held, worked)

    def bars(self, begin: float, end: float, model: str) -> list[list[str]]:
        """Return the rows of a table, by the time from which a worker was held."""
        first: dict[str, float] = {}
        for row in self.held:
            first[row["name"]] = min(row["begin"], first.get(row["name"], math.inf))
        names = sorted(first, key=lambda name: first[name])[:MOST]
        return [[name, *_bar(self.of_worker(name), begin, end, model)] for name in names]


def timeline(subject: Subject) -> Part:
    """Lanes and evaluation actors over the time of the run, and the busy share of the time that they were held."""
    rows, model = subject.run_folder.times(), subject.model.name
    lanes, actors = _Times.of(rows, LANE), _Times.of(rows, EVALUATOR)
    own = [row for row in lanes.worked if row["study"] == model]
    if not lanes.held or not own:
        return Part("Timeline")
    held = lanes.held + actors.held
    begin, end = min(row["begin"] for row in held), max(row["end"] for row in held)
    by_study: dict[str, list[dict[str, Any]]] = {}
    for row in lanes.worked:
        by_study.setdefault(str(row["study"]), []).append(row)
    others = [study for study, rows in by_study.items() if study != model and _overlap(own, rows)]
    beside = f", beside {', '.join(sorted(others))}" if others else ""
    shares = f"Lanes were busy for {lanes.busy} of the time that they were held"
    about = [
        f"{shares}, evaluation actors for {actors.busy}." if actors.held else f"{shares}.",
        f"This model trained from {hours(min(row['begin'] for row in own) - begin)} to "
        f"{hours(max(row['end'] for row in own) - begin)} after the first worker was up{beside}.",
    ]
    table = Table(
        f"Lanes and evaluation actors over {hours(end - begin)}: {OWN} this model, {OTHER} another, {IDLE} idle",
        ["worker", "held", "busy", "timeline"],
        lanes.bars(begin, end, model) + actors.bars(begin, end, model),
    )
    return Part("Timeline", about, [table])


def _bar(times: _Times, begin: float, end: float, model: str) -> list[str]:
    step = (end - begin) / COLUMNS or 1.0
    signs = [_sign(begin + (column + 0.5) * step, times, model) for column in range(COLUMNS)]
    return [hours(_seconds(times.held)), times.busy, "".join(signs).rstrip()]


def _sign(when: float, times: _Times, model: str) -> str:
    for row in times.worked:
        if row["begin"] <= when < row["end"]:
            return OWN if row["study"] == model else OTHER
    return IDLE if any(row["begin"] <= when < row["end"] for row in times.held) else AWAY


def _seconds(rows: Sequence[dict[str, Any]]) -> float:
    return sum(row["end"] - row["begin"] for row in rows)


def _overlap(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> bool:
    """Return whether a time of one overlaps one of the other: both are walked in the order of their begins."""
    latest = [-math.inf, -math.inf]
    for begin, end, whose in sorted(
        (row["begin"], row["end"], n) for n, rows in enumerate((one, other)) for row in rows
    ):
        if begin < latest[1 - whose]:
            return True
        latest[whose] = max(latest[whose], end)
    return False
