"""Work on the models of a large run in several processes; a small one is not worth starting them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

from tune.analysis.results import ModelResults
from tune.analysis.verdict import Verdict, verdicts
from tune.report.text import one_line
from tune.storage.records import TrialRecord
from tune.storage.run_folder import RunFolder

MANY = 5
"""Models that share one page and one process; more get a page each."""
EACH = 3
"""Models for which a process pays its start."""
IDLE_S = 20
"""Seconds after which a process without work ends."""


class Noted(Protocol):
    """The result of work, with the damaged files that it met."""

    @property
    def problems(self) -> list[str]: ...


T = TypeVar("T")
R = TypeVar("R", bound=Noted)


@dataclass(frozen=True)
class Judged:
    """The verdicts on a model, or the trouble that prevents them."""

    verdicts: list[Verdict]
    trouble: str | None
    problems: list[str]


def judged(run_folder: RunFolder, model: ModelResults, trials: list[TrialRecord]) -> Judged:
    """Judge one model of a run."""
    try:
        found = verdicts(run_folder, model.display, trials) if model.trials("macdrop") else []
        return Judged(found, None, run_folder.problems or [])
    except Exception as error:  # a file of another shape than ours: it may raise anything
        trouble = f"a file of the run is damaged ({type(error).__name__}: {one_line(str(error))})."
        return Judged([], trouble, run_folder.problems or [])


def spread(
    work: Callable[[RunFolder, ModelResults, T], R], tasks: Sequence[tuple[RunFolder, ModelResults, T]]
) -> list[R]:
    """Return `work` of each task, in order: in processes of this machine where there are more than MANY tasks.

    They start without the script that runs, so that it needs no guard, and a notebook may ask for them, too.
    """
    processes = _processes(len(tasks))
    if processes > 1:
        from joblib import Parallel, delayed, parallel_config

        # Each takes the scores of its model along: reading those of all would cost each of them the whole file.
        lean = ((folder.with_scores_of(model.name), model, more) for folder, model, more in tasks)
        try:
            with parallel_config("loky", n_jobs=processes, idle_worker_timeout=IDLE_S):
                found: list[R] = list(Parallel()(delayed(work)(*task) for task in lean))
        except (BrokenExecutor, OSError):  # no room for processes, or one was killed: here, then
            return [work(*task) for task in tasks]
        for (folder, _, _), made in zip(tasks, found, strict=True):
            if folder.problems is not None:
                folder.problems += [each for each in made.problems if each not in folder.problems]
        return found
    return [work(*task) for task in tasks]


def _processes(tasks: int) -> int:
    """The number of processes for so many tasks; 1: this one."""
    if tasks <= MANY:
        return 1
    from joblib import cpu_count

    return int(min(cpu_count(), tasks // EACH))
