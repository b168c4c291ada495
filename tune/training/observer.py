"""Endings of a fine-tuning: by its steps, by the word of an observer of its metrics, or by early stopping."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Any

from macdrop.schedules import DECAYED, decayed_step
from tune.config.run_spec import TrainSpec


class Word(StrEnum):
    """The answer to a reported step; it takes effect at the next step."""

    GO_ON = "go_on"
    """Continue training."""
    STOP = "stop"
    """End early, with an adapter of the steps so far."""
    LEAVE = "leave"
    """End at once with a checkpoint to resume from and no adapter: the machine is about to disappear."""


class Ending(StrEnum):
    """The ending of a fine-tuning that raised no error."""

    DONE = "done"
    """All steps were taken, or validations did not improve for as long as `early_stopping_patience` allows."""
    STOPPED = "stopped"
    """`Word.STOP` came first; the adapter is that of the last step taken."""
    LEFT = "left"
    """`Word.LEAVE` came first; there is a checkpoint to resume from and no adapter."""


#: Called on rank 0 with the metrics of each logged step.
Observer = Callable[[dict[str, Any]], Word]


class Patience:
    """Early stopping: counts the validations in a row that have not improved on the best, from step `first` on.

    The same on every rank, as their validation losses are. None as `limit` or `first`: training is never ended.
    """

    def __init__(self, limit: int | None, first: int | None) -> None:
        self._limit, self._first = limit, first
        self._seen, self._worse = 0, 0
        self._best: float | None = None

    @classmethod
    def of(cls, spec: TrainSpec, total_steps: int, steps_per_epoch: int) -> Patience:
        """Return that of a fine-tuning: from the step at which p is at most a tenth of p0."""
        first: int | None = 1
        if spec.macdrop.config(seed=0).enabled:
            block = spec.macdrop
            first = decayed_step(block.schedule, block.alpha, DECAYED, total_steps, steps_per_epoch)
        return cls(spec.early_stopping_patience, first)

    def ends(self, step: int, loss: float | None) -> bool:
        """Take the validation loss after a step; return whether training ends there. A second look changes nothing."""
        if self._limit is None or self._first is None or step < self._first or loss is None:
            return False
        if step > self._seen:
            self._seen = step
            better = self._best is None or loss < self._best
            self._best, self._worse = (loss, 0) if better else (self._best, self._worse + 1)
        return self._worse >= self._limit

    def missed(self, step: int, every: int) -> bool:
        """Return whether the validation after a step is yet to be taken: its machine went away before."""
        counts = self._limit is not None and self._first is not None and step >= self._first
        return counts and step % every == 0 and step > self._seen

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps; nothing where training is never ended."""
        return {} if self._limit is None else {"patience": [self._seen, self._best, self._worse]}

    def resume(self, meta: dict[str, Any]) -> None:
        """Continue from what a checkpoint has kept."""
        if "patience" in meta:
            self._seen, self._best, self._worse = meta["patience"]
