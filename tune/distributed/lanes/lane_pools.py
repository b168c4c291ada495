"""The lanes of a run: a pool for each kind of lane that its models ask for, which share the cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from tune.config.run_spec import RaySpec
from tune.distributed.cluster import ray_internals
from tune.distributed.cluster.placement_groups import Reaper
from tune.distributed.lanes.dispatcher import call
from tune.distributed.lanes.lane_pool import CLOSE_S, LanePool
from tune.scheduling.allocation import LaneKind, Room
from tune.scheduling.sharing import LaneSharing, StudyNeeds
from tune.scheduling.time_watch import LANE, TimeWatch

#: How often the room is shared out, and nodes that will go are looked for: it changes with tasks that end and nodes.
SHARE_EVERY_S = 1.0


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

        record: takes the times of lanes as they end (`TimeWatch`).
        """
        #: Phases of the studies; their threads turn them.
        self.sharing = LaneSharing(needs)
        self._pools = {
            kind: LanePool(dispatcher, spec, kind, storage, evaluator=evaluator) for kind, spec in specs.items()
        }
        self._times, self._record = TimeWatch(LANE), record
        self._dispatcher = dispatcher
        self._reaper = Reaper()
        #: Nodes that will be taken away soon.
        self.leaving: list[str] = []
        self._opened: set[LaneKind] = set()
        self._shared = 0.0
        #: What the cluster had when the room was last shared out: asked for each study that waits.
        self._room: Room | None = None
        self._closed = False

    def has_gap(self, study: str) -> bool:
        """Return whether a study that waits could use a lane that no begun study wants."""
        return self.sharing.has_gap(study, self._room or _there(), time.monotonic())

    def leaves_a_lane(self, study: str) -> bool:
        """Return whether the actors of a study that waits would leave room for any lane of it and of those begun."""
        return self.sharing.leaves_a_lane(study, self._room or _there())

    def check(self, snapshot: dict[str, Any], *, scoring: bool = False, working: bool = False) -> None:
        """Share the room, move lanes whose nodes will go, and check each pool, as `LanePool.check` does."""
        if self._closed:
            return
        lanes = snapshot["lanes"].items()
        work = {name: (lane["study"], lane["task"]) if lane["task"] else None for name, lane in lanes}
        self._record(self._times.see(work, time.time()))
        self.sharing.look(snapshot)
        if time.monotonic() > self._shared + SHARE_EVERY_S:
            self._shared = time.monotonic()
            self._look_at_nodes()
            self._share()
        busy = {lane["pool"] for lane in snapshot["lanes"].values() if lane["task"]}
        for kind in self._opened:
            # A pool may have to wait for the end of another one's task.
            self._pools[kind].check(snapshot, scoring=scoring, working=working or bool(busy - {str(kind)}))

    @property
    def starving(self) -> bool:
        """True if a pool has had no lane for long, though there should be one."""
        return any(self._pools[kind].starving for kind in self._opened)

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
        self._reaper.close()

    def _look_at_nodes(self) -> None:
        """Report nodes that will be taken away to the queue."""
        leaving = ray_internals.draining_nodes()
        if leaving != self.leaving:
            self.leaving = leaving
            call(self._dispatcher, "drain", leaving)

    def _share(self) -> None:
        self._room = _there()
        demands = self.sharing.demands(time.monotonic())
        for kind, lanes in self.sharing.lanes(demands, self._room).items():
            if demands[kind].tasks and kind not in self._opened:
                self._opened.add(kind)
                self._pools[kind].open(lanes)
            self._pools[kind].allow(lanes)


def _there() -> Room:
    """Return what the cluster has."""
    resources = ray.cluster_resources()
    return Room(resources.get("CPU", 0.0), resources.get("GPU", 0.0))
