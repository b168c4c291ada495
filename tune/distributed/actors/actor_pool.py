"""Actors of one kind that all hold the same thing, and take work one piece at a time; the dead are replaced.

The owner hands work to whoever is idle and asks for what is done. A piece whose actor died comes back as such: whether
it is tried again is the owner's to say.
"""

from __future__ import annotations

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
from tune.scheduling.queue import MAX_ATTEMPTS

#: The label that Ray gives every node.
NODE_ID = "ray.io/node-id"


class PoolActor:
    """What a crew's actors are. `prepare` is for the kind to say."""

    def prepare(self, argument: Any) -> Any:
        raise NotImplementedError

    def open(self, argument: Any) -> tuple[Any, str]:
        """Make ready; returns what `prepare` does, and the node's id."""
        return self.prepare(argument), ray.get_runtime_context().get_node_id()


@dataclass
class Done:
    """A finished piece of work: what the actor answered, the error it raised, or why it died.

    `excused`: its node was about to leave, so the work is not to blame.
    """

    actor: ActorHandle
    work: Any
    value: Any = None
    error: MacDropError | None = None
    died: str | None = None
    excused: bool = False


class ActorPool:
    """`size` actors of a kind. Those in `idle` are ready, or will be before they begin what they are given."""

    def __init__(self, kind: type[PoolActor], size: int, *, cpus: float, gpus: float) -> None:
        options = {"max_restarts": 0, "num_cpus": cpus, "num_gpus": gpus, "label_selector": _off_bare_heads()}
        self._make = ray.remote(**options)(kind).remote
        self.idle: list[ActorHandle] = [self._make() for _ in range(size)]
        self._busy: dict[ray.ObjectRef, tuple[ActorHandle, Any]] = {}
        self._coming: dict[ray.ObjectRef, ActorHandle] = {}
        self._nodes: dict[ActorHandle, str] = {}
        self._leaving: set[str] = set()
        self._argument: Any = None
        self._lost = 0
        self._holds, self._resting = bool(cpus or gpus), 0

    def open(self, argument: Any, then: Callable[[Any], Any] = lambda argument: argument) -> Any:
        """Make an actor ready with `argument`, and have the others, and later ones, made so with `then` of it.

        Returns what the first one answered, which is the first that has its resources: the others, which may have to
        wait for theirs, come when they come. An actor that dies is replaced.

        Raises:
            MacDropError: the first actor raised it, or `MAX_ATTEMPTS` of them died. The crew can be opened again.
        """
        assert not self._busy, "a crew is opened when it has no work"
        actors = [*self.idle, *self._coming.values(), *(self._make() for _ in range(self._resting))]
        first = self._quickest(actors)
        self.idle, self._coming, self._resting = [], {}, 0
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
        """The first that has its resources and lives."""
        waiting = {ray_internals.ready(actor): actor for actor in actors}
        while len(waiting) > 1:
            (ref,), _ = ray.wait(list(waiting), num_returns=1)
            actor = waiting.pop(ref)
            with suppress(RayError):  # a dead one
                ray.get(ref)
                return actor
        return next(iter(waiting.values()))

    def _opened(self, actor: ActorHandle, argument: Any) -> Any:
        while True:
            try:
                answer, self._nodes[actor] = ray.get(actor.open.remote(argument))
                return answer
            except RayTaskError as error:
                raise cause_of(error) from None
            except RayError as error:
                self._forget(actor)
                actor = self._make()
                if not self._survived(error):
                    raise self._given_up(error) from None
            finally:
                self.idle = [actor]

    def give(self, actor: ActorHandle, call: str, work: Any) -> None:
        """Have an idle actor begin with a piece of work, the argument of its method `call`."""
        self.idle.remove(actor)
        self._busy[getattr(actor, call).remote(work)] = (actor, work)

    @property
    def work(self) -> list[Any]:
        """What is being done."""
        return [work for _, work in self._busy.values()]

    def ready(self, timeout: float | None = 0) -> list[Done]:
        """What is done by now; waits for a first piece up to `timeout` seconds (None: as long as it takes).

        Raises:
            MacDropError: actors that are to replace dead ones die or fail as they are made ready, and none is left.
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
        """A replacement is ready, or is replaced itself."""
        actor = self._coming.pop(ref)
        try:
            _, self._nodes[actor] = ray.get(ref)
            self.idle.append(actor)
        except RayError as error:
            self._forget(actor)
            if self._survived(error):
                self._replace(actor)
            elif not (self.idle or self._busy or self._coming):
                raise self._given_up(error) from None

    def drain(self, nodes: Collection[str]) -> None:
        """Actors on these nodes get no more work and are replaced elsewhere, those at work once they are done."""
        self._leaving |= set(nodes)
        for actor in [actor for actor in self.idle if self._nodes.get(actor) in self._leaving]:
            self.idle.remove(actor)
            self._replace(actor)

    def rest(self) -> int:
        """End actors without work that hold something, or wait for it, so that others can have it: how many there were.
        `wake` makes new ones."""
        if not self._holds:
            return 0
        resting = [*self.idle, *self._coming.values()]
        for actor in resting:
            self._forget(actor)
        self.idle, self._coming = [], {}
        self._resting += len(resting)
        return len(resting)

    def wake(self) -> None:
        """Have those back that rest; they are ready when they have been made so anew."""
        for _ in range(self._resting):
            self._start()
        self._resting = 0

    def close(self) -> None:
        """End all actors; safe to call twice."""
        for actor in [*self.idle, *self._coming.values(), *(actor for actor, _ in self._busy.values())]:
            with suppress(RayError):
                ray.kill(actor)
        self.idle, self._busy, self._coming, self._resting = [], {}, {}, 0

    def _replace(self, actor: ActorHandle) -> None:
        self._forget(actor)
        self._start()

    def _start(self) -> None:
        actor = self._make()
        self._coming[actor.open.remote(self._argument)] = actor

    def _forget(self, actor: ActorHandle) -> None:
        self._nodes.pop(actor, None)
        with suppress(RayError):
            ray.kill(actor)  # one that cannot be reached may live

    def _survived(self, error: RayError) -> bool:
        """Count an actor that was lost before it was ready; whether another one may be made."""
        self._lost += 1
        return self._lost < MAX_ATTEMPTS

    def _given_up(self, error: RayError) -> MacDropError:
        if isinstance(error, RayTaskError):
            return cause_of(error)
        return MacDropError(
            f"{self._lost} actors died while they were made ready: {str(error).splitlines()[0]}\n"
            "Too little memory is the usual reason: lower ray.evaluators or batch sizes, or use larger machines."
        )


def cause_of(error: RayTaskError) -> MacDropError:
    """Our own error as it was raised in the actor; any other with its type's name."""
    cause = error.cause
    return cause if isinstance(cause, MacDropError) else MacDropError(f"{type(cause).__name__}: {cause}")


def _off_bare_heads() -> dict[str, str]:
    """Ray's label selector for every node but a head without CPUs, which is kept free of work: an actor that asks for
    none would land there, and a sliver of a CPU would take the room of a whole one from a lane elsewhere."""
    for node in ray.nodes():
        if node["Alive"] and HEAD in node["Resources"] and not node["Resources"].get("CPU"):
            return {NODE_ID: f"!{node['NodeID']}"}
    return {}
