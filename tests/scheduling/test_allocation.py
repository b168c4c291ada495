"""Room shared among pools of lanes: never more than there is, reserved for who waits, given up where idle."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from macdrop.errors import ConfigError
from tune.config.run_spec import load
from tune.scheduling.allocation import (
    RESERVE_AFTER_S,
    Demand,
    LaneKind,
    PoolWatch,
    Room,
    allocate,
    evaluator_room,
    has_gap,
    lane_kind,
)
from tune.scheduling.study import check_local_lanes, studies

ONE, FOUR, EIGHT = (LaneKind(64, workers, Room(1, 1)) for workers in (1, 4, 8))
LONG = RESERVE_AFTER_S + 1


@pytest.mark.parametrize(
    ("demands", "gpus", "wanted"),
    [
        ({ONE: Demand(queued=3)}, 8, {ONE: 3}),
        ({ONE: Demand(queued=30)}, 8, {ONE: 8}),
        ({ONE: Demand(), FOUR: Demand()}, 8, {ONE: 0, FOUR: 0}),
        ({ONE: Demand(expected=2)}, 8, {ONE: 2}),
        # Work per lane decides about free room.
        ({ONE: Demand(queued=4), FOUR: Demand(queued=1)}, 8, {ONE: 4, FOUR: 1}),
        # Lanes with tasks are kept; a large lane comes when there is room for it.
        ({ONE: Demand(up=8, running=8, queued=20), EIGHT: Demand(queued=1)}, 8, {ONE: 8, EIGHT: 0}),
        # After the wait the room is kept for it.
        ({ONE: Demand(up=8, running=8, queued=20), EIGHT: Demand(queued=1, waited_s=LONG)}, 8, {ONE: 0, EIGHT: 1}),
        ({ONE: Demand(up=9, running=9, queued=20), EIGHT: Demand(queued=1, waited_s=LONG)}, 9, {ONE: 1, EIGHT: 1}),
        # Who has far more to do than others gets more, too.
        (
            {ONE: Demand(up=12, running=12, queued=0), FOUR: Demand(up=1, running=1, queued=11, waited_s=LONG)},
            16,
            {ONE: 8, FOUR: 2},
        ),
        # Idle lanes are kept for tasks to come, unless another pool wants them or none will come.
        ({ONE: Demand(up=4)}, 8, {ONE: 4}),
        ({ONE: Demand(up=4), EIGHT: Demand(queued=1)}, 8, {ONE: 0, EIGHT: 1}),
        ({ONE: Demand(up=4, more=False)}, 8, {ONE: 0}),
    ],
)
def test_lanes_of_each_pool(demands, gpus, wanted):
    assert allocate(demands, Room(1000, gpus)) == wanted


numbers = st.integers(0, 20)


@settings(deadline=None, max_examples=300)
@given(
    st.dictionaries(
        st.builds(LaneKind, st.integers(1, 16), st.sampled_from([1, 2, 4, 8]), st.just(Room(1, 0.5))),
        st.builds(Demand, numbers, numbers, numbers, numbers, st.booleans(), st.sampled_from([0.0, LONG])),
        max_size=5,
    ),
    st.integers(0, 64),
)
def test_no_more_lanes_than_there_is_room_or_than_a_pool_may_have_and_none_is_left_out_for_nothing(demands, gpus):
    granted = allocate(demands, Room(1000, gpus))
    held = sum(kind.room.gpus * lanes for kind, lanes in granted.items())
    assert held <= gpus and all(0 <= lanes <= kind.most for kind, lanes in granted.items())
    for kind, lanes in granted.items():
        wanted = min(kind.most, demands[kind].tasks)
        assert lanes >= wanted or held + kind.room.gpus > gpus
    assert granted == allocate(demands, Room(1000, gpus))


def test_a_study_begins_where_no_other_wants_the_lane():
    room, none = Room(100, 8), Room(0, 0)
    assert has_gap({}, room, EIGHT, none)
    assert not has_gap({}, room, EIGHT, Room(1, 0.5)), "its evaluators need room, too"
    assert has_gap({ONE: Demand(up=8, running=4)}, room, FOUR, none), "idle lanes are a gap"
    assert not has_gap({ONE: Demand(up=4, running=4, queued=1)}, room, FOUR, none)
    few = LaneKind(2, 1, Room(1, 1))
    assert has_gap({few: Demand(running=1)}, room, few, none)
    assert not has_gap({few: Demand(running=1, queued=1)}, room, few, none), "its pool has no lane to spare"


def test_waiting_counts_from_the_first_queued_task_or_the_newest_lane():
    watch = PoolWatch()

    def waited(now: float, queued: int, up: int) -> float:
        lanes = {str(n): {"pool": str(ONE), "task": None} for n in range(up)}
        snapshot = {"lanes": lanes, "queued": {str(ONE): queued} if queued else {}}
        return watch.demands({ONE: 0}, (), snapshot, now)[ONE].waited_s

    assert [waited(0, 0, 0), waited(10, 1, 0), waited(30, 1, 0)] == [0, 10, 30]
    assert waited(40, 0, 0) == 0 and waited(45, 2, 0) == 5 and waited(50, 2, 1) == 0 and waited(57, 2, 1) == 7
    assert waited(60, 2, 0) == 10, "a lost lane does not begin the wait again"


def test_a_model_has_the_lanes_and_actors_that_its_entry_asks_for():
    run = load(
        None,
        [
            "sweep.models=[zoo:planted-llama,{model_name_or_path: zoo:planted-phi3, ray: {num_workers: 2, lanes: 3}}]",
            "ray.gpus_per_evaluator=0.5",
        ],
    )
    plain, own = run.rays()
    assert plain == run.ray and (own.num_workers, own.lanes, own.gpus_per_evaluator) == (2, 3, 0.5)
    assert str(lane_kind(own, 8.0)) == "3 lane(s) x 2 worker(s) x (1 CPU, 1 GPU)"
    assert lane_kind(own, 8.0).room == Room(2, 2) and evaluator_room(own, 8.0) == Room(0, 0.5)
    assert lane_kind(plain, 0.0) != lane_kind(own, 0.0)


BIG = "sweep.models=[zoo:planted-llama,{model_name_or_path: zoo:planted-phi3, ray: {num_workers: 999}}]"


def test_a_model_that_can_never_be_held_is_named_with_the_arithmetic_or_left_out():
    planned = studies(load(None, [BIG]))
    with pytest.raises(ConfigError, match=r"planted-phi3: The run needs more CPUs(?s:.*)999(?s:.*)--skip-unplaceable"):
        check_local_lanes(planned)
    check_local_lanes(planned, skip=True)


@pytest.mark.parametrize(
    ("ray", "said"),
    [
        ("{num_worker: 2}", "entry 1 .* num_worker is an unknown key. Did you mean 'num_workers'"),
        ("{address: auto}", "ray.address is for the whole run; write it outside of sweep.models"),
        ("{num_workers: 0}", "num_workers must be at least 1, not 0"),
        ("3", "ray must be a mapping of num_workers, lanes, .*, not 3"),
    ],
)
def test_wrong_lanes_of_a_model_are_refused(ray, said):
    with pytest.raises(ConfigError, match=said):
        load(None, [f"sweep.models=[{{model_name_or_path: zoo:planted-llama, ray: {ray}}}]"])


@pytest.mark.parametrize("value", ["0", "several", "1.5"])
def test_models_at_once_are_a_whole_number_or_auto(value):
    load(None, ["sweep.max_concurrent_models=auto", "model_name_or_path=zoo:planted-llama"])
    with pytest.raises(ConfigError, match="max_concurrent_models"):
        load(None, [f"sweep.max_concurrent_models={value}", "model_name_or_path=zoo:planted-llama"])


def test_a_time_budget_is_not_spent_waiting_for_another_model():
    with pytest.raises(ConfigError, match="max_concurrent_models auto cannot be combined with time_budget_s"):
        load(
            None,
            [
                "sweep.max_concurrent_models=auto",
                "sweep.time_budget_s=60",
                "model_name_or_path=zoo:planted-llama",
            ],
        )


def test_lanes_with_other_threads_are_another_pool():
    run = load(
        None, ["sweep.models=[zoo:planted-llama,{model_name_or_path: zoo:planted-phi3, ray.threads_per_worker: 2}]"]
    )
    one, two = (lane_kind(ray, 0.0) for ray in run.rays())
    assert one != two and str(two).endswith("(1 CPU, 0 GPU, 2 threads)")
