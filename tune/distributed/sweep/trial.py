"""Tune's side of a trial: place an order, relay its progress, report its scores."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.tune
from ray.actor import ActorHandle
from ray.tune import Callback

from tune.config.run_spec import TrainSpec, dump
from tune.config.sections import EVAL_LOSS
from tune.distributed.lanes.dispatcher import call
from tune.distributed.sweep.searcher import FINISHED, values
from tune.scheduling.history import FAILED
from tune.scheduling.queue import TrainTask
from tune.scheduling.study import Study
from tune.storage.run_folder import TrialRecord
from tune.storage.states import Stage, TaskState

POLL_EVERY_S = 0.2
#: Times that Tune starts a trial's actor again after its process died; the order knows nothing of it.
RESTARTS = 5


@dataclass(frozen=True)
class TrialContext:
    """Where the trials of one study place their orders."""

    dispatcher: ActorHandle
    study: Study
    run_dir: str
    data: str
    weights: str | None
    width: int

    def task(self, spec: TrainSpec, stage: str, drawn: dict[str, Any] | None = None) -> TrainTask:
        """The order for a canonical fine-tuning in a stage of its study; its folder lies in the run folder."""
        name = spec.trial_id()
        return TrainTask(
            id=name,
            study=self.study.name,
            spec=dump(spec),
            folder=str(Path(self.run_dir) / "trials" / name),
            data=self.data,
            weights=self.weights if spec.arm != "plain" else None,
            engine_key=spec.engine_key(),
            width=self.width,
            stage=stage,
            cell=self.study.cell(spec),
            drawn=drawn,
        )


def run_trial(config: dict[str, Any], *, context: TrialContext) -> None:
    """Tune's function trainable: when Tune starts it again, it follows the order that it had placed.

    However the order ended, the function returns: Tune would try again what the lanes have tried.
    """
    task = context.task(context.study.searched(values(config)), Stage.SEARCH, values(config))
    # What an earlier run of this folder validated, a scheduler has to hear of: a resumed lane begins after it.
    record = TrialRecord(Path(task.folder), within=Path(context.run_dir))
    evaluated = [row for row in record.metrics() if row.get(EVAL_LOSS) is not None]
    call(context.dispatcher, "place", task, ray.tune.get_context().get_trial_id(), evaluated)
    step = -1
    while True:
        news = call(context.dispatcher, "poll", task.id, step)
        for metrics in news["metrics"]:
            step = metrics["step"]
            ray.tune.report({"step": step, EVAL_LOSS: metrics["eval_loss"]})
        if news["state"].is_final:
            break
        time.sleep(POLL_EVERY_S)
    if news["state"] == TaskState.DONE:
        outcome = news["outcome"]
        last = {"step": outcome["step"], EVAL_LOSS: outcome["eval_loss"], FINISHED: True}
        ray.tune.report({**last, **news["scores"]})
    elif news["state"] == TaskState.FAILED:
        ray.tune.report({FAILED: True})
    # stopped or diverged: an end that says something about the setting, but has no objective


class CancelStopped(Callback):
    """Tells the dispatcher when Tune has ended a trial, so that a lane need not finish what nobody waits for."""

    def __init__(self, context: TrialContext) -> None:
        self.context = context

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._cancel(trial)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._cancel(trial)

    def _cancel(self, trial: Any) -> None:
        name = self.context.study.searched(values(trial.config)).trial_id()
        last = trial.last_result or {}
        call(self.context.dispatcher, "cancel", name, trial.trial_id, None if last.get(FINISHED) else last.get("step"))
