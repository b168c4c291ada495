"""The queue of training tasks: decisions, no Ray.

The dispatcher actor is this queue behind Ray calls. A task goes queued -> running -> trained -> done; it ends early as
stopped (its followers gave up on it), diverged or failed. Tasks are named by their content (`TrainSpec.trial_id`), so
placing the same fine-tuning twice follows the first one.

What the queue holds is a function of the calls it got, and a call that comes twice changes nothing: the dispatcher may
be made again from a log of its calls (`tune.scheduling.queue_log`), and Ray sends a call again whose answer was lost.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any
from uuid import uuid4

from tune.scheduling.tasks import MAX_ATTEMPTS, QueuedTask, TrainTask
from tune.storage.states import Stage, TaskState
from tune.training.observer import Ending, Word

#: What a snapshot is later than: the queue's process, and the number of its last change.
Mark = tuple[str, int]


@dataclass
class TaskQueue:
    """Queue of training tasks and the lanes that run them. Every method is quick."""

    entries: dict[str, QueuedTask] = field(default_factory=dict)
    lanes: dict[str, dict[str, Any]] = field(default_factory=dict)
    _closing: set[str] = field(default_factory=set)
    _drained: set[str] = field(default_factory=set)
    _changes: list[str] = field(default_factory=list)
    #: Pool -> its queued tasks in their order.
    _queued: dict[str, dict[str, None]] = field(default_factory=dict)
    #: Study -> the number of its tasks that have not ended.
    _open: dict[str, int] = field(default_factory=dict)
    #: Task -> the number of its last change, in the order of these; `_process` tells queues made again apart.
    _touched: dict[str, int] = field(default_factory=dict, compare=False)
    _process: str = field(default_factory=lambda: uuid4().hex, compare=False)
    _number: int = field(default=0, compare=False)

    # --- followers ---

    def place(self, task: TrainTask, follower: str, evaluated: Sequence[dict[str, Any]] = ()) -> TaskState:
        """Queue a task, or follow the equal one that is there; returns its state.

        A trial of the search that is placed for the final stage is not trained again, but scored for that stage.
        evaluated: validations of an earlier run of the same folder, not yet reported to the followers.
        """
        entry = self.entries.get(task.id)
        if entry is None:
            entry = self._enter(QueuedTask(task, evaluated=list(evaluated)))
            self._changed(task.id)
        elif entry.task.stage != task.stage == Stage.FINAL or entry.state == TaskState.STOPPED:
            self._count(entry, -1)
            entry.task = replace(task, drawn=entry.task.drawn)
            self._count(entry, +1)
            if entry.state == TaskState.DONE:
                self._turn(entry, TaskState.TRAINED)
            self._touch(entry)
        if entry.cancelled or entry.state == TaskState.STOPPED:
            # Wanted again after its only follower gave up.
            entry.cancelled = False
            if entry.state == TaskState.STOPPED:
                self._requeue(entry)
        entry.followers.add(follower)
        return entry.state

    def record(
        self,
        task: TrainTask,
        state: TaskState,
        outcome: dict[str, Any],
        scores: dict[str, float] | None,
        reason: str | None = None,
    ) -> None:
        """Enter a task that an earlier run of the same folder has ended, or trained without scoring all of it.

        Nothing happens to a task that is in the queue.
        """
        state = TaskState(state)  # a plain string where it comes from a log
        assert state.is_final or state == TaskState.TRAINED
        if task.id in self.entries:
            return
        self._enter(QueuedTask(task, state=state, outcome=outcome, scores=scores, reason=reason))
        if state == TaskState.TRAINED:
            self._changed(task.id)

    def cancel(self, task_id: str, follower: str, judged: int | None = None) -> None:
        """A follower gives up; without any other the task stops at the lane's next step.

        judged: the last step whose validation the follower has seen.
        """
        entry = self.entries.get(task_id)
        if entry is None or entry.state.is_final:
            return
        entry.judged = judged
        if entry.state == TaskState.TRAINED:
            return
        entry.followers.discard(follower)
        if entry.followers:
            return
        entry.cancelled = True
        if entry.state == TaskState.QUEUED:
            self._end(entry, TaskState.STOPPED, "stopped before it started")

    def abandon(self, study: str, keep: str) -> None:
        """The search of a study is over (its time is up, say): of its followers only `keep` still waits."""
        for entry in self.entries.values():
            if entry.task.study == study:
                for follower in entry.followers - {keep}:
                    self.cancel(entry.task.id, follower)

    def poll(self, task_id: str, after: int) -> dict[str, Any]:
        """Metrics with a validation loss of steps later than `after`, the state, and how it ended."""
        entry = self.entries[task_id]
        return {
            "state": entry.state,
            "metrics": [metrics for metrics in entry.evaluated if metrics["step"] > after],
            "outcome": entry.outcome,
            "reason": entry.reason,
            "scores": entry.scores,
        }

    # --- lanes ---

    def lane_up(self, lane: str, pool: str, host: str, nodes: Collection[str] = ()) -> None:
        """A lane's workers are ready on `nodes`; a task it had before it was restarted goes back into the queue."""
        self.lane_down(lane, "its worker died")
        self.lanes[lane] = {"pool": pool, "host": host, "nodes": list(nodes), "task": None}

    def lane_down(self, lane: str, reason: str) -> None:
        """A lane is gone; its task is queued again, or fails after the attempts it has."""
        self.lanes.pop(lane, None)
        for entry in self.entries.values():
            if entry.lane == lane and entry.state == TaskState.RUNNING:
                entry.reason = entry.reason or reason
                if entry.cancelled:
                    self._end(entry, TaskState.STOPPED, "stopped")
                elif not self._exhausted(entry):
                    self._requeue(entry)

    def take(self, lane: str, engine_key: str | None) -> TrainTask | None:
        """The next task for a lane: one that fits the engine it has, else the oldest of its pool.

        A lane that asks again before it reported the end of its task is given that task again.
        """
        if lane not in self.lanes:
            return None
        if running := self.lanes[lane]["task"]:
            return self.entries[running].task
        waiting = self._queued.get(self.lanes[lane]["pool"])
        if not waiting or self.closing(lane):
            return None
        fitting = (name for name in waiting if self.entries[name].task.engine_key == engine_key)
        entry = self.entries[next(fitting, next(iter(waiting)))]
        entry.lane = lane
        entry.attempts += 1
        entry.reason, entry.limit = None, MAX_ATTEMPTS
        self.lanes[lane]["task"] = entry.task.id
        self._turn(entry, TaskState.RUNNING)
        return entry.task

    def closing(self, lane: str) -> bool:
        """Return whether a lane should end: it was asked to, its nodes are about to go, or it was taken for dead."""
        return lane not in self.lanes or lane in self._closing or self._leaving(lane)

    def close(self, lane: str) -> None:
        """Ask a lane to end once its task is finished."""
        self._closing.add(lane)

    def asked_to_close(self, lane: str) -> bool:
        """Return whether a lane was asked to end."""
        return lane in self._closing

    def drain(self, nodes: Collection[str]) -> None:
        """Nodes are about to go: lanes with a worker there save a checkpoint, return their task and end."""
        self._drained |= set(nodes)

    def progress(self, task_id: str, metrics: dict[str, Any], lane: str | None = None) -> Word:
        """Take the metrics of a step from a lane; return the answer for it."""
        entry = self.entries[task_id]
        entry.last = metrics
        self._touch(entry)
        # A retried task replays the steps after its last checkpoint: only the first report of a step is forwarded.
        if metrics.get("eval_loss") is not None and all(m["step"] != metrics["step"] for m in entry.evaluated):
            entry.evaluated.append(metrics)
        if entry.cancelled or not self._has(entry, lane):
            return Word.STOP
        return Word.LEAVE if entry.lane is not None and self._leaving(entry.lane) else Word.GO_ON

    def trained(self, task_id: str, outcome: dict[str, Any], lane: str | None = None) -> None:
        """A fine-tuning has ended with its adapter on disk, or was asked to stop or to leave.

        lane: the reporting lane; reports of a lane that no longer has the task are ignored.
        """
        entry = self.entries[task_id]
        if not self._has(entry, lane):
            return
        self._release(entry)
        entry.outcome = outcome
        if outcome["status"] == Ending.DONE:
            self._turn(entry, TaskState.TRAINED)
        elif entry.cancelled:
            self._end(entry, TaskState.STOPPED, f"stopped at step {outcome['step']} of {outcome['total_steps']}")
        else:
            # Its lane had to go, or it was wanted again after its lane was asked to stop: its newest checkpoint counts.
            if outcome["status"] == Ending.LEFT and entry.lane is not None:
                self.close(entry.lane)
            entry.attempts -= 1
            self._requeue(entry)

    def failed(self, task_id: str, state: TaskState, reason: str, lane: str | None = None) -> None:
        """A fine-tuning has ended without an adapter; `state` is failed or diverged, `lane` as for `trained`."""
        state = TaskState(state)  # a plain string where it comes from a log
        assert state in (TaskState.FAILED, TaskState.DIVERGED)
        entry = self.entries[task_id]
        if self._has(entry, lane):
            self._release(entry)
            entry.kind = None
            self._end(entry, state, reason)

    def held(self, lane: str) -> tuple[TrainTask, int] | None:
        """Return the lane's current task and its last reported step."""
        task_id = self.lanes[lane]["task"] if lane in self.lanes else None
        if task_id is None:
            return None
        entry = self.entries[task_id]
        return entry.task, entry.last.get("step", 0)

    def lost(
        self, task_id: str, reason: str, attempts: int = MAX_ATTEMPTS, step: int = 0, kind: str | None = None
    ) -> None:
        """Record why a lane is about to die under a task, or just died, and how often such a task is tried in a row.

        step: its last step; a task that got further than ever before has all its attempts again: on machines that come
        and go, a long one would else never end. kind: of the failure; a resumed run tries some again.
        """
        entry = self.entries[task_id]
        if entry.state in (TaskState.RUNNING, TaskState.QUEUED) and entry.attempts:
            if step > entry.reached:
                entry.reached, entry.attempts = step, 1
            entry.reason, entry.limit, entry.kind = reason, attempts, kind
            self._touch(entry)
            if entry.state == TaskState.QUEUED:
                self._exhausted(entry)

    # --- controller ---

    def scored(self, task_id: str, scores: dict[str, float], reason: str | None) -> None:
        """All benchmarks of a trained task are through; `reason` names those that failed."""
        entry = self.entries[task_id]
        if entry.state == TaskState.TRAINED:
            entry.scores = scores
            self._end(entry, TaskState.DONE, reason)

    def changes(self, after: int) -> tuple[int, list[QueuedTask]]:
        """Return the number of state changes so far, and the entries of those later than `after`."""
        changed = dict.fromkeys(self._changes[after:])
        return len(self._changes), [self.entries[task_id] for task_id in changed]

    def snapshot(self, after: Mark | None = None) -> dict[str, Any]:
        """Return the rows of a progress table that changed since the snapshot with a mark, all without one.

        `queued` counts the queued tasks of each pool, `open` those of each study that have not ended.
        """
        changed: Iterable[str] = self.entries
        if after is not None and after[0] == self._process:
            since = after[1]
            changed = reversed(list(takewhile(lambda name: self._touched[name] > since, reversed(self._touched))))
        return {
            "mark": (self._process, self._number),
            "tasks": [self.entries[name].row() for name in changed],
            "lanes": {name: {**lane, "study": self._study(lane["task"])} for name, lane in self.lanes.items()},
            "queued": {pool: len(tasks) for pool, tasks in self._queued.items() if tasks},
            "open": {study: count for study, count in self._open.items() if count},
        }

    # --- details ---

    def _has(self, entry: QueuedTask, lane: str | None) -> bool:
        """Return whether the task is running, on this lane if one is named."""
        return entry.state == TaskState.RUNNING and lane in (None, entry.lane)

    def _study(self, task_id: str | None) -> str | None:
        return None if task_id is None else self.entries[task_id].task.study

    def _leaving(self, lane: str) -> bool:
        return not self._drained.isdisjoint(self.lanes[lane]["nodes"])

    def _exhausted(self, entry: QueuedTask) -> bool:
        """End a task that lost as many lanes as it may."""
        if entry.attempts < entry.limit:
            return False
        tried = f" (tried {entry.attempts} times)" if entry.attempts > 1 else ""
        self._end(entry, TaskState.FAILED, f"{entry.reason}{tried}")
        return True

    def _requeue(self, entry: QueuedTask) -> None:
        """Back into the queue as if it had never ended; why its lane was lost is kept until it is taken again."""
        if entry.state == TaskState.STOPPED:
            entry.reason, entry.attempts = None, 0
        entry.lane, entry.outcome = None, {}
        self._turn(entry, TaskState.QUEUED)
        # Before those that were placed later.
        self._queued[entry.task.pool] = {entry.task.id: None, **self._queued[entry.task.pool]}

    def _release(self, entry: QueuedTask) -> None:
        if entry.lane in self.lanes:
            self.lanes[entry.lane]["task"] = None

    def _end(self, entry: QueuedTask, state: TaskState, reason: str | None) -> None:
        entry.reason = reason
        self._turn(entry, state)

    def _enter(self, entry: QueuedTask) -> QueuedTask:
        self.entries[entry.task.id] = entry
        self._count(entry, +1)
        self._touch(entry)
        return entry

    def _turn(self, entry: QueuedTask, state: TaskState) -> None:
        self._count(entry, -1)
        entry.state = state
        self._count(entry, +1)
        self._changed(entry.task.id)

    def _count(self, entry: QueuedTask, sign: int) -> None:
        """Keep the counts of queued and open tasks, before (-1) and after (+1) a change of state."""
        task = entry.task
        if not entry.state.is_final:
            self._open[task.study] = self._open.get(task.study, 0) + sign
        if entry.state == TaskState.QUEUED:
            waiting = self._queued.setdefault(task.pool, {})
            if sign > 0:
                waiting[task.id] = None
            else:
                del waiting[task.id]

    def _changed(self, task_id: str) -> None:
        self._changes.append(task_id)
        self._touch(self.entries[task_id])

    def _touch(self, entry: QueuedTask) -> None:
        self._number += 1
        self._touched.pop(entry.task.id, None)
        self._touched[entry.task.id] = self._number
