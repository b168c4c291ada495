"""One fine-tuning of a spec in the current process group, and the short one that SNRs are measured in before it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tune.config.run_spec import TrainSpec, dump
from tune.config.sections import Arm
from tune.data import dataset
from tune.errors import TrainingDiverged
from tune.storage.atomic import atomic_write_json, atomic_write_yaml
from tune.storage.places import cache_dir
from tune.storage.records import SNR_FILE
from tune.storage.sealed_folder import newest
from tune.storage.segments import workers_at_start
from tune.storage.trial_folder import TrialFolder
from tune.training.checkpoint import read_meta
from tune.training.collectives import all_do, rank0_does
from tune.training.engine import Engine
from tune.training.finetune import Outcome, finetune
from tune.training.loading import base_fingerprint, require_base
from tune.training.massive_weights import scanned
from tune.training.observer import Observer, Word
from tune.training.optimizers.adamw import MOMENTS
from tune.training.optimizers.snr_formula import SnrMeter
from tune.training.optimizers.snr_record import (
    CUTOFF,
    SKIPPED,
    STEPS,
    AdapterSnr,
    SnrRecord,
    is_auto,
    read_snr,
    snr_spec,
)
from tune.training.process_group import prepare_process
from tune.training.step import Training
from tune.training.trial_setup import record_setup


def train_here(
    spec: TrainSpec, folder: Path, *, observe: Observer | None, threads: int, beat: Callable[[], None] = lambda: None
) -> Outcome:
    """Train in the current process group (of one, unless torchrun or Ray Train made a larger one)."""
    prepare_process(threads)
    spec, snr, snr_file = spec.canonical(), None, folder / SNR_FILE
    if is_auto(spec):
        snr = recorded_snr([spec], snr_file, cache_dir() / "data", beat=beat)
        spec = snr.ruled(spec)
    weights = scanned(spec) if spec.arm != Arm.PLAIN else None
    engine = Engine(spec)
    prepared = dataset.load(dataset.prepare(spec, engine.tokenizer, cache_dir() / "data"))

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
        if snr:
            atomic_write_json(snr_file, snr.model_dump(mode="json"))
        record_setup(folder, prepared, weights, scan, dist.get_world_size(), begun, spec.slimadam_rules)

    outcome = finetune(
        engine, spec, prepared, folder, weights=weights, observe=watch, begin=begin, beat=beat, workers=begun
    )
    about = {"model": spec.model_name_or_path, "arm": spec.arm, **asdict(outcome)}
    rank0_does(lambda: atomic_write_json(folder / "trial.json", about))
    return outcome


# --- SNRs of second moments ---


def recorded_snr(
    specs: Sequence[TrainSpec],
    file: Path,
    data: Path,
    *,
    workers: int | None = None,
    beat: Callable[[], None] = lambda: None,
) -> SnrRecord:
    """Return what `file` records for fine-tunings of one model, one of each kind of adapter; else measure it.

    A collective; nothing is written. data: the folder of tokenised data. workers: those that will train, by default as
    many as there are here; the batches are theirs. beat: called after each micro-step.

    Raises:
        ConfigError: the file is damaged, was changed, or belongs to another base or other settings.
        TrainingDiverged: a loss or gradient norm is not finite.
    """
    recorded = rank0_does(lambda: _read(file, specs))
    if recorded is not None:
        return recorded
    adapters = [_measure(snr_spec(spec), data, workers, beat) for spec in specs]
    return SnrRecord(
        model=specs[0].model_name_or_path,
        fingerprint=rank0_does(lambda: base_fingerprint(specs[0])),
        steps=STEPS,
        skipped=SKIPPED,
        cutoff=CUTOFF,
        adapters=adapters,
    ).sealed()


def _read(file: Path, specs: Sequence[TrainSpec]) -> SnrRecord | None:
    if not file.is_file():
        return None
    record = read_snr(file)
    record.check(file, specs)
    require_base(specs[0], record.fingerprint)
    return record


def _measure(spec: TrainSpec, data: Path, workers: int | None, beat: Callable[[], None]) -> AdapterSnr:
    """Train an adapter for some steps, and return the SNRs of its second moments."""
    meter, key = _train(spec, data, workers, beat)
    gc.collect()  # the next engine, or what is evaluated, may not fit beside this one
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return AdapterSnr(
        use_dora=spec.use_dora,
        use_rslora=spec.use_rslora,
        lora_target=spec.lora_target,
        lora_rank=spec.lora_rank,
        trial=spec.trial_id(),
        data=key,
        kinds=meter.kinds(),
        factors=meter.factors(),
    )


def _train(spec: TrainSpec, data: Path, workers: int | None, beat: Callable[[], None]) -> tuple[SnrMeter, str]:
    """Return what was measured in the steps of a fine-tuning, and the key of its data."""
    engine = Engine(spec)
    prepared = all_do(lambda: dataset.load(dataset.prepare(spec, engine.tokenizer, data)))
    training = Training(engine, spec, prepared, None, beat, workers)
    engine.load_state(engine.initial_state(spec.seed, spec.init_lora_weights))
    training.choose_layout()
    training.set_optimizer()
    meter = SnrMeter(engine.tensors)
    for step in range(1, training.steps + 1):
        done = training.step(step)
        if not done.finite:
            raise TrainingDiverged(
                f"The SNRs for slimadam_rules: auto cannot be measured: loss {done.metrics['loss']} at step {step} of "
                f"a plain fine-tuning. Lower learning_rate ({spec.learning_rate}), or write rules."
            )
        if step > SKIPPED:
            meter.add(engine.read_state(step, {}).optimizer[MOMENTS[1]])
    engine.check_base()
    return meter, prepared.info["key"]
