"""A queue made again from its log equals the one that died: random calls, repeated calls, a log cut at any byte."""

from __future__ import annotations

import copy
import json
import math
import tempfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as some

from tune.errors import ResourceError
from tune.scheduling import queue_log
from tune.scheduling.queue import TaskQueue
from tune.scheduling.queue_log import LoggedQueue
from tune.scheduling.tasks import TrainTask
from tune.storage.states import Stage, TaskState
from tune.training.observer import Word

NAMES, LANES, NODES, FOLLOWERS = ("a", "b", "c"), ("l", "m"), ("n1", "n2"), ("tom", "ann")


def task(name: str, stage: str = "search") -> TrainTask:
    spec = {"seed": 0, "macdrop": {"p0": 0.8, "exclude": []}}
    return TrainTask(name, "s", spec, f"/{name}", "/data", None, "e", "p", stage, {"k": 1}, {"learning_rate": 1e-3})


def steps(status: str) -> dict:
    return {"status": status, "step": 2, "total_steps": 4, "eval_loss": 1.0}


def method(name: str, *arguments: some.SearchStrategy) -> some.SearchStrategy:
    return some.tuples(some.just(name), some.tuples(*arguments))


def metrics(step: int, loss: float | None) -> dict:
    return {"step": step, "loss": 1.5} | ({} if loss is None else {"eval_loss": loss})


names, lanes, nodes, followers = map(some.sampled_from, (NAMES, LANES, NODES, FOLLOWERS))
lane_or_none = some.none() | lanes
#: The states in which a task can be entered from an earlier run.
ENTERED = [state for state in TaskState if state.is_final or state == TaskState.TRAINED]
ends = some.builds(steps, some.sampled_from(["done", "stopped", "left"]))
CALLS = some.one_of(
    method("place", some.builds(task, names, some.sampled_from(list(Stage))), followers),
    method("place", some.builds(task, names), followers, some.just([metrics(1, 2.5)])),
    method("record", some.builds(task, names), some.sampled_from(ENTERED), ends, some.none()),
    method("cancel", names, followers, some.none() | some.integers(1, 4)),
    method("abandon", some.just("s"), followers),
    method("poll", names, some.integers(-1, 4)),
    method("lane_up", lanes, some.just("p"), some.just("host"), some.lists(nodes, max_size=2)),
    method("lane_down", lanes, some.just("its node died")),
    method("take", lanes, some.none() | some.just("e")),
    method("closing", lanes),
    method("close", lanes),
    method("drain", some.lists(nodes, max_size=2)),
    method("progress", names, some.builds(metrics, some.integers(1, 4), some.none() | some.floats()), lane_or_none),
    method("trained", names, ends, lane_or_none),
    method("failed", names, some.sampled_from(["failed", "diverged"]), some.just("why"), lane_or_none),
    method("lost", names, some.just("why"), some.integers(1, 4)),
    method("scored", names, some.just({"qa/acc": 0.1 + 0.2}), some.none()),
    method("changes", some.integers(0, 9)),
    method("snapshot"),
)
#: What lanes do most, about two tasks only, so that one call meets the other.
few = some.sampled_from(NAMES[:2])
WORK = some.one_of(
    method("take", lanes, some.none()),
    method("trained", few, ends, lane_or_none),
    method("lane_down", lanes, some.just("died")),
)
#: Sequences that come far: two lanes are up and the tasks are placed.
BEGUN = [("lane_up", (lane, "p", "host", [node])) for lane, node in zip(LANES, NODES, strict=True)]
BEGUN += [("place", (task(name), "tom")) for name in NAMES[:2]]
SEQUENCES = some.lists(CALLS | WORK, max_size=40).map(lambda calls: BEGUN + calls)


def replay(queue: LoggedQueue, calls: list) -> list:
    """The answers to calls; what a queue refuses changes nothing."""
    answers = []
    for name, arguments in calls:
        with suppress(KeyError):
            answers.append(queue.call(name, *arguments))
    return answers


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def fresh(folder: Path) -> Path:
    file = folder / "queue.jsonl"
    file.write_text("")
    return file


@settings(deadline=None)
@given(calls=SEQUENCES)
def test_a_replayed_queue_equals_the_one_that_died(folder, calls):
    file = fresh(folder)
    live = LoggedQueue(file)
    replay(live, calls)
    again = LoggedQueue(file)
    assert again.queue == live.queue
    assert again.call("changes", 0) == live.call("changes", 0)
    # Both continue alike, but for the metrics shown of steps without a validation.
    calls = [each for each in calls if each[0] != "snapshot"]
    assert replay(again, calls) == replay(live, calls) and again.queue == live.queue


def without_mark(answer):
    """Return an answer without what differs between two queues of the same content: the mark of a snapshot."""
    return {key: value for key, value in answer.items() if key != "mark"} if isinstance(answer, dict) else answer


@settings(deadline=None)
@given(calls=SEQUENCES)
def test_calls_that_come_twice_change_nothing(calls):
    once, repeated = TaskQueue(), TaskQueue()
    for name, arguments in calls:
        answers = []
        for queue in (once, repeated, repeated):
            with suppress(KeyError):
                answers.append(without_mark(copy.deepcopy(getattr(queue, name)(*arguments))))
        assert all(answer == answers[0] for answer in answers)
        assert once == repeated


@settings(deadline=None)
@given(calls=SEQUENCES, cut=some.integers(0, 1 << 20))
@example(calls=[*BEGUN, ("progress", ("a", {"step": 1, "loss": 1.5, "eval_loss": math.inf}, None))], cut=0)
def test_a_log_cut_at_any_byte_is_the_log_of_the_calls_before(folder, calls, cut):
    file = fresh(folder)
    live, expected = LoggedQueue(file), TaskQueue()
    replay(live, calls)
    whole = file.read_bytes()
    kept = whole[: cut % (len(whole) + 1)]
    file.write_bytes(kept)
    again = LoggedQueue(file)
    lines = whole.splitlines(keepends=True)
    count = kept.count(b"\n")
    # The same calls to a queue without a log, up to the cut.
    for line in lines[:count]:
        row = json.loads(line)
        getattr(expected, row["method"])(*map(queue_log._read, row["arguments"]))
    assert again.queue == expected
    # Whoever had no answer asks again: the file is whole from the cut on.
    for line in lines[count:]:
        row = json.loads(line)
        again.call(row["method"], *map(queue_log._read, row["arguments"]))
    assert file.read_bytes() == whole and again.queue == live.queue


def test_what_changes_nothing_leaves_no_line(tmp_path):
    file = fresh(tmp_path)
    queue = LoggedQueue(file)
    replay(queue, BEGUN)
    queue.call("take", "l", None)
    size = file.stat().st_size
    for name, *arguments in (
        *(("poll", "a", -1), ("snapshot",), ("changes", 0), ("closing", "l")),
        ("progress", "a", {"step": 1, "loss": 2.0}, "l"),
    ):
        queue.call(name, *arguments)
    assert file.stat().st_size == size and queue.call("snapshot")["tasks"][0]["last"]["loss"] == 2.0
    queue.call("close", "m")
    assert queue.call("take", "m", None) is None and json.loads(file.read_text().splitlines()[-1])["method"] == "close"


def test_a_damaged_line_is_refused_with_its_place(tmp_path):
    file = fresh(tmp_path)
    replay(LoggedQueue(file), BEGUN)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([lines[0], "{oops\n", *lines[1:]]))
    with pytest.raises(ValueError, match="line 2"):
        LoggedQueue(file)


def test_a_log_that_is_gone_is_not_taken_for_an_empty_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        LoggedQueue(tmp_path / "queue.jsonl")


def test_a_full_disk_delays_the_log_and_nothing_else(tmp_path, monkeypatch):
    file = fresh(tmp_path)
    queue = LoggedQueue(file)

    def full(*arguments):
        raise ResourceError("The disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(queue_log, "append_jsonl", full)
        replay(queue, BEGUN[:2])
    file.rename(file.with_name("elsewhere"))  # and its storage goes, too
    replay(queue, BEGUN[2:3])
    assert not file.exists()
    file.with_name("elsewhere").rename(file)
    assert not file.read_text()
    replay(queue, BEGUN[3:])
    assert LoggedQueue(file).queue == queue.queue and len(file.read_text().splitlines()) == len(BEGUN)


def test_a_task_is_read_as_it_was_written(tmp_path):
    file = fresh(tmp_path)
    LoggedQueue(file).call("place", task("a"), "tom")
    (entry,) = LoggedQueue(file).queue.entries.values()
    assert entry.task == task("a") and asdict(entry.task) == asdict(task("a"))


def test_tasks_recorded_together_are_those_recorded_one_by_one(tmp_path):
    ended = [(task(name), TaskState.DONE, steps("done"), {"qa/acc": 0.5}, None) for name in NAMES]
    together, alone = LoggedQueue(fresh(tmp_path)), TaskQueue()
    together.record_all(ended)
    for arguments in ended:
        alone.record(*arguments)
    assert together.queue == alone == LoggedQueue(tmp_path / "queue.jsonl").queue
    together.record_all(ended)
    assert together.queue == alone, "known ones are left as they are"


def test_a_lane_gets_a_task_or_is_told_to_leave_and_waits_otherwise(tmp_path):
    queue = LoggedQueue(fresh(tmp_path))
    assert queue.next_task("l", None) is Word.LEAVE, "it is not known"
    replay(queue, BEGUN)
    assert queue.next_task("l", None) == task("a") == queue.next_task("l", None), "its answer may have been lost"
    assert queue.next_task("m", None) == task("b")
    queue.call("trained", "a", steps("done"), "l")
    size = (tmp_path / "queue.jsonl").stat().st_size
    assert queue.next_task("l", None) is None and (tmp_path / "queue.jsonl").stat().st_size == size
    queue.call("close", "l")
    assert queue.next_task("l", None) is Word.LEAVE


def test_news_are_of_validations_that_were_not_seen_and_of_the_end(tmp_path):
    queue = LoggedQueue(fresh(tmp_path))
    replay(queue, BEGUN)
    queue.next_task("l", None)
    queue.call("progress", "a", metrics(1, None), "l")
    assert queue.news("a", -1) is None
    queue.call("progress", "a", metrics(2, 1.5), "l")
    assert queue.news("a", -1) == queue.call("poll", "a", -1) and queue.news("a", 2) is None
    queue.call("trained", "a", steps("done"), "l")
    assert queue.news("a", 2) is None
    queue.call("scored", "a", {"qa/acc": 0.5}, None)
    assert queue.news("a", 2)["scores"] == {"qa/acc": 0.5}


@settings(deadline=None)
@given(calls=SEQUENCES)
def test_changes_since_a_cursor_are_all_of_them_each_once(folder, calls):
    queue = LoggedQueue(fresh(folder))
    cursor, changed, rows = None, [], {}
    for one in calls:
        replay(queue, [one])
        if (news := queue.since(cursor)) is not None:
            cursor = news.cursor
            changed += [entry.task.id for entry in news.changed]
            rows |= {row["id"]: row for row in news.snapshot["tasks"]}
        assert queue.since(cursor) is None
    seen, _ = queue.call("changes", 0)
    assert cursor is None or cursor.seen == seen and set(changed) == set(queue.queue._changes)
    assert list(rows.values()) == [] or rows == {row["id"]: row for row in queue.call("snapshot")["tasks"]}
    again = LoggedQueue(folder / "queue.jsonl").since(cursor)
    assert again is not None and len(again.snapshot["tasks"]) == len(queue.queue.entries), "another process: all rows"


def test_an_answer_stays_as_it_was_given(tmp_path):
    """Ray pickles it in another thread, so a later change would otherwise reach the caller twice."""
    queue = LoggedQueue(fresh(tmp_path))
    replay(queue, BEGUN)
    (entry, _) = queue.since(None).changed
    before = copy.deepcopy(entry)
    queue.next_task("l", None)
    queue.call("progress", "a", metrics(1, 2.0), "l")
    queue.call("place", task("a"), "ann")
    assert entry == before and entry.state == TaskState.QUEUED
