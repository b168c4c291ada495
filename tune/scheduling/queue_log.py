"""A task queue that outlives its process: each call that changes it is in a file before it is answered.

What a queue holds is a function of its calls (`queue`), so that the file is nothing but these calls, one JSON line
each. A process that dies in the middle of a call has not answered it: the caller sends it again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from tune.errors import ResourceError
from tune.scheduling.queue import Mark, TaskQueue
from tune.scheduling.tasks import QueuedTask, TrainTask
from tune.storage.atomic import lasting, plain
from tune.storage.json_lines import append_jsonl, read_jsonl
from tune.storage.states import Stage
from tune.training.observer import Word

#: Read-only methods.
READ_ONLY = frozenset({"poll", "closing", "held", "snapshot", "changes"})
#: Marks an argument that is a task; no other mapping of the queue's methods has this key.
TASK = "task"


@dataclass(frozen=True)
class Cursor:
    """A position in the history of a queue: its process, and how many calls and state changes came before."""

    process: str
    calls: int
    seen: int
    mark: Mark


@dataclass(frozen=True)
class Changes:
    """Changes after a cursor: entries with a new state, and a snapshot that has the rows of changed tasks only."""

    cursor: Cursor
    changed: list[QueuedTask]
    snapshot: dict[str, Any]


class LoggedQueue:
    """A queue replayed from a log file, which logs every further call."""

    def __init__(self, file: Path) -> None:
        """Replay the log, which may be empty.

        Raises:
            OSError: the file is missing, also after waiting for its storage. A missing log is an error, not an empty
                queue: an empty queue would report all work as finished.
            ValueError: a whole line of the file is damaged.
        """
        lasting(lambda: os.stat(file), file.parent)
        self.queue = TaskQueue()
        self._file = file
        self._unwritten: list[dict[str, Any]] = []
        self._process, self._calls = uuid4().hex, 0
        for row in read_jsonl(file, needs=("method", "arguments")):
            self._apply(row)

    def call(self, method: str, *arguments: Any) -> Any:
        """Run one method of the queue. Read-only calls are not logged."""
        if method in READ_ONLY:
            return getattr(self.queue, method)(*arguments)
        if _without_validation_loss(method, arguments):
            self._calls += 1
            return getattr(self.queue, method)(*arguments)
        row = plain({"method": method, "arguments": [_written(each) for each in arguments]})
        # The queue sees what its file will say, also of a number that JSON does not have.
        answer = self._apply(row)
        if method == "take" and answer is None:
            return None
        self._calls += 1
        if not _without_validation_loss(method, row["arguments"]):
            self._write(row)
        return answer

    def record_all(self, ended: Sequence[Sequence[Any]]) -> None:
        """Call `TaskQueue.record` with each of these arguments, and log them in one write."""
        rows = [plain({"method": "record", "arguments": [_written(each) for each in arguments]}) for arguments in ended]
        for row in rows:
            self._apply(row)
        self._calls += 1
        self._write(*rows)

    # --- what a caller may wait for: None if there is nothing yet ---

    def next_task(self, lane: str, engine_key: str | None) -> TrainTask | Word | None:
        """Take the next task for a lane; return `Word.LEAVE` if there is none and the lane should end."""
        task = self.call("take", lane, engine_key)
        return Word.LEAVE if task is None and self.queue.closing(lane) else task

    def news(self, task_id: str, after: int) -> dict[str, Any] | None:
        """Return what `poll` does of a task that has ended, or has validations of steps later than `after`."""
        found = self.queue.poll(task_id, after)
        return found if found["metrics"] or found["state"].is_final else None

    def since(self, cursor: Cursor | None) -> Changes | None:
        """Return what came after a cursor; all changes if it is None."""
        if cursor is not None and (cursor.process, cursor.calls) == (self._process, self._calls):
            return None
        seen, changed = self.queue.changes(cursor.seen if cursor else 0)
        snapshot = self.queue.snapshot(cursor.mark if cursor else None)
        # Copies: Ray pickles the answer of an asynchronous actor in another thread, after further calls perhaps.
        entries = [replace(entry, evaluated=[*entry.evaluated], followers={*entry.followers}) for entry in changed]
        return Changes(Cursor(self._process, self._calls, seen, snapshot["mark"]), entries, snapshot)

    # --- details ---

    def _apply(self, row: dict[str, Any]) -> Any:
        return getattr(self.queue, row["method"])(*map(_read, row["arguments"]))

    def _write(self, *rows: dict[str, Any]) -> None:
        """Append lines. While the disk is full or gone they wait in their order: no run must end for its log."""
        self._unwritten += rows
        with suppress(ResourceError):
            if self._file.exists():
                append_jsonl(self._file, self._unwritten)
                self._unwritten = []


def _without_validation_loss(method: str, arguments: Sequence[Any]) -> bool:
    """Metrics of a step without a validation loss: they come with each step, and are not needed later."""
    return method == "progress" and arguments[1].get("eval_loss") is None


def _written(argument: Any) -> Any:
    return {TASK: asdict(argument)} if isinstance(argument, TrainTask) else argument


def _read(argument: Any) -> Any:
    is_task = isinstance(argument, dict) and argument.keys() == {TASK}
    if not is_task:
        return argument
    return TrainTask(**{**argument[TASK], "stage": Stage(argument[TASK]["stage"])})
