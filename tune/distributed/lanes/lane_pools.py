"""The lanes of a run: a pool for each kind of lane that its models ask for, which share the cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from tune.config.run_spec import RaySpec
from tune.distributed.lanes.lane_pool import CLOSE_S, LanePool
from tune.scheduling.allocation import Demand, LaneKind, PoolWatch, Room, allocate, has_gap
from tune.scheduling.lane_watch import LaneWatch

#: How often the room is shared out: it changes with tasks that end and nodes that come and go.
SHARE_EVERY_S = 1.0


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


class LanePools:
    """Opens, sizes and closes the pools."""

    def __init__(
        self,
        dispatcher: ActorHandle,
        specs: Mapping[LaneKind, RaySpec],
        needs: Mapping[str, StudyNeeds],
        storage: Path,
        *,
        evaluator: type,
        record: Callable[[list[dict[str, Any]]], object] = list,
    ) -> None:
        """specs: the settings of each kind of lane. needs: of each study, by name. evaluator: see `LanePool`.

        record: takes the times of lanes as they end (`LaneWatch`).
        """
        self.needs = dict(needs)
        self._pools = {
            kind: LanePool(dispatcher, spec, kind, storage, evaluator=evaluator) for kind, spec in specs.items()
        }
        self._watch, self._times, self._record = PoolWatch(), LaneWatch(), record
        self._opened: set[LaneKind] = set()
        self._snapshot: dict[str, Any] | None = None
        self._shared = 0.0
        self._closed = False

    def turn(self, study: str, phase: Phase) -> None:
        """Note that a study has come to a phase."""
        needs = self.needs[study]
        needs.phase = max(phase, needs.phase)

    def pool_of(self, study: str) -> str:
        """Return the name of the pool whose lanes train a study."""
        return str(self.needs[study].kind)

    def has_gap(self, study: str) -> bool:
        """Return whether a study that waits could use a lane that no begun study wants."""
        if self._snapshot is None:
            return False
        needs = self.needs[study]
        return has_gap(self._demanded(self._snapshot), self._room(), needs.kind, needs.evaluators)

    def check(self, snapshot: dict[str, Any], *, scoring: bool = False, working: bool = False) -> None:
        """Share the room and check each pool, as `LanePool.check` does."""
        if self._closed:
            return
        self._record(self._times.see(snapshot, time.time()))
        self._snapshot = {**snapshot, "tasks": []}
        if time.monotonic() > self._shared + SHARE_EVERY_S:
            self._shared = time.monotonic()
            self._share(snapshot)
        busy = {lane["pool"] for lane in snapshot["lanes"].values() if lane["task"]}
        for kind in self._opened:
            # A pool may have to wait for the end of another one's task.
            self._pools[kind].check(snapshot, scoring=scoring, working=working or bool(busy - {str(kind)}))

    @property
    def starving(self) -> bool:
        """True if a pool has had no lane for long, though there should be one."""
        return any(self._pools[kind].starving for kind in self._opened)

    @property
    def leaving(self) -> list[str]:
        """Nodes that will be taken away soon."""
        return sorted({node for pool in self._pools.values() for node in pool.leaving})

    def close(self) -> None:
        """Close every pool; safe to call twice."""
        if not self._closed:
            self._record(self._times.end(time.time()))
        self._closed = True
        # All of them save their states at the same time, before the first that does not respond has others killed.
        for pool in self._pools.values():
            pool.ask_to_close()
        for pool in self._pools.values():
            with suppress(Exception):
                pool.join(CLOSE_S, waiting=False)
        for pool in self._pools.values():
            pool.close()

    def _share(self, snapshot: dict[str, Any]) -> None:
        for study, needs in self.needs.items():
            if needs.phase == Phase.OPENING and study in snapshot["open"]:
                self.turn(study, Phase.RUNNING)
        demands = self._demanded(snapshot)
        if len(self._pools) == 1:
            wanted = {kind: self._alone(kind) for kind in self._pools}
        else:
            wanted = allocate(demands, self._room())
            if not any(demand.up or wanted[kind] for kind, demand in demands.items()):
                # Nothing that ends would make room: one lane asks for it, so that machines are started or it fails.
                wanted |= {kind: 1 for kind, demand in demands.items() if demand.tasks}
        for kind, demand in demands.items():
            if demand.tasks and kind not in self._opened:
                self._opened.add(kind)
                self._pools[kind].open(wanted[kind])
            self._pools[kind].allow(wanted[kind])

    def _alone(self, kind: LaneKind) -> int:
        """Return the lanes of the only pool: all, but for the room of actors where several studies have begun."""
        if sum(Phase.WAITING < needs.phase < Phase.ENDED for needs in self.needs.values()) < 2:
            return kind.most
        room = self._room()
        fitting = (lanes for lanes in range(kind.most, 1, -1) if room.holds(kind.room * lanes))
        return next(fitting, 1)

    def _demanded(self, snapshot: dict[str, Any]) -> dict[LaneKind, Demand]:
        expected, more = dict.fromkeys(self._pools, 0), set()
        for needs in self.needs.values():
            if needs.phase == Phase.OPENING:
                expected[needs.kind] += needs.first_tasks
            if needs.phase < Phase.LAST and needs.first_tasks:
                more.add(needs.kind)
        return self._watch.demands(expected, more, snapshot, time.monotonic())

    def _room(self) -> Room:
        """Return what the cluster has for lanes, beside the evaluation actors of begun studies."""
        there = ray.cluster_resources()
        room = Room(there.get("CPU", 0.0), there.get("GPU", 0.0))
        for needs in self.needs.values():
            if Phase.WAITING < needs.phase < Phase.ENDED:
                room -= needs.evaluators
        return room
