"""States that are written into run folders: of a run, of a trial (a training task), and the stage of a trial."""

from __future__ import annotations

from enum import StrEnum


class RunStatus(StrEnum):
    """The status of a run, in run.json."""

    RUNNING = "running"
    """A sweep works in the folder, or was killed there."""
    DONE = "done"
    """Every trial has ended and every score is in."""
    FAILED = "failed"
    """The sweep ended with an error."""
    INTERRUPTED = "interrupted"
    """The sweep was stopped on request (Ctrl-C, a signal) and can be resumed."""


class Stage(StrEnum):
    """The purpose of a trial."""

    SEARCH = "search"
    """Selects a setting by validation; never compared on the test benchmarks."""
    FINAL = "final"
    """Compared on the test benchmarks. A search trial may be promoted to this stage; it is not trained again."""


class TaskState(StrEnum):
    """The state of a training task in the queue, and the `status` in the trial.json of its trial.

    queued -> running -> trained -> done. A task may return to the queue from running (its lane was lost) and from
    stopped (it is wanted again), and from done to trained (it is promoted and has further benchmarks to be scored on).
    """

    QUEUED = "queued"
    """Waits for a lane of its width: new, or lost its lane and has attempts left. Never written to trial.json."""
    RUNNING = "running"
    """A lane trains it. trial.json also says so while a trained trial waits for its scores, or after a kill."""
    TRAINED = "trained"
    """The adapter is on disk and benchmarks are being scored. Never written to trial.json as a status."""
    DONE = "done"
    """Trained and scored. A benchmark that failed is named in the reason."""
    STOPPED = "stopped"
    """Ended early because no follower waited for it any more: the search pruned it, or ran out of time."""
    FAILED = "failed"
    """Ended without an adapter by an error, or after losing as many lanes as it may."""
    DIVERGED = "diverged"
    """Ended without an adapter because loss or gradients became non-finite; the setting is at fault."""

    @property
    def is_final(self) -> bool:
        """Return whether the state is final: done, stopped, failed or diverged."""
        return self in (TaskState.DONE, TaskState.STOPPED, TaskState.FAILED, TaskState.DIVERGED)
