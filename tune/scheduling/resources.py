"""Resources of a run: lanes, evaluators, CPUs and GPUs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from macdrop.errors import ConfigError
from tune.config.run_spec import RaySpec
from tune.storage.capacity import cpus


@dataclass(frozen=True)
class Resources:
    """CPUs and GPUs that lanes and evaluators hold while a run is going."""

    cpus: float
    gpus: float
    sum: str


class GpuShares(NamedTuple):
    """GPUs of one worker and of one evaluator."""

    per_worker: float
    per_evaluator: float


def resources(spec: RaySpec, *, cluster_gpus: float) -> Resources:
    """Add up what a run needs; the sum is written out for people."""
    shares = gpu_shares(spec, cluster_gpus)
    workers = spec.lanes * spec.num_workers
    cpus = workers * spec.cpus_per_worker + spec.evaluators * spec.cpus_per_evaluator
    gpus = workers * shares.per_worker + spec.evaluators * shares.per_evaluator
    return Resources(
        cpus,
        gpus,
        f"{spec.lanes} lane(s) x {spec.num_workers} worker(s)"
        f" x ({spec.cpus_per_worker:g} CPU, {shares.per_worker:g} GPU)"
        f" + {spec.evaluators} evaluator(s) x ({spec.cpus_per_evaluator:g} CPU, {shares.per_evaluator:g} GPU)"
        f" = {cpus:g} CPU, {gpus:g} GPU",
    )


def gpu_shares(spec: RaySpec, cluster_gpus: float) -> GpuShares:
    """GPUs per worker and per evaluator: as written, else 1 each where there are GPUs and 0 where there are none."""
    default = 1.0 if cluster_gpus else 0.0
    worker = default if spec.gpus_per_worker is None else spec.gpus_per_worker
    evaluator = default if spec.gpus_per_evaluator is None else spec.gpus_per_evaluator
    return GpuShares(worker, evaluator)


def needs_of(specs: Iterable[RaySpec], *, cluster_gpus: float) -> str:
    """Return what the models of a run need, as text: the sum, or one for each of several distinct settings."""
    return "; or ".join(dict.fromkeys(resources(spec, cluster_gpus=cluster_gpus).sum for spec in specs))


def check_local(spec: RaySpec) -> None:
    """Refuse a model that the CPUs here can never hold, before Ray is started. A cluster is asked when joined.

    Raises:
        ConfigError: with the arithmetic.
    """
    there, needs = cpus(), resources(spec, cluster_gpus=0)
    if spec.address is None and needs.cpus > there:
        raise ConfigError(
            f"The run needs more CPUs than this process may use, {needs.cpus:g} of {there}:\n"
            f"ray.lanes {spec.lanes} x ray.num_workers {spec.num_workers} x ray.cpus_per_worker "
            f"{spec.cpus_per_worker:g} + ray.evaluators {spec.evaluators} x ray.cpus_per_evaluator "
            f"{spec.cpus_per_evaluator:g} = {needs.cpus:g}.\n"
            "Lower ray.num_workers or ray.lanes, or set ray.address to a cluster that has more."
        )


def one_lane(spec: RaySpec) -> RaySpec:
    """Return the resources of `macdrop train`: one lane, no evaluators."""
    return spec.model_copy(update={"lanes": 1, "evaluators": 1, "cpus_per_evaluator": 0.0, "gpus_per_evaluator": 0.0})
