"""A run in virtual time: all work is done once, within the room, as short as its parts allow."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tune.scheduling.allocation import LaneKind, Room
from tune.scheduling.queue import TaskQueue
from tune.scheduling.simulation import Simulation, Span, StageTimes, StudyTimes, Timeline

ROOM = Room(1000, 16)


def study(name: str, *, workers: int = 1, trials: int = 4, most: int = 16, seconds: float = 100.0, actors: int = 1):
    stages = (StageTimes((seconds,) * trials, 10.0, 2), StageTimes((seconds,) * trials, 20.0, trials))
    return StudyTimes(name, LaneKind(most, workers, Room(1, 1)), actors, Room(0, 0.5), stages, 5.0, 10.0, 3.0)


def test_one_study_takes_the_sum_of_its_parts():
    """Two lanes for the search of four trials, then four lanes: opening, loading, training, the last scores."""
    (found,) = [Simulation([study("a")], ROOM).run()]
    assert found.end == pytest.approx(5 + (3 + 100) + (100 + 10) + 10 + (3 + 100) + 4 * 20, abs=20)
    assert len(found.worked) == 8 + 8 + 1, "fine-tunings, their scores, the base model's"


def test_an_event_looks_at_what_has_changed_only(monkeypatch):
    rows, snapshot = [], TaskQueue.snapshot

    def counted(queue, after=None):
        found = snapshot(queue, after)
        rows.append(len(found["tasks"]))
        return found

    monkeypatch.setattr(TaskQueue, "snapshot", counted)
    Simulation([study("a", trials=200)], ROOM).run()
    assert sum(rows) < 5 * 400, "a task is placed, taken, trained and scored"


def held_at(spans: list[Span], when: float) -> float:
    return sum(span.room.gpus for span in spans if span.begin <= when < span.end)


studies_of = st.lists(
    st.builds(
        lambda workers, trials, seconds: (workers, trials, seconds),
        st.sampled_from([1, 2, 4, 8]),
        st.integers(1, 6),
        st.floats(1, 1000),
    ),
    min_size=1,
    max_size=6,
)


@settings(deadline=None, max_examples=60)
@given(studies_of, st.sampled_from([None, 1, 2]))
@example([(1, 2, 20.0), (2, 2, 18.0), (8, 3, 4.0), (1, 1, 1.0), (1, 1, 1.0)], None)  # two begin beside busy lanes
@example([(1, 1, 2.0), (1, 1, 1.0), (1, 1, 1.0)], None)  # the last one ends before a lane is up
def test_any_run_ends_with_all_work_done_once_within_its_room(parts, most):
    studies = [study(f"m{n}", workers=w, trials=t, seconds=s) for n, (w, t, s) in enumerate(parts)]
    found = Simulation(studies, ROOM, most=most, start_s=2.0).run()
    trained = [span.what for span in found.worked if span.holder.startswith("lane")]
    assert sorted(trained) == sorted(
        f"{each.name}-{stage}-{n}" for each in studies for stage in (0, 1) for n in range(len(each.stages[0].train_s))
    )
    for when in {span.begin for span in found.held}:
        assert held_at(found.held, when) <= ROOM.gpus + 1e-6
    for holder in {span.holder for span in found.worked if span.holder.startswith("lane")}:
        mine = sorted((span.begin, span.end) for span in found.worked if span.holder == holder)
        assert all(end <= begin + 1e-6 for (_, end), (begin, _) in itertools.pairwise(mine))
    if most == 1:
        times = sorted(found.studies.values())
        assert all(end <= begin + 1e-6 for (_, end), (begin, _) in itertools.pairwise(times))
    assert found == Simulation(studies, ROOM, most=most, start_s=2.0).run()


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.integers(1, 2), st.sampled_from([0.5, 1.0])), max_size=6),
    st.sampled_from([2, 4, 8]),
    st.sampled_from([None, 1, 2, 3]),
)
def test_models_that_fit_one_by_one_all_end_however_many_may_run_at_once(parts, gpus, most):
    """Actors of several models must not take the room that any of their lanes needs."""
    studies = [
        replace(
            study(f"m{n}", workers=workers, trials=2, most=int((gpus - actors * each) // workers), actors=actors),
            evaluator=Room(0, each),
        )
        for n, (workers, actors, each) in enumerate(parts)
        if workers + actors * each <= gpus
    ]
    found = Simulation(studies, Room(1000, gpus), most=most, start_s=2.0).run()
    assert found.studies.keys() == {each.name for each in studies}


def test_studies_overlap_where_one_leaves_lanes_idle_and_a_large_one_is_not_starved():
    small = [study(f"small-{n}", trials=20, seconds=50.0) for n in range(6)]
    found = Simulation([*small, study("large", workers=8, trials=1)], ROOM).run()
    alone = Simulation([*small, study("large", workers=8, trials=1)], ROOM, most=1).run()
    assert found.end < alone.end / 1.5
    begin, _ = found.studies["large"]
    first = min(span.begin for span in found.worked if span.study == "large" and span.holder.startswith("lane"))
    assert first - begin < found.end / 2


def test_a_share_of_time_counts_gpus():
    held = [Span("lane-1", 0, 10, Room(1, 2)), Span("lane-2", 0, 10, Room(1, 1)), Span("evaluator", 0, 10, Room(1, 9))]
    worked = [Span("lane-1", 0, 5, Room(1, 2), "a", "t"), Span("lane-2", 0, 10, Room(1, 1), "a", "u")]
    assert Timeline(held, worked).utilisation("lane") == pytest.approx(20 / 30)


@pytest.mark.parametrize("trials", [(0, 0), (3, 0), (0, 3)])
def test_a_stage_without_fine_tunings_is_passed(trials):
    """As with `sweep.seeds: 0`, where the search's own trials are compared, or without any arm but the base."""
    stages = tuple(StageTimes((10.0,) * number, 1.0, max(number, 1)) for number in trials)
    parts = StudyTimes("a", LaneKind(2, 1, Room(1, 1)), 1, Room(0, 0), stages, base_s=5.0)
    for each in (parts, replace(parts, base_s=0.0)):
        found = Simulation([each], ROOM).run()
        assert sum(span.holder.startswith("lane") for span in found.worked) == sum(trials)
