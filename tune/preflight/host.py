"""Requirements of a local Ray: one table, for `macdrop doctor` and for every start of Ray."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import socket
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tune.errors import ResourceError
from tune.storage import places
from tune.storage.places import PYTHON_SOCKET, RAY_SOCKET, SOCKET_BYTES

#: Free space that the sessions of one local Ray need, and /dev/shm, in MiB.
ROOM_MIB, SHARED_MIB = 100, 256
#: Open files of one process, and processes with threads of this user, that a small sweep takes at least.
FILES, TASKS = 1024, 600
CONNECT_S = 5.0


@dataclass(frozen=True)
class Check:
    """One finding. `fix` is the remedy, empty when all is well; `needed` is False for what macdrop can do without."""

    name: str
    ok: bool
    found: str
    fix: str = ""
    needed: bool = True


class Lacks(Exception):
    """Something is missing: what was found, and the remedy."""

    def __init__(self, found: str, fix: str) -> None:
        super().__init__(found, fix)
        self.found, self.fix = found, fix


class Need(NamedTuple):
    """A requirement: `look` returns what it found, or raises Lacks; without `needed` it is only a note."""

    name: str
    look: Callable[[], str]
    needed: bool = True


def start_checks() -> Iterator[Check]:
    """Yield a check for every row of `NEEDS`; nothing is written but an empty folder for Ray's sessions."""
    for need in NEEDS:
        try:
            yield Check(need.name, True, need.look(), needed=need.needed)
        except Lacks as lacks:
            yield Check(need.name, False, lacks.found, lacks.fix, needed=need.needed)


def check_start() -> list[str]:
    """Refuse to start Ray where it cannot run; return the notes, each a sentence with its remedy.

    Raises:
        ResourceError: what is missing, with its remedy.
    """
    found = [check for check in start_checks() if not check.ok]
    missing = [f"{check.found}\n{check.fix}" for check in found if check.needed]
    if missing:
        raise ResourceError("Ray cannot start on this machine: " + "\n".join(missing))
    return [f"{check.found} {check.fix}" for check in found]


def start_failure(error: BaseException) -> ResourceError:
    """Return the error for whatever the start of a local Ray has raised: a sentence and a remedy."""
    text = str(error).strip() or type(error).__name__
    last = [line.strip() for line in text.splitlines() if line.strip()][-1][:300]
    remedy = next((remedy for pattern, remedy in RAISED if re.search(pattern, f"{type(error).__name__}: {text}")), ELSE)
    return ResourceError(f"Ray could not start on this machine: {last}\n{remedy}")


ELSE = "`macdrop doctor --ray` looks for the cause."
#: What `ray.init` may still raise after all rows of `NEEDS` hold: pattern of the error, remedy.
RAISED = (
    (r"No space left|Disk quota", "Free some space, or set RAY_TMPDIR to a short path on another disk."),
    (r"AF_UNIX|path too long", "Set RAY_TMPDIR and TMPDIR to folders with short paths, for example /tmp."),
    (r"Read-only file system|Permission", "Set RAY_TMPDIR to a folder that this user can write to."),
    (r"home directory", "Set HOME to a folder that this user can write to."),
    (r"Too many open files", f"Raise the limit of open files: ulimit -n {FILES * 4}."),
    (r"temporarily unavailable|start new thread|Cannot fork", "Raise the limit of processes: ulimit -u."),
    (r"Cannot allocate memory|MemoryError", "Free memory on this machine."),
    (r"[Aa]uthentica|token", "Unset RAY_AUTH_MODE, RAY_AUTH_TOKEN and RAY_AUTH_TOKEN_PATH: a run has its own token."),
    (r"timed out|Failed to start GCS", f"The machine may be overloaded, or its disk full; {ELSE}"),
)


# --- one function a row: what was found, or Lacks ---


def _home() -> str:
    try:
        return str(places.home())
    except ResourceError as error:
        raise Lacks(*str(error).split("\n")) from None


def _temporary() -> str:
    """Check the folders of Ray's sessions and of Python's sockets: short, ASCII where Ray needs it, private, room."""
    chosen = os.environ.get(places.RAY_TEMP_VARIABLE)
    short = "Set {} to a folder with a shorter path, for example /tmp."
    try:
        root, usual = places.ray_root(), tempfile.gettempdir()
    except OSError as error:
        raise Lacks(f"no temporary folder can be written to ({error.strerror}).", "Set TMPDIR to one.") from None
    if not str(root).isascii():
        raise Lacks(f"RAY_TMPDIR={chosen} is not ASCII, which Ray needs.", "Set RAY_TMPDIR to an ASCII path.")
    if not places.fits_sockets(root, RAY_SOCKET):
        room = SOCKET_BYTES - len(f"/{root.parent.name}/{root.name}{RAY_SOCKET}")
        raise Lacks(
            f"RAY_TMPDIR={chosen} has {len(chosen or '')} characters, and Ray's sockets below it allow {room}.",
            short.format("RAY_TMPDIR"),
        )
    if len(os.fsencode(usual + PYTHON_SOCKET)) > SOCKET_BYTES:
        size, room = len(os.fsencode(usual)), SOCKET_BYTES - len(PYTHON_SOCKET)
        raise Lacks(f"TMPDIR={usual} has {size} bytes, and sockets below it allow {room}.", short.format("TMPDIR"))
    _usable(root.parent)
    return f"{root} ({shutil.disk_usage(root.parent).free / 2**30:.0f} GiB free)"


def _usable(root: Path) -> None:
    elsewhere = "Set RAY_TMPDIR to a folder with a short path that this user can write to."
    try:
        places.private_folder(root)
        with tempfile.NamedTemporaryFile(dir=root) as file:
            file.write(bytes(2**20))
            file.flush()
        free = shutil.disk_usage(root).free / 2**20
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = 0.0
        else:
            raise Lacks(f"Ray's folder {root} cannot be written to ({error.strerror or error}).", elsewhere) from None
    if free < ROOM_MIB:
        raise Lacks(
            f"the disk of Ray's folder {root} has {free:.0f} MiB free, and {ROOM_MIB} are needed.",
            "Free some space, or set RAY_TMPDIR to a folder with a short path on another disk.",
        )


def _token() -> str:
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode is not None and mode.lower() != "token":
        return f"turned off by RAY_AUTH_MODE={mode}: whoever can reach Ray's ports can run code as this user"
    try:
        file = places.token_file()
        text = file.read_text(encoding="utf-8") if file.exists() else None
    except ResourceError:
        return "each run makes its own"
    except (OSError, UnicodeDecodeError) as error:
        if mode is None and "RAY_AUTH_TOKEN_PATH" not in os.environ:
            return "each run makes its own"
        why = getattr(error, "strerror", None) or "not text"
        raise Lacks(
            f"the token {file} cannot be read ({why}).", "Unset RAY_AUTH_TOKEN_PATH and RAY_AUTH_MODE."
        ) from None
    if places.open_to_others(file):
        raise Lacks(
            f"other users have rights to the Ray token {file}.", f"Delete it, or make another: chmod 600 {file}"
        )
    return "each run makes its own" if mode is None or text is None else f"in {file}"


def _limits() -> str:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if files != resource.RLIM_INFINITY and files < FILES:
        raise Lacks(f"{files} open files are allowed, and {FILES} are needed.", f"Raise the limit: ulimit -n {FILES}.")
    tasks = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    used = _tasks()
    if os.getuid() and tasks != resource.RLIM_INFINITY and tasks - used < TASKS:
        raise Lacks(
            f"{tasks} processes and threads are allowed to this user, {used} run, and {TASKS} more are needed.",
            f"Raise the limit: ulimit -u {used + 2 * TASKS}.",
        )
    return "open files, processes and threads suffice"


def _tasks() -> int:
    """Count the processes and threads of this user."""
    count = 0
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if place.stat().st_uid == os.getuid():
                count += len(os.listdir(place / "task"))
        except OSError:
            continue  # it has ended
    return count


def _loopback() -> str:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            with socket.create_connection(server.getsockname(), timeout=CONNECT_S):
                return "127.0.0.1 answers"
    except OSError as error:
        raise Lacks(
            f"this machine cannot reach itself at 127.0.0.1 ({error.strerror or error}).",
            "Bring the loopback interface up: ip link set lo up.",
        ) from None


def _shared_memory() -> str:
    place = Path("/dev/shm")
    if not place.is_dir():
        return "no /dev/shm here"
    size = shutil.disk_usage(place).total / 2**20
    if not os.access(place, os.W_OK) or size < SHARED_MIB:
        raise Lacks(
            f"/dev/shm has {size:.0f} MiB: Ray keeps its objects on disk instead, which is slower.",
            "Give the container more: docker run --shm-size=1g, or a memory volume at /dev/shm in Kubernetes.",
        )
    return f"{size / 1024:.1f} GiB"


def _proxies() -> str:
    found = sorted(
        f"{kind} {places.without_password(url)}" for kind, url in urllib.request.getproxies().items() if kind != "no"
    )
    return f"{', '.join(found)}; this machine's own addresses are exempt" if found else "none"


NEEDS = (
    Need("home folder", _home),
    Need("Ray's folder", _temporary),
    Need("limits", _limits),
    Need("loopback", _loopback),
    Need("Ray's token", _token, needed=False),
    Need("shared memory", _shared_memory, needed=False),
    Need("proxies", _proxies, needed=False),
)
