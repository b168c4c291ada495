"""Ends a worker or an actor that hangs, with its stacks on disk: a dead one is replaced, a stuck one never is.

The timer is a thread of C (`faulthandler`): it fires while Python waits in a collective that will never end, or holds
the interpreter's lock for ever.
"""

from __future__ import annotations

import contextlib
import faulthandler
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: The folder of a trial, of a model or of a run, in which stacks are left.
STACKS = "stacks"
#: Setting the timer takes 0.2 ms, so a beat sets it only when this share of the time has passed since it was set last.
SLACK = 0.02


class Watchdog:
    """Between the first `beat` and the end of the `with` block, `seconds` without a beat end the process.

    `file` then holds the stacks of all its threads, and the next attempt keeps it as `.last.txt`; else it is removed.
    """

    def __init__(self, file: Path, seconds: float) -> None:
        self._path, self._seconds = file, seconds
        self._next = 0.0

    def __enter__(self) -> Watchdog:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.exists() and self._path.stat().st_size:
                self._path.replace(self._path.with_suffix(".last.txt"))
            self._file = self._path.open("w")
        except OSError:
            # Who needs the folder for more than this says so; the process's own log takes the stacks.
            self._file = sys.__stderr__
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self._file is not sys.__stderr__:
            with contextlib.suppress(OSError):
                self._file.close()
                self._path.unlink(missing_ok=True)
                self._path.parent.rmdir()  # by the last rank

    def beat(self) -> None:
        """Something was done."""
        now = time.monotonic()
        if now >= self._next:
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=self._file)
            self._next = now + SLACK * self._seconds


@contextlib.contextmanager
def passes_watched(model: torch.nn.Module, file: Path, seconds: float) -> Iterator[None]:
    """In the `with` block a forward pass must begin every so many seconds; generation makes one for each token."""
    with Watchdog(file, seconds) as watchdog:
        heard = model.register_forward_pre_hook(lambda *_: watchdog.beat())
        try:
            yield
        finally:
            heard.remove()


def why_it_died(file: Path, seconds: float, died: str) -> str:
    """That an actor so watched hung, if it left stacks; else `died`, Ray's word for its death."""
    try:
        hung = file.stat().st_size > 0
    except OSError:
        hung = False
    return f"no forward pass began within ray.step_timeout_s = {seconds:g} s, see {file}" if hung else died


def stack_file(folder: Path, rank: int) -> Path:
    """Where a rank leaves its stacks, in the folder of its trial."""
    return folder / STACKS / f"rank-{rank}.txt"


def stacks(folder: Path) -> list[Path]:
    """The files of the ranks that ended themselves under the newest attempt at a trial."""
    return sorted(path for path in (folder / STACKS).glob("rank-*[0-9].txt") if path.stat().st_size)
