"""Watchdog that ends a hung worker or actor and leaves its stacks on disk; only a dead process is replaced.

The timer is a C thread (`faulthandler`): it fires even while Python waits in a collective that never ends or holds the
interpreter lock.
"""

from __future__ import annotations

import contextlib
import faulthandler
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    import torch

#: Folder for stacks within that of a trial, a model or a run.
STACKS = "stacks"
#: Arming the timer takes 0.2 ms, so a beat re-arms it only after this share of the time-out has passed.
SLACK = 0.02


class Watchdog:
    """Ends the process after `seconds` without a `beat`, from the first beat to the end of the `with` block.

    `file` then holds the stacks of all threads; the next attempt keeps it as `.last.txt`. Otherwise it is removed.
    """

    def __init__(self, file: Path, seconds: float) -> None:
        self._path, self._seconds = file, seconds
        self._next = 0.0

    def __enter__(self) -> Watchdog:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.exists() and self._path.stat().st_size:
                self._path.replace(self._path.with_suffix(".last.txt"))
            self._file: TextIO = self._path.open("w")
        except OSError:
            # Others report that the folder cannot be written; the stacks go to the process's own log.
            self._file = sys.__stderr__ or sys.stderr
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
        """Report progress: restart the time-out."""
        now = time.monotonic()
        if now >= self._next:
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=self._file)
            self._next = now + SLACK * self._seconds


@contextlib.contextmanager
def passes_watched(model: torch.nn.Module, file: Path, seconds: float) -> Iterator[None]:
    """Require a forward pass to begin every `seconds` within the `with` block; generation makes one per token."""
    with Watchdog(file, seconds) as watchdog:
        hook = model.register_forward_pre_hook(lambda *_: watchdog.beat())
        try:
            yield
        finally:
            hook.remove()


def why_it_died(file: Path, seconds: float, died: str) -> str:
    """Say that a watched actor hung if it left stacks; otherwise return `died`, Ray's reason for its death."""
    try:
        hung = file.stat().st_size > 0
    except OSError:
        hung = False
    return f"no forward pass began within ray.step_timeout_s = {seconds:g} s, see {file}" if hung else died


def stack_file(folder: Path, rank: int) -> Path:
    """Return the file for a rank's stacks, in the folder of its trial."""
    return folder / STACKS / f"rank-{rank}.txt"


def stacks(folder: Path) -> list[Path]:
    """List the stacks of ranks that ended themselves in the latest attempt at a trial."""
    return sorted(path for path in (folder / STACKS).glob("rank-*[0-9].txt") if path.stat().st_size)
