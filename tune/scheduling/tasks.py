"""Training tasks and what became of them: plain data that crosses processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tune.storage.states import Stage, TaskState

#: A worker may die under a task (node lost, out of memory); after this many lost lanes the task counts as failed.
MAX_ATTEMPTS = 3


@dataclass(frozen=True)
class TrainTask:
    """One fine-tuning to be done, as plain data that crosses processes.

    `spec` is a dumped TrainSpec; `folder` the trial's folder; `data` the cache of tokenised data; `weights` the file
    with the massive weights, None for a plain adapter; `pool` the pool of lanes that trains it; `stage` decides
    what the adapter is scored on; `cell` is the searched kind of adapter; `drawn` are the values that a search drew;
    `workers_at_start` are the workers that the run began with, which decide its batches, None for those of the lane.
    """

    id: str
    study: str
    spec: dict[str, Any]
    folder: str
    data: str
    weights: str | None
    engine_key: str
    pool: str
    stage: Stage = Stage.FINAL
    cell: dict[str, Any] = field(default_factory=dict)
    drawn: dict[str, Any] | None = None
    workers_at_start: int | None = None


@dataclass
class QueuedTask:
    """A task and what became of it.

    `attempts` are those in a row that got no further than step `reached`, `limit` how many of them it has, given how
    its lanes were lost.
    `last` are the metrics of the newest step: to be shown, and no part of what a queue that is made again must know.
    """

    task: TrainTask
    state: TaskState = TaskState.QUEUED
    lane: str | None = None
    attempts: int = 0
    reached: int = 0
    limit: int = MAX_ATTEMPTS
    followers: set[str] = field(default_factory=set)
    cancelled: bool = False
    last: dict[str, Any] = field(default_factory=dict, compare=False)
    evaluated: list[dict[str, Any]] = field(default_factory=list)
    outcome: dict[str, Any] = field(default_factory=dict)
    #: The last step that a search saw of a task which it gave up.
    judged: int | None = None
    kind: str | None = None
    reason: str | None = None
    scores: dict[str, float] | None = None

    def row(self) -> dict[str, Any]:
        """Return the task's row of a progress table."""
        return {
            "id": self.task.id,
            "study": self.task.study,
            "stage": self.task.stage,
            "state": self.state,
            "last": self.last,
            "total_steps": self.outcome.get("total_steps"),
            "reason": self.reason,
        }
