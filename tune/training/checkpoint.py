"""Portable adapter checkpoints: safetensors and JSON, no pickle, for any ZeRO stage and world size.

A checkpoint folder is a PEFT adapter that any PEFT user can load (`adapter_model.safetensors`, in fp32 as training
keeps it, and `adapter_config.json`) plus what resuming needs: `resume.safetensors` with the optimizer's state,
`state.json`, and last of all `MANIFEST.json` with a checksum per file. A folder without a matching manifest is not a
checkpoint.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from tune.errors import CheckpointError
from tune.storage.sealed_folder import verify

if TYPE_CHECKING:
    import torch

ADAPTER, RESUME, STATE = "adapter_model.safetensors", "resume.safetensors", "state.json"


@dataclass
class AdapterState:
    """Everything that training changes, unpartitioned, on the CPU.

    `weights` maps the adapter's parameter names to fp32 tensors, `optimizer` each part of the optimizer's state (as
    `exp_avg`) to its tensors by the same names, as the optimizer keeps them; `step` counts finished optimizer steps;
    `meta` is plain JSON (trial, seed, total steps).
    """

    weights: dict[str, torch.Tensor]
    optimizer: dict[str, dict[str, torch.Tensor]]
    step: int = 0
    meta: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path, names: Mapping[str, str] | None = None) -> None:
        """Write a checkpoint's three files into an existing folder; the adapter's configuration is written elsewhere.

        names: parameter name -> name of its tensor in the adapter file.
        """
        names = names or {name: name for name in self.weights}
        write_tensors({names[name]: tensor for name, tensor in self.weights.items()}, folder / ADAPTER)
        parts = {f"{part}|{name}": kept for part, tensors in self.optimizer.items() for name, kept in tensors.items()}
        write_tensors(parts, folder / RESUME)
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
                    f"{folder} is an adapter without {name}: it can be used, but training cannot resume from it. "
                    "Name a folder step-... of a trial."
                )
        try:
            state = json.loads((folder / STATE).read_text())
            weights = {state["names"][key]: tensor for key, tensor in load_file(folder / ADAPTER).items()}
            parts: dict[str, dict[str, torch.Tensor]] = {}
            for key, tensor in load_file(folder / RESUME).items():
                part, _, name = key.partition("|")
                parts.setdefault(part, {})[name] = tensor
            return cls(weights, parts, state["step"], state["meta"])
        except (KeyError, TypeError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{folder} is not a complete checkpoint: {error!r}. Restart the trial.") from None


def read_meta(folder: Path) -> dict[str, Any]:
    """Return the `meta` of a checkpoint alone.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    try:
        meta = json.loads((folder / STATE).read_text(encoding="utf-8"))["meta"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder} is not a complete checkpoint: {error!r}. Restart the trial.") from None
    return dict(meta)


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file as PEFT does.

    Raises:
        OSError: as for any file (safetensors raises its own error, with the errno in its text).
    """
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), os.fspath(path)) from error
