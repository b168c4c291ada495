"""Tune's side of a trial: queue a task, forward its progress, report its scores."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.tune
from ray.actor import ActorHandle
from ray.tune import Callback
from ray.tune.experiment import Trial

from tune.config.run_spec import TrainSpec, dump
from tune.config.sections import EVAL_LOSS, Arm
from tune.distributed.lanes.dispatcher import answer, call, wait_for
from tune.distributed.sweep.searcher import FINISHED, values
from tune.scheduling.history import FAILED
from tune.scheduling.study import Study
from tune.scheduling.tasks import TrainTask
from tune.storage.states import Stage, TaskState
from tune.storage.trial_folder import TrialFolder

#: How long a trial waits for news of its task before it asks again.
NEWS_S = 30.0
#: How long an actor waits for the thread of its last trial before it takes the next; that thread may wait for news.
THREAD_S = 2 * NEWS_S
#: How often Tune restarts a trial's actor after its process died; the task is not affected.
RESTARTS = 5


@dataclass(frozen=True)
class TrialContext:
    """All that the trials of one study need to queue their tasks."""

    dispatcher: ActorHandle
    study: Study
    run_dir: str
    data: str
    weights: str | None
    pool: str
    workers_at_start: int | None = None

    def task(self, spec: TrainSpec, stage: Stage, drawn: dict[str, Any] | None = None) -> TrainTask:
        """Return the task of a canonical fine-tuning in a stage of its study, with its folder in the run folder."""
        name = spec.trial_id()
        return TrainTask(
            id=name,
            study=self.study.name,
            spec=dump(spec),
            folder=str(Path(self.run_dir) / "trials" / name),
            data=self.data,
            weights=self.weights if spec.arm != Arm.PLAIN else None,
            engine_key=spec.engine_key(),
            pool=self.pool,
            workers_at_start=self.workers_at_start,
            stage=stage,
            cell=self.study.cell(spec),
            drawn=drawn,
        )


def run_trial(config: dict[str, Any], *, context: TrialContext) -> None:
    """Run one trial as Tune's function trainable; after a restart, follow the task queued before.

    The function returns however the task ended: Tune would retry what the lanes have retried already.
    """
    # Read by this process when it is reused; Tune does not pass the variable on from the driver.
    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", f"{THREAD_S:.0f}")
    task = context.task(context.study.searched(values(config)), Stage.SEARCH, values(config))
    # The scheduler must know the validations of an earlier run of this folder: a resumed lane starts after them.
    record = TrialFolder(Path(task.folder), within=Path(context.run_dir))
    evaluated = [row for row in record.metrics() if row.get(EVAL_LOSS) is not None]
    call(context.dispatcher, "place", task, ray.tune.get_context().get_trial_id(), evaluated)
    news, step = None, -1
    while news is None or not news["state"].is_final:
        news = answer(wait_for(context.dispatcher, NEWS_S, task.id, "news", task.id, step))
        for metrics in news["metrics"] if news else ():
            step = metrics["step"]
            ray.tune.report({"step": step, EVAL_LOSS: metrics["eval_loss"]})
    if news["state"] == TaskState.DONE:
        outcome = news["outcome"]
        last = {"step": outcome["step"], EVAL_LOSS: outcome["eval_loss"], FINISHED: True}
        ray.tune.report({**last, **news["scores"]})
    elif news["state"] == TaskState.FAILED:
        ray.tune.report({FAILED: True})
    # stopped or diverged: informative about the setting, but without objectives


class CancelStopped(Callback):
    """Cancels a trial's task when Tune has ended the trial, so that no lane finishes it in vain."""

    def __init__(self, context: TrialContext) -> None:
        self.context = context

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Cancel the task of a trial that has ended."""
        self._cancel(trial)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Cancel the task of a trial that has failed."""
        self._cancel(trial)

    def _cancel(self, trial: Trial) -> None:
        name = self.context.study.searched(values(trial.config)).trial_id()
        last = trial.last_result or {}
        call(self.context.dispatcher, "cancel", name, trial.trial_id, None if last.get(FINISHED) else last.get("step"))
