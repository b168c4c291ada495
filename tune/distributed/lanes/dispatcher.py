"""The actor between Tune's trials and the lanes: a `TaskQueue` behind Ray calls, which survives its process."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError

from tune.distributed.cluster.ray_internals import HEAD
from tune.errors import ResourceError
from tune.scheduling.queue_log import LoggedQueue
from tune.storage.atomic import atomic_write_text

#: How long a caller waits for an answer; an actor that is made again on a busy machine takes seconds.
PATIENCE_S = 180.0


class DispatcherLost(ResourceError):
    """The dispatcher does not answer and is not coming back: the run cannot go on."""


@contextmanager
def dispatching(folder: Path) -> Iterator[ActorHandle]:
    """Run the actor on the head node with its log in `folder`; the log goes when the block ends well.

    The actor takes no CPU. When its process dies, Ray starts it again and sends again what it had not answered.
    """
    log = atomic_write_text(folder / f"queue-{uuid.uuid4().hex[:8]}.jsonl", "")
    dispatcher = Dispatcher.options(resources={HEAD: 0.001}).remote(log)
    try:
        yield dispatcher
    finally:
        if ray.is_initialized():
            ray.kill(dispatcher)
    log.unlink(missing_ok=True)


@ray.remote(num_cpus=0, max_concurrency=1, max_restarts=-1, max_task_retries=-1)
class Dispatcher:
    def __init__(self, log: Path) -> None:
        self.queue = LoggedQueue(log)

    def call(self, method: str, *arguments: Any) -> Any:
        """Run one method of the book; calls come one at a time, so the book needs no lock."""
        return self.queue.call(method, *arguments)


def ask(dispatcher: ActorHandle, method: str, *arguments: Any) -> ray.ObjectRef:
    """Call the book without waiting; `answer` takes the reference."""
    return dispatcher.call.remote(method, *arguments)


def answer(reference: ray.ObjectRef) -> Any:
    """Wait for an answer, also while the actor is made again.

    Raises:
        DispatcherLost: there was none in `PATIENCE_S`, or Ray gave the actor up.
    """
    try:
        return ray.get(reference, timeout=PATIENCE_S)
    except (GetTimeoutError, RayActorError) as error:
        raise DispatcherLost(
            f"The actor that hands out the fine-tunings of this run does not answer ({type(error).__name__}).\n"
            "Is the head node overloaded? Start the run again with --resume."
        ) from error


def call(dispatcher: ActorHandle, method: str, *arguments: Any) -> Any:
    """Call the book and wait for its answer, as `answer` does."""
    return answer(ask(dispatcher, method, *arguments))
