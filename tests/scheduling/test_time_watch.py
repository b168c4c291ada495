"""Times of lanes: each comes once, when it has ended, and what is still held comes at the end."""

from __future__ import annotations

from tune.scheduling.lane_watch import LaneWatch


def snapshot(*tasks: tuple[str, str], **lanes: str | None) -> dict:
    return {
        "tasks": [{"id": trial, "study": study} for trial, study in tasks],
        "lanes": {name: {"task": task} for name, task in lanes.items()},
    }


def row(lane: str, begin: float, end: float, trial: str | None = None, study: str | None = None) -> dict:
    return {"lane": lane, "study": study, "trial": trial, "begin": begin, "end": end}


def test_times_are_told_as_they_end():
    watch = LaneWatch()
    assert watch.see(snapshot(("t", "a"), ("u", "b"), one="t"), 0.0) == []
    assert watch.see(snapshot(one="t", two=None), 5.0) == []
    assert watch.see(snapshot(one="u", two="t"), 10.0) == [row("one", 0.0, 10.0, "t", "a")]
    assert watch.see(snapshot(one=None), 12.0) == [
        row("one", 10.0, 12.0, "u", "b"),
        row("two", 10.0, 12.0, "t", "a"),
        row("two", 5.0, 12.0),
    ]
    assert watch.end(20.0) == [row("one", 0.0, 20.0)] and watch.end(21.0) == []
