"""Resources orphaned by dead runs: placement groups, detached actors, local Ray sessions.

A run that dies takes its actors with it, but not the placement groups of its Train controllers, nor the detached
actors of Ray Train. On a cluster they hold CPUs and GPUs until they are removed. Resources of a live job are never
touched, nor are the detached actors and groups of others, which are meant to outlive their creators.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray

from tune.distributed.cluster import ray_internals
from tune.storage.atomic import atomic_write_json
from tune.storage.places import ray_root
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

#: The note of the process that started a session, in the session's folder.
DRIVER = "macdrop.json"
#: A session's folder ends with the process id of its driver (Ray 2.60); and where arguments of Ray's processes name it.
SESSION = re.compile(r"session_[\d_-]+_(?P<pid>\d+)")
NAMED = re.compile(rf"(?:^|=)(/[^=]*?/{SESSION.pattern})(?:/|$)")
#: Programs of Ray, by their paths in its package.
PROGRAMS = re.compile(r"/ray/(core/src/ray/(raylet/raylet|gcs/gcs_server)|(_private|dashboard|autoscaler)/.+\.py)$")
#: Sessions whose logs are kept after their end, for a look at what went wrong; and days without a change after which
#: one has ended, though its driver ran on a machine that cannot be asked.
KEPT_SESSIONS, KEPT_DAYS = 3, 30


def remember_driver(session: str | os.PathLike) -> None:
    """Note in a session's folder that this process has started it, so that its orphans can be found."""
    atomic_write_json(Path(session) / DRIVER, process(os.getpid()))


def remove_old_sessions(root: Path) -> None:
    """Delete the folders of sessions that have ended, but for the newest `KEPT_SESSIONS`."""
    alive = {session for _, session in _ray_processes()}
    folders = [
        folder for folder in root.glob("session_*") if SESSION.fullmatch(folder.name) and not folder.is_symlink()
    ]
    ended = [folder for folder in folders if folder not in alive and (_driver_dead(folder) or _old(folder))]
    for folder in sorted(ended, key=lambda folder: folder.name)[:-KEPT_SESSIONS]:
        shutil.rmtree(folder, ignore_errors=True)


def on_machine() -> list[Orphan]:
    """Return local Ray sessions of this user's sweeps that outlived them."""
    sessions: dict[Path, int] = {}
    for _, session in _ray_processes():
        sessions[session] = sessions.get(session, 0) + 1
    found = []
    for session, count in sorted(sessions.items()):
        if session.parent.parts[-2:] == ray_root().parts[-2:] and _driver_dead(session):
            what = f"{count} process(es) of the Ray session {session}, whose sweep is dead"
            found.append(Orphan(what, partial(_end, session)))
    return found


def _old(folder: Path) -> bool:
    return time.time() - folder.lstat().st_mtime > KEPT_DAYS * 86400


def _driver_dead(session: Path) -> bool:
    """Check that the process that started a session has ended; False if that cannot be known here."""
    match = SESSION.fullmatch(session.name)
    pid = int(match["pid"]) if match else 0
    try:
        begun = json.loads((session / DRIVER).read_text(encoding="utf-8"))
        return bool(begun["where"] == process(pid)["where"] and begun != process(pid))
    except FileNotFoundError:
        return process(pid)["begun"] is None  # the driver died before it could write its note
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _ray_processes() -> list[tuple[int, Path]]:
    """Return Ray's own processes of this user, each with its session's folder; never this process or those above it."""
    mine, found = _lineage(), []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if place.stat().st_uid != os.getuid() or int(place.name) in mine:
                continue
            words = (place / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if not any(PROGRAMS.search(word) for word in (os.readlink(place / "exe"), *_script(words))):
                continue
        except OSError:
            continue  # it has ended
        session = next((Path(match[1]) for word in words if (match := NAMED.search(word))), None)
        if session is not None and session.is_dir() and session.stat().st_uid == os.getuid():
            found.append((int(place.name), session))
    return found


def _script(words: list[str]) -> list[str]:
    """Return the script that a Python process runs, from its command line."""
    if not Path(words[0]).name.startswith("python"):
        return []
    return [word for word in words[1:] if not word.startswith("-")][:1]


def _lineage() -> set[int]:
    """Return the ids of this process and of all those above it."""
    found, pid = set(), os.getpid()
    while pid > 0 and pid not in found:
        found.add(pid)
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            break
    return found


def _end(session: Path) -> None:
    for pid, its in _ray_processes():
        if its == session:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


# --- reporting and removal ---


def look(*, local: bool, clear: bool, ask: Callable[[str], bool] | None = None, tell: Callable[[str], None]) -> int:
    """Report the orphans of this machine (`local`) or of the cluster just joined, and offer to remove them.

    ask: puts a yes-or-no question to the user; None where nobody can answer. Returns how many were removed.
    """
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
