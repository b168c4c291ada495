"""Files of JSON lines: appended whole or not at all by several processes at once, and read on where they grew."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from macdrop.errors import ConfigError
from tune.storage.atomic import AnyPath, check_mapping, lasting, make_folder, plain, stat, writing

Check = Callable[[dict[str, Any]], object]
#: At the end of a line that is not the last of its `append_jsonl`; and all of a text up to the last that is.
MORE = " "
_WHOLE = re.compile(rb".*[^ ]\n", re.DOTALL)
_MORE = MORE.encode()
#: Bytes that are read at once.
_BLOCK = 1 << 22
#: Bytes before the end of what was read that must still be there for the rest to be all that is new.
_SEAM = 64


def append_jsonl(path: AnyPath, rows: Iterable[Mapping[str, Any]], within: AnyPath | None = None) -> int:
    """Append rows as JSON lines, all of them or none, and return their number.

    They go out in one `os.write` under an exclusive lock, so that processes writing at once never mix their lines. All
    lines of a call but the last end in a space, which JSON does not mind: it says that more belongs to them, so that
    what a crash has torn in the middle is passed over by readers and cut off by the next call.
    """
    path = Path(path)
    lines = [json.dumps(plain(row), allow_nan=False) for row in rows]
    if not lines:
        return 0
    data = (f"{MORE}\n".join(lines) + "\n").encode()
    tries = itertools.count()

    def append() -> None:
        again = next(tries) > 0
        make_folder(path.parent, within)
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            end = _cut_torn(handle)
            if again and os.pread(handle, len(data), max(0, end - len(data))) == data:
                return  # an error came, and yet it was written
            try:
                if os.write(handle, data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:  # a part may be there: take it back, so that a second try doubles nothing
                with suppress(OSError):
                    os.ftruncate(handle, end)
                raise
        finally:
            os.close(handle)

    with writing(path):
        lasting(append, within)
    return len(lines)


def read_jsonl(
    path: AnyPath,
    problems: list[str] | None = None,
    needs: Collection[str] = (),
    within: AnyPath | None = None,
    check: Check | None = None,
) -> list[dict[str, Any]]:
    """Rows of a file written by `append_jsonl`; a missing file is an empty list, what a crash tore is left out.

    Args:
        problems: where damaged lines are described, each once, instead of raised.
        needs: keys that each row must have.
        check: raises a ValueError for content that is not valid.

    Raises:
        ConfigError: a complete line is no JSON object, or lacks a key; the message has file and line.
    """
    return list(GrowingFile(path, problems, needs, within, check).read()[1])


class GrowingFile:
    """Reader of a file that `append_jsonl` grows: each `read` parses what is new; arguments as of `read_jsonl`."""

    def __init__(
        self,
        path: AnyPath,
        problems: list[str] | None = None,
        needs: Collection[str] = (),
        within: AnyPath | None = None,
        check: Check | None = None,
    ) -> None:
        self._path, self._problems, self._needs, self._within, self._check = Path(path), problems, needs, within, check
        self._forget()

    def _forget(self) -> None:
        self._stamp: tuple[int, int, int] | None = None
        #: Size in bytes and number of the lines that were read, and their last bytes.
        self._end, self._lines, self._seam = 0, 0, b""

    def read(self) -> tuple[bool, Iterator[dict[str, Any]]]:
        """Return whether the rows are all there are, and the rows, to be taken to their end: else those since then.

        They are all there are on the first call, and where the file was replaced, shortened or changed further up.

        Raises:
            ConfigError: as `read_jsonl`, while they are taken.
        """
        state = stat(self._path, self._within)
        if state is None:
            self._forget()
            return True, iter(())
        stamp = (state.st_ino, state.st_size, state.st_mtime_ns)
        if stamp == self._stamp:
            return False, iter(())
        before = self._stamp
        grown = self._end > 0 and before is not None and before[0] == stamp[0] and before[1] < stamp[1]
        if not grown or self._bytes(self._end - len(self._seam), len(self._seam)) != self._seam:
            grown = False
            self._forget()
        return not grown, self._rows(stamp)

    def _bytes(self, start: int, size: int) -> bytes:
        def look() -> bytes:
            with open(self._path, "rb") as file:
                file.seek(start)
                return file.read(size)

        return lasting(look, self._within)

    def _rows(self, stamp: tuple[int, int, int]) -> Iterator[dict[str, Any]]:
        """Parse what is new, and move on to its end: that of the last whole call."""
        try:
            for group in whole_groups(self._bytes, self._end):
                for line in group:
                    self._lines += 1
                    if (row := self._row(line)) is not None:
                        yield row
                text = b"".join(line + b"\n" for line in group)
                self._end += len(text)
                self._seam = (self._seam + text)[-_SEAM:]
            self._stamp = stamp
        except BaseException:
            self._forget()  # the next call reads all of it
            raise

    def _row(self, line: bytes) -> dict[str, Any] | None:
        try:
            row = json_value(line)
            if type(row) is not dict or self._needs:
                check_mapping(row, self._needs)
            if self._check is not None:
                self._check(row)
            return row
        except (ValueError, RecursionError) as error:
            kind = "not JSON " if isinstance(error, json.JSONDecodeError) else ""
            problem = f"{self._path}, line {self._lines}: {kind}({error}). The file was changed by hand?"
            if self._problems is None:
                raise ConfigError(problem) from error
            self._problems += [problem] if problem not in self._problems else []
            return None


def whole_groups(read: Callable[[int, int], bytes], start: int = 0) -> Iterator[list[bytes]]:
    """Yield the lines of each whole call of `append_jsonl` from an offset on, without what a crash tore at the end.

    read: returns the bytes at an offset, at most so many. The file is read block by block: it may be large.
    """
    group: list[bytes] = []
    left = b""
    block = None
    while block is None or len(block) == _BLOCK:
        block = read(start, _BLOCK)
        start += len(block)
        *lines, left = (left + block).split(b"\n")
        for line in lines:
            group.append(line)
            if not line.endswith(_MORE):
                yield group
                group = []


def json_value(line: bytes) -> Any:
    """The value of a line of JSON. What pydantic's parser refuses is left to the standard one, which takes more.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        return from_json(line)  # a third of the time
    except ValueError:
        return json.loads(line.decode("utf-8", errors="replace"))


def _cut_torn(handle: int) -> int:
    """Truncate the open file after the last whole call of `append_jsonl`; return the size that is left, in bytes."""
    size = end = os.lseek(handle, 0, os.SEEK_END)
    whole = None
    while end > 0 and whole is None:
        end = max(0, end - max(4096, size - end))  # a line is short: doubled where it is not
        whole = _WHOLE.match(os.pread(handle, size - end, end))
    left = end + whole.end() if whole else 0
    if left != size:
        os.ftruncate(handle, left)
    return left
