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

#: How long a caller waits for an answer; on a busy machine an actor takes seconds to restart.
PATIENCE_S = 180.0


class DispatcherLost(ResourceError):
    """The dispatcher does not answer and will not come back: the run cannot continue."""


@contextmanager
def dispatching(folder: Path) -> Iterator[ActorHandle]:
    """Run the actor on the head node with its log in `folder`; the log is deleted when the block ends well.

    The actor takes no CPU. When its process dies, Ray restarts it and repeats the calls that it had not answered.
    """
    log = atomic_write_text(folder / f"queue-{uuid.uuid4().hex[:8]}.jsonl", "")
    actor: Any = ray.remote(Dispatcher).options(
        num_cpus=0, resources={HEAD: 0.001}, max_concurrency=1, max_restarts=-1, max_task_retries=-1
    )
    dispatcher: ActorHandle = actor.remote(log)
    try:
        yield dispatcher
    finally:
        if ray.is_initialized():
            ray.kill(dispatcher)
    log.unlink(missing_ok=True)


class Dispatcher:
    """The actor's class: a queue that logs its calls, one at a time, so it needs no lock."""

    def __init__(self, log: Path) -> None:
        self.queue = LoggedQueue(log)

    def call(self, method: str, *arguments: Any) -> Any:
        """Call one method of the queue."""
        return self.queue.call(method, *arguments)


def ask(dispatcher: ActorHandle, method: str, *arguments: Any) -> ray.ObjectRef:
    """Call the queue without waiting; pass the reference to `answer`."""
    return dispatcher.call.remote(method, *arguments)


def answer(reference: ray.ObjectRef) -> Any:
    """Wait for an answer, also while the actor restarts.

    Raises:
        DispatcherLost: there was none within `PATIENCE_S`, or Ray gave up on the actor.
    """
    try:
        return ray.get(reference, timeout=PATIENCE_S)
    except (GetTimeoutError, RayActorError) as error:
        raise DispatcherLost(
            f"The actor that hands out the fine-tunings of this run does not answer ({type(error).__name__}).\n"
            "Is the head node overloaded? Resume the run with --resume."
        ) from error


def call(dispatcher: ActorHandle, method: str, *arguments: Any) -> Any:
    """Call the queue and wait for its answer, as `answer` does."""
    return answer(ask(dispatcher, method, *arguments))
