"""What a run will do, worked out before anything starts: studies, arms, trials, resources. Pure; no Ray."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from macdrop.errors import ConfigError
from tune.blocks import ARMS
from tune.spec import MacDropSpec, RaySpec, RunSpec, Space, TrainSpec, points, slug, with_values


@dataclass(frozen=True)
class Study:
    """One model's part of a run.

    `spec` is the default fine-tuning; `plain` the baselines, one for each distinct setting of the keys that are not
    MacDrop's; `trials` the searched values (dotted keys) of a grid, None when a searcher draws them from `parameters`.
    """

    name: str
    spec: TrainSpec
    base: bool
    plain: tuple[TrainSpec, ...]
    trials: tuple[dict[str, Any], ...] | None
    samples: int
    parameters: dict[str, Space]

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
        ConfigError: two models share a name, or a grid holds a point that its model refuses.
    """
    for spec in run.studies():
        if spec.macdrop.scope != "massive":
            raise ConfigError(
                f"macdrop.scope is {spec.macdrop.scope!r}, which is for one fine-tuning (macdrop train).\n"
                f"A sweep trains placebos beside MacDrop: list them under sweep.arms ({', '.join(ARMS)})."
            )
    planned = [_study(run, spec) for spec in run.studies()]
    by_name: dict[str, str] = {}
    for study in planned:
        model = study.spec.model_name_or_path
        if by_name.setdefault(study.name, model) != model:
            raise ConfigError(
                f"sweep.models lists {by_name[study.name]} and {model}: both would be called {study.name} in the run's "
                "folder and tables. Give one of the folders another name (a link will do)."
            )
    models = [study.spec.model_name_or_path for study in planned]
    twice = sorted({model for model in models if models.count(model) > 1})
    if twice:
        raise ConfigError(
            f"sweep.models lists {', '.join(twice)} more than once. Give each model one entry; what should vary "
            "within a model goes under sweep.parameters."
        )
    return planned


def _study(run: RunSpec, spec: TrainSpec) -> Study:
    """Plan one model.

    The plain arm: in a grid one baseline for each point of the other keys; with a searcher one for each combination of
    their listed values where these are no more than the trials to be drawn, else the default setting alone.
    """
    sweep = run.sweep
    arms = set(sweep.arms)
    others = {key: space for key, space in sweep.parameters.items() if not key.startswith("macdrop.")}
    parameters = sweep.parameters if "macdrop" in arms else others
    if "macdrop" not in arms:
        spec = _plain(spec)
    plain: list[TrainSpec] = []
    if "plain" in arms:
        listed = points({key: space.values for key, space in others.items() if space.values is not None})
        if sweep.search_alg != "grid" and len(listed) > sweep.num_samples:
            listed = [{}]
        plain = [_plain(with_values(spec, point)).canonical() for point in listed]
        plain = list({baseline.trial_id(): baseline for baseline in plain}.values())
    trials: tuple[dict[str, Any], ...] | None = ()
    if arms != {"base"} and sweep.search_alg == "grid":
        trials = _grid(spec, parameters, {baseline.trial_id() for baseline in plain}, arms)
    elif parameters and arms != {"base"}:
        trials = None
    return Study(
        name=slug(spec.model_name_or_path),
        spec=spec,
        base="base" in arms,
        plain=tuple(plain),
        trials=trials,
        samples=sweep.num_samples if trials is None else len(trials),
        parameters=parameters,
    )


def _grid(
    spec: TrainSpec, parameters: dict[str, Space], baselines: set[str], arms: set[str]
) -> tuple[dict[str, Any], ...]:
    """The points of a grid, without those that are a baseline, another point in other words, or of no arm."""
    seen = set(baselines)
    kept = []
    for point in points({key: space.values for key, space in parameters.items()}):
        trial = with_values(spec, point).canonical()
        if trial.arm in arms and trial.trial_id() not in seen:
            seen.add(trial.trial_id())
            kept.append(point)
    return tuple(kept)


def _plain(spec: TrainSpec) -> TrainSpec:
    return spec.model_copy(update={"macdrop": MacDropSpec(k=0, p0=0.0)})


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
    """Refuse a run that this machine's CPUs can never hold, before Ray is started. A cluster is asked when joined.

    Raises:
        ConfigError: with the arithmetic.
    """
    cpus = os.cpu_count() or 1
    needs = resources(spec, cluster_gpus=0)
    if spec.address is None and needs.cpus > cpus:
        raise ConfigError(
            f"The run needs more CPUs than this machine has, {needs.cpus:g} of {cpus}:\n"
            f"ray.lanes {spec.lanes} x ray.num_workers {spec.num_workers} x ray.cpus_per_worker "
            f"{spec.cpus_per_worker:g} + ray.evaluators {spec.evaluators} x ray.cpus_per_evaluator "
            f"{spec.cpus_per_evaluator:g} = {needs.cpus:g}.\n"
            "Lower ray.num_workers or ray.lanes, or set ray.address to a cluster that has more."
        )


def one_lane(spec: RaySpec) -> RaySpec:
    """What `macdrop train` needs of it: one lane's worth of workers, and nobody to score."""
    return spec.model_copy(update={"lanes": 1, "evaluators": 1, "cpus_per_evaluator": 0.0, "gpus_per_evaluator": 0.0})
