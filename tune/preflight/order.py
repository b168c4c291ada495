"""The order of a run's models: which trains when, by the scheduler of a real run in virtual time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tune.config.run_spec import RunSpec
from tune.preflight.forecast import Measured, trial_seconds
from tune.scheduling.allocation import Room, evaluator_room, lane_kind
from tune.scheduling.resources import resources
from tune.scheduling.simulation import Simulation, StageTimes, StudyTimes, Timeline
from tune.scheduling.study import Study
from tune.storage.capacity import cpus


def study_times(run: RunSpec, study: Study, steps: int, found: Measured) -> StudyTimes:
    """Return the parts of a study with their seconds, as a probe found them."""
    one, gpus, ray = trial_seconds(study, steps, found), _cluster_gpus(), study.ray
    search = StageTimes((one,) * study.searched_count, found.validations, run.sweep.max_concurrent_trials)
    final = StageTimes((one,) * study.final_count, found.tests, study.final_count)
    return StudyTimes(
        name=study.name,
        kind=lane_kind(ray, gpus),
        evaluators=ray.evaluators,
        evaluator=evaluator_room(ray, gpus) * (1 / ray.evaluators),
        stages=(search, final) if study.search else (final,),
        open_s=found.load,
        base_s=study.base * (found.tests + (found.validations if study.search else 0.0)),
        load_s=found.load,
    )


def order(run: RunSpec, times: Sequence[StudyTimes]) -> Timeline:
    """Return which study trains when on this machine, or on a cluster that holds the largest model's request."""
    most = run.sweep.max_concurrent_models
    return Simulation(times, _room(run), most=None if most == "auto" else most).run()


def _room(run: RunSpec) -> Room:
    here = Room(float(cpus()), float(torch.cuda.device_count())) if run.ray.address is None else Room(0.0, 0.0)
    # Also where the plan is made on a smaller machine than the run.
    needs = [resources(ray, cluster_gpus=_cluster_gpus()) for ray in run.rays()]
    return Room(max(here.cpus, *(each.cpus for each in needs)), max(here.gpus, *(each.gpus for each in needs)))


def _cluster_gpus() -> float:
    """Return 1 where there are GPUs, of which workers and actors get one each by default, else 0."""
    return 1.0 if torch.cuda.is_available() else 0.0
