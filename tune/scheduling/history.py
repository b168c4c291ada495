"""Search history of a previous run, used to resume the search: draws, outcomes, validations. Pure; no Ray.

    models/<slug>/draws.jsonl         one line per draw of the searcher: number (from 0), values (dotted keys)
    models/<slug>/search_time.json    seconds: spent searching so far

A search resumes as if it had not been interrupted: the searcher is replayed its draws, in their order, with their
outcomes; the scheduler the validations of each trial up to its last decision. Neither has a state of its own on disk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tune.config.sections import EVAL_LOSS
from tune.storage.records import TrialRecord
from tune.storage.states import TaskState

#: States of a draw of an earlier run: to be tried (again), with its objectives, without any, or not to be counted.
OPEN, COMPLETE, PRUNED, FAILED = "open", "complete", "pruned", "failed"
#: Kinds of failures (`tune.scheduling.failures`) that lie with the trial, which would meet with them again.
DETERMINISTIC = frozenset({"bug", "gpu_oom"})


@dataclass(frozen=True)
class PastTrial:
    """A draw of an earlier run: its values, how it stands, its objectives where it is complete.

    `reported` are the steps and validation losses reported to the searcher on the way.
    """

    drawn: dict[str, Any]
    state: str
    objectives: tuple[float, ...] | None = None
    reported: tuple[tuple[int, float], ...] = ()


def resume_state(record: TrialRecord, *, adapter: bool, scored: bool, retry_failed: bool = False) -> TaskState | None:
    """Return the task state (`tune.scheduling.queue`) in which a trial enters a resumed run; None: yet to be trained.

    record: its trial.json. adapter: whether a whole adapter lies in its folder. scored: whether it has all its scores.
    """
    status = record.status
    if status == TaskState.DONE and scored:
        return status  # also where its adapter was deleted to save room
    if status == TaskState.DONE or (status == TaskState.RUNNING and record.trained):
        return TaskState.TRAINED if adapter else None
    if status == TaskState.STOPPED:
        return status if record.step is not None else None  # given up before it began: it says nothing
    if status == TaskState.FAILED:
        return status if not retry_failed and lies_with_the_trial(record) else None
    return status if status == TaskState.DIVERGED and not retry_failed else None


def lies_with_the_trial(record: TrialRecord) -> bool:
    """Return whether a failed trial would fail again: no machine was lost, and no resource ran short."""
    return record.kind is None or record.kind in DETERMINISTIC


def judged(record: TrialRecord, metrics: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """Return steps and validation losses that the scheduler has seen: a lane may be ahead of its decision to stop."""
    last = record.judged
    return [
        (row["step"], row[EVAL_LOSS])
        for row in metrics
        if row.get(EVAL_LOSS) is not None and math.isfinite(row[EVAL_LOSS]) and (last is None or row["step"] <= last)
    ]


def past(
    drawn: dict[str, Any],
    state: TaskState | None,
    record: TrialRecord,
    objectives: Sequence[float | None],
    reports: Sequence[tuple[int, float]],
) -> PastTrial:
    """A draw as the searcher must know it.

    state: of the task (`resume_state`). objectives: as they were measured, None where one is missing. reports:
    `judged`.
    """
    if state in (None, TaskState.TRAINED):
        return PastTrial(drawn, OPEN)
    if state == TaskState.FAILED:
        return PastTrial(drawn, FAILED)
    finite = tuple(value for value in objectives if value is not None and math.isfinite(value))
    if state == TaskState.DONE and len(finite) == len(objectives):
        return PastTrial(drawn, COMPLETE, finite)
    # The validation for which a trial is stopped is not reported to the searcher.
    last = record.judged
    return PastTrial(drawn, PRUNED, None, tuple(pair for pair in reports if last is None or pair[0] < last))
