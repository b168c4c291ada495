"""The actor between Tune's trials and the lanes: a `TaskQueue`, restored from its log when the actor restarts."""

from __future__ import annotations

import asyncio
import gc
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from tune.distributed.cluster.ray_internals import HEAD
from tune.errors import ResourceError
from tune.scheduling.queue_log import READ_ONLY, Changes, Cursor, LoggedQueue
from tune.scheduling.tasks import TrainTask
from tune.storage.atomic import atomic_write_text

#: How long a caller waits for an answer; on a busy machine an actor takes seconds to restart.
PATIENCE_S = 180.0
#: What a caller of `Dispatcher.wait` waits for, unless it is one task: a task for its lane, and any change.
LANES, CHANGES = "lanes", "changes"
#: Methods of the queue whose first argument is not the task that they change.
OF_ANY_TASK = frozenset({"abandon", "close", "drain", "lane_down", "lane_up"})
#: Seconds that waiting calls get to return before the actor is killed; a call that comes later rests for so long.
END_S = 2.0
#: How long a `Watch` waits at a time, and the minimum pause between two of its requests.
CHANGES_S, REST_S = 5.0, 0.2
#: Callers that may wait at the same time.
MAX_WAITERS = 10_000


class DispatcherLost(ResourceError):
    """The dispatcher does not answer and will not come back: the run cannot continue."""


@contextmanager
def dispatching(folder: Path) -> Iterator[ActorHandle]:
    """Run the actor on the head node with its log in `folder`; the log is deleted when the block ends well.

    The actor takes no CPU. When its process dies, Ray restarts it and repeats the calls that it had not answered.
    """
    log = atomic_write_text(folder / f"queue-{uuid.uuid4().hex[:8]}.jsonl", "")
    actor: Any = ray.remote(Dispatcher).options(
        num_cpus=0, resources={HEAD: 0.001}, max_concurrency=MAX_WAITERS, max_restarts=-1, max_task_retries=-1
    )
    dispatcher: ActorHandle = actor.remote(log)
    try:
        yield dispatcher
    finally:
        if ray.is_initialized():
            with suppress(RayError):  # Ray reports calls that an actor leaves unanswered to the user
                ray.get(dispatcher.end.remote(), timeout=END_S)
            ray.kill(dispatcher)
    log.unlink(missing_ok=True)


class Dispatcher:
    """The actor's class: a queue that logs its calls.

    Each call of the queue runs to its end before the next: all are made in the actor's event loop, and none awaits
    anything. Answers are pickled later, in another thread. Calls may come in another order than they were sent in.
    """

    def __init__(self, log: Path) -> None:
        self.queue = LoggedQueue(log)
        self._waiting: dict[str, asyncio.Event] = {}
        self._waiters = 0
        self._ended = False

    async def call(self, method: str, *arguments: Any) -> Any:
        """Call one method of the queue."""
        answer = self.queue.call(method, *arguments)
        if method not in READ_ONLY:
            self._wake(method, arguments)
        return answer

    async def record_all(self, ended: Sequence[Sequence[Any]]) -> None:
        """Call `LoggedQueue.record_all`, at the start of a study: nobody waits for its tasks yet."""
        self.queue.record_all(ended)
        gc.freeze()  # they stay: the collector need not look at them again and again
        self._wake("record", [""])

    async def wait(self, seconds: float, about: str, method: str, *arguments: Any) -> Any:
        """Return what a method of `LoggedQueue` returns as soon as that is not None.

        None after `seconds`, or at the actor's end.

        about: the task that it depends on, `LANES` or `CHANGES`.
        """
        if self._ended:  # its caller would call again and again
            await asyncio.sleep(END_S)
        self._waiters += 1
        try:
            found = await self._found(time.monotonic() + seconds, about, method, arguments)
        finally:
            self._waiters -= 1
        if isinstance(found, TrainTask):
            self._wake("take", (found,))
        return found

    async def _found(self, end: float, about: str, method: str, arguments: Sequence[Any]) -> Any:
        while (found := getattr(self.queue, method)(*arguments)) is None and (left := end - time.monotonic()) > 0:
            if self._ended:
                break
            changed = self._waiting.setdefault(about, asyncio.Event())
            with suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), left)
        return found

    async def end(self) -> None:
        """Return when no call waits any more, at the actor's end."""
        self._ended = True
        for changed in self._waiting.values():
            changed.set()
        while self._waiters:
            await asyncio.sleep(0.01)

    def _wake(self, method: str, arguments: Sequence[Any]) -> None:
        """Wake the waiters that a call may affect."""
        if method in OF_ANY_TASK:
            about = set(self._waiting)
        else:
            first = arguments[0]
            about = {CHANGES, first.id if isinstance(first, TrainTask) else first}
            if method not in ("progress", "take"):
                about.add(LANES)
        for each in about & self._waiting.keys():
            self._waiting.pop(each).set()


def ask(dispatcher: ActorHandle, method: str, *arguments: Any) -> ray.ObjectRef:
    """Call the queue without waiting; pass the reference to `answer`."""
    return dispatcher.call.remote(method, *arguments)


def answer(reference: ray.ObjectRef, seconds: float = PATIENCE_S) -> Any:
    """Wait for an answer, also while the actor restarts.

    Raises:
        DispatcherLost: there was none within so many seconds, or Ray gave up on the actor.
    """
    try:
        return ray.get(reference, timeout=seconds)
    except (GetTimeoutError, RayActorError) as error:
        raise DispatcherLost(
            f"The task dispatcher of this run is not responding ({type(error).__name__}).\n"
            "Is the head node overloaded? Resume the run with --resume."
        ) from error


def call(dispatcher: ActorHandle, method: str, *arguments: Any) -> Any:
    """Call the queue and wait for its answer, as `answer` does."""
    return answer(ask(dispatcher, method, *arguments))


def wait_for(dispatcher: ActorHandle, seconds: float, about: str, method: str, *arguments: Any) -> ray.ObjectRef:
    """Have `Dispatcher.wait` wait, for less than `PATIENCE_S`; pass the reference to `answer`."""
    assert seconds < PATIENCE_S / 2
    return dispatcher.wait.remote(seconds, about, method, *arguments)


class Watch:
    """A subscription to the changes of the queue that does not block; each change is returned once."""

    def __init__(self, dispatcher: ActorHandle) -> None:
        self._dispatcher = dispatcher
        self._cursor: Cursor | None = None
        self._asked: tuple[float, ray.ObjectRef] | None = None
        self._taken_at = 0.0

    def news(self) -> Changes | None:
        """Return what has come since the last call, if the answer is there; None otherwise.

        Raises:
            DispatcherLost: as `answer`.
        """
        if self._asked is None:
            if time.monotonic() < self._taken_at + REST_S:
                return None
            reference = wait_for(self._dispatcher, CHANGES_S, CHANGES, "since", self._cursor)
            self._asked = time.monotonic() + PATIENCE_S, reference
        until, reference = self._asked
        if time.monotonic() < until and not ray.wait([reference], timeout=0)[0]:
            return None
        self._asked = None
        return self._taken(answer(reference, 1.0))

    def fetch(self) -> Changes | None:
        """Return what has come since the last call, this moment's included; None for nothing.

        Raises:
            DispatcherLost: as `answer`.
        """
        self._asked = None
        return self._taken(answer(wait_for(self._dispatcher, 0.0, CHANGES, "since", self._cursor)))

    def _taken(self, changes: Changes | None) -> Changes | None:
        self._taken_at = time.monotonic()
        if changes is not None:
            self._cursor = changes.cursor
        return changes
