"""Ctrl-C and SIGTERM: the first signal stops a sweep gracefully, the second at once. Uses no Ray."""

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
    """A handler of stop signals; `signal` is the one that came, None until then."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.signal: int | None = None
        self._tell = tell

    def __call__(self, number: int, frame: Any) -> None:
        if self.signal is not None:
            self.leave()
        self.signal = number
        self._tell("running fine-tunings save a checkpoint; signal once more to stop at once")
        # Whatever the interrupted call turns the exception into, `signal` shows that it was not a failure.
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(self.code)

    @property
    def code(self) -> int:
        """The exit code of a shell after the signal."""
        return 128 + (self.signal or 0)

    def leave(self) -> NoReturn:
        """Exit at once. Ray's child processes exit with us; threads inside Ray are not waited for."""
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError, RuntimeError):  # a closed pipe, or a write that the signal interrupted
                pass
        os._exit(self.code)


@contextmanager
def stoppable(tell: Callable[[str], None]) -> Iterator[Stop]:
    """Let `SIGNALS` stop the body of a `with` block; `tell` shows a message to the user."""
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
