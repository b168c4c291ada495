"""What a run will do, worked out before anything starts: studies, arms, trials, resources. Pure; no Ray."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from typing import Any

from macdrop.errors import ConfigError
from tune.spec import MacDropSpec, RaySpec, RunSpec, TrainSpec, slug, with_values


@dataclass(frozen=True)
class Study:
    """One model's part of a run.

    `spec` is the default fine-tuning; `plain` the baselines, one for each distinct setting of the keys that are not
    MacDrop's; `trials` the searched values (dotted keys) of a grid, None when a searcher draws them.
    """

    name: str
    spec: TrainSpec
    base: bool
    plain: tuple[TrainSpec, ...]
    trials: tuple[dict[str, Any], ...] | None
    samples: int

    def searched(self, values: dict[str, Any]) -> TrainSpec:
        """The canonical fine-tuning for a point of the search space."""
        return with_values(self.spec, values).canonical()

    @property
    def count(self) -> int:
        """Fine-tunings at most (a searcher may draw the same one twice)."""
        return len(self.plain) + self.samples


def studies(run: RunSpec) -> list[Study]:
    """The studies of a run, in the order of its models.

    Raises:
        ConfigError: two models share a name, or a grid holds a value that its model refuses.
    """
    planned = [_study(run, spec) for spec in run.studies()]
    names = [study.name for study in planned]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"sweep.models lists {', '.join(twice)} more than once. Give each model one entry; what should vary "
            "within a model goes under sweep.parameters."
        )
    return planned


def _study(run: RunSpec, spec: TrainSpec) -> Study:
    sweep = run.sweep
    arms = set(sweep.arms)
    if "macdrop" not in arms:
        spec = _plain(spec)
    base_only = arms == {"base"}
    trials: tuple[dict[str, Any], ...] | None = None
    plain: list[TrainSpec] = []
    if sweep.search_alg == "grid" and not base_only:
        points = _grid(sweep.parameters)
        if "plain" in arms:
            plain = [_plain(with_values(spec, point, partial=True)).canonical() for point in points]
        seen = {spec.trial_id() for spec in plain}
        kept = []
        for point in points:
            trial = with_values(spec, point).canonical().trial_id()
            if trial not in seen:
                seen.add(trial)
                kept.append(point)
        trials = tuple(kept)
        samples = len(kept)
    else:
        plain = [_plain(spec).canonical()] if "plain" in arms else []
        samples = 0 if base_only else sweep.num_samples
        trials = () if base_only else None
    return Study(
        name=slug(spec.model_name_or_path),
        spec=spec,
        base="base" in arms,
        plain=tuple({baseline.trial_id(): baseline for baseline in plain}.values()),
        trials=trials,
        samples=samples,
    )


def _plain(spec: TrainSpec) -> TrainSpec:
    return spec.model_copy(update={"macdrop": MacDropSpec(k=0, p0=0.0)})


def _grid(parameters: dict[str, Any]) -> list[dict[str, Any]]:
    keys = list(parameters)
    return [
        dict(zip(keys, point, strict=True)) for point in itertools.product(*(parameters[key].values for key in keys))
    ]


@dataclass(frozen=True)
class Resources:
    """CPUs and GPUs that lanes and evaluators hold while a run is going."""

    cpus: float
    gpus: float
    sum: str


def resources(spec: RaySpec, *, cluster_gpus: float) -> Resources:
    """Add up what a run needs; the sum is written out for people."""
    gpus_per_worker, gpus_per_evaluator = gpu_shares(spec, cluster_gpus)
    workers = spec.lanes * spec.num_workers
    cpus = workers * spec.cpus_per_worker + spec.evaluators * spec.cpus_per_evaluator
    gpus = workers * gpus_per_worker + spec.evaluators * gpus_per_evaluator
    return Resources(
        cpus,
        gpus,
        f"{spec.lanes} lane(s) x {spec.num_workers} worker(s) x ({spec.cpus_per_worker:g} CPU, {gpus_per_worker:g} GPU)"
        f" + {spec.evaluators} evaluator(s) x ({spec.cpus_per_evaluator:g} CPU, {gpus_per_evaluator:g} GPU)"
        f" = {cpus:g} CPU, {gpus:g} GPU",
    )


def gpu_shares(spec: RaySpec, cluster_gpus: float) -> tuple[float, float]:
    """GPUs per worker and per evaluator: as written, else 1 each where there are GPUs and 0 where there are none."""
    default = 1.0 if cluster_gpus else 0.0
    worker = default if spec.gpus_per_worker is None else spec.gpus_per_worker
    evaluator = default if spec.gpus_per_evaluator is None else spec.gpus_per_evaluator
    return worker, evaluator


def check_local(spec: RaySpec) -> None:
    """Refuse a run that this machine's CPUs can never hold, before Ray is started.

    Raises:
        ConfigError: with the arithmetic.
    """
    cpus = os.cpu_count() or 1
    workers = spec.lanes * spec.num_workers
    if workers * spec.cpus_per_worker > cpus:
        raise ConfigError(
            f"ray.lanes {spec.lanes} x ray.num_workers {spec.num_workers} x ray.cpus_per_worker "
            f"{spec.cpus_per_worker:g} = {workers * spec.cpus_per_worker:g} CPUs, but this machine has {cpus}.\n"
            "Lower ray.num_workers or ray.lanes, or set ray.address to a cluster that has more."
        )
