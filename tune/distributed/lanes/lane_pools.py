"""The lanes of a run: a pool for each kind of lane that its models ask for, which share the cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from tune.config.run_spec import RaySpec
from tune.distributed.lanes.lane_pool import LanePool
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
        self._demands: dict[LaneKind, Demand] = {}
        self._shared = 0.0
        self._closed = False

    def turn(self, study: str, phase: Phase) -> None:
        """Note that a study has come to a phase."""
        needs = self.needs[study]
        needs.phase = max(phase, needs.phase)

    def has_gap(self, study: str) -> bool:
        """Return whether a study that waits could use a lane that no begun study wants."""
        needs = self.needs[study]
        return has_gap(self._demands, self._room(), needs.kind, needs.evaluators)

    def check(self, snapshot: dict[str, Any], *, scoring: bool = False, working: bool = False) -> None:
        """Share the room and check each pool, as `LanePool.check` does."""
        if self._closed:
            return
        self._record(self._times.see(snapshot, time.time()))
        now = time.monotonic()
        if now > self._shared + SHARE_EVERY_S:
            self._shared = now
            self._share(snapshot, now)
        for kind in self._opened:
            self._pools[kind].check(snapshot, scoring=scoring, working=working)

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
        for pool in self._pools.values():
            pool.close()

    def _share(self, snapshot: dict[str, Any], now: float) -> None:
        expected, more = dict.fromkeys(self._pools, 0), set()
        for study, needs in self.needs.items():
            if needs.phase == Phase.OPENING and study in snapshot["open"]:
                self.turn(study, Phase.RUNNING)
            if needs.phase == Phase.OPENING:
                expected[needs.kind] += needs.first_tasks
            if needs.phase < Phase.LAST and needs.first_tasks:
                more.add(needs.kind)
        self._demands = self._watch.demands(expected, more, snapshot, now)
        for kind, demand in self._demands.items():
            if demand.tasks and kind not in self._opened:
                self._opened.add(kind)
                self._pools[kind].open()
        if len(self._pools) > 1:
            for kind, lanes in allocate(self._demands, self._room()).items():
                self._pools[kind].allow(lanes)

    def _room(self) -> Room:
        """Return what the cluster has for lanes, beside the evaluation actors of begun studies."""
        there = ray.cluster_resources()
        room = Room(there.get("CPU", 0.0), there.get("GPU", 0.0))
        for needs in self.needs.values():
            if Phase.WAITING < needs.phase < Phase.ENDED:
                room -= needs.evaluators
        return room
