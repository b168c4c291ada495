"""Processes of Tune's trials: kept for later trials while they live.

`_Keeping` overrides protected methods of Tune's controller, as Ray 2.60 has them;
`tests/distributed/test_trial_actors.py` fails if another version changes them.
"""

from __future__ import annotations

from typing import Any

from ray.exceptions import RayActorError
from ray.tune import TuneError
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial

from tune.distributed.cluster import ray_internals


def keep_idle_and_starting(controller: Any, trial: Trial, most: int) -> None:
    """Keep up to `most` idle actors for later trials, and never replace an actor that is still starting.

    Tune's `reuse_actors` alone keeps one idle actor, and more only while trials wait for theirs; a trial that waits
    takes an idle one, and its own, which is starting, is killed. Where trials end more often than processes start, none
    ever starts, and each attempt costs seconds of a CPU.

    controller: the one that Tune passes to a scheduler. trial: one of those whose actors are alike.
    """
    inner = controller._tune_controller
    inner._actor_cache.increase_max(trial.placement_group_factory, most)
    # Its class, as studies run at the same time, and Tune writes all attributes of an instance to the run folder.
    inner.__class__ = _Keeping


class _Keeping(TuneController):
    """Tune's controller of one study, with the rules of `keep_idle_and_starting`."""

    _trial_to_actor: dict[Trial, Any]
    _actor_cache: Any

    def _maybe_reuse_cached_actor(self, trial: Trial) -> bool:
        """Give a trial a living idle actor, unless its own is starting.

        One that waits for resources takes an idle actor: those hold theirs until the search ends.
        """
        if trial in self._resetting_trials:
            return True
        own = self._trial_to_actor.get(trial)
        if own is not None and self._actor_manager.is_actor_started(own):
            return False
        self._remove_dead(trial.placement_group_factory)
        return bool(super()._maybe_reuse_cached_actor(trial))

    def _remove_dead(self, resources: Any) -> None:
        """Remove dead actors from the front of the idle ones: nothing watches those."""
        while idle := self._actor_cache._cached_objects[resources]:
            handle, _ = self._actor_manager._live_actors_to_ray_actors_resources[idle[0]]
            if ray_internals.alive(handle):
                break
            dead = self._actor_cache.pop_cached_object(resources)
            dead.set_on_stop(None)
            dead.set_on_error(None)
            self._remove_actor(tracked_actor=dead)

    def _trial_task_failure(self, trial: Trial, exception: Exception) -> None:
        """Retry a trial whose idle actor died when it got the trial.

        Tune calls this for the death of the actor, and again for the task that it did not take. The second call would
        find the trial waiting for its retry, and end it for good.
        """
        if isinstance(exception, RayActorError):
            self._resetting_trials.discard(trial)
            if trial.status == Trial.PENDING and trial not in self._trial_to_actor:
                return
        super()._trial_task_failure(trial, exception)

    def _on_trial_reset(self, trial: Trial, success: bool) -> None:
        """Give a trial another actor where an idle one did not take it; Tune would end it, unknown to the searcher."""
        if success:
            super()._on_trial_reset(trial, success)
            return
        self._resetting_trials.remove(trial)
        self._set_trial_status(trial, Trial.RUNNING)  # the only status from which a trial is retried
        self._unstage_trial_with_resources(trial)
        super()._trial_task_failure(trial, TuneError("the thread of the actor's last trial did not end"))
