"""Ctrl-C, SIGTERM and SIGHUP: the first signal stops a sweep gracefully, the second at once. Uses no Ray."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

#: The last one comes when a terminal closes; where it is ignored, as under `nohup`, it stays ignored.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stop:
    """A handler of stop signals; `signal` is the one that came, None until then."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.signal: int | None = None
        self._tell = tell

    def __call__(self, number: int, frame: Any) -> None:
        if self.signal is not None:
            if number == signal.SIGHUP:  # a closing terminal sends several
                return
            self.leave()
        self.signal = number
        with suppress(Exception):  # the terminal may have gone, or be in the middle of a write
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
    wanted = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in wanted}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def hangup_ignored() -> Iterator[None]:
    """Let processes that are started in the `with` block ignore SIGHUP.

    When a terminal closes, all of its processes get the signal; those of Ray have to outlive it for a checkpoint.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)
