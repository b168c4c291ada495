"""Copies what has changed in a run folder into an object store; no thread, no retry."""

from __future__ import annotations

import hashlib
import json
import socket
import time
import uuid
from pathlib import Path
from typing import Any

from macdrop.errors import ConfigError
from tune.config.resume import shell_command
from tune.errors import ResourceError
from tune.storage.atomic import atomic_write_json, now, read_mapping
from tune.storage.remote.copied_units import (
    OWNER,
    RUN_FILES,
    Content,
    Manifest,
    Owner,
    Unit,
    Units,
    UnitStamp,
    manifest_key,
)
from tune.storage.remote.object_store import ObjectStore, why
from tune.storage.sealed_folder import sha256

#: What the run folder keeps about its copy: run, to, time, copied, not_copied, unfinished, error.
STATE_FILE = "sync.json"


class TakenOver(Exception):
    """Another process copies its run to the same address."""


class Copier:
    """Copies one run folder. `identity` names the run, in the store and in the folder's sync.json.

    only: the units that are copied; None: all. `moved` is the monotonic time of the last object that was written.
    """

    def __init__(self, run_dir: Path, store: ObjectStore, only: frozenset[str] | None = None) -> None:
        self.store, self._run_dir, self._units, self._only = store, run_dir, Units(run_dir, only), only
        self.identity = identity(run_dir) or uuid.uuid4().hex
        self.moved = time.monotonic()
        self._session = uuid.uuid4().hex
        self._owned = False
        self._manifests: dict[str, Manifest | None] = {}
        self._done: dict[str, UnitStamp] = {}
        self._failures: dict[str, int] = {}

    def copy(self, *, last: bool = False) -> None:
        """Copy each unit that has changed; those that failed before come last.

        last: look through all units; otherwise trials that are settled have their turns (`Units.unsettled`).

        Raises:
            TakenOver: another process owns the address.
            Exception: whatever the store raises, at the first unit that cannot be copied.
        """
        looked = self._units if last else self._units.unsettled()
        units = sorted(looked, key=lambda unit: self._failures.get(unit.name, 0))
        checked = False
        for unit in units:
            try:
                stamp = unit.stamp()
                if not unit.files or self._done.get(unit.name) == stamp:
                    self._units.settle(unit)
                    continue
                if not checked:
                    self._own()
                    checked = True
                if self._copy_unit(unit) and (not unit.ended or unit.stamp() == stamp):
                    self._done[unit.name] = stamp
                    self._units.settle(unit)
            except Exception as error:
                if isinstance(error, FileNotFoundError) and not all(file.exists() for file in unit.files.values()):
                    continue  # a trial that starts again: it is copied once it has ended
                self._failures[unit.name] = self._failures.get(unit.name, 0) + 1
                raise

    def pending(self) -> list[str]:
        """Return the names of units whose present state is not in the store."""
        found = []
        for unit in self._units:
            try:
                if unit.files and self._done.get(unit.name) != unit.stamp():
                    found.append(unit.name)
            except FileNotFoundError:
                continue
        return found

    def record(self, error: str | None) -> list[str]:
        """Write sync.json; return the units that are not copied."""
        missing = self.pending()
        state: dict[str, Any] = {"run": self.identity, "to": self.store.url, "time": now(), "copied": len(self._done)}
        state |= {"not_copied": missing, "unfinished": self._units.unfinished, "error": error if missing else None}
        if self._only is not None:  # of the other units an earlier copier has written
            earlier = read_mapping(self._run_dir / STATE_FILE, []) or {}
            kept = [unit for unit in earlier.get("not_copied", []) if unit not in self._only]
            state |= {"copied": earlier.get("copied", 0), "not_copied": [*kept, *missing]}
            state["error"] = state["error"] or (earlier.get("error") if kept else None)
        atomic_write_json(self._run_dir / STATE_FILE, state)
        return missing

    # --- objects ---

    def _own(self) -> None:
        """Write the owner once, and afterwards make sure that it is still this process."""
        if self._owned:
            content = self.store.read(OWNER)
            if content is not None and Owner.decoded(content).session != self._session:
                raise TakenOver(f"another process copies to {self.store.url}")
            return
        owner = {"run": self.identity, "session": self._session, "host": socket.gethostname(), "since": now()}
        self.store.write(OWNER, json.dumps(owner, indent=1).encode())
        self._owned = True

    def _copy_unit(self, unit: Unit) -> bool:
        """Copy what has changed of a unit; return whether it is sealed."""
        contents = {} if unit.ended else {path: file.read_bytes() for path, file in unit.files.items()}
        files = {path: _content(file, contents.get(path)) for path, file in unit.files.items()}
        known = self._known(unit.name)
        whole = known is not None and known.before is None
        there = known.files if known is not None and whole else {}
        changed = [path for path, content in files.items() if there.get(path) != content]
        if whole and there == files:
            return True
        before = None if known is None else known.before or known.files
        if before is not None:
            self._write(manifest_key(unit.name), Manifest(files=files, before=before).encoded())
            self._manifests[unit.name] = Manifest(files=files, before=before)
        stamp = unit.stamp()
        for path in changed:
            if path in contents:
                self._write(path, contents[path])
            else:
                self.store.upload(path, unit.files[path])
                self.moved = time.monotonic()
        if unit.ended and unit.stamp() != stamp:
            return False
        self._manifests[unit.name] = Manifest(files=files)
        self._write(manifest_key(unit.name), Manifest(files=files).encoded())
        for path in (before or {}).keys() - files.keys():
            self.store.delete(path)
        return True

    def _known(self, unit: str) -> Manifest | None:
        if unit not in self._manifests:
            content = self.store.read(manifest_key(unit))
            try:
                self._manifests[unit] = None if content is None else Manifest.decoded(unit, content)
            except ValueError:
                self._manifests[unit] = None  # a damaged one is replaced
        return self._manifests[unit]

    def _write(self, key: str, content: bytes) -> None:
        self.store.write(key, content)
        self.moved = time.monotonic()


def _content(file: Path, content: bytes | None) -> Content:
    if content is None:
        return Content(sha256=sha256(file), size=file.stat().st_size)
    return Content(sha256=hashlib.sha256(content).hexdigest(), size=len(content))


def identity(run_dir: Path) -> str | None:
    """Return the name under which a run folder has been copied; None if it has not."""
    file = run_dir / STATE_FILE
    found = (read_mapping(file, []) or {}).get("run") if file.is_file() else None
    return found if isinstance(found, str) else None


def check_place(url: str, run_dir: Path, *, resume: bool) -> str | None:
    """Check that a run may be copied to an address; of a resumed run, return why the address cannot be reached.

    Raises:
        ConfigError: another run, or something else, is there, or it lies in the run folder.
        ResourceError: a new run cannot write there.
    """
    store = ObjectStore(url)
    if url.startswith("file:") and Path(url.removeprefix("file://")).resolve().is_relative_to(run_dir.resolve()):
        raise ConfigError(f"sync_to {url} lies in the run folder {run_dir}. Choose another place.")
    try:
        owner = store.read(OWNER)
        others = [] if owner is not None else [name for name in RUN_FILES if store.holds(name)]
        if owner is None and not others:
            probe = f"{OWNER.rpartition('/')[0]}/probe-{uuid.uuid4().hex}"
            store.write(probe, b"macdrop\n")
            store.delete(probe)
    except Exception as error:
        if resume:
            return why(error)
        raise ResourceError(
            f"sync_to {url} cannot be used: {why(error)}\nCheck the address and the credentials, or leave sync_to out."
        ) from error
    if others:
        raise ConfigError(f"sync_to {url} holds {others[0]}, which is no copy of a run. Choose another place.")
    if owner is not None and _run_of(owner) != identity(run_dir):
        raise ConfigError(
            f"sync_to {url} holds a copy of another run.\nChoose another place. To resume it in an empty folder:\n  "
            + shell_command("macdrop", "sweep", "--resume", "output_dir=FOLDER", f"sync_to={url}")
        )
    return None


def _run_of(owner: bytes) -> str | None:
    try:
        return Owner.decoded(owner).run
    except ValueError:
        return None
