"""Ray Tune's space and searcher, made from the spec's search block.

The subclass here uses protected attributes of `OptunaSearch`, as Ray 2.60 has them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ray.tune import choice as one_of
from ray.tune import grid_search, loguniform, randint, uniform
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from tune.config.run_spec import Space, SweepSpec
from tune.config.sections import EVAL_LOSS
from tune.scheduling.history import COMPLETE, FAILED, OPEN, PRUNED, PastTrial
from tune.scheduling.study import Study

#: The key under which listed trials carry their values: a single list, so that omitted points stay omitted.
POINT = "point"
#: In the last report of a trial that was trained and scored to its end.
FINISHED = "finished"


def points(study: Study, sweep: SweepSpec) -> list[dict[str, Any]] | None:
    """Return the points that a search will try, if known beforehand: a grid's, or random ones from `search_seed`.

    None for a searcher whose draws depend on results.
    """
    if study.trials is not None:
        return list(study.trials)
    if sweep.search_alg != "random":
        return None
    draws = np.random.default_rng(sweep.search_seed)
    space = {key: _domain(space) for key, space in study.parameters.items()}
    return [{key: domain.sample(random_state=draws) for key, domain in space.items()} for _ in range(study.samples)]


def param_space(study: Study, listed: Sequence[dict[str, Any]] | None) -> dict[str, Any]:
    """Return Tune's `param_space`: the points of a list, or a distribution per dotted key."""
    if listed is not None:
        return {POINT: grid_search(list(listed))}
    return {key: _domain(space) for key, space in study.parameters.items()}


def values(config: dict[str, Any]) -> dict[str, Any]:
    """Return the dotted keys and values of a Tune trial's config."""
    return config.get(POINT, config)


def optuna_searcher(
    sweep: SweepSpec, past: Sequence[PastTrial] = (), remember: Callable[[int, dict[str, Any]], None] | None = None
) -> Searcher:
    """Return Optuna's TPE, resumed from `past`; `remember` gets each new draw with its number, counted from 0."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("ray.tune.search.optuna").setLevel(logging.ERROR)
    names = [metric.name for metric in sweep.metric]
    modes = [{"minimize": "min", "maximize": "max"}[metric.goal] for metric in sweep.metric]
    one = len(names) == 1
    return _Optuna(
        past,
        remember,
        metric=names[0] if one else names,
        mode=modes[0] if one else modes,
        sampler=_sampler(sweep.search_seed),
    )


def _sampler(seed: int) -> Any:
    """Return a TPE sampler whose n-th draw depends on (seed, n) and the trials known by then alone.

    TPE's own generator would have to be advanced by all earlier draws, each with the results known at its time.
    """
    from optuna.samplers import BaseSampler, TPESampler

    class PerDraw(BaseSampler):
        tpe: TPESampler

        def before_trial(self, study: Any, trial: Any) -> None:
            drawn = np.random.SeedSequence([seed, trial.number]).generate_state(1)
            # TPE draws at random until five trials are done; with its default a small sweep would see nothing else.
            self.tpe = TPESampler(seed=int(drawn[0]), n_startup_trials=5)

        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
            return self.tpe.infer_relative_search_space(study, trial)

        def sample_relative(self, study: Any, trial: Any, search_space: dict[str, Any]) -> dict[str, Any]:
            return self.tpe.sample_relative(study, trial, search_space)

        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
            return self.tpe.sample_independent(study, trial, param_name, param_distribution)

        def __reduce__(self) -> tuple:
            # Tune pickles its searcher into the run folder, and a class within a function cannot be looked up.
            return _sampler, (seed,)

    return PerDraw()


class _Optuna(OptunaSearch):
    """`OptunaSearch` that counts trials that were stopped early as pruned, as they have no objective.

    The original looks for every metric in every report, takes the last report of a stopped trial for its result, and
    with several metrics passes values of None to Optuna, which rejects them, so that the trial stays open forever.
    """

    _ot_study: Any
    _space: Any

    def __init__(
        self, past: Sequence[PastTrial], remember: Callable[[int, dict[str, Any]], None] | None, **settings: Any
    ) -> None:
        super().__init__(**settings)
        self._past, self._remember = tuple(past), remember
        #: Per trial, the steps whose loss has been reported: Tune repeats the last report of a trial that ends.
        self._reported: dict[str, set[int]] = {}

    def set_search_properties(self, metric: Any, mode: Any, config: dict[str, Any], **spec: Any) -> bool:
        """Create the Optuna study, with the trials of earlier runs in it."""
        done = super().set_search_properties(metric, mode, config, **spec)
        from optuna.trial import TrialState, create_trial

        states = {COMPLETE: TrialState.COMPLETE, PRUNED: TrialState.PRUNED, FAILED: TrialState.FAIL}
        for past in self._past:
            if past.state == OPEN:
                self._ot_study.enqueue_trial(past.drawn)
                continue
            on_the_way = dict(past.reported) if self.metric == EVAL_LOSS else {}
            self._ot_study.add_trial(
                create_trial(
                    state=states[past.state],
                    values=past.objectives,
                    params=past.drawn,
                    distributions=self._space,
                    intermediate_values=on_the_way,
                )
            )
        return done

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Draw the values of a trial and remember them."""
        drawn = super().suggest(trial_id)
        number = self._ot_trials[trial_id].number
        if self._remember is not None and number >= len(self._past):
            self._remember(number, self._ot_trials[trial_id].params)
        return drawn

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Report a single objective that is measured during training, by our own step (Tune's count restarts)."""
        loss, trial = result.get(EVAL_LOSS), self._ot_trials[trial_id]
        if self.metric == EVAL_LOSS and is_finite(loss) and trial_id not in self._completed_trials:
            if result["step"] not in self._reported.setdefault(trial_id, set()):
                self._reported[trial_id].add(result["step"])
                trial.report(loss, result["step"])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Pass on the objectives of a trial that has all of them; any other is pruned, or failed."""
        names = [self.metric] if isinstance(self.metric, str) else self.metric
        whole = result and result.get(FINISHED) and all(is_finite(result.get(name)) for name in names)
        failed = error or bool(result and result.get(FAILED))
        super().on_trial_complete(trial_id, result if whole else None, failed)


def is_finite(value: Any) -> bool:
    """Return whether a reported value is a number that can be compared."""
    return value is not None and math.isfinite(value)


def _domain(space: Space) -> Any:
    if space.values is not None:
        return one_of(space.values)
    assert space.min is not None and space.max is not None, "a space has values or limits"
    if space.distribution == "int_uniform":
        return randint(int(space.min), int(space.max) + 1)
    if space.distribution == "log_uniform":
        return loguniform(space.min, space.max)
    return uniform(space.min, space.max)
