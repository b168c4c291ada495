"""Room of a cluster shared among models: which study may begin, how many lanes each pool may hold. Pure; no Ray.

Models with the same settings of lanes share a pool of them. The numbers here are targets: a surplus lane ends its
task before it closes, and a new lane waits for free resources. So room is kept for a lane of many GPUs by not refilling
it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from tune.config.run_spec import RaySpec
from tune.scheduling.resources import gpu_shares

#: Seconds that the tasks of a pool wait without any lane before others give up lanes that still have tasks.
RESERVE_AFTER_S = 60.0
#: Pools give up lanes to one that has this many times their work per lane, and has waited as long.
UNEVEN = 2.0
#: CPUs and GPUs are sums of fractions.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Room:
    """CPUs and GPUs."""

    cpus: float
    gpus: float

    def __add__(self, other: Room) -> Room:
        return Room(self.cpus + other.cpus, self.gpus + other.gpus)

    def __sub__(self, other: Room) -> Room:
        return Room(self.cpus - other.cpus, self.gpus - other.gpus)

    def __mul__(self, times: float) -> Room:
        return Room(self.cpus * times, self.gpus * times)

    def holds(self, other: Room) -> bool:
        """Return whether the other fits into this one."""
        return other.cpus <= self.cpus + ROUNDING and other.gpus <= self.gpus + ROUNDING


@dataclass(frozen=True)
class LaneKind:
    """A pool's lanes: `most` of them, each of `workers`, each of these with `each`, and `threads` of torch."""

    most: int
    workers: int
    each: Room
    threads: int = 1

    @property
    def room(self) -> Room:
        """CPUs and GPUs that one lane holds."""
        return self.each * self.workers

    def __str__(self) -> str:
        threads = "" if self.threads == 1 else f", {self.threads} threads"
        each = f"({self.each.cpus:g} CPU, {self.each.gpus:g} GPU{threads})"
        return f"{self.most} lane(s) x {self.workers} worker(s) x {each}"


def lane_kind(spec: RaySpec, cluster_gpus: float) -> LaneKind:
    """Return the kind of lane that a model's settings ask for."""
    each = Room(spec.cpus_per_worker, gpu_shares(spec, cluster_gpus).per_worker)
    return LaneKind(spec.lanes, spec.num_workers, each, spec.threads_per_worker)


def evaluator_room(spec: RaySpec, cluster_gpus: float) -> Room:
    """Return what a model's evaluation actors hold while its study lasts."""
    return Room(spec.cpus_per_evaluator, gpu_shares(spec, cluster_gpus).per_evaluator) * spec.evaluators


@dataclass(frozen=True)
class Demand:
    """Lanes and tasks of a pool.

    up: its lanes, `running` of which have a task. queued: tasks without a lane. expected: those that studies which are
    being opened will queue. more: its studies will queue further tasks, later. waited_s: how long it has had queued
    tasks without getting a lane.
    """

    up: int = 0
    running: int = 0
    queued: int = 0
    expected: int = 0
    more: bool = True
    waited_s: float = 0.0

    @property
    def tasks(self) -> int:
        return self.running + self.queued + self.expected


def allocate(demands: Mapping[LaneKind, Demand], room: Room) -> dict[LaneKind, int]:
    """Return how many lanes each pool may hold of a room that evaluation actors leave.

    Lanes with tasks are kept, except where a pool has waited for `RESERVE_AFTER_S` and is far behind the others. What
    is left goes lane by lane to the pool with the most work per lane; idle lanes keep what nobody wants.
    """
    granted = dict.fromkeys(demands, 0)

    def left() -> Room:
        held = Room(0.0, 0.0)
        for kind, lanes in granted.items():
            held += kind.room * lanes
        return room - held

    def give(kind: LaneKind, up_to: int) -> None:
        while granted[kind] < min(up_to, kind.most) and left().holds(kind.room):
            granted[kind] += 1

    def load(kind: LaneKind, lanes: int) -> float:
        return demands[kind].tasks / max(lanes, 0.5)

    behind = [kind for kind in demands if _is_behind(kind, demands)]
    for kind in sorted(behind, key=lambda kind: -demands[kind].waited_s):
        give(kind, demands[kind].up + 1)
    # Small lanes make room for large ones: their tasks tend to be shorter.
    for kind in sorted(demands, key=lambda kind: (-kind.room.gpus, -kind.room.cpus)):
        give(kind, min(demands[kind].up, demands[kind].tasks))
    while wanting := [k for k in demands if granted[k] < min(k.most, demands[k].tasks) and left().holds(k.room)]:
        granted[max(wanting, key=lambda kind: load(kind, granted[kind]))] += 1
    for kind, demand in demands.items():
        if demand.more:
            give(kind, demand.up)
    return granted


def _is_behind(kind: LaneKind, demands: Mapping[LaneKind, Demand]) -> bool:
    """Return whether a pool has waited long enough, and has so much more to do than another that it goes first."""
    mine = demands[kind]
    if not mine.queued or mine.waited_s < RESERVE_AFTER_S or mine.up >= kind.most:
        return False
    if not mine.up:
        return True
    others = [other.tasks / other.up for key, other in demands.items() if key != kind and other.up]
    return bool(others) and mine.tasks / (mine.up + 1) > UNEVEN * min(others)


class PoolWatch:
    """Watches the queue's snapshots: what each pool has and wants, and for how long it has waited."""

    def __init__(self) -> None:
        self._since: dict[str, tuple[float, int]] = {}

    def demands(
        self, expected: Mapping[LaneKind, int], more: Collection[LaneKind], snapshot: Mapping[str, Any], now: float
    ) -> dict[LaneKind, Demand]:
        """Return the demand of each kind of lane; the snapshot names pools by the kind's text.

        expected: for each kind the tasks that studies which are being opened will queue. more: the kinds of studies
        that will queue further tasks.
        """
        named = {str(kind): kind for kind in expected}
        counts = {str(kind): Counter(expected=tasks) for kind, tasks in expected.items()}
        for lane in snapshot["lanes"].values():
            if lane["pool"] in counts:
                counts[lane["pool"]]["up"] += 1
                counts[lane["pool"]]["running"] += lane["task"] is not None
        for name, queued in snapshot["queued"].items():
            if name in counts:
                counts[name]["queued"] = queued
        return {
            kind: Demand(
                counts[name]["up"],
                counts[name]["running"],
                counts[name]["queued"],
                counts[name]["expected"],
                more=kind in more,
                waited_s=self._waited(name, counts[name], now),
            )
            for name, kind in named.items()
        }

    def _waited(self, name: str, counts: Mapping[str, int], now: float) -> float:
        since, lanes = self._since.get(name, (now, counts["up"]))
        if not counts["queued"] or counts["up"] > lanes:
            since = now
        self._since[name] = since, counts["up"]
        return now - since


def has_gap(demands: Mapping[LaneKind, Demand], room: Room, kind: LaneKind, evaluators: Room) -> bool:
    """Return whether a study that waits could use a lane that no begun study wants.

    demands: of the begun studies. evaluators: what the waiting study's evaluation actors will hold. A lane that a begun
    study can use at once is not a gap.
    """
    wanted = Room(0.0, 0.0)
    for each, demand in demands.items():
        wanted += each.room * min(each.most, demand.tasks)
    own = demands.get(kind, Demand())
    return own.tasks < kind.most and (room - wanted).holds(kind.room + evaluators)
