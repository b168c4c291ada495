"""From the spec's search block to Ray Tune's space, searcher and scheduler."""

from __future__ import annotations

import logging
from typing import Any

from ray.tune import choice as one_of
from ray.tune import grid_search, loguniform, randint, uniform
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler
from ray.tune.search import BasicVariantGenerator, SearchAlgorithm, Searcher
from ray.tune.search.optuna import OptunaSearch

from tune.plan import Study
from tune.spec import Space, SweepSpec

#: Under this key a grid's trials carry their values: one list, so that duplicates left out by the plan stay out.
POINT = "point"


def param_space(study: Study) -> dict[str, Any]:
    """Tune's `param_space`: the planned points of a grid, or a distribution per dotted key."""
    if study.trials is not None:
        return {POINT: grid_search(list(study.trials))}
    return {key: _domain(space) for key, space in study.parameters.items()}


def values(config: dict[str, Any]) -> dict[str, Any]:
    """The dotted keys and values of a Tune trial's config."""
    return config.get(POINT, config)


def searcher(study: Study, sweep: SweepSpec) -> Searcher | SearchAlgorithm:
    """Grid and random by Tune's variant generator, or Optuna's TPE; all repeat for a `search_seed`."""
    if sweep.search_alg == "optuna":
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        logging.getLogger("ray.tune.search.optuna").setLevel(logging.ERROR)
        # Until five trials are done TPE draws at random; a small sweep would see nothing else with the default of ten.
        sampler = optuna.samplers.TPESampler(seed=sweep.search_seed, n_startup_trials=5)
        return OptunaSearch(metric=sweep.metric.name, mode=mode(sweep), sampler=sampler)
    return BasicVariantGenerator(random_state=sweep.search_seed)


def scheduler(sweep: SweepSpec, total_steps: int) -> TrialScheduler | None:
    """ASHA on our own `step`, or None; a finished trial is never cut before its scores (`stop_last_trials=False`).

    Metric and mode come from the TuneConfig: Tune refuses them in both places.
    """
    if sweep.scheduler == "none":
        return None
    return AsyncHyperBandScheduler(
        time_attr="step",
        grace_period=sweep.grace_period,
        reduction_factor=sweep.reduction_factor,
        max_t=total_steps,
        stop_last_trials=False,
    )


def mode(sweep: SweepSpec) -> str:
    return {"minimize": "min", "maximize": "max"}[sweep.metric.goal]


def _domain(space: Space) -> Any:
    if space.values is not None:
        return one_of(space.values)
    if space.distribution == "int_uniform":
        return randint(int(space.min), int(space.max) + 1)
    if space.distribution == "log_uniform":
        return loguniform(space.min, space.max)
    return uniform(space.min, space.max)
