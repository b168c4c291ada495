"""Lanes and a task queue on a live Ray, and what is seen of them while a test disturbs them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tune.config.run_spec import RaySpec, TrainSpec, dump


@dataclass
class Scene:
    """A run folder, its task queue and lanes, and what was seen of them."""

    folder: Path
    dispatcher: Any
    #: Its only pool, and what checks and closes it.
    lanes: Any
    pools: Any
    #: The name of its lanes.
    pool: str
    #: Disturbance -> seconds until the task was further than before; `start`: until the first step.
    recovered: dict[str, float] = field(default_factory=dict)
    #: Disturbance -> seconds until no placement group of a dead maker was left.
    reaped: dict[str, float] = field(default_factory=dict)
    #: Why lanes were lost, as the queue reported it, in that order.
    reasons: list[str] = field(default_factory=list)
    most_up: int = 0
    evaluator_lived: bool = False
    left: list[Any] = field(default_factory=list)

    def place(self, name: str, spec: TrainSpec) -> None:
        from tune.scheduling.tasks import TrainTask

        folders = str(self.folder / "trials" / name), str(self.folder / "data")
        self.call("place", TrainTask(name, "study", dump(spec), *folders, None, spec.engine_key(), self.pool), "test")

    def call(self, method: str, *arguments: Any) -> Any:
        from tune.distributed.lanes.dispatcher import call

        return call(self.dispatcher, method, *arguments)

    def wait(self, until: Callable[[dict[str, Any]], bool], *, scoring: bool = False) -> None:
        """Do what the controller does, until the snapshot of the queue is as wanted."""
        deadline = time.monotonic() + 150
        while True:
            snapshot = self.call("snapshot")
            self.pools.check(snapshot, scoring=scoring)
            self.most_up = max(self.most_up, len(snapshot["lanes"]))
            for row in snapshot["tasks"]:
                if row["reason"] and row["reason"] not in self.reasons:
                    self.reasons.append(row["reason"])
            if until(snapshot):
                return
            assert time.monotonic() < deadline, snapshot
            time.sleep(0.05)

    def reach(self, name: str, state: str, step: int = 0) -> int:
        """Wait until a task is in a state, at a step or later; return the step."""
        row: dict[str, Any] = {}

        def there(snapshot: dict[str, Any]) -> bool:
            row.update(next(row for row in snapshot["tasks"] if row["id"] == name))
            assert row["state"] not in ("failed", "diverged"), row
            return row["state"] == state and row["last"].get("step", 0) >= step

        self.wait(there)
        return row["last"]["step"]

    def disturb(self, name: str, step: int, act: Callable[[], None]) -> None:
        """Do something to the lane of `storm` at a step, and wait until the task is further than it was."""
        from tune.distributed.cluster.placement_groups import orphaned_groups

        reached = self.reach("storm", "running", step)
        started = time.monotonic()
        act()
        self.wait(lambda snapshot: not snapshot["lanes"])
        self.wait(lambda snapshot: not orphaned_groups())
        self.reaped[name] = time.monotonic() - started
        self.reach("storm", "running", reached + 1)
        self.recovered[name] = time.monotonic() - started


@contextmanager
def scene_of(folder: Path, spec: RaySpec, evaluator: type = object) -> Iterator[Scene]:
    """A scene with lanes as a spec says, on a cluster without GPUs."""
    from tune.distributed.lanes.dispatcher import dispatching
    from tune.distributed.lanes.lane_pools import LanePools
    from tune.scheduling.allocation import Room, lane_kind
    from tune.scheduling.sharing import StudyNeeds

    kind = lane_kind(spec, 0.0)
    (folder / "ray").mkdir(parents=True)
    with dispatching(folder / "ray") as dispatcher:
        needs = {"study": StudyNeeds(kind, Room(0, 0), 0)}
        pools = LanePools(dispatcher, {kind: spec}, needs, folder / "ray", evaluator=evaluator)
        pools._opened.add(kind)  # a test opens its pool itself
        try:
            yield Scene(folder, dispatcher, pools._pools[kind], pools, str(kind))
        finally:
            pools.close()
