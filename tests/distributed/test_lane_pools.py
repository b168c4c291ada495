"""The pools of a run without Ray: who begins when, who gets how many lanes, what happens at the end."""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from macdrop.errors import MacDropError
from tune.config.run_spec import RaySpec, load
from tune.distributed.actors import actor_pool
from tune.distributed.actors.actor_pool import ActorPool
from tune.distributed.lanes import lane_pools
from tune.distributed.lanes.lane_pools import LanePools
from tune.distributed.sweep.controller import Closed
from tune.distributed.sweep.scoring import Scoring
from tune.distributed.sweep.studies import StudyThreads
from tune.distributed.sweep.study_run import StopOnError
from tune.errors import ResourceError
from tune.scheduling.allocation import LaneKind, Room
from tune.scheduling.sharing import Phase, StudyNeeds

ONE, EIGHT = LaneKind(4, 1, Room(1, 1)), LaneKind(1, 8, Room(1, 1))
NONE = Room(0, 0)


@dataclass
class Pool:
    """A pool that notes its calls."""

    said: list[Any] = field(default_factory=list)
    starving = False

    def open(self, lanes: int) -> None:
        self.said.append(("open", lanes))

    def allow(self, lanes: int) -> None:
        self.said.append(("allow", lanes))

    def check(self, snapshot: dict, *, scoring: bool, working: bool) -> None:
        self.said.append(("working", working))

    def ask_to_close(self) -> None:
        self.said.append("ask_to_close")

    def join(self, seconds: float, *, waiting: bool) -> None:
        self.said.append("join")

    def close(self) -> None:
        self.said.append("close")


@pytest.fixture
def cluster(monkeypatch) -> SimpleNamespace:
    """What a run asks of its cluster and tells its queue beside sharing out lanes."""
    found = SimpleNamespace(draining=[], asked=0, told=[], reapers=[])

    class Reaper:
        def __init__(self) -> None:
            found.reapers.append("runs")

        def close(self) -> None:
            found.reapers[-1] = "closed"

    def draining_nodes() -> list[str]:
        found.asked += 1
        return list(found.draining)

    monkeypatch.setattr(lane_pools, "Reaper", Reaper)
    monkeypatch.setattr(lane_pools.ray_internals, "draining_nodes", draining_nodes)
    monkeypatch.setattr(lane_pools, "call", lambda _, *words: found.told.append(words))
    return found


@pytest.fixture
def make(monkeypatch, cluster):
    """Pools over a cluster of so many GPUs."""

    def made(gpus: float, **needs: StudyNeeds) -> LanePools:
        monkeypatch.setattr(lane_pools, "LanePool", lambda *_, **__: Pool())
        monkeypatch.setattr(lane_pools, "SHARE_EVERY_S", -1.0)
        monkeypatch.setattr(lane_pools.ray, "cluster_resources", lambda: {"CPU": 100.0, "GPU": gpus})
        kinds = {each.kind: RaySpec() for each in needs.values()}
        return LanePools(None, kinds, needs, None, evaluator=object)  # type: ignore[arg-type]

    return made


def snapshot(queued: dict[LaneKind, int] | None = None, **lanes: tuple[LaneKind, str | None]) -> dict:
    return {
        "tasks": [],
        "lanes": {
            name: {"pool": str(kind), "task": task, "study": task and "a"} for name, (kind, task) in lanes.items()
        },
        "queued": {str(kind): number for kind, number in (queued or {}).items()},
        "open": {},
    }


def test_one_kind_has_all_of_its_lanes_from_the_first_study_on(make):
    pools = make(0, a=StudyNeeds(ONE, NONE, 3))
    pools.check(snapshot())
    assert pools._pools[ONE].said == [("allow", 4)], "nothing begins before a study does"
    pools.sharing.turn("a", Phase.OPENING)
    pools.check(snapshot())
    assert ("open", 4) in pools._pools[ONE].said and pools._pools[ONE].said[-1] == ("working", False)


def test_a_study_that_is_being_opened_counts_at_once(make):
    pools = make(4, a=StudyNeeds(ONE, NONE, 3), b=StudyNeeds(ONE, NONE, 3), c=StudyNeeds(ONE, NONE, 3))
    assert not pools.has_gap("a"), "nothing is known yet"
    pools.check(snapshot())
    assert pools.has_gap("a")
    pools.sharing.turn("a", Phase.OPENING)
    assert pools.has_gap("b"), "three tasks leave one of four lanes"
    pools.sharing.turn("b", Phase.OPENING)
    assert not pools.has_gap("c")


def test_lanes_make_room_for_the_actors_of_studies_that_have_begun(make):
    pools = make(4, a=StudyNeeds(ONE, Room(0, 1), 3), b=StudyNeeds(ONE, Room(0, 1), 3))
    pools.sharing.turn("a", Phase.OPENING)
    pools.check(snapshot())
    assert ("allow", 4) in pools._pools[ONE].said, "a lone study has what it asks for"
    pools.sharing.turn("b", Phase.OPENING)
    pools.check(snapshot())
    assert pools._pools[ONE].said[-2] == ("allow", 2)
    pools.sharing.turn("a", Phase.ENDED)
    pools.check(snapshot())
    assert pools._pools[ONE].said[-2] == ("allow", 4)


def test_a_pool_is_patient_while_another_one_trains_and_asks_for_a_lane_that_nothing_makes_room_for(make):
    pools = make(4, a=StudyNeeds(ONE, NONE, 3), big=StudyNeeds(EIGHT, NONE, 1))
    pools.sharing.turn("big", Phase.OPENING)
    pools.sharing.turn("a", Phase.OPENING)
    pools.check(snapshot({EIGHT: 1}, lane=(ONE, "trial")))
    assert pools._pools[EIGHT].said[-1] == ("working", True)
    assert ("open", 0) in pools._pools[EIGHT].said, "there is no room for it, and never will be"
    pools.sharing.turn("a", Phase.ENDED)
    pools.check(snapshot({EIGHT: 1}))
    assert pools._pools[EIGHT].said[-2:] == [("allow", 1), ("working", False)], "it asks, and gives up in time"


def test_all_pools_are_asked_before_any_is_waited_for(make):
    pools = make(4, a=StudyNeeds(ONE, NONE, 3), big=StudyNeeds(EIGHT, NONE, 1))
    order: list[str] = []
    for name, pool in zip("ab", pools._pools.values(), strict=True):
        pool.said = SimpleNamespace(append=lambda word, name=name: order.append(f"{word} {name}"))
    pools.close()
    assert order == [f"{word} {name}" for word in ("ask_to_close", "join", "close") for name in "ab"]


def test_one_reaper_serves_all_pools_until_the_last_is_closed(make, cluster):
    pools = make(4, a=StudyNeeds(ONE, NONE, 3), big=StudyNeeds(EIGHT, NONE, 1))
    assert cluster.reapers == ["runs"]
    last = list(pools._pools.values())[-1]
    last.close = lambda: last.said.append(list(cluster.reapers))
    pools.close()
    assert last.said[-1] == ["runs"] and cluster.reapers == ["closed"]


def test_nodes_that_will_go_are_looked_for_and_reported_once_for_all_pools(make, cluster):
    pools = make(4, a=StudyNeeds(ONE, NONE, 3), big=StudyNeeds(EIGHT, NONE, 1))
    pools.sharing.turn("a", Phase.OPENING)
    pools.sharing.turn("big", Phase.OPENING)
    pools.check(snapshot())
    cluster.draining = ["node"]
    pools.check(snapshot())
    pools.check(snapshot())
    assert cluster.asked == 3 and cluster.told == [("drain", ["node"])] and pools.leaving == ["node"]


def test_times_of_lanes_are_recorded_as_they_end(make):
    pools = make(4, a=StudyNeeds(ONE, NONE, 3))
    times: list[dict] = []
    pools._record = times.extend
    pools.check(snapshot(lane=(ONE, "t")))
    pools.check(snapshot(lane=(ONE, None)))
    assert [(row["role"], row["name"], row["study"], row["trial"]) for row in times] == [("lane", "lane", "a", "t")]
    pools.close()
    assert [row["trial"] for row in times] == ["t", None]


# --- studies ---


@dataclass
class Controller:
    """A control loop that goes on until there is an error."""

    error: BaseException | None = None
    broken = False
    notes: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    over: list[tuple[str, bool, bool]] = field(default_factory=list)

    def check(self, study: Any = None) -> None:
        if self.error is not None:
            raise self.error

    def ended(self, study: Any, *, well: bool, more: bool) -> None:
        self.over.append((study.name, well, more))

    def note(self, text: str) -> None:
        self.notes.append(text)

    def study_failed(self, name: str, reason: str) -> None:
        self.failed.append(f"{name}: {reason}")


def threads(
    run, most: int | None, *names: str, gaps=lambda name: False, room=lambda name: True, budget: float | None = None
) -> StudyThreads:
    lanes = SimpleNamespace(has_gap=gaps, leaves_a_lane=room, sharing=SimpleNamespace(turn=lambda *_: None))
    studies: Any = [SimpleNamespace(name=name) for name in names]
    return StudyThreads(studies, run, Controller(), lanes, most, budget)  # type: ignore[arg-type]


@pytest.mark.parametrize(("most", "together"), [(1, 1), (2, 2), (3, 3)])
def test_as_many_studies_as_asked_for_run_at_once(most, together):
    going, seen, lock = [0], [], threading.Lock()

    def run(study, share):
        with lock:
            going[0] += 1
            seen.append(going[0])
        time.sleep(0.5)
        with lock:
            going[0] -= 1
        return 0.0

    found = threads(run, most, "a", "b", "c")
    found.run_all()
    assert max(seen) == together and [name for name, *_ in found.controller.over[:1]] == ["a"]
    assert [more for *_, more in found.controller.over][-1] is False


def test_a_study_whose_actors_would_take_the_room_of_every_lane_begins_later():
    order, going = [], []

    def run(study, share):
        order.append(study.name)
        going.append(study.name)
        time.sleep(0.5)
        going.remove(study.name)
        return 0.0

    found = threads(run, 3, "a", "large", "b", room=lambda name: name != "large" or not going)
    found.run_all()
    assert order == ["a", "b", "large"]
    assert found.controller.notes == ["large is waiting to start: its evaluation actors would leave no room for a lane"]


def test_the_room_for_a_lane_of_each_begun_study_is_kept(make):
    actors = Room(0, 2)
    sharing = make(
        8,
        a=StudyNeeds(ONE, actors, 3),
        b=StudyNeeds(LaneKind(1, 4, Room(1, 1)), actors, 1),
        c=StudyNeeds(ONE, actors, 1),
    ).sharing
    assert sharing.leaves_a_lane("a", Room(100, 8))
    sharing.turn("a", Phase.OPENING)
    assert sharing.leaves_a_lane("b", Room(100, 8)) and not sharing.leaves_a_lane("b", Room(100, 7))
    sharing.turn("b", Phase.OPENING)
    assert not sharing.leaves_a_lane("c", Room(100, 8)), "two would be left, and b's lanes need four"
    sharing.turn("b", Phase.ENDED)
    assert sharing.leaves_a_lane("c", Room(100, 8))


def test_one_model_that_cannot_be_used_stops_no_other_and_a_lone_one_ends_the_run():
    def run(study, share):
        if study.name == "bad":
            raise MacDropError("no such layer")
        return 0.0

    found = threads(run, None, "bad", "good", gaps=lambda name: True)
    found.run_all()
    assert found.controller.failed == ["bad: no such layer"]
    assert sorted(each[:2] for each in found.controller.over) == [("bad", False), ("good", True)]
    with pytest.raises(MacDropError, match="no such layer"):
        threads(run, 1, "bad").run_all()


def test_an_unexpected_error_is_raised_and_a_closed_run_ends_its_threads_silently():
    def run(study, share):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        threads(run, 1, "a", "b").run_all()

    def closed(study, share):
        raise Closed

    found = threads(closed, 1, "a")
    found.run_all()
    found.close()
    assert found.controller.over == []


def test_shares_of_a_time_budget_add_up_to_it():
    shares = {}

    def run(study, share):
        shares[study.name] = share
        return share / 2

    threads(run, 1, "a", "b", "c", budget=60.0).run_all()
    assert shares == pytest.approx({"a": 20.0, "b": 25.0, "c": 37.5})


def test_a_model_that_fails_leaves_its_share_of_the_time_to_the_others():
    shares = {}

    def run(study, share):
        shares[study.name] = share
        if study.name == "a":
            raise MacDropError("no such layer")
        return share

    threads(run, 1, "a", "b", budget=60.0).run_all()
    assert shares["b"] == pytest.approx(60.0, abs=5.0)


# --- actors that are gone ---


def test_a_search_ends_when_the_actors_of_its_study_are_gone():
    scoring = Scoring(0.0)
    gone = MacDropError("3 actors died")

    def step() -> list:
        raise gone

    pool = SimpleNamespace(step=step, busy=1, at=dict)
    scoring._open["a"] = SimpleNamespace(pool=pool, opening=None)  # type: ignore[assignment]
    assert scoring.step() == [] and scoring.broken == {"a": gone} and scoring.left() == {}

    class Checks:
        def check(self, study: Any) -> None:
            if study in scoring.broken:
                raise scoring.broken[study]

    checks: Any = Checks()
    assert StopOnError(checks, "a").stop_all() and not StopOnError(checks, "b").stop_all()  # type: ignore[arg-type]
    assert not StopOnError(None, None).stop_all()


@pytest.mark.parametrize(("opening", "kept"), [(None, True), (1.0, False)])
def test_actors_are_handed_on_unless_another_study_waits_for_their_room(opening, kept):
    scoring, closed = Scoring(0.0), []
    ended: Any = SimpleNamespace(pool=SimpleNamespace(busy=0, close=lambda: closed.append("a")), size=1, opening=None)
    other: Any = SimpleNamespace(pool=SimpleNamespace(busy=0), size=1, opening=opening)
    scoring._open = {"a": ended, "b": other}
    scoring.hand_on("a", keep=True)
    assert (scoring._free == [ended], closed == []) == (kept, kept) and "a" not in scoring._open


def test_actors_that_no_study_has_go_first_where_room_is_needed():
    scoring, closed = Scoring(0.0), []
    pool = SimpleNamespace(close=lambda: closed.append("free"))
    free: Any = SimpleNamespace(pool=pool, size=SimpleNamespace(actors=2))
    idle: Any = SimpleNamespace(pool=SimpleNamespace(busy=0, release=lambda: 1), opening=None)
    scoring._free, scoring._open = [free], {"a": idle}
    assert scoring.release() == 3 and closed == ["free"] and scoring._free == []


def test_times_of_actors_are_recorded_as_they_end():
    times: list[dict] = []
    scoring, at = Scoring(0.0, record=times.extend), {"actor 1": "t", "actor 2": None}
    pool: Any = SimpleNamespace(step=list, busy=1, at=lambda: at, close=lambda: None)
    scoring._open["a"] = SimpleNamespace(pool=pool, opening=None)  # type: ignore[assignment]
    scoring.step()
    at["actor 1"] = None
    scoring.step()
    assert [(row["role"], row["name"], row["study"], row["trial"]) for row in times] == [
        ("evaluator", "actor 1", "a", "t")
    ]
    scoring.close()
    assert sorted((row["name"], row["trial"]) for row in times[1:]) == [("actor 1", None), ("actor 2", None)]


def test_a_run_of_models_of_two_kinds_loads():
    models = "sweep.models=[zoo:planted-llama,{model_name_or_path: zoo:planted-phi3, ray: {lanes: 2}}]"
    assert [ray.lanes for ray in load(None, [models, "ray.lanes=1"]).rays()] == [1, 2]


@pytest.mark.parametrize("names", [("a",), ("a", "b")])
def test_a_control_loop_that_fails_ends_the_run_with_its_error(names):
    def run(study, share):
        found.controller.error, found.controller.broken = ResourceError("the disk is full"), True
        found.controller.check(study)
        return 0.0

    found = threads(run, 2, *names, gaps=lambda name: True)
    with pytest.raises(ResourceError, match="the disk is full"):
        found.run_all()


def test_actors_of_two_sessions_of_a_run_have_names_of_their_own(monkeypatch):
    names = []
    for began in (1000.5, 2000.5):  # a resumed run is another process, which counts from 1 again
        monkeypatch.setattr(actor_pool, "_COUNT", itertools.count(1))
        monkeypatch.setattr(actor_pool, "time", SimpleNamespace(time=lambda began=began: began))
        pool = ActorPool.__new__(ActorPool)
        pool._busy, pool._nodes, pool._names = {}, {"one": "node", "two": "node"}, {}
        assert list(pool.at()) == list(pool.at())
        names += pool.at()
    assert names == ["actor-1-1000", "actor-2-1000", "actor-1-2000", "actor-2-2000"]
