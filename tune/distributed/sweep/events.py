"""Events of a sweep, for its display."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from tune.distributed.actors.eval_task import Result
from tune.scheduling.study import Study
from tune.scheduling.tasks import QueuedTask
from tune.scheduling.time_left import Work

log = logging.getLogger(__name__)


class Observer(Protocol):
    """Follows a sweep: by one call at a time, from several threads."""

    def started(self, run_dir: Path, dashboard: str, resources: str) -> None:
        """The run folder exists and Ray is connected; `resources` is the written-out sum of what the run needs."""

    def planned(self, work: Work) -> None:
        """The work of the whole run, at most; called once, after `started`."""

    def finished(self) -> None:
        """The sweep has ended, one way or another; may be called twice."""

    def found(self, study: str, sentence: str) -> None:
        """The checks of a study's model and data found something that the user should know."""

    def study(self, study: Study) -> None:
        """A study begins."""

    def stage(self, study: Study, stage: str, trials: int) -> None:
        """A stage of at most `trials` trials begins."""

    def study_ended(self, study: Study) -> None:
        """A study has ended, well or not."""

    def note(self, text: str) -> None:
        """A message for the user."""

    def show(self, snapshot: dict[str, Any], scoring: Mapping[str, int]) -> None:
        """Changes of the queue since the last call, and the benchmarks of each study that are to be scored."""

    def ended(self, entry: QueuedTask) -> None:
        """A trial has ended."""

    def scored(self, name: str, result: Result, study: str) -> None:
        """A benchmark of a study's trial or base model has been scored, or has failed."""

    def judged(self, done: int, of: int) -> None:
        """The judge has scored `done` of `of` answers."""


def unfailing(observer: Observer) -> Observer:
    """Return the observer with its errors logged, the first of each method, not raised: no display ends a run."""
    return cast(Observer, _Unfailing(observer))


class _Unfailing:
    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._failed: set[str] = set()

    def __getattr__(self, name: str) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            try:
                getattr(self._observer, name)(*arguments)
            except Exception as error:
                if name not in self._failed:
                    log.warning("The display failed at %r: %s: %s", name, type(error).__name__, error)
                self._failed.add(name)

        return call
