"""A recorded trial trained again without Ray, and the comparison of its adapter with the recorded one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import load_file

from macdrop import MassiveWeights
from macdrop.errors import ConfigError, NoMassiveWeights
from tune.config.resume import shell_command
from tune.config.run_spec import TrainSpec, load
from tune.data import dataset
from tune.storage.places import cache_dir
from tune.storage.sealed_folder import sha256
from tune.storage.segments import describe, recorded
from tune.training.collectives import all_do
from tune.training.engine import Engine
from tune.training.finetune import Outcome, finetune
from tune.training.loading import require_base
from tune.training.massive_weights import scanned
from tune.training.observer import Word
from tune.training.process_group import prepare_process
from tune.training.trial_setup import read_setup, reproduce_command

ADAPTER = "adapter_model.safetensors"
#: Folder below the trial's that the new adapter goes to.
TARGET = "reproduced"


@dataclass(frozen=True)
class Comparison:
    """Comparison of a trial's new adapter with the recorded one.

    recorded: its sha256, None if there is none. distance: what differs, empty if nothing does.
    """

    adapter: Path
    sha256: str
    recorded: str | None
    distance: str


def train_again(folder: Path, overrides: Iterable[str] = (), *, observe: Callable[[dict[str, Any]], None]) -> Outcome:
    """Train the trial of `folder` again into its reproduced/; on every rank alike. Rank 0 calls `observe`.

    Raises:
        ConfigError: files are missing, or the number of workers, the data or the base are others than the trial's; or
            more than one number of workers trained it.
    """
    folder, overrides = folder.absolute(), list(overrides)
    setup = read_setup(folder)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != setup["workers"]:
        raise ConfigError(
            f"The adapter was trained on {setup['workers']} worker(s); this run has {world}, so its batches would "
            f"differ. Run: {reproduce_command(folder, setup['workers'])}"
        )
    spec = load(folder / "config.yaml", overrides, kind=TrainSpec)
    info = _recorded(folder)
    if (words := describe(recorded(info))) is not None:
        workers = f"ray.num_workers={setup.get('workers_at_start', setup['workers'])}"
        again = shell_command("macdrop", "train", folder / "config.yaml", workers)
        raise ConfigError(
            f"The adapter cannot be trained again to the same bits: {words}, and one group of processes has one number "
            f"of workers. To train it on the one that it began with: {again} output_dir=FOLDER"
        )
    stop_at = _recorded_step(info)
    if not overrides and os.path.isdir(setup["directory"]):
        os.chdir(setup["directory"])  # local data and models may be named relative to it
    alone = not dist.is_initialized()
    prepare_process(setup["threads"])
    weights = all_do(lambda: _weights(folder, spec, setup)) if setup["fingerprint"] else None
    engine = Engine(spec)
    prepared = all_do(lambda: _data(spec, engine, setup))
    target = folder / TARGET
    if dist.get_rank() == 0:
        shutil.rmtree(target, ignore_errors=True)
    dist.barrier()

    def watch(metrics: dict[str, Any]) -> Word:
        observe(metrics)
        # A word takes effect at the next step: a trial that was stopped at step n heard it at n - 1 at the latest.
        return Word.GO_ON if stop_at is None or metrics["step"] + 1 < stop_at else Word.STOP

    spec = spec.model_copy(update={"save_steps": 0})
    begun = setup.get("workers_at_start")
    outcome = finetune(engine, spec, prepared, target, weights=weights, observe=watch, resume=False, workers=begun)
    if alone:
        dist.destroy_process_group()
    return outcome


def compare_adapters(folder: Path) -> Comparison:
    """Compare the new adapter of a trial with the recorded one, byte by byte."""
    recorded, made = folder / "adapter" / ADAPTER, folder / TARGET / "adapter" / ADAPTER
    digest = sha256(made)
    if not recorded.is_file():
        return Comparison(made.parent, digest, None, "")
    then = sha256(recorded)
    return Comparison(made.parent, digest, then, "" if then == digest else _distance(recorded, made))


def _data(spec: TrainSpec, engine: Engine, setup: dict[str, Any]) -> dataset.Prepared:
    """Load the trial's data.

    Raises:
        ConfigError: they are not those that it was trained on.
    """
    prepared = dataset.load(dataset.prepare(spec, engine.tokenizer, cache_dir() / "data"))
    there, here = setup["data"], prepared.info
    if here["key"] != there["key"]:
        raise ConfigError(
            f"The data are not those of the trial: it had {there['examples']} examples with {there['tokens']} tokens, "
            f"here are {here['examples']} with {here['tokens']}.\nFind the files as they were, or add dataset=PATH."
        )
    return prepared


def _weights(folder: Path, spec: TrainSpec, setup: dict[str, Any]) -> MassiveWeights:
    """Load the scan that the trial used, else scan the same checkpoint again.

    Raises:
        ConfigError: the base is not the trial's.
    """
    require_base(spec, setup["fingerprint"])
    try:
        weights = MassiveWeights.load(folder / setup["weights"])
    except NoMassiveWeights:
        return scanned(spec)
    weights.check(setup["fingerprint"])
    return weights


def _recorded(folder: Path) -> dict[str, Any]:
    """Return trial.json; nothing if there is none, as the trial has not ended."""
    file = folder / "trial.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _recorded_step(info: dict[str, Any]) -> int | None:
    """Return the step after which the trial was stopped early; None if it ran to its end."""
    step, total = info.get("step"), info.get("total_steps")
    return step if step is not None and total is not None and step < total else None


def _distance(recorded: Path, made: Path) -> str:
    then, now = load_file(recorded), load_file(made)
    if {name: tensor.shape for name, tensor in then.items()} != {name: tensor.shape for name, tensor in now.items()}:
        return "it has other tensors"
    largest = max(float((then[name].float() - now[name].float()).abs().max()) for name in then)
    return f"the largest difference of an entry is {largest:.3g}"
