"""Folders written whole or not at all, sealed with a manifest of checksums."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from tune.errors import CheckpointError
from tune.storage.atomic import lasting, make_folder, sync_folder, writing

MANIFEST = "MANIFEST.json"
#: Name prefixes of folders that are being written, and that are being replaced.
STAGING, ASIDE = ".tmp-", ".old-"
#: Checkpoints that a fine-tuning under way keeps, the newest ones.
KEPT = 2


def write_folder(folder: Path, write: Callable[[Path], None], within: Path) -> None:
    """Make `folder` of what `write` puts into a staging folder next to it: whole or not at all, an older one replaced.

    While the storage of `within` is gone, all of it is tried again; see `tune.storage.atomic.lasting`.

    Raises:
        ResourceError: it cannot be written; nothing half-written is left.
    """
    staging = folder.with_name(f"{STAGING}{folder.name}")

    def attempt() -> None:
        make_folder(folder.parent, within)
        shutil.rmtree(staging, ignore_errors=True)
        try:
            staging.mkdir()
            write(staging)
            commit(staging, folder)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise

    with writing(folder):
        lasting(attempt, within)


def commit(staging: Path, folder: Path) -> None:
    """Seal a finished staging folder with its manifest and move it into place; an older folder there is replaced.

    The older one is moved aside first, so that a crash at any point leaves one whole folder, if under another name.
    """
    digests = {path.name: sha256(path, sync=True) for path in sorted(staging.iterdir())}
    with open(staging / MANIFEST, "w") as file:
        json.dump(digests, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(staging)
    older = folder.with_name(f"{ASIDE}{folder.name}")
    shutil.rmtree(older, ignore_errors=True)
    if folder.exists():
        os.replace(folder, older)
    os.replace(staging, folder)
    sync_folder(folder.parent)
    shutil.rmtree(older, ignore_errors=True)


def tidy(root: Path) -> None:
    """Remove what a killed writer left under `root`; a whole folder that it had moved aside only goes back."""
    if not root.is_dir():
        return
    left = [root / name for name in os.listdir(root) if name.startswith((STAGING, ASIDE))]
    for older in left:
        folder = root / older.name.removeprefix(ASIDE)
        if older.name.startswith(ASIDE) and _whole(older) and not _whole(folder):
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(older, folder)
    for path in left:
        shutil.rmtree(path, ignore_errors=True)


def verify(folder: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: what is missing or damaged.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise CheckpointError(f"{folder} is not a checkpoint: it has no {MANIFEST}. Name a folder step-... of a trial.")
    try:
        digests = json.loads(manifest.read_text())
        whole = isinstance(digests, dict) and bool(digests) and all(Path(name).name == name for name in digests)
    except (ValueError, RecursionError):
        whole = False
    if not whole:
        raise CheckpointError(f"{manifest} is damaged. Use an older checkpoint of the trial, or restart it.")
    with os.scandir(folder) as entries:
        there = {entry.name for entry in entries if entry.is_file()}
    for name, digest in digests.items():
        path = folder / name
        if name not in there:
            missing = f"{folder} lacks {name[:80]}."
            raise CheckpointError(f"{missing} Use an older checkpoint of the trial, or restart it.")
        if sha256(path) != digest:
            raise CheckpointError(f"{path} is damaged: its checksum differs from {MANIFEST}. Use an older checkpoint.")


def folder_name(step: int) -> str:
    """`step-...`, padded so that names sort as steps do."""
    return f"step-{step:08d}"


def newest(root: Path) -> Path | None:
    """The newest whole checkpoint under `root`; damaged ones are passed over, as a killed run may leave one.

    One that was moved aside (see `commit`) counts, where nothing whole is in its place.
    """
    found = {path.name.removeprefix(ASIDE): path for path in root.glob(f"{ASIDE}step-*") if _whole(path)}
    for name in sorted({*found, *(path.name for path in root.glob("step-*"))}, reverse=True):
        if _whole(root / name):
            return root / name
        if name in found:
            return found[name]
    return None


def prune(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints under `root`."""
    for folder in sorted(root.glob("step-*"), reverse=True)[keep:]:
        shutil.rmtree(folder, ignore_errors=True)


def _whole(folder: Path) -> bool:
    try:
        verify(folder)
    except CheckpointError:
        return False
    return True


def sha256(path: Path, *, sync: bool = False) -> str:
    """Hex digest of a file; with `sync` its content is on the disk before."""
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
