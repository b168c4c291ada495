"""Times of workers: each comes once, when it has ended, and what is still held comes at the end."""

from __future__ import annotations

from tune.scheduling.time_watch import LANE, TimeWatch


def row(name: str, begin: float, end: float, trial: str | None = None, study: str | None = None) -> dict:
    return {"role": LANE, "name": name, "study": study, "trial": trial, "begin": begin, "end": end}


def test_times_are_told_as_they_end():
    watch = TimeWatch(LANE)
    t, u = ("a", "t"), ("b", "u")
    assert watch.see({"one": t}, 0.0) == []
    assert watch.see({"one": t, "two": None}, 5.0) == []
    assert watch.see({"one": u, "two": t}, 10.0) == [row("one", 0.0, 10.0, "t", "a")]
    assert watch.see({"one": None}, 12.0) == [
        row("one", 10.0, 12.0, "u", "b"),
        row("two", 10.0, 12.0, "t", "a"),
        row("two", 5.0, 12.0),
    ]
    assert watch.end(20.0) == [row("one", 0.0, 20.0)] and watch.end(21.0) == []
