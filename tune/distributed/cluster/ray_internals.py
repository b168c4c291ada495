"""Every use of Ray's private modules and tables in `tune/`, read from Ray 2.60.

A function here says what the public API lacks. The private tables come back as the small records below, so that a
change in Ray is repaired in this file; `test_private_ray_tables_still_answer` finds such a change out. Subclasses that
override protected methods (`placement_groups.Trainer`, `searcher`, `trial_actors`) stay where they are used.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray._private import ray_constants
from ray._private import state as ray_state
from ray._private import worker as ray_worker
from ray._raylet import RAY_NODE_ID_KEY, AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # compiled
from ray.actor import ActorHandle
from ray.core.generated.gcs_pb2 import (  # type: ignore[attr-defined]  # protobuf makes them at run time
    ActorTableData,
    JobTableData,
    PlacementGroupTableData,
)
from ray.util.placement_group import PlacementGroup, remove_placement_group

#: The resource of the head node, 1.0 of it in all; a small share pins a light actor there without taking a CPU.
#: Ray 2.60, `ray._common.constants`: no public constant has it, though documents name it.
HEAD: str = HEAD_NODE_RESOURCE_NAME
#: Actor classes of Ray Train (2.60, `ray.train.v2._internal`), by their names in the actor table.
TRAIN_CONTROLLER, TRAIN_CLEANER = "TrainController", "PlacementGroupCleaner"


@dataclass(frozen=True)
class Actor:
    """An actor that is not dead."""

    id: bytes
    job: bytes
    class_name: str
    name: str
    namespace: str
    pid: int
    #: Whether it still waits for its resources or its process.
    pending: bool


@dataclass(frozen=True)
class Group:
    """A placement group that has not been removed."""

    id: bytes
    job: bytes
    #: The actor that made it; None if a driver did.
    creator: bytes | None
    creator_dead: bool
    detached: bool
    #: Whether it has its resources.
    placed: bool
    bundles: tuple[dict[str, float], ...]


@dataclass(frozen=True)
class Job:
    """A driver that has joined the cluster."""

    id: bytes
    pid: int
    host: str


def actors(job: bytes | None = None) -> list[Actor]:
    """Return the living actors of a job, or of all jobs."""
    # Ray 2.60: `ray.util.state` asks the dashboard, which may be off or another Ray's; the GCS table is private.
    rows = map(ActorTableData.FromString, _accessor().get_actor_table(job and ray.JobID(job), None))
    return [
        Actor(
            id=row.actor_id,
            job=row.job_id,
            class_name=row.class_name,
            name=row.name,
            namespace=row.ray_namespace,
            pid=row.pid,
            pending=row.state == ActorTableData.PENDING_CREATION,
        )
        for row in rows
        if row.state != ActorTableData.DEAD
    ]


def placement_groups() -> list[Group]:
    """Return the placement groups of all jobs."""
    # Ray 2.60: `ray.util.placement_group_table` has neither the job nor the actor that made a group.
    rows = map(PlacementGroupTableData.FromString, _accessor().get_placement_group_table())
    return [
        Group(
            id=row.placement_group_id,
            job=row.creator_job_id,
            creator=_creator(row.creator_actor_id),
            creator_dead=row.creator_actor_dead,
            detached=row.is_detached,
            placed=row.state == PlacementGroupTableData.CREATED,
            bundles=tuple(dict(bundle.unit_resources) for bundle in row.bundles),
        )
        for row in rows
        if row.state != PlacementGroupTableData.REMOVED
    ]


def dead_jobs() -> dict[bytes, Job]:
    """Return the drivers that have left or died, by their job ids."""
    # Ray 2.60: `ray.util.state.list_jobs` asks the dashboard.
    table = _accessor().get_job_table(skip_submission_job_info_field=True, skip_is_running_tasks_field=True)
    rows = [row for row in map(JobTableData.FromString, table) if row.is_dead]
    return {row.job_id: Job(row.job_id, row.driver_pid, row.driver_address.ip_address) for row in rows}


def remove_group(group: Group) -> None:
    """Remove a placement group of any job."""
    # Ray 2.60: a `PlacementGroup` is found by its name alone; those of Ray Train have none.
    remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.id)))


def kill_actor(actor: Actor) -> None:
    """Kill an actor without a restart."""
    # Ray 2.60: `ray.kill` takes a handle, and `ray.get_actor` finds actors by name alone.
    worker: Any = ray_worker.global_worker
    worker.core_worker.kill_actor(ray.ActorID(actor.id), True)


def draining_nodes() -> list[str]:
    """Return the ids of nodes that will be taken away, after a spot notice or `ray drain-node`."""
    # Ray 2.60: no public API has them, but for `ray.train.get_preemption_info` inside a worker.
    return sorted(ray_state.state.get_draining_nodes())


def free_resources() -> dict[str, dict[str, float]]:
    """Return what is free on each node, by node id."""
    # Ray 2.60: `ray.available_resources` has the sum over all nodes alone.
    return ray_state.available_resources_per_node()


def session_dir() -> str:
    """Return the session folder of the Ray that this process has started."""
    # Ray 2.60: the context that `ray.init` returns has the address alone.
    node: Any = ray_worker._global_node
    return node.get_session_dir_path()


def read_environment() -> None:
    """Let this process see RAY_AUTH_MODE and RAY_AUTH_TOKEN as they are now."""
    # Ray 2.60: both are read when Ray is imported; `ray._private.authentication` does the same for its own variable.
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def on_loopback() -> Iterator[None]:
    """Let a Ray that is started inside listen at 127.0.0.1 alone: all its ports, in all its processes."""
    # Ray 2.60: `_node_ip_address` turns loopback into the address of the network. What keeps a Mac's Ray from the
    # network is this constant; Ray's processes read it from the environment.
    before = ray_constants.ENABLE_RAY_CLUSTER, os.environ.get(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR)
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before[0]
        del os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR]
        if before[1] is not None:
            os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = before[1]


def ready(actor: ActorHandle) -> ray.ObjectRef:
    """Return a reference that resolves once the actor has its resources and its process, and fails if it died."""
    # Ray 2.60: a method of every actor, public by convention alone.
    return actor.__ray_ready__.remote()


def alive(actor: ActorHandle) -> bool:
    """Return whether an actor that had started still runs."""
    # Ray 2.60: the actor itself answers only after what it has to do, and `ray.util.state` asks the dashboard.
    row = _accessor().get_actor_info(actor._actor_id)
    return row is not None and ActorTableData.FromString(row).state == ActorTableData.ALIVE


def without_cleaner(callbacks: Iterable[Any]) -> list[Any]:
    """Return a Train run's callbacks without the one that starts the `PlacementGroupCleaner`."""
    # Ray 2.60: no setting turns it off. Imported here, as it loads Ray Train, which node checks do without.
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    return [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]


def run_train_controller(name: str, settings: dict[str, Any]) -> Any:
    """Run the controller of a Train run in an actor of this name; return the run's result."""
    # Ray 2.60: `DataParallelTrainer._initialize_and_run_controller` does the same with an actor without a name, and
    # nothing in the tables of actors and placement groups tells one run from another.
    from ray.train.v2._internal import constants
    from ray.train.v2._internal.execution.controller import TrainController

    variables = constants.get_env_vars_to_propagate()
    variables.setdefault(
        constants.RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR,
        constants.DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE,
    )
    remote: Any = ray.remote  # type checkers see no `name`
    actor = remote(
        name=name,
        num_cpus=0,
        label_selector={RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()},
        runtime_env={"env_vars": variables},
    )(TrainController)
    controller = actor.remote(**settings)
    ray.get(controller.run.remote())
    return ray.get(controller.get_result.remote())


def table_name(kind: type) -> str:
    """Return the name under which the actor table has actors of a class."""
    # Ray 2.60: `PythonFunctionDescriptor.from_class` takes the qualified name, with the function around a class.
    return kind.__qualname__


def _creator(actor_id: bytes) -> bytes | None:
    return None if not actor_id or ray.ActorID(actor_id).is_nil() else actor_id


def _accessor() -> Any:
    return ray_state.state._connect_and_get_accessor()
