"""Portable adapter checkpoints: safetensors and JSON, no pickle, for any ZeRO stage and world size.

A checkpoint folder is a PEFT adapter that any PEFT user can load (`adapter_model.safetensors`, in fp32 as training
keeps it, and `adapter_config.json`) plus what resuming needs: `resume.safetensors` with Adam's moments, `state.json`,
and last of all `MANIFEST.json` with a checksum per file. A folder without a matching manifest is not a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from macdrop.errors import CheckpointError
from tune.storage.atomic import lasting, make_folder, sync_folder, writing

if TYPE_CHECKING:
    import torch

ADAPTER, RESUME, STATE, MANIFEST = "adapter_model.safetensors", "resume.safetensors", "state.json", "MANIFEST.json"
#: How the names of folders begin that are being written, and that are being replaced.
STAGING, ASIDE = ".tmp-", ".old-"
MOMENTS = ("exp_avg", "exp_avg_sq")
#: Checkpoints that a fine-tuning under way keeps, the newest ones.
KEPT = 2


@dataclass
class AdapterState:
    """Everything that training changes, unpartitioned, in fp32, on the CPU.

    `weights`, `exp_avg` and `exp_avg_sq` map the adapter's parameter names to tensors of the parameter's shape; `step`
    counts finished optimizer steps; `meta` is plain JSON (trial, seed, total steps).
    """

    weights: dict[str, torch.Tensor]
    exp_avg: dict[str, torch.Tensor]
    exp_avg_sq: dict[str, torch.Tensor]
    step: int = 0
    meta: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path, names: Mapping[str, str] | None = None) -> None:
        """Write the three files of a checkpoint but for the adapter's configuration into an existing folder.

        names: of each parameter, its tensor's name in an adapter's file.
        """
        names = names or {name: name for name in self.weights}
        write_tensors({names[name]: tensor for name, tensor in self.weights.items()}, folder / ADAPTER)
        moments = {f"{part}|{name}": tensor for part in MOMENTS for name, tensor in getattr(self, part).items()}
        write_tensors(moments, folder / RESUME)
        state = {"step": self.step, "meta": self.meta, "names": {names[name]: name for name in self.weights}}
        (folder / STATE).write_text(json.dumps(state, indent=1))

    @classmethod
    def load(cls, folder: Path) -> AdapterState:
        """Read a checkpoint folder after verifying its manifest.

        Raises:
            CheckpointError: the folder is missing, incomplete, or a checksum differs.
        """
        from safetensors.torch import load_file

        verify(folder)
        for name in (RESUME, STATE):
            if not (folder / name).is_file():
                raise CheckpointError(
                    f"{folder} is an adapter without {name}: it can be used, but training cannot go on from it. "
                    "Name a folder step-... of a trial."
                )
        try:
            state = json.loads((folder / STATE).read_text())
            weights = {state["names"][key]: tensor for key, tensor in load_file(folder / ADAPTER).items()}
            parts: dict[str, dict[str, torch.Tensor]] = {moment: {} for moment in MOMENTS}
            for key, tensor in load_file(folder / RESUME).items():
                part, _, name = key.partition("|")
                parts[part][name] = tensor
            return cls(weights, *(parts[moment] for moment in MOMENTS), state["step"], state["meta"])
        except (KeyError, TypeError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{folder} is no whole checkpoint: {error!r}. Start the trial anew.") from None


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file as PEFT does.

    Raises:
        OSError: as for any file (safetensors has an error of its own, with the number in its text).
    """
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), os.fspath(path)) from error


def write_folder(folder: Path, write: Callable[[Path], None], within: Path) -> None:
    """Make `folder` of what `write` puts into a staging folder beside it: whole or not at all, an older one replaced.

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
    for older in root.glob(f"{ASIDE}*"):
        folder = root / older.name.removeprefix(ASIDE)
        if _whole(older) and not _whole(folder):
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(older, folder)
    for left in [*root.glob(f"{STAGING}*"), *root.glob(f"{ASIDE}*")]:
        shutil.rmtree(left, ignore_errors=True)


def verify(folder: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: what is missing or damaged.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise CheckpointError(f"{folder} is no checkpoint: it has no {MANIFEST}. Name a folder step-... of a trial.")
    try:
        digests = json.loads(manifest.read_text())
        whole = isinstance(digests, dict) and bool(digests) and all(Path(name).name == name for name in digests)
    except (ValueError, RecursionError):
        whole = False
    if not whole:
        raise CheckpointError(f"{manifest} is damaged. Use an older checkpoint of the trial, or start it anew.")
    there = {path.name for path in folder.iterdir() if path.is_file()}
    for name, digest in digests.items():
        path = folder / name
        if name not in there:
            told = f"{folder} lacks {name[:80]}."
            raise CheckpointError(f"{told} Use an older checkpoint of the trial, or start it anew.")
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
