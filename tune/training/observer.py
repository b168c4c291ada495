"""What a fine-tuning reports while it runs, what it can be asked in return, and how it can end."""

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
    """End at once with a checkpoint to resume from and no adapter: the machine is about to go."""


class Ending(StrEnum):
    """How a fine-tuning ended that raised no error."""

    DONE = "done"
    """All steps were taken."""
    STOPPED = "stopped"
    """`Word.STOP` came first; the adapter is that of the last step taken."""
    LEFT = "left"
    """`Word.LEAVE` came first; there is a checkpoint to resume from and no adapter."""


#: Called on rank 0 with the metrics of each logged step.
Observer = Callable[[dict[str, Any]], Word]
