"""What Ctrl-C and SIGTERM do to a sweep: the first ends it in good order, the second at once. Pure; no Ray."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Whether a signal has come, and which: `signal` is None until then."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.signal: int | None = None
        self._tell = tell

    def __call__(self, number: int, frame: Any) -> None:
        if self.signal is not None:
            self.leave()
        self.signal = number
        self._tell("running fine-tunings save a checkpoint; once more to stop at once")
        # Whatever the call that it comes into makes of the exception: `signal` says that it was no failure.
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(self.code)

    @property
    def code(self) -> int:
        """The exit code, as a shell has it."""
        return 128 + (self.signal or 0)

    def leave(self) -> NoReturn:
        """End the process now. Ray's processes that it started end with it; threads inside Ray are not waited for."""
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError, RuntimeError):  # a closed pipe, or the signal came into a write
                pass
        os._exit(self.code)


@contextmanager
def stoppable(tell: Callable[[str], None]) -> Iterator[Stop]:
    """Have `SIGNALS` stop what runs inside; tell: where the user is told so."""
    stop = Stop(tell)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
