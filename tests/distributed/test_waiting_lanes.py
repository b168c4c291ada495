"""Lanes that wait for resources, without Ray: which of them are ended, and that their end is not a failure."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tune.config.run_spec import RaySpec
from tune.distributed.cluster import placement_groups, ray_internals
from tune.distributed.cluster.placement_groups import Trainer, end_waiting_runs
from tune.distributed.cluster.ray_internals import Actor, Group
from tune.distributed.lanes import lane_pool
from tune.distributed.lanes.lane_pool import LanePool
from tune.errors import ResourceError
from tune.scheduling.allocation import LaneKind, lane_kind

JOB = b"job"


class Cluster:
    """Train runs as the control store has them: one controller and one group each, all of one CPU."""

    def __init__(self) -> None:
        self.runs: dict[str, bool] = {}  # name -> whether it has its resources
        self.killed: list[str] = []
        self.slow = False  # killed runs stay for now

    def actors(self, class_name: str) -> list[Actor]:
        return [Actor(name.encode(), JOB, class_name, name, "", 1, False) for name in self.runs]

    def groups(self) -> list[Group]:
        each = {"CPU": 1.0}
        return [
            Group(b"of " + name.encode(), JOB, name.encode(), False, False, placed, (each,))
            for name, placed in self.runs.items()
        ]

    def kill(self, actor: Actor) -> None:
        self.killed.append(actor.name)
        if not self.slow:
            del self.runs[actor.name]


@pytest.fixture
def cluster(monkeypatch) -> Cluster:
    found = Cluster()
    monkeypatch.setattr(placement_groups, "actors", found.actors)
    monkeypatch.setattr(placement_groups, "groups", found.groups)
    monkeypatch.setattr(placement_groups.ray_internals, "kill_actor", found.kill)
    return found


class Thread:
    """The thread of a lane: alive as long as the lane's run."""

    runs: dict[str, bool]

    def __init__(self, *, target: Any, args: tuple[str], name: str, daemon: bool) -> None:
        self.name = name

    def start(self) -> None:
        self.runs[self.name] = False

    def is_alive(self) -> bool:
        return self.name in self.runs


@pytest.fixture
def pools(cluster, monkeypatch):
    """Pools whose lanes are the runs of the cluster; a lane that is gone had lost its controller."""
    monkeypatch.setattr(Thread, "runs", cluster.runs, raising=False)
    monkeypatch.setattr(lane_pool.threading, "Thread", Thread)
    monkeypatch.setattr(lane_pool, "LOOK_EVERY_S", -1.0)
    monkeypatch.setattr(lane_pool, "call", lambda *_: None)
    monkeypatch.setattr(lane_pool, "report_loss", lambda *_: False)
    monkeypatch.setattr(lane_pool, "resume_command", lambda _: "macdrop sweep --resume")
    monkeypatch.setattr(lane_pool, "without_resources", lambda _: False)

    class Pool(LanePool):
        def _ended(self, name: str, *rest: Any) -> None:
            self._errors[name] = RuntimeError("The actor died")
            super()._ended(name, *rest)

    def pool(spec: RaySpec) -> LanePool:
        return Pool(None, spec, lane_kind(spec, 0.0), Path("run/ray"), evaluator=object)  # type: ignore[arg-type]

    return pool


def snapshot(kind: LaneKind, *up: str) -> dict[str, Any]:
    lane = {"pool": str(kind), "task": None, "study": None}
    return {"tasks": [], "lanes": {name: lane for name in up}, "queued": {str(kind): 5}, "open": {}}


def test_waiting_runs_are_ended_by_name_and_no_more_than_asked_for(cluster):
    cluster.runs.update(a=False, b=True, c=False, other=False, d=False)
    assert end_waiting_runs(["d", "c", "b", "a"], 2) == ["d", "c"]
    assert cluster.killed == ["d", "c"] and "other" in cluster.runs
    assert end_waiting_runs(["b", "gone"], 2) == [] and end_waiting_runs(["a"], 0) == []


def test_a_pool_ends_no_lane_of_another_pool_of_the_same_shape(cluster, pools):
    first, second = pools(RaySpec(lanes=4)), pools(RaySpec(lanes=4, threads_per_worker=2))
    first.open(2)
    second.open(2)
    mine, others = list(first._threads), list(second._threads)
    first.allow(0)
    first.check(snapshot(first._kind), working=True)
    assert sorted(cluster.killed) == sorted(mine) and list(cluster.runs) == others


def test_a_pool_whose_allowance_changes_ends_as_many_waiting_lanes_as_are_above_it(cluster, pools):
    pool = pools(RaySpec(lanes=4))
    pool.open(3)
    oldest, *others = pool._threads
    pool.allow(1)
    pool.check(snapshot(pool._kind), working=True)
    assert cluster.killed == others[::-1] and list(cluster.runs) == [oldest], "the newest first"
    pool.check(snapshot(pool._kind), working=True)
    assert len(cluster.killed) == 2 and list(pool._threads) == [oldest]


def test_lanes_whose_end_takes_long_are_not_ended_again_nor_others_instead(cluster, pools):
    pool = pools(RaySpec(lanes=4))
    pool.open(3)
    cluster.slow = True
    pool.allow(2)
    for _ in range(3):
        pool.check(snapshot(pool._kind), working=True)
    assert len(cluster.killed) == 1 and pool._staying == 2
    del cluster.runs[cluster.killed[0]]
    pool.check(snapshot(pool._kind), working=True)
    assert pool._stillborn == 0 and len(pool._threads) == 2


def test_lanes_that_a_pool_ends_itself_are_not_failures(cluster, pools):
    pool = pools(RaySpec(lanes=4))
    pool.open(3)
    for turn in range(40):
        pool.allow(3 if turn % 2 else 1)
        pool.check(snapshot(pool._kind), working=True)
    assert len(cluster.killed) > 3 * lane_pool.RELAUNCHES * 4, "so many failures would end the run"
    assert pool._staying == len(cluster.runs) == 3


def test_lanes_ended_for_evaluation_actors_are_not_failures_and_are_started_again(cluster, pools, monkeypatch):
    monkeypatch.setattr(lane_pool, "without_resources", lambda _: True)
    monkeypatch.setattr(lane_pool, "ROOM_AFTER_S", 0.0)
    pool = pools(RaySpec(lanes=3))
    pool.open()
    up, *waiting = pool._threads
    cluster.runs[up] = True
    for _ in range(2):
        pool.check({**snapshot(pool._kind, up), "queued": {}}, scoring=True)
    assert cluster.killed == waiting[::-1] and list(cluster.runs) == [up]
    pool.check(snapshot(pool._kind, up), scoring=True)
    assert pool._stillborn == 0 and pool._staying == len(cluster.runs) == 3


def test_lanes_that_die_before_they_take_a_task_end_the_run(cluster, pools):
    pool = pools(RaySpec(lanes=2))
    pool.open()
    with pytest.raises(ResourceError, match="keep failing before they take a task"):
        for _ in range(lane_pool.RELAUNCHES * 2 + 1):
            cluster.runs.clear()
            pool.check(snapshot(pool._kind), working=True)


# --- our copy of a method of Ray ---


class Recorder:
    """Stands in for `ray.remote`, and notes which actor a Train run is controlled by."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def __call__(self, **options: Any) -> Any:
        def made(kind: type) -> Any:
            self.said.append((kind.__name__, options))
            return SimpleNamespace(remote=self._start)

        return made

    def _start(self, **settings: Any) -> Any:
        self.said.append(settings)
        return SimpleNamespace(run=self._method("run"), get_result=self._method("get_result"))

    def _method(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda: self.said.append(name))


def test_a_named_controller_is_rays_own_but_for_its_name(monkeypatch):
    import ray
    from ray.train import RunConfig, ScalingConfig

    context = SimpleNamespace(get_node_id=lambda: "node")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(ray, "get", lambda reference: reference)
    monkeypatch.setenv("RAY_TRAIN_METRICS_ENABLED", "0")
    seen = []
    for named in (False, True):
        monkeypatch.setattr(ray, "remote", recorder := Recorder())
        run = Trainer(print, scaling_config=ScalingConfig(), run_config=RunConfig(name="lane-1"), named=named)
        run._initialize_and_run_controller(train_fn_ref="work")
        seen.append(recorder.said)
    kind, options = seen[1][0]
    assert kind == ray_internals.TRAIN_CONTROLLER and options.pop("name") == "lane-1"
    assert seen[0] == seen[1] and len(seen[0]) == 4
