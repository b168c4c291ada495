"""A fault-tolerant actor pool: identical actors, one task each; dead ones are replaced.

The owner hands tasks to idle actors and asks for finished ones. A task whose actor died is reported as such: whether it
is retried is up to the owner.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from macdrop.errors import MacDropError
from tune.distributed.cluster import ray_internals
from tune.distributed.cluster.ray_internals import HEAD
from tune.scheduling.tasks import MAX_ATTEMPTS

#: The label that Ray gives every node.
NODE_ID = "ray.io/node-id"
#: Numbers of actors.
_COUNT = itertools.count(1)


class PoolActor:
    """Base class of the actors in a pool."""

    def prepare(self, argument: Any) -> Any:
        """Load what the actor keeps resident."""
        raise NotImplementedError

    def open(self, argument: Any) -> tuple[Any, str]:
        """Initialise the actor; return the result of `prepare` and the id of its node."""
        return self.prepare(argument), ray.get_runtime_context().get_node_id()


@dataclass
class Done:
    """A finished task: the actor's answer, the error it raised, or the reason for its death.

    `excused`: the node was about to leave, so the task is not to blame.
    """

    actor: ActorHandle
    work: Any
    value: Any = None
    error: MacDropError | None = None
    died: str | None = None
    excused: bool = False


class ActorPool:
    """`size` actors of one class. Actors in `idle` are initialised, or will be before they begin their next task."""

    def __init__(self, kind: type[PoolActor], size: int, *, cpus: float, gpus: float) -> None:
        actor: Any = ray.remote(kind).options(
            max_restarts=0, num_cpus=cpus, num_gpus=gpus, label_selector=_off_bare_heads()
        )
        self._make: Callable[[], ActorHandle] = actor.remote
        self.idle: list[ActorHandle] = [self._make() for _ in range(size)]
        self._busy: dict[ray.ObjectRef, tuple[ActorHandle, Any]] = {}
        self._coming: dict[ray.ObjectRef, ActorHandle] = {}
        self._nodes: dict[ActorHandle, str] = {}
        self._names: dict[ActorHandle, str] = {}
        self._leaving: set[str] = set()
        self._argument: Any = None
        self._opening: list[ActorHandle] = []
        self._closed = False
        self._lost = 0
        self._holds, self._released = bool(cpus or gpus), 0

    def open(self, argument: Any, then: Callable[[Any], Any] = lambda argument: argument) -> Any:
        """Initialise one actor with `argument`, and all others, later ones too, with `then(argument)`.

        Returns the answer of the first actor that has its resources; the others join when they get theirs. An actor
        that dies is replaced.

        Raises:
            MacDropError: the first actor raised it, or `MAX_ATTEMPTS` of them died. The pool can be opened again.
        """
        assert not self._busy, "a pool is opened when it has no tasks"
        actors = [*self.idle, *self._coming.values(), *(self._make() for _ in range(self._released))]
        first = self._quickest(actors)
        self.idle, self._coming, self._released = [], {}, 0
        self._argument, self._lost = then(argument), 0
        others = [actor for actor in actors if actor is not first]
        try:
            answer = self._opened(first, argument)
        except MacDropError:
            self.idle += others
            raise
        self._coming = {actor.open.remote(self._argument): actor for actor in others}
        return answer

    def _quickest(self, actors: list[ActorHandle]) -> ActorHandle:
        """Return the first actor that has its resources and is alive."""
        waiting = {ray_internals.ready(actor): actor for actor in actors}
        while len(waiting) > 1:
            (ref,), _ = ray.wait(list(waiting), num_returns=1)
            actor = waiting.pop(ref)
            with suppress(RayError):  # raised for a dead actor
                ray.get(ref)
                return actor
        return next(iter(waiting.values()))

    def _opened(self, actor: ActorHandle, argument: Any) -> Any:
        while True:
            self._opening = [actor]
            try:
                opened: Any = ray.get(actor.open.remote(argument))
                self._nodes[actor] = opened[1]
                return opened[0]
            except RayTaskError as error:
                raise cause_of(error) from None
            except RayError as error:
                self._forget(actor)
                if self._closed:
                    raise self._given_up(error) from None
                actor = self._make()
                if not self._survived():
                    raise self._given_up(error) from None
            finally:
                self._opening, self.idle = [], [actor]

    def give(self, actor: ActorHandle, call: str, work: Any) -> None:
        """Start a task on an idle actor, by its method `call` with the argument `work`."""
        self.idle.remove(actor)
        self._busy[getattr(actor, call).remote(work)] = (actor, work)

    @property
    def work(self) -> list[Any]:
        """The tasks in flight."""
        return [work for _, work in self._busy.values()]

    def at(self) -> dict[str, Any]:
        """Return the tasks of initialised actors, None of idle ones, by names that no two pools share.

        Nor do two sessions of a run, whose times are recorded in one file.
        """
        work, up = dict(self._busy.values()), list(self._nodes)
        new = (actor for actor in up if actor not in self._names)
        self._names |= {actor: f"actor-{next(_COUNT)}-{int(time.time())}" for actor in new}
        return {self._names[actor]: work.get(actor) for actor in up}

    def ready(self, timeout: float | None = 0) -> list[Done]:
        """Collect finished tasks; wait up to `timeout` seconds for the first one (None: without limit).

        Raises:
            MacDropError: replacements of dead actors die or fail while they are initialised, and no actor is left.
        """
        refs = [*self._busy, *self._coming]
        if not refs:
            return []
        ray.wait(refs, num_returns=1, timeout=timeout)
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        done = []
        for ref in ready:
            if ref in self._busy:
                done.append(self._collect(ref))
            else:
                self._welcome(ref)
        return done

    def _collect(self, ref: ray.ObjectRef) -> Done:
        actor, work = self._busy.pop(ref)
        try:
            done = Done(actor, work, ray.get(ref))
        except RayTaskError as error:
            done = Done(actor, work, error=cause_of(error))
        except RayError as error:
            excused = self._nodes.get(actor) in self._leaving
            self._replace(actor)
            return Done(actor, work, died=str(error).splitlines()[0], excused=excused)
        self._lost = 0
        if self._nodes.get(actor) in self._leaving:
            self._replace(actor)
        else:
            self.idle.append(actor)
        return done

    def _welcome(self, ref: ray.ObjectRef) -> None:
        """Add an initialised replacement to the idle actors, or replace it if it died."""
        actor = self._coming.pop(ref)
        try:
            _, self._nodes[actor] = ray.get(ref)
            self.idle.append(actor)
        except RayError as error:
            self._forget(actor)
            if self._survived():
                self._replace(actor)
            elif not (self.idle or self._busy or self._coming):
                raise self._given_up(error) from None

    def drain(self, nodes: Collection[str]) -> None:
        """Replace actors on these nodes elsewhere; busy ones finish their task first."""
        self._leaving |= set(nodes)
        for actor in [actor for actor in self.idle if self._nodes.get(actor) in self._leaving]:
            self.idle.remove(actor)
            self._replace(actor)

    def release(self) -> int:
        """Release idle and pending actors that hold resources; return how many. `restart` brings them back."""
        if not self._holds:
            return 0
        released = [*self.idle, *self._coming.values()]
        for actor in released:
            self._forget(actor)
        self.idle, self._coming = [], {}
        self._released += len(released)
        return len(released)

    def restart(self) -> None:
        """Restart released actors; they become idle once re-initialised."""
        for _ in range(self._released):
            self._start()
        self._released = 0

    def close(self) -> None:
        """End all actors; safe to call twice, and while another thread opens the pool, which then fails."""
        self._closed = True
        busy = [actor for actor, _ in self._busy.values()]
        for actor in [*self._opening, *self.idle, *self._coming.values(), *busy]:
            with suppress(RayError):
                ray.kill(actor)
        self.idle, self._busy, self._coming, self._released = [], {}, {}, 0

    def _replace(self, actor: ActorHandle) -> None:
        self._forget(actor)
        self._start()

    def _start(self) -> None:
        actor = self._make()
        self._coming[actor.open.remote(self._argument)] = actor

    def _forget(self, actor: ActorHandle) -> None:
        self._nodes.pop(actor, None)
        with suppress(RayError):
            ray.kill(actor)  # an unreachable actor may still be alive

    def _survived(self) -> bool:
        """Count an actor that was lost before it was initialised; return whether another one may be made."""
        self._lost += 1
        return self._lost < MAX_ATTEMPTS

    def _given_up(self, error: RayError) -> MacDropError:
        if isinstance(error, RayTaskError):
            return cause_of(error)
        return MacDropError(
            f"{self._lost} actors died while they were initialised: {str(error).splitlines()[0]}\n"
            "The usual cause is too little memory: lower ray.evaluators or batch sizes, or use larger machines."
        )


def cause_of(error: RayTaskError) -> MacDropError:
    """Return our own error as it was raised in the actor; any other with the name of its type."""
    cause = error.cause
    return cause if isinstance(cause, MacDropError) else MacDropError(f"{type(cause).__name__}: {cause}")


def _off_bare_heads() -> dict[str, str]:
    """Return Ray's label selector for all nodes but a head without CPUs, which is kept free of work.

    An actor that asks for no CPU would land there, and a sliver of a CPU would cost a lane elsewhere a whole one.
    """
    for node in ray.nodes():
        if node["Alive"] and HEAD in node["Resources"] and not node["Resources"].get("CPU"):
            return {NODE_ID: f"!{node['NodeID']}"}
    return {}
