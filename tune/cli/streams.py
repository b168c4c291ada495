"""Standard streams that end no command: closed ones are replaced, and what cannot be written is dropped."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from typing import Any, TextIO

#: Stream -> its descriptor, and how characters are written that its encoding does not have.
STREAMS = {"stdout": (1, "replace"), "stderr": (2, "backslashreplace")}


class LastingFile(io.FileIO):
    """A descriptor whose writes never fail: what it does not take is dropped, and the first time reported.

    A reader that has left (`| head`) is not reported: it left on purpose.
    """

    reported = False

    def write(self, data: Any, /) -> int:
        try:
            while (written := super().write(data)) is None:  # non-blocking, and full
                select.select((), (self.fileno(),), ())
            return written
        except OSError as error:
            self._report(error)
            return len(data)

    def _report(self, error: OSError) -> None:
        if self.reported or error.errno == errno.EPIPE:
            return
        self.reported = True
        if self.fileno() == STREAMS["stdout"][0] and sys.stderr is not None:
            reason = error.strerror or type(error).__name__
            print(f"macdrop: cannot write standard output ({reason}); continuing without it.", file=sys.stderr)


def protect() -> None:
    """Replace closed standard streams by the null device, and let the others drop what they cannot write."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            # Also the descriptor: the next file that is opened would get its number, and the output of children.
            if not _is_open(number):
                _null(number)
            setattr(sys, name, open(os.devnull, "w" if number else "r", encoding="utf-8"))
    for name, (number, errors) in STREAMS.items():
        stream = getattr(sys, name)
        if _number(stream) == number:
            stream.flush()
            buffer = io.BufferedWriter(LastingFile(number, "w", closefd=False))
            lined = number == STREAMS["stderr"][0] or stream.isatty()
            setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, errors, line_buffering=lined))


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a stream, which may be closed or missing, is a terminal."""
    return stream is not None and not stream.closed and stream.isatty()


def _number(stream: Any) -> int | None:
    try:
        return stream.fileno()
    except (AttributeError, OSError, ValueError):
        return None  # not a file, as where a test captures it


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _null(number: int) -> None:
    found = os.open(os.devnull, os.O_RDWR)
    if found == number:
        os.set_inheritable(found, True)
    else:
        os.dup2(found, number)
        os.close(found)
