"""A task queue that outlives its process: each call that changes it is in a file before it is answered.

What a queue holds is a function of its calls (`queue`), so that the file is nothing but these calls, one JSON line
each. A process that dies in the middle of a call has not answered it: the caller sends it again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tune.errors import ResourceError
from tune.scheduling.queue import TaskQueue
from tune.scheduling.tasks import TrainTask
from tune.storage.atomic import lasting, plain
from tune.storage.json_lines import append_jsonl, read_jsonl
from tune.storage.states import Stage

#: Read-only methods.
LOOKS = frozenset({"poll", "closing", "held", "snapshot", "changes"})
#: Marks an argument that is a task; no other mapping of the queue's methods has this key.
TASK = "order"


class LoggedQueue:
    """A queue replayed from a log file, which logs every further call."""

    def __init__(self, file: Path) -> None:
        """Make the queue again from its file, which may be empty.

        Raises:
            OSError: the file is missing, also after waiting for its storage. A missing log is an error, not an empty
                queue: an empty queue would report all work as finished.
            ValueError: a whole line of the file is damaged.
        """
        lasting(lambda: os.stat(file), file.parent)
        self.queue = TaskQueue()
        self._file = file
        self._unwritten: list[dict[str, Any]] = []
        for row in read_jsonl(file, needs=("method", "arguments")):
            self._apply(row)

    def call(self, method: str, *arguments: Any) -> Any:
        """Run one method of the queue. Read-only calls are not logged."""
        if method in LOOKS or _unvalidated(method, arguments):
            return getattr(self.queue, method)(*arguments)
        row = plain({"method": method, "arguments": [_written(each) for each in arguments]})
        # The queue sees what its file will say, also of a number that JSON does not have.
        answer = self._apply(row)
        if not (method == "take" and answer is None) and not _unvalidated(method, row["arguments"]):
            self._write(row)
        return answer

    def _apply(self, row: dict[str, Any]) -> Any:
        return getattr(self.queue, row["method"])(*map(_read, row["arguments"]))

    def _write(self, row: dict[str, Any]) -> None:
        """Append a line. While the disk is full or gone the lines wait in their order: no run must end for its log."""
        self._unwritten.append(row)
        with suppress(ResourceError):
            if self._file.exists():
                append_jsonl(self._file, self._unwritten)
                self._unwritten = []


def _unvalidated(method: str, arguments: Sequence[Any]) -> bool:
    """Metrics of a step without a validation loss: they come with each step, and are not needed later."""
    return method == "progress" and arguments[1].get("eval_loss") is None


def _written(argument: Any) -> Any:
    return {TASK: asdict(argument)} if isinstance(argument, TrainTask) else argument


def _read(argument: Any) -> Any:
    is_task = isinstance(argument, dict) and argument.keys() == {TASK}
    if not is_task:
        return argument
    return TrainTask(**{**argument[TASK], "stage": Stage(argument[TASK]["stage"])})
