"""The part on time: when each lane was held, and for which model it worked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tune.report.sections.subject import Subject
from tune.report.tables import Part, Table
from tune.report.text import hours

#: Characters of a lane's bar, and what they say.
COLUMNS = 40
OWN, OTHER, IDLE, AWAY = "#", "=", "-", " "
#: Lanes listed; runs on machines that come and go may have had any number.
MOST = 24


def timeline(subject: Subject) -> Part:
    """Lanes over the time of the run, and the busy share of the time that they were held."""
    rows = subject.run_folder.lane_times()
    held = [row for row in rows if row["trial"] is None]
    known = {row["lane"] for row in held}  # a lane is recorded when it ends
    worked = [row for row in rows if row["trial"] is not None and row["lane"] in known]
    own = [row for row in worked if row["study"] == subject.model.name]
    if not held or not own:
        return Part("Timeline")
    begin, end = min(row["begin"] for row in held), max(row["end"] for row in held)
    busy = sum(_seconds(worked)) / max(sum(_seconds(held)), 1e-9)
    by_study: dict[str, list[dict[str, Any]]] = {}
    for row in worked:
        by_study.setdefault(str(row["study"]), []).append(row)
    others = [study for study, rows in by_study.items() if study != subject.model.name and _overlap(own, rows)]
    beside = f", beside {', '.join(sorted(others))}" if others else ""
    about = [
        f"Lanes were busy for {min(busy, 1.0):.0%} of the time that they were held.",
        f"This model trained from {hours(min(row['begin'] for row in own) - begin)} to "
        f"{hours(max(row['end'] for row in own) - begin)} after the first lane was up{beside}.",
    ]
    lanes = sorted({row["lane"]: row["begin"] for row in reversed(held)}.items(), key=lambda pair: pair[1])
    table = Table(
        f"Lanes over {hours(end - begin)}: {OWN} this model, {OTHER} another, {IDLE} idle",
        ["lane", "held", "busy", "timeline"],
        [_row(lane, begin, end, held, worked, subject.model.name) for lane, _ in lanes[:MOST]],
    )
    return Part("Timeline", about, [table])


def _row(lane: str, begin: float, end: float, held: Sequence[dict], worked: Sequence[dict], model: str) -> list[str]:
    mine, work = ([row for row in rows if row["lane"] == lane] for rows in (held, worked))
    step = (end - begin) / COLUMNS or 1.0
    bar = [_sign(begin + (column + 0.5) * step, mine, work, model) for column in range(COLUMNS)]
    seconds = sum(_seconds(mine))
    return [lane, hours(seconds), f"{min(1.0, sum(_seconds(work)) / max(seconds, 1e-9)):.0%}", "".join(bar).rstrip()]


def _sign(when: float, held: Sequence[dict], worked: Sequence[dict], model: str) -> str:
    for row in worked:
        if row["begin"] <= when < row["end"]:
            return OWN if row["study"] == model else OTHER
    return IDLE if any(row["begin"] <= when < row["end"] for row in held) else AWAY


def _seconds(rows: Sequence[dict[str, Any]]) -> list[float]:
    return [row["end"] - row["begin"] for row in rows]


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
