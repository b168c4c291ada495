"""Removes placement groups leaked by dead Train controllers: a group outlives the actor that made it.

Ray Train's own remedy is a detached actor per run that asks the dashboard whether the run is alive: it does nothing
without a dashboard or next to a second Ray instance, and is itself orphaned. The Global Control Store already knows
which creators are dead, so one thread in the driver serves all runs.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

import ray
from ray.train.torch import TorchTrainer

from tune.distributed.cluster import ray_internals
from tune.distributed.cluster.ray_internals import Group

#: How often dead runs are looked for.
REAP_EVERY_S = 1.0
#: A control store that has gone away takes a minute to say so.
CLOSE_S = 5.0


class Trainer(TorchTrainer):
    """A TorchTrainer without Train's own cleaner of placement groups; needs a running `Reaper`."""

    def __init__(self, *arguments: Any, named: bool = False, **settings: Any) -> None:
        """named: the actor that controls the run has the run's name, for `end_waiting_runs`; such a run is fit once."""
        super().__init__(*arguments, **settings)
        self._named = named

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        # Type checkers see the class of Train V1, which has no such method.
        inner = super()._initialize_and_run_controller  # type: ignore[misc]
        name = self.run_config.name if self._named else None
        return inner(**settings) if name is None else ray_internals.run_train_controller(name, settings)

    def _create_default_callbacks(self) -> list[Any]:
        # Type checkers see the class of Train V1, which has no such method.
        return ray_internals.without_cleaner(super()._create_default_callbacks())  # type: ignore[misc]


class Reaper:
    """A thread that removes orphaned placement groups; close it before Ray is shut down."""

    def __init__(self) -> None:
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="reaper", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Reap once more and end the thread; safe to call twice."""
        self._end.set()
        self._thread.join(timeout=CLOSE_S)

    def _loop(self) -> None:
        ended = False
        while not ended:
            ended = self._end.wait(REAP_EVERY_S)
            try:
                reap()
            except Exception:
                # The control store may be away for a moment; callers that depend on it report that themselves.
                logging.getLogger(__name__).debug("reaper", exc_info=True)


def reap() -> int:
    """Remove this job's orphaned placement groups; return how many there were."""
    found = orphaned_groups()
    for group in found:
        ray_internals.remove_group(group)
    return len(found)


def orphaned_groups() -> list[Group]:
    """Return this job's placement groups whose creator, an actor, is dead, unless they are meant to outlive it.

    Tune's groups have no creator: the driver makes them for its trials.
    """
    made = [group for group in groups() if group.creator is not None]
    return [group for group in made if group.creator_dead and not group.detached]


def end_runs() -> int:
    """Kill the controllers of this job's Train runs, and so their workers; return how many there were."""
    return _kill(actors(ray_internals.TRAIN_CONTROLLER))


def end_waiting_runs(names: Sequence[str], most: int) -> list[str]:
    """Kill up to `most` of the runs of these names that wait for their resources, in this order; return their names.

    Nothing else ends a run that waits. Runs are found by name: those of another pool may ask for the same resources.
    """
    waiting = {group.creator for group in groups() if not group.placed}
    found = {actor.name: actor for actor in actors(ray_internals.TRAIN_CONTROLLER) if actor.id in waiting}
    ending = [name for name in names if name in found][:most]
    _kill([found[name] for name in ending])
    return ending


def _kill(controllers: list[ray_internals.Actor]) -> int:
    for actor in controllers:
        ray_internals.kill_actor(actor)
    return len(controllers)


def without_resources(kind: type) -> bool:
    """Return whether actors of a class wait for resources and none of them has any."""
    found = actors(ray_internals.table_name(kind))
    return bool(found) and all(actor.pending for actor in found)


def groups() -> list[Group]:
    """Return this job's placement groups."""
    job = _job()
    return [group for group in ray_internals.placement_groups() if group.job == job]


def actors(class_name: str) -> list[ray_internals.Actor]:
    """Return this job's living actors of a class, by its name in Ray's actor table."""
    return [actor for actor in ray_internals.actors(_job()) if actor.class_name == class_name]


def _job() -> bytes:
    return bytes.fromhex(ray.get_runtime_context().get_job_id())
