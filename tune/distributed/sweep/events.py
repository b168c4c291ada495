"""Events of a sweep, for whoever shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from tune.distributed.actors.evaluators import Result
from tune.scheduling.queue import QueuedTask
from tune.scheduling.study import Study


class Observer(Protocol):
    """Follows a sweep. All but `started` and `finished` are called from the control loop's thread alone."""

    def started(self, run_dir: Path, dashboard: str, resources: str) -> None:
        """The run folder exists and Ray is connected; `resources` is their sum in words."""

    def finished(self) -> None:
        """The sweep has ended, one way or another; may be called twice."""

    def study(self, study: Study) -> None:
        """A study begins."""

    def stage(self, study: Study, stage: str, trials: int) -> None:
        """A stage begins, of `trials` trials at most."""

    def note(self, text: str) -> None:
        """Something the user should read."""

    def show(self, snapshot: dict[str, Any], scoring: int) -> None:
        """The queue as it stands now; `scoring` benchmarks wait or run."""

    def ended(self, entry: QueuedTask) -> None:
        """A trial has ended."""

    def scored(self, name: str, result: Result) -> None:
        """A benchmark of a trial or base model has been scored, or has failed."""

    def judged(self, done: int, of: int) -> None:
        """The judge has scored `done` of `of` answers."""
