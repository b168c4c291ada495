"""Times at which lanes were held and worked, from snapshots of the queue. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class LaneWatch:
    """Watches lanes, and yields a row for each time that has ended: held by a lane, or worked by it for a trial.

    Rows have `lane`, `begin` and `end` (seconds since the epoch), and `study` and `trial`, both None for a time held.
    """

    def __init__(self) -> None:
        self._held: dict[str, float] = {}
        self._working: dict[str, tuple[str, float]] = {}
        self._studies: dict[str, str] = {}

    def see(self, snapshot: Mapping[str, Any], now: float) -> list[dict[str, Any]]:
        """Take a snapshot; return the rows of what has ended since the last one."""
        self._studies |= {row["id"]: row["study"] for row in snapshot["tasks"]}
        lanes, ended = snapshot["lanes"], []
        for lane, (trial, begin) in list(self._working.items()):
            if lane not in lanes or lanes[lane]["task"] != trial:
                del self._working[lane]
                ended.append(self._row(lane, trial, begin, now))
        for lane in self._held.keys() - lanes.keys():
            ended.append(self._row(lane, None, self._held.pop(lane), now))
        for lane, state in lanes.items():
            self._held.setdefault(lane, now)
            if state["task"] is not None:
                self._working.setdefault(lane, (state["task"], now))
        return ended

    def end(self, now: float) -> list[dict[str, Any]]:
        """Return the rows of all that is still held."""
        return self.see({"tasks": [], "lanes": {}}, now)

    def _row(self, lane: str, trial: str | None, begin: float, end: float) -> dict[str, Any]:
        study = None if trial is None else self._studies.get(trial)
        return {"lane": lane, "study": study, "trial": trial, "begin": round(begin, 2), "end": round(end, 2)}
