"""From the spec's search block to Ray Tune's space, searcher and scheduler."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray.tune import choice as one_of
from ray.tune import grid_search, loguniform, randint, uniform
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler
from ray.tune.search import BasicVariantGenerator, SearchAlgorithm, Searcher
from ray.tune.search.optuna import OptunaSearch

from tune.asha import Cuts
from tune.blocks import EVAL_LOSS
from tune.plan import Study
from tune.spec import Space, SweepSpec

#: Under this key a grid's trials carry their values: one list, so that duplicates left out by the plan stay out.
POINT = "point"
#: In the last report of a trial that was trained and scored to its end.
FINISHED = "finished"


def param_space(study: Study) -> dict[str, Any]:
    """Tune's `param_space`: the planned points of a grid, or a distribution per dotted key."""
    if study.trials is not None:
        return {POINT: grid_search(list(study.trials))}
    return {key: _domain(space) for key, space in study.parameters.items()}


def values(config: dict[str, Any]) -> dict[str, Any]:
    """The dotted keys and values of a Tune trial's config."""
    return config.get(POINT, config)


@dataclass(frozen=True)
class Past:
    """What an earlier run of the same folder drew, and what came of it.

    `objectives` None: stopped, failed or diverged; `ended` False: to be drawn again, as it was interrupted.
    """

    drawn: dict[str, Any]
    objectives: tuple[float, ...] | None
    ended: bool = True


def searcher(study: Study, sweep: SweepSpec, past: Sequence[Past] = ()) -> Searcher | SearchAlgorithm:
    """Grid and random by Tune's variant generator, or Optuna's TPE; all repeat for a `search_seed`.

    Optuna's draws depend on results and their order, so that a resumed search goes on from its `past`.
    """
    if sweep.search_alg == "optuna":
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        logging.getLogger("ray.tune.search.optuna").setLevel(logging.ERROR)
        # Until five trials are done TPE draws at random; a small sweep would see nothing else with the default of ten.
        # A resumed one must not draw its first points again.
        sampler = optuna.samplers.TPESampler(seed=sweep.search_seed + len(past), n_startup_trials=5)
        names = [metric.name for metric in sweep.metric]
        modes = [{"minimize": "min", "maximize": "max"}[metric.goal] for metric in sweep.metric]
        if len(names) == 1:
            return _Optuna(past, metric=names[0], mode=modes[0], sampler=sampler)
        return _Optuna(past, metric=names, mode=modes, sampler=sampler)
    return BasicVariantGenerator(random_state=sweep.search_seed)


class _Optuna(OptunaSearch):
    """Tells Optuna the truth about trials that were stopped early: they have no objective, and count as pruned.

    `OptunaSearch` looks for every metric in every report, takes the last report of a stopped trial for its result, and
    with several metrics tells Optuna values of None, which it refuses, so that the trial would stay open for ever.
    """

    def __init__(self, past: Sequence[Past], **settings: Any) -> None:
        super().__init__(**settings)
        self._past = tuple(past)

    def set_search_properties(self, metric: Any, mode: Any, config: dict[str, Any], **spec: Any) -> bool:
        done = super().set_search_properties(metric, mode, config, **spec)
        from optuna.trial import TrialState, create_trial

        for past in self._past:
            if not past.ended:
                self._ot_study.enqueue_trial(past.drawn)
                continue
            state = TrialState.PRUNED if past.objectives is None else TrialState.COMPLETE
            self._ot_study.add_trial(
                create_trial(state=state, values=past.objectives, params=past.drawn, distributions=self._space)
            )
        return done

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if self.metric in result if isinstance(self.metric, str) else True:
            super().on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        names = [self.metric] if isinstance(self.metric, str) else self.metric
        whole = result and result.get(FINISHED) and all(_finite(result.get(name)) for name in names)
        super().on_trial_complete(trial_id, result if whole else None, error)


def scheduler(study: Study, sweep: SweepSpec, cuts: Cuts | None) -> TrialScheduler | None:
    """ASHA on our own `step` and `eval_loss`, or None; a trial that reached its end is not cut before its scores."""
    return None if cuts is None else _AfterDecay(study, sweep, cuts)


class _AfterDecay(AsyncHyperBandScheduler):
    """ASHA among the trials whose curriculum has decayed by the first rung (`tune.asha`); others take no part."""

    def __init__(self, study: Study, sweep: SweepSpec, cuts: Cuts) -> None:
        super().__init__(
            time_attr="step",
            metric=EVAL_LOSS,
            mode="min",
            grace_period=cuts.first,
            reduction_factor=sweep.reduction_factor,
            max_t=cuts.total,
            stop_last_trials=False,
        )
        self._study, self._cuts = study, cuts

    def on_trial_add(self, controller: Any, trial: Any) -> None:
        if self._cuts.comparable(self._study.searched(values(trial.config)).macdrop):
            super().on_trial_add(controller, trial)

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if trial.trial_id not in self._trial_info or not 0 <= result.get("step", -1) < self._cuts.total:
            return TrialScheduler.CONTINUE
        return super().on_trial_result(controller, trial, result)

    def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
        if trial.trial_id in self._trial_info:
            super().on_trial_complete(controller, trial, result)

    def on_trial_remove(self, controller: Any, trial: Any) -> None:
        self._trial_info.pop(trial.trial_id, None)


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _domain(space: Space) -> Any:
    if space.values is not None:
        return one_of(space.values)
    if space.distribution == "int_uniform":
        return randint(int(space.min), int(space.max) + 1)
    if space.distribution == "log_uniform":
        return loguniform(space.min, space.max)
    return uniform(space.min, space.max)
