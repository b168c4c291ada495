"""The task queue as tables: state transitions, assignment of tasks to lanes, reports to followers."""

from __future__ import annotations

import copy
import pickle
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tune.scheduling.queue import TaskQueue
from tune.scheduling.tasks import MAX_ATTEMPTS, TrainTask
from tune.storage.states import TaskState
from tune.training.observer import Word

DONE = {"status": "done", "step": 4, "total_steps": 4, "eval_loss": 1.0}
STOPPED = {"status": "stopped", "step": 2, "total_steps": 4, "eval_loss": 2.0}
LEFT = {**STOPPED, "status": "left"}


def task(name: str = "a", *, engine: str = "e", pool: str = "p", study: str = "s", stage: str = "final") -> TrainTask:
    return TrainTask(name, study, {"seed": 0}, f"/trials/{name}", "/data", None, engine, pool, stage)


def book_in(state: str) -> TaskQueue:
    """A queue whose task `a`, placed by `tom`, is in `state`; lane `l` is up."""
    queue = TaskQueue()
    queue.lane_up("l", "p", "host", ["node"])
    queue.place(task(), "tom")
    if state == "queued":
        return queue
    queue.take("l", None)
    if state in ("trained", "done"):
        queue.trained("a", DONE)
    if state == "done":
        queue.scored("a", {"x": 1.0}, None)
    if state in ("failed", "diverged"):
        queue.failed("a", state, "a reason")
    if state == "stopped":
        queue.cancel("a", "tom")
        queue.trained("a", STOPPED)
    assert queue.entries["a"].state == state
    return queue


EVENTS = {
    "placed by another": lambda queue: queue.place(task(), "ann"),
    "cancelled": lambda queue: queue.cancel("a", "tom"),
    "cancelled by a stranger": lambda queue: queue.cancel("a", "ann"),
    "lane lost": lambda queue: queue.lane_down("l", "node died"),
    "lane restarted": lambda queue: queue.lane_up("l", "p", "host"),
    "asked for": lambda queue: queue.take("l", None),
    "trained": lambda queue: queue.trained("a", DONE),
    "left": lambda queue: queue.trained("a", LEFT),
    "failed": lambda queue: queue.failed("a", "failed", "a reason"),
    "lost for good": lambda queue: (queue.lost("a", "a bug", 1), queue.lane_down("l", "died")),
    "scored": lambda queue: queue.scored("a", {}, None),
    "recorded": lambda queue: queue.record(task(), "done", DONE, {}),
    "trained elsewhere": lambda queue: queue.trained("a", DONE, "a lane taken for dead"),
    "failed elsewhere": lambda queue: queue.failed("a", "failed", "a reason", "a lane taken for dead"),
    "drained": lambda queue: queue.drain(["node"]),
    "closed": lambda queue: queue.close("l"),
}
#: state -> event -> state after it, where it differs.
TABLE = {
    "queued": {"cancelled": "stopped", "asked for": "running"},
    "running": {
        **{"lane lost": "queued", "lane restarted": "queued", "left": "queued"},
        **{"trained": "trained", "failed": "failed", "lost for good": "failed"},
    },
    "trained": {"scored": "done"},
    "done": {},
    "failed": {},
    "diverged": {},
    "stopped": {"placed by another": "queued"},
}


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("state", TABLE)
def test_state_after_event(state, event):
    queue = book_in(state)
    EVENTS[event](queue)
    assert queue.entries["a"].state == TABLE[state].get(event, state)


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("state", TABLE)
def test_a_call_that_comes_twice_changes_nothing(state, event):
    """Ray sends a call again when its answer was lost."""
    queue = book_in(state)
    first = EVENTS[event](queue)
    after = copy.deepcopy(queue)
    assert EVENTS[event](queue) == first and queue == after


def test_the_whole_way():
    queue = TaskQueue()
    queue.lane_up("l", "p", "host")
    assert queue.place(task(), "tom") == "queued" and queue.poll("a", -1)["state"] == "queued"
    assert queue.take("l", None) == task() and queue.snapshot()["lanes"]["l"]["task"] == "a"
    assert queue.progress("a", {"step": 1, "loss": 3.0}) == Word.GO_ON
    assert queue.progress("a", {"step": 2, "eval_loss": 2.0}) == Word.GO_ON
    assert queue.poll("a", -1)["metrics"] == [{"step": 2, "eval_loss": 2.0}] and not queue.poll("a", 2)["metrics"]
    queue.trained("a", DONE)
    assert queue.snapshot()["lanes"]["l"]["task"] is None and queue.poll("a", 2)["state"] == "trained"
    queue.scored("a", {"zero_shot/qa/acc": 0.5}, None)
    end = queue.poll("a", 2)
    assert (end["state"], end["outcome"], end["scores"]) == ("done", DONE, {"zero_shot/qa/acc": 0.5})


def test_placing_the_same_fine_tuning_twice_follows_the_first():
    queue = TaskQueue()
    queue.lane_up("l", "p", "host")
    queue.place(task(), "tom")
    queue.place(task(), "ann")
    queue.lane_up("m", "p", "host")
    assert queue.take("l", None).id == "a" and queue.take("m", None) is None
    queue.cancel("a", "tom")
    assert queue.progress("a", {"step": 1}) == Word.GO_ON, "ann still waits for it"
    queue.cancel("a", "ann")
    assert queue.progress("a", {"step": 2}) == Word.STOP
    queue.trained("a", STOPPED)
    assert queue.poll("a", -1) | {"metrics": None} == {
        **{"state": "stopped", "metrics": None, "outcome": STOPPED, "scores": None},
        "reason": "stopped at step 2 of 4",
    }


def test_wanted_again_before_the_lane_has_stopped():
    queue = book_in("running")
    queue.cancel("a", "tom")
    assert queue.place(task(), "ann") == "running" and queue.progress("a", {"step": 1}) == Word.GO_ON


def test_wanted_again_after_the_lane_was_told_to_stop():
    queue = book_in("running")
    queue.cancel("a", "tom")
    assert queue.progress("a", {"step": 1}) == Word.STOP
    queue.place(task(), "ann")
    queue.trained("a", STOPPED)
    assert queue.poll("a", -1)["state"] == "queued" and queue.entries["a"].attempts == 0
    assert queue.take("l", None).id == "a"


def test_wanted_again_after_the_end_starts_again():
    queue = book_in("stopped")
    seen, _ = queue.changes(0)
    assert queue.place(task(), "ann") == "queued"
    entry = queue.entries["a"]
    assert (entry.reason, entry.outcome, entry.attempts) == (None, {}, 0)
    assert [changed.task.id for changed in queue.changes(seen)[1]] == ["a"]


def test_cancelling_what_nobody_knows_is_harmless():
    TaskQueue().cancel("a", "tom")


# --- lanes ---


@pytest.mark.parametrize(
    ("engine", "pool", "taken"),
    [
        ("x", "p", "first x"),
        ("y", "p", "first y"),
        ("other", "p", "first x"),
        (None, "p", "first x"),
        ("y", "wide", "wide x"),
        (None, "another", None),
    ],
)
def test_a_lane_prefers_what_fits_its_engine_else_the_oldest_of_its_pool(engine, pool, taken):
    queue = TaskQueue()
    for name, of, its in (
        ("first x", "x", "p"),
        ("first y", "y", "p"),
        ("second x", "x", "p"),
        ("wide x", "x", "wide"),
    ):
        queue.place(task(name, engine=of, pool=its), "tom")
    queue.lane_up("l", pool, "host")
    found = queue.take("l", engine)
    assert (found and found.id) == taken


def test_a_closing_lane_gets_nothing_more():
    queue = book_in("queued")
    assert not queue.closing("l")
    queue.close("l")
    assert queue.closing("l") and queue.take("l", None) is None and queue.poll("a", -1)["state"] == "queued"


def test_an_order_fails_after_some_lost_lanes_with_the_last_reason():
    queue = book_in("queued")
    for attempt in range(1, MAX_ATTEMPTS + 1):
        assert queue.take("l", None) is not None and queue.entries["a"].attempts == attempt
        queue.lost("a", f"out of memory {attempt}")
        queue.lane_up("l", "p", "host")
    end = queue.poll("a", -1)
    assert (end["state"], end["reason"]) == ("failed", f"out of memory {MAX_ATTEMPTS} (tried {MAX_ATTEMPTS} times)")


def test_how_a_lane_was_lost_decides_how_often_its_order_is_tried():
    queue = book_in("running")
    for kind, attempts, state in [("node lost", 5, "queued")] * 3 + [("a bug", 1, "failed")]:
        queue.take("l", None)
        queue.lost("a", kind, attempts)
        queue.lane_up("l", "p", "host")
        assert queue.entries["a"].state == state
    assert queue.entries["a"].reason == "a bug (tried 4 times)"


def test_an_order_that_gets_further_has_all_its_attempts_again():
    """On machines that come and go a long task must end one day; one that dies at the same step again must fail."""
    queue = book_in("running")
    for step, state in [(100, "queued"), (200, "queued"), (300, "queued"), (300, "failed")]:
        queue.take("l", None)
        queue.progress("a", {"step": step})
        assert queue.held("l") == (task(), step)
        queue.lost("a", "killed", 2, step)
        queue.lane_up("l", "p", "host")
        assert queue.entries["a"].state == state and queue.held("l") is None


def test_why_a_lane_was_lost_may_be_known_only_after_it():
    queue = book_in("running")
    queue.lane_down("l", "its worker died")
    queue.lost("a", "a bug", 1)
    assert (queue.entries["a"].state, queue.entries["a"].reason) == ("failed", "a bug")


def test_why_a_lane_was_lost_is_said_of_the_last_attempt_only():
    queue = book_in("running")
    queue.lost("a", "out of memory")
    for _ in range(MAX_ATTEMPTS):
        queue.lane_up("l", "p", "host")
        queue.take("l", None)
    assert queue.entries["a"].reason == f"its worker died (tried {MAX_ATTEMPTS} times)"


def test_the_order_of_a_lane_whose_node_will_go_is_saved_and_queued_without_counting_an_attempt():
    queue = book_in("running")
    queue.lane_up("m", "p", "host", ["another node"])
    queue.drain(["node"])
    assert queue.closing("l") and not queue.closing("m")
    assert queue.progress("a", {"step": 1}, "l") == Word.LEAVE
    queue.trained("a", LEFT, "l")
    assert queue.entries["a"].attempts == 0 and queue.take("l", None) is None
    assert queue.take("m", None).id == "a" and queue.progress("a", {"step": 3}, "m") == Word.GO_ON
    assert queue.progress("a", {"step": 3}, "l") == Word.STOP, "the task is no longer its own"


def test_nobody_waits_for_what_was_cancelled_though_its_node_will_go():
    queue = book_in("running")
    queue.drain(["node"])
    queue.cancel("a", "tom")
    assert queue.progress("a", {"step": 1}, "l") == Word.STOP
    queue.trained("a", LEFT, "l")
    assert queue.entries["a"].state == "stopped"


def test_a_lane_that_the_book_gave_up_is_told_to_end():
    queue = book_in("queued")
    queue.lane_down("l", "node died")
    assert queue.take("l", None) is None and queue.closing("l")


def test_a_lost_lane_ends_what_was_cancelled():
    queue = book_in("running")
    queue.cancel("a", "tom")
    queue.lane_down("l", "node died")
    assert queue.poll("a", -1)["state"] == "stopped" and "l" not in queue.snapshot()["lanes"]


def test_a_lost_lane_leaves_the_orders_of_others():
    queue = book_in("running")
    queue.lane_up("m", "p", "host")
    queue.lane_down("m", "node died")
    assert queue.poll("a", -1)["state"] == "running"


def test_a_retried_order_repeats_no_metrics():
    queue = book_in("running")
    queue.progress("a", {"step": 2, "eval_loss": 2.0})
    queue.lane_up("l", "p", "host")
    queue.take("l", None)
    queue.progress("a", {"step": 2, "eval_loss": 2.0})
    queue.progress("a", {"step": 4, "eval_loss": 1.0})
    assert [metrics["step"] for metrics in queue.poll("a", -1)["metrics"]] == [2, 4]


# --- the supervisor's side ---


def test_what_an_earlier_run_finished_is_neither_trained_nor_told_again():
    queue = TaskQueue()
    queue.lane_up("l", "p", "host")
    queue.record(task(), "done", DONE, {"x": 1.0})
    assert queue.place(task(), "tom") == "done" and queue.take("l", None) is None
    assert queue.poll("a", -1)["scores"] == {"x": 1.0} and queue.changes(0) == (0, [])


def test_changes_are_told_once():
    queue = book_in("trained")
    seen, changed = queue.changes(0)
    assert [(entry.task.id, entry.state) for entry in changed] == [("a", "trained")]
    assert queue.changes(seen) == (seen, []) and queue.changes(0) == (seen, changed), "who lost an answer asks again"
    queue.scored("a", {}, "qa: no such file")
    _, (entry,) = queue.changes(seen)
    assert (entry.state, entry.reason) == ("done", "qa: no such file")


def test_snapshot_has_a_row_for_each_order():
    queue = book_in("running")
    queue.place(task("b", study="t"), "tom")
    queue.progress("a", {"step": 1, "loss": 2.0})
    rows = {row["id"]: row for row in queue.snapshot()["tasks"]}
    assert (rows["a"]["state"], rows["a"]["last"]["loss"], rows["b"]["study"]) == ("running", 2.0, "t")


def test_final_states_are_those_that_nothing_but_a_new_follower_leaves():
    kept = {state for state, row in TABLE.items() if set(row) <= {"placed by another"}}
    assert kept - {TaskState.TRAINED} == {state for state in TaskState if state.is_final}


def test_a_book_can_cross_processes():
    queue = pickle.loads(pickle.dumps(book_in("running")))
    assert queue.poll("a", -1)["state"] == "running"


def test_abandon_leaves_only_the_kept_followers():
    queue = TaskQueue()
    for name in ("searched", "baseline", "both"):
        queue.place(task(name), "baseline" if name == "baseline" else "trial")
    queue.place(task("both"), "baseline")
    queue.abandon(task("searched").study, "baseline")
    states = {row["id"]: row["state"] for row in queue.snapshot()["tasks"]}
    assert states == {"searched": "stopped", "baseline": "queued", "both": "queued"}


def test_a_trial_of_the_search_placed_for_the_final_stage_is_scored_again_and_not_trained():
    queue = TaskQueue()
    queue.lane_up("l", "p", "host")
    queue.place(task(stage="search"), "tom")
    queue.take("l", None)
    queue.trained("a", DONE)
    queue.scored("a", {"x": 1.0}, None)
    seen, _ = queue.changes(0)
    assert queue.place(task(), "baseline") == "trained"
    entry = queue.entries["a"]
    assert (entry.state, entry.task.stage, entry.outcome) == ("trained", "final", DONE)
    assert [changed.task.id for changed in queue.changes(seen)[1]] == ["a"] and queue.take("l", None) is None
    queue.scored("a", {}, None)
    assert entry.state == "done"
    queue.place(task(stage="search"), "ann")  # and the search never takes it back
    assert (entry.state, entry.task.stage) == ("done", "final")


def test_a_snapshot_after_a_mark_holds_what_changed_since_and_one_of_another_process_all():
    queue = TaskQueue()
    for name in "abc":
        queue.place(task(name), "tom")
    first = queue.snapshot()
    assert [row["id"] for row in first["tasks"]] == ["a", "b", "c"] and first["queued"] == {"p": 3}
    assert queue.snapshot(first["mark"])["tasks"] == []
    queue.lane_up("l", "p", "host")
    queue.take("l", None)
    queue.progress("a", {"step": 1}, "l")
    queue.failed("a", TaskState.FAILED, "broken", "l")
    second = queue.snapshot(first["mark"])
    assert [(row["id"], row["state"], row["last"]) for row in second["tasks"]] == [("a", "failed", {"step": 1})]
    assert (second["queued"], second["open"]) == ({"p": 2}, {"s": 2})
    assert len(queue.snapshot(("another process", 10**6))["tasks"]) == 3


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.sampled_from(sorted(EVENTS)), st.sampled_from("abc")), max_size=30), st.data())
def test_snapshots_after_marks_add_up_to_the_whole_one_and_counts_are_those_of_the_entries(calls, data):
    queue, rows, mark = TaskQueue(), {}, None
    for name in "abc":
        queue.place(task(name), "tom")
    queue.lane_up("l", "p", "host")
    for event, _ in calls:
        with suppress(KeyError, AssertionError):
            EVENTS[event](queue)
        if data.draw(st.booleans()):
            seen = queue.snapshot(mark)
            mark = seen["mark"]
            rows |= {row["id"]: row for row in seen["tasks"]}
    seen = queue.snapshot(mark)
    rows |= {row["id"]: row for row in seen["tasks"]}
    assert rows == {name: entry.row() for name, entry in queue.entries.items()}
    states = [entry.state for entry in queue.entries.values()]
    assert sum(seen["queued"].values()) == states.count(TaskState.QUEUED)
    assert sum(seen["open"].values()) == sum(not state.is_final for state in states)


def test_a_task_that_an_earlier_run_stopped_and_that_is_wanted_again_goes_to_the_pool_of_now():
    queue = TaskQueue()
    queue.record(task(pool=""), TaskState.STOPPED, STOPPED, None, "stopped")
    queue.lane_up("l", "p", "host")
    assert queue.place(task(pool="p"), "tom") == TaskState.QUEUED
    assert queue.take("l", None).id == "a" and queue.snapshot()["open"] == {"s": 1}
