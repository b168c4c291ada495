"""What dead runs left behind: placement groups and actors on a joined cluster, Ray sessions of dead sweeps here.

A run that dies takes its actors with it, but not the placement groups that its Train controllers made, nor detached
actors of Ray Train. On a cluster they hold CPUs and GPUs until somebody clears them. What belongs to a job that lives
is never touched, nor are detached actors and groups of others, which are meant to outlive their makers.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.core.generated.gcs_pb2 import ActorTableData, JobTableData, PlacementGroupTableData
from ray.util.placement_group import PlacementGroup, remove_placement_group

from tune.storage.atomic import atomic_write_json
from tune.storage.cache import cache_dir
from tune.storage.run_lock import process

#: Detached actors that Ray Train starts for a run, by the names of their classes.
TRAIN_ACTORS = ("PlacementGroupCleaner", "TrainController")


@dataclass(frozen=True)
class Orphan:
    """Something that nobody owns any more, in words, and how to be rid of it."""

    told: str
    clear: Callable[[], Any]


def on_cluster() -> list[Orphan]:
    """What dead jobs left on the cluster that this process has joined."""
    state = ray._private.state.state._connect_and_get_accessor()
    jobs = [JobTableData.FromString(row) for row in state.get_job_table(skip_submission_job_info_field=True,
                                                                         skip_is_running_tasks_field=True)]  # fmt: skip
    dead = {job.job_id: job for job in jobs if job.is_dead}
    found = []
    for group in map(PlacementGroupTableData.FromString, state.get_placement_group_table()):
        if group.creator_job_id in dead and not group.is_detached and group.state != group.REMOVED:
            holds = ", ".join(_amounts(bundle.unit_resources) for bundle in group.bundles)
            handle = PlacementGroup(ray.PlacementGroupID(group.placement_group_id))
            told = f"a placement group that holds {holds}{_of(dead[group.creator_job_id])}"
            found.append(Orphan(told, lambda handle=handle: remove_placement_group(handle)))
    for row in state.get_actor_table(None, None):
        actor = ActorTableData.FromString(row)
        if actor.job_id in dead and actor.class_name in TRAIN_ACTORS and actor.state != ActorTableData.DEAD:
            told = f"an actor {actor.class_name}{_of(dead[actor.job_id])}"
            found.append(Orphan(told, lambda row=actor: _kill(row.name, row.ray_namespace)))
    return found


def _amounts(resources: Any) -> str:
    return " ".join(f"{amount:g} {name}" for name, amount in sorted(dict(resources).items())) or "nothing"


def _of(job: Any) -> str:
    return f", of job {job.job_id.hex()} (driver {job.driver_pid} on {job.driver_address.ip_address}), which is dead"


def _kill(name: str, namespace: str) -> None:
    try:
        ray.kill(ray.get_actor(name, namespace=namespace))
    except ValueError:
        pass  # gone meanwhile


# --- Ray sessions of this machine ---


def remember_session(session: str | os.PathLike) -> None:
    """Keep that this process has started a local Ray, so that what is left of it can be found."""
    folder = cache_dir() / "sessions"
    atomic_write_json(folder / f"{os.getpid()}.json", {"session": str(session), "process": process(os.getpid())})


def on_machine() -> list[Orphan]:
    """Local Rays whose sweep is dead and whose processes are not; notes of those that are gone are removed."""
    found = []
    for note in sorted((cache_dir() / "sessions").glob("*.json")):
        try:
            kept = json.loads(note.read_text(encoding="utf-8"))
            pid, session, begun = int(note.stem), kept["session"], kept["process"]
        except (OSError, ValueError, KeyError, TypeError):
            note.unlink(missing_ok=True)
            continue
        if begun["where"] != process(pid)["where"] or begun == process(pid):
            continue  # of another machine with the same cache, or of a sweep that lives
        left = _processes(session)
        if not left:
            note.unlink(missing_ok=True)
            continue
        told = f"{len(left)} process(es) of the Ray session {session}, whose sweep (process {pid}) is dead"
        found.append(Orphan(told, lambda session=session: _end(session)))
    return found


def _processes(session: str) -> list[int]:
    """Processes that have a Ray session's folder in their command line."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes()
        except OSError:
            continue
        if session.encode() in words:
            found.append(int(place.name))
    return found


def _end(session: str) -> None:
    for pid in _processes(session):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


# --- what is done about them ---


def look(
    *, local: bool, clear: bool, ask: Callable[[str], bool] | None = None, tell: Callable[[str], None]
) -> int:
    """Tell of what is left behind where this process has just started (`local`) or joined Ray, and offer to clear it.

    ask: puts a yes-or-no question to the user; None where there is nobody to ask. Returns how many were cleared.
    """
    if local:
        remember_session(ray._private.worker._global_node.get_session_dir_path())
    try:
        found = on_machine() if local else on_cluster()
    except (AttributeError, TypeError, ray.exceptions.RayError):
        return 0  # Ray's private tables have changed: no reason not to run
    return offer(found, clear=clear, ask=ask, tell=tell)


def offer(found: list[Orphan], *, clear: bool, ask: Callable[[str], bool] | None, tell: Callable[[str], None]) -> int:
    """Tell of leftovers and clear them if `clear` says so, or the user when asked; returns how many were cleared.

    ask: puts a yes-or-no question to the user; None where there is nobody to ask.
    """
    for each in found:
        tell(f"left behind: {each.told}")
    if not found or not (clear or (ask is not None and ask(f"Clear {len(found)} leftover(s) of dead runs?"))):
        if found:
            tell("they stay; --clear-orphans removes them")
        return 0
    for each in found:
        each.clear()
    tell(f"{len(found)} leftover(s) of dead runs cleared")
    return len(found)
