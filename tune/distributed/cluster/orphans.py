"""Resources orphaned by dead runs: placement groups, detached actors, local Ray sessions.

A run that dies takes its actors with it, but not the placement groups of its Train controllers, nor the detached
actors of Ray Train. On a cluster they hold CPUs and GPUs until they are removed. Resources of a live job are never
touched, nor are the detached actors and groups of others, which are meant to outlive their creators.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray

from tune.distributed.cluster import ray_internals
from tune.storage.atomic import atomic_write_json
from tune.storage.cache import cache_dir
from tune.storage.run_lock import process

#: Actors that Ray Train detaches from the run that they serve.
TRAIN_ACTORS = (ray_internals.TRAIN_CLEANER, ray_internals.TRAIN_CONTROLLER)


@dataclass(frozen=True)
class Orphan:
    """An orphaned resource: a description and a way to remove it."""

    what: str
    clear: Callable[[], Any]


def on_cluster() -> list[Orphan]:
    """Return what dead jobs left on the cluster that this process has joined."""
    dead = ray_internals.dead_jobs()
    found = []
    for group in ray_internals.placement_groups():
        if group.job in dead and not group.detached:
            holds = ", ".join(_amounts(bundle) for bundle in group.bundles)
            what = f"a placement group that holds {holds}{_of(dead[group.job])}"
            found.append(Orphan(what, partial(ray_internals.remove_group, group)))
    for actor in ray_internals.actors():
        if actor.job in dead and actor.class_name in TRAIN_ACTORS:
            what = f"an actor {actor.class_name}{_of(dead[actor.job])}"
            found.append(Orphan(what, partial(_kill, actor.name, actor.namespace)))
    return found


def _amounts(resources: dict[str, float]) -> str:
    return " ".join(f"{amount:g} {name}" for name, amount in sorted(resources.items())) or "nothing"


def _of(job: ray_internals.Job) -> str:
    return f", of job {job.id.hex()} (driver {job.pid} on {job.host}), which is dead"


def _kill(name: str, namespace: str) -> None:
    try:
        ray.kill(ray.get_actor(name, namespace=namespace))
    except ValueError:
        pass  # gone meanwhile


# --- Ray sessions of this machine ---


def remember_session(session: str | os.PathLike) -> None:
    """Record that this process has started a local Ray, so that its orphans can be found."""
    folder = cache_dir() / "sessions"
    atomic_write_json(folder / f"{os.getpid()}.json", {"session": str(session), "process": process(os.getpid())})


def on_machine() -> list[Orphan]:
    """Return local Ray sessions that outlived their sweep; records of sessions that have ended are deleted."""
    found = []
    for note in sorted((cache_dir() / "sessions").glob("*.json")):
        try:
            kept = json.loads(note.read_text(encoding="utf-8"))
            pid, session, begun = int(note.stem), kept["session"], kept["process"]
        except (OSError, ValueError, KeyError, TypeError):
            note.unlink(missing_ok=True)
            continue
        if begun["where"] != process(pid)["where"] or begun == process(pid):
            continue  # on another machine with the same cache, or its sweep is alive
        left = _processes(session)
        if not left:
            note.unlink(missing_ok=True)
            continue
        what = f"{len(left)} process(es) of the Ray session {session}, whose sweep (process {pid}) is dead"
        found.append(Orphan(what, partial(_end, session)))
    return found


def _processes(session: str) -> list[int]:
    """Return the processes that have a Ray session's folder in their command line."""
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


# --- reporting and removal ---


def look(*, local: bool, clear: bool, ask: Callable[[str], bool] | None = None, tell: Callable[[str], None]) -> int:
    """Report the orphans of this machine (`local`) or of the cluster just joined, and offer to remove them.

    ask: puts a yes-or-no question to the user; None where nobody can answer. Returns how many were removed.
    """
    if local:
        remember_session(ray_internals.session_dir())
    try:
        found = on_machine() if local else on_cluster()
    except (AttributeError, TypeError, ray.exceptions.RayError):
        return 0  # Ray's private tables have changed: that must not keep a run from starting
    return offer(found, clear=clear, ask=ask, tell=tell)


def offer(found: list[Orphan], *, clear: bool, ask: Callable[[str], bool] | None, tell: Callable[[str], None]) -> int:
    """Report orphans, and remove them if `clear` is set or the user agrees; return how many were removed.

    ask: puts a yes-or-no question to the user; None where nobody can answer.
    """
    for each in found:
        tell(f"orphaned: {each.what}")
    if not found or not (clear or (ask is not None and ask(f"Remove {len(found)} orphaned resource(s) of dead runs?"))):
        if found:
            tell("kept; --clear-orphans removes them")
        return 0
    for each in found:
        each.clear()
    tell(f"{len(found)} orphaned resource(s) of dead runs removed")
    return len(found)
