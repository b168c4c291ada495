"""Observers of a fine-tuning: what it reports, the words they answer with, and its endings."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Any


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
