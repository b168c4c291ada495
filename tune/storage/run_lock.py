"""One run at a time in a folder, a sweep or `macdrop train`: a file that says who works there. Pure.

The file is touched as long as that process lives:

    in_use.json     token, pid, begun, where (host name, boot, process namespace), host, since, command

A lock is stale if its process has exited (checked on the same host), or if it has not been touched for `DEAD_S`.
Ages are taken by the clock of the file system: clocks of hosts need not agree.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from macdrop.errors import ConfigError
from tune.storage.atomic import atomic_write_json, now, writing

FILE, GUARD = "in_use.json", ".in_use.lock"
#: All files of a lock, in a folder that holds nothing else.
NAMES = frozenset({FILE, GUARD})
TOUCH_S = 5.0
#: A process on another host without a heartbeat for so long is taken for dead.
DEAD_S = 60.0


class RunLock:
    """A lock on a folder that this process works in. `lost` is why the process lost it, None while it holds it."""

    def __init__(self, folder: Path, token: str) -> None:
        self._file, self._token = folder / FILE, token
        self.lost: str | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._touch, name="run-lock", daemon=True)

    def _touch(self) -> None:
        while not self._end.wait(TOUCH_S):
            try:
                mine = (_read(self._file) or {}).get("token") == self._token
                if mine:
                    os.utime(self._file)
            except OSError:
                continue  # storage that is gone for a minute; a process that takes over meanwhile leaves another token
            if not mine and not self._end.is_set():
                self.lost = f"{self._file} is no longer this process's own: another process has taken the folder over."
                os.kill(os.getpid(), signal.SIGTERM)
                return

    def release(self) -> None:
        self._end.set()
        if self.lost is None and (_read(self._file) or {}).get("token") == self._token:
            self._file.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[RunLock]:
    """Work in a run folder (created if missing) while no other process does.

    Raises:
        ConfigError: another process that lives, or may live, works there.
        ResourceError: the folder cannot be written.
    """
    file, token = folder / FILE, uuid.uuid4().hex
    with writing(file):
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / GUARD, "w") as guard:
            fcntl.flock(guard, fcntl.LOCK_EX)
            check_free(folder)
            about = {"host": socket.gethostname(), "since": now(), "command": " ".join(sys.argv)}
            atomic_write_json(file, {"token": token, "pid": os.getpid(), **process(os.getpid()), **about})
    lock = RunLock(folder, token)
    lock._thread.start()
    try:
        yield lock
    finally:
        lock.release()


def check_free(folder: Path) -> None:
    """Refuse a folder that another process works in; nothing is left there.

    Raises:
        ConfigError: a process that lives, or may live, works there.
    """
    file = folder / FILE
    holder = _read(file)
    if holder is not None and (why := alive(holder, _age(file))):
        raise ConfigError(_refusal(folder, holder, why))


def in_use(folder: Path) -> bool:
    """Return whether a process that lives, or may live, works in a folder, which may be read-only."""
    file = folder / FILE
    holder = _read(file)
    try:
        return holder is not None and alive(holder, _age(file)) is not None
    except FileNotFoundError:  # released meanwhile
        return False
    except OSError:
        return holder is not None and alive(holder, time.time() - os.stat(file).st_mtime) is not None


def alive(holder: dict[str, Any], age_s: float) -> str | None:
    """Return why the process behind a lock must be taken for alive; None if it is dead.

    age_s: seconds since the lock was touched.
    """
    here = process(holder.get("pid") or 0)
    if holder.get("where") == here["where"]:
        same = here["begun"] is not None and here["begun"] == holder.get("begun")
        return f"process {holder['pid']} of this machine is alive" if same else None
    return f"its last sign of life came {max(age_s, 0):.0f} s ago" if age_s < DEAD_S else None


def _refusal(folder: Path, holder: dict[str, Any], why: str) -> str:
    return (
        f"{folder} is in use: a run has been there since {holder.get('since')} (process {holder.get('pid')} on host "
        f"{holder.get('host')}), and {why}.\nWait for it, or stop it (Ctrl-C there, or `kill {holder.get('pid')}`) and "
        f"give this command again; a host that died is noticed within {DEAD_S:.0f} s. If you know that nothing runs "
        f"there, delete {folder / FILE}."
    )


def process(pid: int) -> dict[str, Any]:
    """Identify a process among those that had its number earlier or elsewhere; `begun` is None if there is none."""
    words = [socket.gethostname()]
    for read in (lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(), _namespace):
        try:
            words.append(read())
        except OSError:
            words.append("")
    return {"where": "/".join(words), "begun": _begun(pid)}


def _namespace() -> str:
    return os.readlink("/proc/self/ns/pid")


def _begun(pid: int) -> str | None:
    """Return the start time of a process in the kernel's own count; without /proc, only that it exists."""
    if Path("/proc/self/stat").exists():
        try:
            words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if words[0] in "ZX" else words[19]
    try:
        os.kill(pid, 0)
    except (OSError, OverflowError):
        return None
    return "alive"


def _age(file: Path) -> float:
    """Seconds since the file was touched, by the clock of its file system."""
    probe = file.with_name(f".{file.name}-{uuid.uuid4().hex[:8]}")
    try:
        probe.touch()
        return probe.stat().st_mtime - file.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _read(file: Path) -> dict[str, Any] | None:
    """Read the lock; None without one. A damaged one locks nothing, as locks are written whole."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
