"""Shares the cluster between the studies of a run: which may start, and how many lanes each pool gets. Pure.

A real run and a simulated one ask the same questions; what differs is how lanes come and go, and the clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from tune.scheduling.allocation import Demand, LaneKind, PoolWatch, Room, allocate, has_gap


class Phase(IntEnum):
    """Phase of a study."""

    WAITING = 0
    #: Its model is being loaded; it has queued no task yet.
    OPENING = 1
    RUNNING = 2
    #: All of its tasks have been queued.
    LAST = 3
    ENDED = 4


@dataclass
class StudyNeeds:
    """Needs of a study: its kind of lane, the room of its evaluation actors, and the tasks that it begins with."""

    kind: LaneKind
    evaluators: Room
    first_tasks: int
    phase: Phase = Phase.WAITING

    @property
    def begun(self) -> bool:
        return Phase.WAITING < self.phase < Phase.ENDED


class LaneSharing:
    """Studies and their phases, and what follows from them and the newest snapshot of the queue."""

    def __init__(self, needs: Mapping[str, StudyNeeds]) -> None:
        self._needs, self._watch = dict(needs), PoolWatch()
        self._kinds = tuple(dict.fromkeys(each.kind for each in self._needs.values()))
        self._snapshot: dict[str, Any] | None = None

    def turn(self, study: str, phase: Phase) -> None:
        """Note that a study has come to a phase; one that it has passed changes nothing."""
        needs = self._needs[study]
        needs.phase = max(phase, needs.phase)

    def pool_of(self, study: str) -> str:
        """Return the name of the pool whose lanes train a study."""
        return str(self._needs[study].kind)

    def look(self, snapshot: dict[str, Any]) -> None:
        """Take a snapshot of the queue; of its tasks only counts matter."""
        self._snapshot = {key: snapshot[key] for key in ("lanes", "queued", "open")}
        for study, needs in self._needs.items():
            if needs.phase == Phase.OPENING and study in snapshot["open"]:
                self.turn(study, Phase.RUNNING)

    def has_gap(self, study: str, there: Room, now: float) -> bool:
        """Return whether a study that waits could use a lane that no begun study wants; not before the first look."""
        if self._snapshot is None:
            return False
        needs = self._needs[study]
        return has_gap(self.demands(now), self.room(there), needs.kind, needs.evaluators)

    def leaves_a_lane(self, study: str, there: Room) -> bool:
        """Return whether the actors of a study that waits would leave room for any lane of it and of those begun."""
        mine = self._needs[study]
        kinds = {mine.kind, *(needs.kind for needs in self._needs.values() if needs.begun)}
        return all((self.room(there) - mine.evaluators).holds(kind.room) for kind in kinds)

    def lanes(self, demands: Mapping[LaneKind, Demand], there: Room) -> dict[LaneKind, int]:
        """Return how many lanes each pool may have; there: what the cluster has."""
        room = self.room(there)
        if len(self._kinds) == 1:
            (kind,) = self._kinds
            return {kind: self._alone(kind, room)}
        wanted = allocate(demands, room)
        if not any(demand.up or wanted[kind] for kind, demand in demands.items()):
            # Nothing that ends would make room: one lane asks for it, so that machines are started or it fails.
            wanted |= {kind: 1 for kind, demand in demands.items() if demand.tasks}
        return wanted

    def demands(self, now: float) -> dict[LaneKind, Demand]:
        """Return what each pool has and wants."""
        expected, more = dict.fromkeys(self._kinds, 0), set()
        for needs in self._needs.values():
            if needs.phase == Phase.OPENING:
                expected[needs.kind] += needs.first_tasks
            if needs.phase < Phase.LAST and needs.first_tasks:
                more.add(needs.kind)
        return self._watch.demands(expected, more, self._snapshot or {"lanes": {}, "queued": {}}, now)

    def room(self, there: Room) -> Room:
        """Return the room for lanes, beside the evaluation actors of begun studies."""
        for needs in self._needs.values():
            if needs.begun:
                there -= needs.evaluators
        return there

    def _alone(self, kind: LaneKind, room: Room) -> int:
        """Return the lanes of the only pool: all, but for the room of actors where several studies have begun."""
        if sum(needs.begun for needs in self._needs.values()) < 2:
            return kind.most
        fitting = (lanes for lanes in range(kind.most, 1, -1) if room.holds(kind.room * lanes))
        return next(fitting, 1)
