"""The order book as tables: what a state and an event make, who gets which order, what is told to whom."""

from __future__ import annotations

import copy
import pickle

import pytest

from tune.scheduling.queue import FINAL, GO_ON, LEAVE, MAX_ATTEMPTS, STOP, TaskQueue, TrainTask

DONE = {"status": "done", "step": 4, "total_steps": 4, "eval_loss": 1.0}
STOPPED = {"status": "stopped", "step": 2, "total_steps": 4, "eval_loss": 2.0}
LEFT = {**STOPPED, "status": "left"}


def order(name: str = "a", *, engine: str = "e", width: int = 1, study: str = "s", stage: str = "final") -> TrainTask:
    return TrainTask(name, study, {"seed": 0}, f"/trials/{name}", "/data", None, engine, width, stage)


def book_in(state: str) -> TaskQueue:
    """A book whose order `a`, placed by `tom`, is in `state`; lane `l` is up."""
    book = TaskQueue()
    book.lane_up("l", 1, "host", ["node"])
    book.place(order(), "tom")
    if state == "queued":
        return book
    book.take("l", None)
    if state in ("trained", "done"):
        book.trained("a", DONE)
    if state == "done":
        book.scored("a", {"x": 1.0}, None)
    if state in ("failed", "diverged"):
        book.failed("a", state, "a reason")
    if state == "stopped":
        book.cancel("a", "tom")
        book.trained("a", STOPPED)
    assert book.entries["a"].state == state
    return book


EVENTS = {
    "placed by another": lambda book: book.place(order(), "ann"),
    "cancelled": lambda book: book.cancel("a", "tom"),
    "cancelled by a stranger": lambda book: book.cancel("a", "ann"),
    "lane lost": lambda book: book.lane_down("l", "node died"),
    "lane restarted": lambda book: book.lane_up("l", 1, "host"),
    "asked for": lambda book: book.take("l", None),
    "trained": lambda book: book.trained("a", DONE),
    "left": lambda book: book.trained("a", LEFT),
    "failed": lambda book: book.failed("a", "failed", "a reason"),
    "lost for good": lambda book: (book.lost("a", "a bug", 1), book.lane_down("l", "died")),
    "scored": lambda book: book.scored("a", {}, None),
    "recorded": lambda book: book.record(order(), "done", DONE, {}),
    "trained elsewhere": lambda book: book.trained("a", DONE, "a lane taken for dead"),
    "failed elsewhere": lambda book: book.failed("a", "failed", "a reason", "a lane taken for dead"),
    "drained": lambda book: book.drain(["node"]),
    "closed": lambda book: book.close("l"),
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
    book = book_in(state)
    EVENTS[event](book)
    assert book.entries["a"].state == TABLE[state].get(event, state)


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("state", TABLE)
def test_a_call_that_comes_twice_changes_nothing(state, event):
    """Ray sends a call again when its answer was lost."""
    book = book_in(state)
    first = EVENTS[event](book)
    after = copy.deepcopy(book)
    assert EVENTS[event](book) == first and book == after


def test_the_whole_way():
    book = TaskQueue()
    book.lane_up("l", 1, "host")
    assert book.place(order(), "tom") == "queued" and book.poll("a", -1)["state"] == "queued"
    assert book.take("l", None) == order() and book.snapshot()["lanes"]["l"]["order"] == "a"
    assert book.progress("a", {"step": 1, "loss": 3.0}) == GO_ON
    assert book.progress("a", {"step": 2, "eval_loss": 2.0}) == GO_ON
    assert book.poll("a", -1)["metrics"] == [{"step": 2, "eval_loss": 2.0}] and not book.poll("a", 2)["metrics"]
    book.trained("a", DONE)
    assert book.snapshot()["lanes"]["l"]["order"] is None and book.poll("a", 2)["state"] == "trained"
    book.scored("a", {"zero_shot/qa/acc": 0.5}, None)
    end = book.poll("a", 2)
    assert (end["state"], end["outcome"], end["scores"]) == ("done", DONE, {"zero_shot/qa/acc": 0.5})


def test_placing_the_same_fine_tuning_twice_follows_the_first():
    book = TaskQueue()
    book.lane_up("l", 1, "host")
    book.place(order(), "tom")
    book.place(order(), "ann")
    book.lane_up("m", 1, "host")
    assert book.take("l", None).id == "a" and book.take("m", None) is None
    book.cancel("a", "tom")
    assert book.progress("a", {"step": 1}) == GO_ON, "ann still waits for it"
    book.cancel("a", "ann")
    assert book.progress("a", {"step": 2}) == STOP
    book.trained("a", STOPPED)
    assert book.poll("a", -1) | {"metrics": None} == {
        **{"state": "stopped", "metrics": None, "outcome": STOPPED, "scores": None},
        "reason": "stopped at step 2 of 4",
    }


def test_wanted_again_before_the_lane_has_stopped():
    book = book_in("running")
    book.cancel("a", "tom")
    assert book.place(order(), "ann") == "running" and book.progress("a", {"step": 1}) == GO_ON


def test_wanted_again_after_the_lane_was_told_to_stop():
    book = book_in("running")
    book.cancel("a", "tom")
    assert book.progress("a", {"step": 1}) == STOP
    book.place(order(), "ann")
    book.trained("a", STOPPED)
    assert book.poll("a", -1)["state"] == "queued" and book.entries["a"].attempts == 0
    assert book.take("l", None).id == "a"


def test_wanted_again_after_the_end_starts_anew():
    book = book_in("stopped")
    seen, _ = book.changes(0)
    assert book.place(order(), "ann") == "queued"
    entry = book.entries["a"]
    assert (entry.reason, entry.outcome, entry.attempts) == (None, {}, 0)
    assert [changed.order.id for changed in book.changes(seen)[1]] == ["a"]


def test_cancelling_what_nobody_knows_is_harmless():
    TaskQueue().cancel("a", "tom")


# --- lanes ---


@pytest.mark.parametrize(
    ("engine", "width", "taken"),
    [
        ("x", 1, "first x"),
        ("y", 1, "first y"),
        ("other", 1, "first x"),
        (None, 1, "first x"),
        ("y", 2, "wide x"),
        (None, 3, None),
    ],
)
def test_a_lane_prefers_what_fits_its_engine_else_the_oldest_of_its_width(engine, width, taken):
    book = TaskQueue()
    for name, of, wide in (("first x", "x", 1), ("first y", "y", 1), ("second x", "x", 1), ("wide x", "x", 2)):
        book.place(order(name, engine=of, width=wide), "tom")
    book.lane_up("l", width, "host")
    found = book.take("l", engine)
    assert (found and found.id) == taken


def test_a_closing_lane_gets_nothing_more():
    book = book_in("queued")
    assert not book.closing("l")
    book.close("l")
    assert book.closing("l") and book.take("l", None) is None and book.poll("a", -1)["state"] == "queued"


def test_an_order_fails_after_some_lost_lanes_with_the_last_reason():
    book = book_in("queued")
    for attempt in range(1, MAX_ATTEMPTS + 1):
        assert book.take("l", None) is not None and book.entries["a"].attempts == attempt
        book.lost("a", f"out of memory {attempt}")
        book.lane_up("l", 1, "host")
    end = book.poll("a", -1)
    assert (end["state"], end["reason"]) == ("failed", f"out of memory {MAX_ATTEMPTS} (tried {MAX_ATTEMPTS} times)")


def test_how_a_lane_was_lost_decides_how_often_its_order_is_tried():
    book = book_in("running")
    for kind, attempts, state in [("node lost", 5, "queued")] * 3 + [("a bug", 1, "failed")]:
        book.take("l", None)
        book.lost("a", kind, attempts)
        book.lane_up("l", 1, "host")
        assert book.entries["a"].state == state
    assert book.entries["a"].reason == "a bug (tried 4 times)"


def test_an_order_that_gets_further_has_all_its_attempts_again():
    """On machines that come and go a long order must end one day; one that dies at the same step again must fail."""
    book = book_in("running")
    for step, state in [(100, "queued"), (200, "queued"), (300, "queued"), (300, "failed")]:
        book.take("l", None)
        book.progress("a", {"step": step})
        assert book.held("l") == (order(), step)
        book.lost("a", "killed", 2, step)
        book.lane_up("l", 1, "host")
        assert book.entries["a"].state == state and book.held("l") is None


def test_why_a_lane_was_lost_may_be_known_only_after_it():
    book = book_in("running")
    book.lane_down("l", "its worker died")
    book.lost("a", "a bug", 1)
    assert (book.entries["a"].state, book.entries["a"].reason) == ("failed", "a bug")


def test_why_a_lane_was_lost_is_said_of_the_last_attempt_only():
    book = book_in("running")
    book.lost("a", "out of memory")
    for _ in range(MAX_ATTEMPTS):
        book.lane_up("l", 1, "host")
        book.take("l", None)
    assert book.entries["a"].reason == f"its worker died (tried {MAX_ATTEMPTS} times)"


def test_the_order_of_a_lane_whose_node_will_go_is_saved_and_queued_without_counting_an_attempt():
    book = book_in("running")
    book.lane_up("m", 1, "host", ["another node"])
    book.drain(["node"])
    assert book.closing("l") and not book.closing("m")
    assert book.progress("a", {"step": 1}, "l") == LEAVE
    book.trained("a", LEFT, "l")
    assert book.entries["a"].attempts == 0 and book.take("l", None) is None
    assert book.take("m", None).id == "a" and book.progress("a", {"step": 3}, "m") == GO_ON
    assert book.progress("a", {"step": 3}, "l") == STOP, "the order is no longer its own"


def test_nobody_waits_for_what_was_cancelled_though_its_node_will_go():
    book = book_in("running")
    book.drain(["node"])
    book.cancel("a", "tom")
    assert book.progress("a", {"step": 1}, "l") == STOP
    book.trained("a", LEFT, "l")
    assert book.entries["a"].state == "stopped"


def test_a_lane_that_the_book_gave_up_is_told_to_end():
    book = book_in("queued")
    book.lane_down("l", "node died")
    assert book.take("l", None) is None and book.closing("l")


def test_a_lost_lane_ends_what_was_cancelled():
    book = book_in("running")
    book.cancel("a", "tom")
    book.lane_down("l", "node died")
    assert book.poll("a", -1)["state"] == "stopped" and "l" not in book.snapshot()["lanes"]


def test_a_lost_lane_leaves_the_orders_of_others():
    book = book_in("running")
    book.lane_up("m", 1, "host")
    book.lane_down("m", "node died")
    assert book.poll("a", -1)["state"] == "running"


def test_a_retried_order_repeats_no_metrics():
    book = book_in("running")
    book.progress("a", {"step": 2, "eval_loss": 2.0})
    book.lane_up("l", 1, "host")
    book.take("l", None)
    book.progress("a", {"step": 2, "eval_loss": 2.0})
    book.progress("a", {"step": 4, "eval_loss": 1.0})
    assert [metrics["step"] for metrics in book.poll("a", -1)["metrics"]] == [2, 4]


# --- the supervisor's side ---


def test_what_an_earlier_run_finished_is_neither_trained_nor_told_again():
    book = TaskQueue()
    book.lane_up("l", 1, "host")
    book.record(order(), "done", DONE, {"x": 1.0})
    assert book.place(order(), "tom") == "done" and book.take("l", None) is None
    assert book.poll("a", -1)["scores"] == {"x": 1.0} and book.changes(0) == (0, [])


def test_changes_are_told_once():
    book = book_in("trained")
    seen, changed = book.changes(0)
    assert [(entry.order.id, entry.state) for entry in changed] == [("a", "trained")]
    assert book.changes(seen) == (seen, []) and book.changes(0) == (seen, changed), "who lost an answer asks again"
    book.scored("a", {}, "qa: no such file")
    _, (entry,) = book.changes(seen)
    assert (entry.state, entry.reason) == ("done", "qa: no such file")


def test_snapshot_has_a_row_for_each_order():
    book = book_in("running")
    book.place(order("b", study="t"), "tom")
    book.progress("a", {"step": 1, "loss": 2.0})
    rows = {row["id"]: row for row in book.snapshot()["orders"]}
    assert (rows["a"]["state"], rows["a"]["last"]["loss"], rows["b"]["study"]) == ("running", 2.0, "t")


def test_final_states_are_those_that_nothing_but_a_new_follower_leaves():
    kept = {state for state, row in TABLE.items() if set(row) <= {"placed by another"}}
    assert kept - {"trained"} == FINAL


def test_a_book_can_cross_processes():
    book = pickle.loads(pickle.dumps(book_in("running")))
    assert book.poll("a", -1)["state"] == "running"


def test_abandon_leaves_only_the_kept_followers():
    book = TaskQueue()
    for name in ("searched", "baseline", "both"):
        book.place(order(name), "baseline" if name == "baseline" else "trial")
    book.place(order("both"), "baseline")
    book.abandon(order("searched").study, "baseline")
    states = {row["id"]: row["state"] for row in book.snapshot()["orders"]}
    assert states == {"searched": "stopped", "baseline": "queued", "both": "queued"}


def test_a_trial_of_the_search_placed_for_the_final_stage_is_scored_again_and_not_trained():
    book = TaskQueue()
    book.lane_up("l", 1, "host")
    book.place(order(stage="search"), "tom")
    book.take("l", None)
    book.trained("a", DONE)
    book.scored("a", {"x": 1.0}, None)
    seen, _ = book.changes(0)
    assert book.place(order(), "baseline") == "trained"
    entry = book.entries["a"]
    assert (entry.state, entry.order.stage, entry.outcome) == ("trained", "final", DONE)
    assert [changed.order.id for changed in book.changes(seen)[1]] == ["a"] and book.take("l", None) is None
    book.scored("a", {}, None)
    assert entry.state == "done"
    book.place(order(stage="search"), "ann")  # and the search never takes it back
    assert (entry.state, entry.order.stage) == ("done", "final")
