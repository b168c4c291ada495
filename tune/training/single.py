"""One fine-tuning of a spec in the current process group, from loading the model to `trial.json`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tune.config.run_spec import TrainSpec, dump
from tune.config.sections import Arm
from tune.data import dataset as data
from tune.storage.atomic import atomic_write_json, atomic_write_yaml
from tune.storage.places import cache_dir
from tune.storage.sealed_folder import newest
from tune.storage.segments import workers_at_start
from tune.storage.trial_folder import TrialFolder
from tune.training.checkpoint import read_meta
from tune.training.collectives import rank0_does
from tune.training.engine import Engine
from tune.training.finetune import Outcome, finetune
from tune.training.massive_weights import scanned
from tune.training.observer import Observer, Word
from tune.training.process_group import prepare_process
from tune.training.trial_setup import record_setup


def train_here(
    spec: TrainSpec, folder: Path, *, observe: Observer | None, threads: int, beat: Callable[[], None] = lambda: None
) -> Outcome:
    """Train in the current process group (of one, unless torchrun or Ray Train made a larger one)."""
    prepare_process(threads)
    spec = spec.canonical()
    weights = scanned(spec) if spec.arm != Arm.PLAIN else None
    engine = Engine(spec)
    prepared = data.load(data.prepare(spec, engine.tokenizer, cache_dir() / "data"))

    checkpoint = rank0_does(lambda: newest(folder / "checkpoints"))
    begun = rank0_does(lambda: None if checkpoint is None else workers_at_start(spec, read_meta(checkpoint)))

    record = TrialFolder(folder, within=folder)

    def watch(metrics: dict[str, Any]) -> Word:
        record.log([metrics])
        return observe(metrics) if observe else Word.GO_ON

    def begin() -> None:
        atomic_write_yaml(folder / "config.yaml", dump(spec))
        scan = folder / "massive_weights.json"
        if weights:
            weights.save(scan)
        record_setup(folder, prepared, weights, scan, dist.get_world_size(), begun)

    outcome = finetune(
        engine, spec, prepared, folder, weights=weights, observe=watch, begin=begin, beat=beat, workers=begun
    )
    about = {"model": spec.model_name_or_path, "arm": spec.arm, **asdict(outcome)}
    rank0_does(lambda: atomic_write_json(folder / "trial.json", about))
    return outcome
