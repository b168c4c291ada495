"""Ray Tune's schedulers, made from the spec's search block: they decide which trials are stopped early.

The subclasses here use protected attributes of Tune's schedulers, as Ray 2.60 has them.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from tune.config.run_spec import SweepSpec
from tune.config.sections import EVAL_LOSS
from tune.distributed.sweep.searcher import FINISHED, is_finite, values
from tune.distributed.sweep.trial_actors import keep_idle_and_starting
from tune.scheduling.early_stopping import MEDIAN_OF, Cuts
from tune.scheduling.median_rule import MedianRule
from tune.scheduling.study import Study


def scheduler(
    study: Study, sweep: SweepSpec, cuts: Cuts | None, known: Mapping[str, Sequence[tuple[int, float]]] | None = None
) -> TrialScheduler:
    """Return the scheduler on our own `step` and `eval_loss`; without `cuts` none is cut, and no finished one ever is.

    known: trials of an earlier run by name, with the steps and losses on which they were judged.
    """
    if cuts is None:
        return _Uncut(sweep)
    made: _Halving | _Median = (_Median if sweep.scheduler == "median" else _Halving)(study, sweep, cuts)
    for name, reports in (known or {}).items():
        made.know(name, reports)
    return made


@dataclass(frozen=True)
class _StandIn:
    """A trial with nothing but a name, which is all that the schedulers look at."""

    trial_id: str


class _KeepsActors:
    """Has Tune keep the actors of trials that end for those that follow, as many as run at the same time.

    `_at_once`: trials at the same time; 0 once Tune knows it.
    """

    _at_once: int

    def on_trial_add(self, controller: Any, trial: Any) -> None:
        """Tell Tune, with the first trial; there is no controller where a trial is entered without Tune."""
        if self._at_once and controller is not None:
            keep_idle_and_starting(controller, trial, self._at_once)
            self._at_once = 0
        super().on_trial_add(controller, trial)  # type: ignore[misc]  # of the scheduler that this is mixed into


class _Uncut(_KeepsActors, FIFOScheduler):
    """Stops no trial."""

    def __init__(self, sweep: SweepSpec) -> None:
        super().__init__()
        self._at_once = sweep.max_concurrent_trials


class _Guard:
    """The part that the schedulers share: only trials whose curriculum has decayed by the first cut are judged.

    To a scheduler a trial has the name of its fine-tuning: one that is drawn twice, or again in a resumed run, counts
    once, and is not judged again where it passed.
    """

    _study: Study
    _cuts: Cuts

    def know(self, name: str, reports: Sequence[tuple[int, float]]) -> None:
        """Enter a trial of an earlier run."""
        trial, no_controller = _StandIn(name), cast(Any, None)
        self._enter(no_controller, trial)
        for step, loss in reports:
            self._decide(no_controller, trial, {"step": step, EVAL_LOSS: loss})

    def on_trial_add(self, controller: Any, trial: Any) -> None:
        """Enter a trial that takes part."""
        if (named := self._named(trial)) is not None:
            self._enter(controller, named)

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide whether a trial continues; a finished one, and one at its last step, always does."""
        if result.get("step", self._cuts.total) >= self._cuts.total or result.get(FINISHED):
            return TrialScheduler.CONTINUE
        return self._judge(controller, trial, result)

    def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Enter the last report of a finished trial."""
        self._judge(controller, trial, result)

    def on_trial_remove(self, controller: Any, trial: Any) -> None:
        """Keep the reports of a removed trial."""

    def _judge(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        named = self._named(trial)
        if named is None or not is_finite(result.get(EVAL_LOSS)):
            return TrialScheduler.CONTINUE
        return self._decide(controller, named, result)

    def _named(self, trial: Any) -> _StandIn | None:
        """Return the trial under the name of its fine-tuning; None if it takes no part."""
        spec = self._study.searched(values(trial.config))
        return _StandIn(spec.trial_id()) if self._cuts.comparable(spec.macdrop) else None

    def _enter(self, controller: Any, named: _StandIn) -> None:
        raise NotImplementedError

    def _decide(self, controller: Any, named: _StandIn, result: dict[str, Any]) -> str:
        raise NotImplementedError


class _Halving(_KeepsActors, _Guard, AsyncHyperBandScheduler):
    """ASHA, or asynchronous HyperBand with several brackets. No trial is ever paused, which a lane could not do."""

    def __init__(self, study: Study, sweep: SweepSpec, cuts: Cuts) -> None:
        super().__init__(
            time_attr="step",
            metric=EVAL_LOSS,
            mode="min",
            grace_period=cuts.first,
            reduction_factor=sweep.reduction_factor,
            max_t=cuts.total,
            brackets=cuts.brackets,
            stop_last_trials=False,
        )
        self._study, self._cuts, self._seed = study, cuts, sweep.search_seed
        self._at_once = sweep.max_concurrent_trials

    def _enter(self, controller: Any, named: _StandIn) -> None:
        """Put a trial into the bracket that follows from its name, and not from the order in which trials come."""
        sizes = np.array([len(bracket._rungs) for bracket in self._brackets], dtype=float)
        shares = np.exp(sizes - sizes.max())  # as Ray draws them
        draws = np.random.default_rng([self._seed, zlib.crc32(named.trial_id.encode())])
        number = int(draws.choice(len(self._brackets), p=shares / shares.sum()))
        self._trial_info[named.trial_id] = self._brackets[number]

    def _decide(self, controller: Any, named: _StandIn, result: dict[str, Any]) -> str:
        return AsyncHyperBandScheduler.on_trial_result(self, controller, cast(Any, named), result)


class _Median(_KeepsActors, _Guard, FIFOScheduler):
    """Stops a trial whose best loss is above the median of the other trials' means, each from the first cut on."""

    def __init__(self, study: Study, sweep: SweepSpec, cuts: Cuts) -> None:
        super().__init__()
        self._study, self._cuts = study, cuts
        self._at_once = sweep.max_concurrent_trials
        self._rule = MedianRule(MEDIAN_OF)
        self._stopped: set[str] = set()

    def _enter(self, controller: Any, named: _StandIn) -> None:
        """Do nothing: a trial counts from its first report on."""

    def _decide(self, controller: Any, named: _StandIn, result: dict[str, Any]) -> str:
        trial, step = named.trial_id, result["step"]
        if trial not in self._stopped:
            last = self._rule.last(trial)
            # Losses from before the first cut must not count, as the best of a trial or otherwise.
            if step < self._cuts.first or (last is not None and step <= last):
                return TrialScheduler.CONTINUE
            if not self._rule.stops(trial, step, result[EVAL_LOSS]):
                return TrialScheduler.CONTINUE
            self._stopped.add(trial)
        return TrialScheduler.STOP
