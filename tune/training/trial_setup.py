"""The record in a trial's folder of all that its bits depend on besides config.yaml: reproduce.json.

It is written when a trial starts: workers, threads, what data and base were, versions. Paths inside the run folder are
kept relative to the trial's, so that the run can be moved. Loads no torch by itself: reports read the record, too.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from macdrop.errors import ConfigError
from tune.config.messages import build
from tune.config.resume import changes, shell_command
from tune.config.run_spec import TrainSpec, dump
from tune.config.train_spec import WITHOUT_EFFECT
from tune.data.batching import MIXTURE
from tune.data.lost_rows import COUNTS, SKIPPED
from tune.storage.atomic import atomic_write_json, read_mapping
from tune.storage.environment import version
from tune.storage.segments import check_shared, workers_at_start
from tune.training.checkpoint import read_meta

if TYPE_CHECKING:
    from macdrop import MassiveWeights
    from tune.data.dataset import Prepared

SETUP = "reproduce.json"
#: Packages whose versions may change the bits of an adapter.
PACKAGES = ("macdrop", "torch", "transformers", "peft", "deepspeed", "numpy", "bitsandbytes", "schedulefree")
#: Part of an `identity` -> what it is, for one that differs while config.yaml does not.
PARTS = {
    "total_steps": "optimizer steps of the whole fine-tuning (they follow from the data)",
    "global_batch": "examples per optimizer step (they follow from the number of workers)",
    "trial": "name of the fine-tuning",
}


def record_setup(
    folder: Path,
    data: Prepared,
    weights: MassiveWeights | None,
    scan: Path,
    workers: int,
    begun: int | None = None,
    rules: Mapping[str, str] | str | None = None,
) -> None:
    """Write the record into a trial's folder.

    weights: the massive weights that the trial uses, if any, and `scan` the file that holds them. begun: the workers
    that its run began with, by default `workers`. rules: SlimAdam's, if it trains.
    """
    import torch

    setup = {
        "workers": workers,
        "workers_at_start": begun or workers,
        "threads": torch.get_num_threads(),
        "directory": os.getcwd(),
        "data": {
            **{key: data.info[key] for key in ("key", "examples", "tokens", "label_tokens", *COUNTS)},
            **{key: data.info[key] for key in (SKIPPED, MIXTURE) if data.info.get(key)},
        },
        "weights": os.path.relpath(scan, folder) if weights else None,
        "fingerprint": weights.fingerprint if weights else None,
        **({} if rules is None else {"slimadam_rules": rules}),
        **surroundings(),
    }
    atomic_write_json(folder / SETUP, setup)


def read_setup(folder: Path) -> dict[str, Any]:
    """Read the record of a trial.

    Raises:
        ConfigError: the folder is not that of a trial.
    """
    missing = [name for name in (SETUP, "config.yaml") if not (folder / name).is_file()]
    if missing:
        hint = " Give one of the folders under its trials/." if (folder / "run.json").is_file() else ""
        raise ConfigError(f"{folder} is not the folder of a trial: it lacks {' and '.join(missing)}.{hint}")
    try:
        setup: dict[str, Any] = json.loads((folder / SETUP).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{folder / SETUP} is damaged: {error}") from error
    return setup


def reproduce_command(folder: Path, workers: int) -> str:
    """Return the command that trains a trial again."""
    start = ["macdrop"] if workers == 1 else ["torchrun", "--nproc_per_node", str(workers), "-m", "tune.cli"]
    return shell_command(*start, "reproduce", folder)


def identity(spec: TrainSpec, total_steps: int, global_batch: int) -> dict[str, Any]:
    """Return what a checkpoint must have been made with to be continued by this fine-tuning."""
    return {"trial": spec.trial_id(), "total_steps": total_steps, "global_batch": global_batch}


def check_checkpoint(spec: TrainSpec, checkpoint: Path, total_steps: int, workers: int) -> None:
    """Refuse, before anything is loaded, to resume a checkpoint that was made with other settings.

    Raises:
        ConfigError: it was, or the workers cannot share its micro-batches evenly. CheckpointError: it is damaged.
    """
    meta = read_meta(checkpoint)
    begun = workers_at_start(spec, meta) or workers
    batch = spec.per_device_train_batch_size * spec.gradient_accumulation_steps * begun
    check_continues(spec, identity(spec, total_steps, batch), meta, checkpoint)
    check_shared(spec, begun, workers)


def check_continues(spec: TrainSpec, here: Mapping[str, Any], there: Mapping[str, Any], checkpoint: Path) -> None:
    """Refuse to continue a checkpoint that was made with other settings; nothing is written.

    here, there: the `identity` of this fine-tuning, and that in the checkpoint.

    Raises:
        ConfigError: names each changed key, its value then and now, and the remedy.
    """
    if all(there.get(key) == value for key, value in here.items()):
        return
    folder = checkpoint.parent.parent
    recorded = _recorded_config(folder)
    lines = list(changes(recorded, dump(spec.canonical()), WITHOUT_EFFECT).values()) if recorded else []
    if not lines:  # the same settings on other data, or on another number of workers
        lines = [
            f"  {words}: {there.get(key)} when it was started, {here[key]} now"
            for key, words in PARTS.items()
            if there.get(key) != here[key]
        ]
    changed = "\n".join(lines)
    if any("gradient_accumulation_steps" in text for text in lines):
        changed += "\nOther workers need no other gradient_accumulation_steps: they share the micro-batches of a step."
    raise ConfigError(
        f"{checkpoint} was made with other settings:\n{changed}\n"
        "Resume with the settings it was started with, or choose another output_dir for these."
    )


def _recorded_config(folder: Path) -> dict[str, Any]:
    """Return what config.yaml says, with today's defaults for what it leaves out; empty if it cannot be read."""
    try:
        return dump(build(TrainSpec, read_mapping(folder / "config.yaml")))
    except ConfigError:
        return {}


def surroundings() -> dict[str, Any]:
    """Return versions and device of this process: where any differs, bits may."""
    import torch

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"cpu {platform.machine()}"
    return {"device": device, "versions": {name: version(name) for name in PACKAGES}}


def differences(setup: dict[str, Any]) -> list[str]:
    """Return a line for each version, or device, that is not the recorded one."""
    here = surroundings()
    found = [f"device: {setup['device']} then, {here['device']} now"] if setup["device"] != here["device"] else []
    for name, now in here["versions"].items():
        then = setup["versions"].get(name, now)  # one that was not recorded may not have been looked at
        found += [f"{name}: {then} then, {now} now"] if then != now else []
    return found
