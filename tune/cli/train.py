"""One fine-tuning from the command line: in this process, under torchrun, or on Ray Train workers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from macdrop.errors import ConfigError
from tune.config.run_spec import RunSpec, TrainSpec, dump
from tune.trackers.sync import OneTrial
from tune.training.finetune import Observer, Outcome, Word, finetune
from tune.training.massive_weights import cache_dir

FOLLOW_EVERY_S = 0.3


def train(spec: RunSpec, folder: Path, *, observe: Observer, resume: bool) -> Outcome:
    """Train the run's one model into `folder`; see `finetune` for what lies there afterwards.

    Raises:
        ConfigError: the spec lists several models, the folder holds another run, a value does not fit.
        and whatever `finetune` raises.
    """
    models = spec.studies()
    if len(models) != 1:
        raise ConfigError(f"train takes one model, and sweep.models lists {len(models)}. Use `macdrop sweep` for them.")
    if folder.exists() and any(folder.iterdir()) and not resume:
        raise ConfigError(f"output_dir {folder} is not empty. Add --resume to go on there, or choose another one.")
    with OneTrial(spec.report_to, models[0], folder, warn=lambda text: print(text, file=sys.stderr)) as followed:
        if spec.ray.num_workers == 1 and spec.ray.address is None:
            outcome = train_here(models[0], folder, observe=observe, threads=spec.ray.threads_per_worker)
        else:
            outcome = _train_on_workers(spec, models[0], folder, observe)
        followed.status = outcome.status
    return outcome


def train_here(
    spec: TrainSpec, folder: Path, *, observe: Observer | None, threads: int, beat: Callable[[], None] = lambda: None
) -> Outcome:
    """Train in the current process group (of one, unless torchrun or Ray Train made a larger one)."""
    import torch.distributed as dist

    from tune.data import dataset as data
    from tune.storage.atomic import atomic_write_json, atomic_write_yaml
    from tune.storage.run_folder import TrialRecord
    from tune.training.collectives import rank0_does
    from tune.training.engine import Engine
    from tune.training.process_group import prepare_process
    from tune.training.reproduce import write_script

    prepare_process(threads)
    spec = spec.canonical()
    weights = scanned(spec) if spec.arm != "plain" else None
    engine = Engine(spec)
    prepared = data.load(data.prepare(spec, engine.tokenizer, cache_dir() / "data"))

    record = TrialRecord(folder, within=folder)

    def watch(metrics: dict[str, Any]) -> Word:
        record.log([metrics])
        return observe(metrics) if observe else "go_on"

    def prepare() -> None:
        atomic_write_yaml(folder / "config.yaml", dump(spec))
        scan = folder / "massive_weights.json"
        if weights:
            weights.save(scan)
        write_script(folder, prepared, weights, scan, dist.get_world_size())

    rank0_does(prepare)
    outcome = finetune(engine, spec, prepared, folder, weights=weights, observe=watch, beat=beat)
    about = {"model": spec.model_name_or_path, "arm": spec.arm, **asdict(outcome)}
    rank0_does(lambda: atomic_write_json(folder / "trial.json", about))
    return outcome


def scanned(spec: TrainSpec) -> Any:
    """The model's massive weights, from the cache or by a scan of a whole (not partitioned) copy of it."""
    from macdrop import load_model, load_tokenizer
    from tune.training.massive_weights import known_weights, massive_weights
    from tune.zoo.catalog import resolve

    known = known_weights(spec)
    if known is not None:
        return known
    source = resolve(spec.model_name_or_path)
    loading = {"revision": spec.model_revision, "trust_remote_code": spec.trust_remote_code}
    model = load_model(
        source,
        dtype="bfloat16" if spec.bf16 else "float32",
        attn_implementation=spec.attn_implementation,
        **loading,
    )
    return massive_weights(spec, model, load_tokenizer(source, **loading))


def _train_on_workers(spec: RunSpec, train_spec: TrainSpec, folder: Path, observe: Observer) -> Outcome:
    """Run `train_here` on Ray Train workers and follow the metrics that rank 0 writes."""
    from tune.distributed.lanes.train_run import Workers
    from tune.storage.atomic import read_jsonl

    file = folder / "metrics.jsonl"
    seen = len(read_jsonl(file)) if file.is_file() else 0
    with Workers(spec.ray, train_spec, folder) as workers:
        while True:
            finished = workers.wait(FOLLOW_EVERY_S)
            rows = read_jsonl(file) if file.is_file() else []
            for metrics in rows[seen:]:
                observe(metrics)
            seen = len(rows)
            if finished:
                return workers.outcome()
