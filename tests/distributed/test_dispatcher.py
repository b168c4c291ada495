"""The dispatcher's class without Ray: waiters are woken by the changes that affect them, and at the end."""

from __future__ import annotations

import asyncio
from pathlib import Path
from unittest import mock

import pytest

from tune.distributed.lanes.dispatcher import CHANGES, END_S, LANES, Dispatcher
from tune.scheduling.tasks import TrainTask
from tune.storage.states import Stage, TaskState
from tune.training.observer import Word

LONG_S = 60.0


@pytest.fixture
def dispatcher(tmp_path) -> Dispatcher:
    log = tmp_path / "queue.jsonl"
    log.write_text("")
    return Dispatcher(log)


def task(name: str) -> TrainTask:
    return TrainTask(name, "s", {}, f"/{name}", "", None, "e", "p", Stage.SEARCH)


async def begun(*waits) -> list[asyncio.Task]:
    """Start waiting, and let each come to its first look."""
    tasks = [asyncio.ensure_future(each) for each in waits]
    await asyncio.sleep(0.01)
    return tasks


async def done(*tasks: asyncio.Task) -> list[bool]:
    await asyncio.sleep(0.01)
    return [each.done() for each in tasks]


def test_each_is_answered_by_what_it_waits_for(dispatcher):
    async def scene() -> None:
        await dispatcher.call("lane_up", "lane", "p", "host")
        lane, changes = await begun(
            dispatcher.wait(LONG_S, LANES, "next_task", "lane", None),
            dispatcher.wait(LONG_S, CHANGES, "since", dispatcher.queue.since(None).cursor),
        )
        await dispatcher.call("place", task("a"), "tom")
        assert await done(lane, changes) == [True, True] and lane.result() == task("a")
        await dispatcher.call("place", task("b"), "tom")
        mine, other, changes = await begun(
            dispatcher.wait(LONG_S, "a", "news", "a", -1),
            dispatcher.wait(LONG_S, "b", "news", "b", -1),
            dispatcher.wait(LONG_S, CHANGES, "since", dispatcher.queue.since(None).cursor),
        )
        await dispatcher.call("progress", "a", {"step": 1}, "lane")
        assert await done(mine, other, changes) == [False, False, True]
        await dispatcher.call("progress", "a", {"step": 2, "eval_loss": 1.0}, "lane")
        assert await done(mine, other) == [True, False]
        assert mine.result()["metrics"] == [{"step": 2, "eval_loss": 1.0}]
        await dispatcher.call("cancel", "b", "tom")
        assert await done(other) == [True] and other.result()["state"] == TaskState.STOPPED

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("method", "arguments"), [("close", ["lane"]), ("drain", [["node"]]), ("lane_down", ["lane", "died"])]
)
def test_a_lane_that_waits_is_told_to_leave(method, arguments, dispatcher):
    async def scene() -> None:
        await dispatcher.call("lane_up", "lane", "p", "host", ["node"])
        (lane,) = await begun(dispatcher.wait(LONG_S, LANES, "next_task", "lane", None))
        await dispatcher.call(method, *arguments)
        assert await done(lane) == [True] and lane.result() is Word.LEAVE

    asyncio.run(scene())


def test_a_wait_that_is_over_and_the_end_answer_with_nothing(dispatcher):
    async def scene() -> None:
        await dispatcher.call("lane_up", "lane", "p", "host")
        assert await dispatcher.wait(0.0, LANES, "next_task", "lane", None) is None
        assert await dispatcher.wait(0.02, LANES, "next_task", "lane", None) is None
        waiting = await begun(*(dispatcher.wait(LONG_S, LANES, "next_task", "lane", None) for _ in range(3)))
        await dispatcher.end()
        assert all(each.done() for each in waiting) and {each.result() for each in waiting} == {None}
        with mock.patch.object(asyncio, "sleep") as rest:
            assert await dispatcher.wait(LONG_S, LANES, "next_task", "lane", None) is None
        rest.assert_awaited_once_with(END_S)

    asyncio.run(scene())


def test_a_task_goes_to_one_of_the_lanes_that_wait(dispatcher: Dispatcher, tmp_path: Path):
    async def scene() -> None:
        for lane in "lm":
            await dispatcher.call("lane_up", lane, "p", "host")
        waiting = await begun(*(dispatcher.wait(LONG_S, LANES, "next_task", lane, None) for lane in "lm"))
        await dispatcher.call("place", task("a"), "tom")
        assert sorted(await done(*waiting)) == [False, True]
        await dispatcher.call("place", task("b"), "tom")
        assert await done(*waiting) == [True, True]
        assert {each.result().id for each in waiting} == {"a", "b"}

    asyncio.run(scene())
