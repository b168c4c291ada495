"""Events of a sweep, for its display."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from tune.distributed.actors.eval_task import Result
from tune.scheduling.queue import QueuedTask
from tune.scheduling.study import Study


class Observer(Protocol):
    """Follows a sweep. Only `started` and `finished` are called outside the control loop's thread."""

    def started(self, run_dir: Path, dashboard: str, resources: str) -> None:
        """The run folder exists and Ray is connected; `resources` is the written-out sum of what the run needs."""

    def finished(self) -> None:
        """The sweep has ended, one way or another; may be called twice."""

    def study(self, study: Study) -> None:
        """A study begins."""

    def stage(self, study: Study, stage: str, trials: int) -> None:
        """A stage of at most `trials` trials begins."""

    def note(self, text: str) -> None:
        """A message for the user."""

    def show(self, snapshot: dict[str, Any], scoring: int) -> None:
        """The current state of the queue; `scoring` benchmarks are waiting or running."""

    def ended(self, entry: QueuedTask) -> None:
        """A trial has ended."""

    def scored(self, name: str, result: Result) -> None:
        """A benchmark of a trial or base model has been scored, or has failed."""

    def judged(self, done: int, of: int) -> None:
        """The judge has scored `done` of `of` answers."""
