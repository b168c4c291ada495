"""Restores a run folder from its copy, every file verified against its manifest."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

from macdrop.errors import ConfigError
from tune.errors import ResourceError
from tune.storage.atomic import atomic_write_json, atomic_write_text, now, writing
from tune.storage.records import check_name
from tune.storage.remote.copied_units import (
    MANIFESTS,
    OWNER,
    RUN,
    Content,
    Manifest,
    Owner,
    manifest_key,
    unit_of,
)
from tune.storage.remote.copier import STATE_FILE
from tune.storage.remote.object_store import ObjectStore, why
from tune.storage.run_folder import check_new
from tune.storage.run_lock import locked
from tune.storage.sealed_folder import sha256

#: In a folder that is being restored, until it is whole.
MARK = ".restoring"


def is_restoring(folder: Path) -> bool:
    """Return whether a restoration of the folder has begun and not ended."""
    return (folder / MARK).is_file()


def holds_run(url: str) -> bool:
    """Return whether a run has been copied to an address.

    Raises:
        ResourceError: it cannot be read.
    """
    store = ObjectStore(url)
    return _read(store, OWNER) is not None and _read(store, manifest_key(RUN)) is not None


def restore(url: str, folder: Path) -> list[str]:
    """Restore the run that was copied to `url` into an empty folder; return what is left out, a sentence each.

    A trial that is not whole is left out, as it is trained again. What was interrupted is continued by another call.

    Raises:
        ConfigError: there is no run, the folder is not empty, or neither run.json nor config.yaml is whole.
        ResourceError: the store cannot be read, or the folder not written.
    """
    store = ObjectStore(url)
    owner = _read(store, OWNER)
    if owner is None or _read(store, manifest_key(RUN)) is None:
        raise ConfigError(f"sync_to {url} holds no copy of a run. Give the address that the run was copied to.")
    if not is_restoring(folder):
        check_new(folder)
    with locked(folder):
        atomic_write_text(folder / MARK, f"from {url}\n")
        try:
            keys = [key for key in store.keys(MANIFESTS) if key.endswith(".json") and key != OWNER]
        except Exception as error:
            raise _unreadable(store, error) from error
        units = sorted(map(unit_of, keys), key=lambda unit: unit == RUN)
        notes = [note for unit in units for note in _restore_unit(store, unit, folder)]
        if not any((folder / name).is_file() for name in ("run.json", "config.yaml")):
            raise ConfigError(f"The copy at {url} is damaged: neither run.json nor config.yaml is whole.")
        identity = Owner.decoded(owner).run
        atomic_write_json(folder / STATE_FILE, {"run": identity, "to": url, "time": now(), "restored": len(units)})
        (folder / MARK).unlink()
    return notes


def _restore_unit(store: ObjectStore, unit: str, folder: Path) -> list[str]:
    kind, _, name = unit.partition("/")
    trial = kind == "trials"
    try:
        manifest = Manifest.decoded(unit, _read(store, manifest_key(unit)) or b"")
        if name:
            check_name(name)
    except ValueError:
        return [f"the manifest of {unit} is damaged at {store.url}: it is left out"]
    files, before = manifest.files, manifest.before or {}
    found = {
        path: _fetch(store, path, folder, [each[path] for each in (files, before) if path in each])
        for path in dict.fromkeys((*files, *before))
    }
    if not trial:
        # Each file is whole in itself, old or new.
        lost = [path for path in files if found[path] is None]
        return [f"{path} is missing or damaged at {store.url}: it is left out" for path in lost]
    chosen = next((each for each in (files, before) if each and _all_there(each, found)), None)
    if chosen is None:
        shutil.rmtree(folder / unit, ignore_errors=True)
        reason = "was being copied when the copy stopped" if before else "is damaged"
        return [f"{unit} {reason} at {store.url}: {name} is trained again"]
    for path in found.keys() - chosen.keys():
        (folder / path).unlink(missing_ok=True)
    return []


def _all_there(wanted: Mapping[str, Content], found: Mapping[str, Content | None]) -> bool:
    return all(found.get(path) == content for path, content in wanted.items())


def _fetch(store: ObjectStore, path: str, folder: Path, allowed: list[Content]) -> Content | None:
    """Bring a file with one of the `allowed` contents into place; None if the object is missing or another."""
    file = folder / path
    if file.is_file() and (there := _content_in(file)) in allowed:
        return there
    temporary = file.with_name(f".{file.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    try:
        store.download(path, temporary)
        content = _content_in(temporary)
        if content not in allowed:
            return None
        os.replace(temporary, file)
        return content
    except FileNotFoundError:
        return None
    except Exception as error:
        raise _unreadable(store, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _content_in(file: Path) -> Content:
    return Content(sha256=sha256(file), size=file.stat().st_size)


def _read(store: ObjectStore, key: str) -> bytes | None:
    try:
        return store.read(key)
    except Exception as error:
        raise _unreadable(store, error) from error


def _unreadable(store: ObjectStore, error: Exception) -> ResourceError:
    return ResourceError(
        f"The run cannot be restored from {store.url}: {why(error)}\n"
        "Check the address and the credentials, then give the command again: it continues where it stopped."
    )
