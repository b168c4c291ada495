"""Portable adapter checkpoints: safetensors and JSON, no pickle, for any ZeRO stage and world size.

A checkpoint folder is a PEFT adapter that any PEFT user can load (`adapter_model.safetensors`, `adapter_config.json`)
plus what resuming needs: `resume.safetensors` with the fp32 masters and Adam's moments, `state.json`, and last of all
`MANIFEST.json` with a checksum per file. A folder without a matching manifest is not a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from macdrop.errors import CheckpointError

if TYPE_CHECKING:
    import torch

MANIFEST = "MANIFEST.json"
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

    def save(self, folder: Path) -> None:
        """Write `resume.safetensors` and `state.json` into an existing folder."""
        from safetensors.torch import save_file

        tensors = {f"weight|{name}": tensor for name, tensor in self.weights.items()}
        for moment in MOMENTS:
            tensors |= {f"{moment}|{name}": tensor for name, tensor in getattr(self, moment).items()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "resume.safetensors")
        (folder / "state.json").write_text(json.dumps({"step": self.step, "meta": self.meta}, indent=1))

    @classmethod
    def load(cls, folder: Path) -> AdapterState:
        """Read a checkpoint folder after verifying its manifest.

        Raises:
            CheckpointError: the folder is missing, incomplete, or a checksum differs.
        """
        from safetensors.torch import load_file

        verify(folder)
        for name in ("resume.safetensors", "state.json"):
            if not (folder / name).is_file():
                raise CheckpointError(
                    f"{folder} is an adapter without {name}: it can be used, but training cannot go on from it. "
                    "Name a folder step-... of a trial."
                )
        state = json.loads((folder / "state.json").read_text())
        parts: dict[str, dict[str, torch.Tensor]] = {"weight": {}, "exp_avg": {}, "exp_avg_sq": {}}
        for key, tensor in load_file(folder / "resume.safetensors").items():
            part, _, name = key.partition("|")
            parts[part][name] = tensor
        return cls(parts["weight"], parts["exp_avg"], parts["exp_avg_sq"], state["step"], state["meta"])


def commit(staging: Path, folder: Path) -> None:
    """Seal a finished staging folder with its manifest and move it into place; an older folder there is replaced.

    The older one is moved aside first, so that a crash at any point leaves one whole folder, if under another name.
    """
    digests = {path.name: sha256(path) for path in sorted(staging.iterdir())}
    with open(staging / MANIFEST, "w") as file:
        json.dump(digests, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    older = folder.with_name(f".old-{folder.name}")
    shutil.rmtree(older, ignore_errors=True)
    if folder.exists():
        os.replace(folder, older)
    os.replace(staging, folder)
    shutil.rmtree(older, ignore_errors=True)


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
        whole = isinstance(digests, dict) and bool(digests)
    except ValueError:
        whole = False
    if not whole:
        raise CheckpointError(f"{manifest} is damaged. Use an older checkpoint of the trial, or start it anew.")
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder} lacks {name}. Use an older checkpoint of the trial, or start it anew.")
        if sha256(path) != digest:
            raise CheckpointError(f"{path} is damaged: its checksum differs from {MANIFEST}. Use an older checkpoint.")


def folder_name(step: int) -> str:
    """`step-...`, padded so that names sort as steps do."""
    return f"step-{step:08d}"


def newest(root: Path) -> Path | None:
    """The newest whole checkpoint under `root`; damaged ones are passed over, as a killed run may leave one."""
    for folder in sorted(root.glob("step-*"), reverse=True):
        try:
            verify(folder)
        except CheckpointError:
            continue
        return folder
    return None


def prune(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints under `root`."""
    for folder in sorted(root.glob("step-*"), reverse=True)[keep:]:
        shutil.rmtree(folder)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
