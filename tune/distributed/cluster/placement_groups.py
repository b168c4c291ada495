"""Gives back what dead Train runs hold: placement groups outlive the actor that made them.

Ray Train's own remedy is a detached actor per run that asks the dashboard whether the run still lives: it does nothing
without a dashboard or beside a second Ray, and is itself left behind. The Global Control Store already knows which
maker is dead, so one thread in the driver does for all runs. Fields and accessors here are Ray's private ones; a test
says so when they change.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import ray
from ray.core.generated.gcs_pb2 import ActorTableData, PlacementGroupTableData
from ray.train.torch import TorchTrainer
from ray.util.placement_group import PlacementGroup, remove_placement_group

#: A dead run's resources are free this soon, and a moment.
REAP_EVERY_S = 1.0
#: A control store that is gone answers only after a minute that it is.
CLOSE_S = 5.0


class Trainer(TorchTrainer):
    """A TorchTrainer without Train's cleaner of placement groups; a `Reaper` must be at work beside it."""

    def _create_default_callbacks(self) -> list[Any]:
        from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]


class Reaper:
    """A thread that removes orphaned placement groups; close it before Ray is shut down."""

    def __init__(self) -> None:
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="reaper", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, after a last look; safe to call twice."""
        self._end.set()
        self._thread.join(timeout=CLOSE_S)

    def _loop(self) -> None:
        ended = False
        while not ended:
            ended = self._end.wait(REAP_EVERY_S)
            try:
                reap()
            except Exception:
                # The control store may be away for a moment; who needs it for more than this says so.
                logging.getLogger(__name__).debug("reaper", exc_info=True)


def reap() -> int:
    """Remove the placement groups of this job whose maker is dead; returns how many there were."""
    found = orphans()
    for group in found:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
    return len(found)


def orphans() -> list[Any]:
    """Placement groups of this job that a dead actor has made and that are not meant to outlive it.

    Those that the driver made, as Tune does for its trials, have no actor, which the table counts as a dead one.
    """
    made = [group for group in _groups() if not ray.ActorID(group.creator_actor_id).is_nil()]
    return [group for group in made if group.creator_actor_dead and not group.is_detached]


def end_runs(*, waiting: bool = False) -> int:
    """Kill the controllers of this job's Train runs, with which their workers die; returns how many there were.

    A run that waits for resources listens to nothing else. waiting: only those.
    """
    settled = {group.creator_actor_id for group in _groups() if group.state == group.CREATED} if waiting else set()
    controllers = [row for row in _actors("TrainController") if row.actor_id not in settled]
    for row in controllers:
        ray._private.worker.global_worker.core_worker.kill_actor(ray.ActorID(row.actor_id), True)
    return len(controllers)


def without_resources(kind: str) -> bool:
    """Whether actors of a class wait for resources and none of them has any."""
    states = {row.state for row in _actors(kind)}
    return bool(states) and all(state == ActorTableData.PENDING_CREATION for state in states)


def draining() -> list[str]:
    """Nodes that are about to be taken away, as a spot notice or `ray drain-node` tells."""
    return sorted(ray._private.state.state.get_draining_nodes())


def _accessor() -> Any:
    return ray._private.state.state._connect_and_get_accessor()


def _groups() -> list[Any]:
    """This job's placement groups that have not been removed."""
    job = bytes.fromhex(ray.get_runtime_context().get_job_id())
    groups = [PlacementGroupTableData.FromString(row) for row in _accessor().get_placement_group_table()]
    return [group for group in groups if group.creator_job_id == job and group.state != group.REMOVED]


def _actors(kind: str) -> list[Any]:
    """This job's actors, but the dead, of a class whose name ends so: the table has it with the function around it."""
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    rows = [ActorTableData.FromString(row) for row in _accessor().get_actor_table(job, None)]
    return [row for row in rows if row.class_name.endswith(kind) and row.state != ActorTableData.DEAD]
