"""Orders for fine-tunings and the book that keeps them: plain data and decisions, no Ray.

The dispatcher actor is this book behind Ray calls. An order goes queued -> running -> trained -> done; it ends early as
stopped (its followers gave up on it), diverged or failed. Orders are named by their content (`TrainSpec.trial_id`), so
placing the same fine-tuning twice follows the first one.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

from tune.journal import FINALS

#: States that no order leaves.
FINAL = frozenset({"done", "stopped", "diverged", "failed"})
#: A worker may die under an order (node lost, out of memory); after this many lost lanes the order counts as failed.
MAX_ATTEMPTS = 3


@dataclass(frozen=True)
class Order:
    """One fine-tuning to be done, as plain data that crosses processes.

    `spec` is a dumped TrainSpec; `folder` the trial's folder; `data` the cache of tokenised data; `weights` the file
    with the massive weights, None for a plain adapter; `width` the number of workers a lane must have; `stage` (one of
    `tune.journal.STAGES`) decides what the adapter is scored on; `cell` is the searched kind of adapter; `drawn` are
    the values that a search drew for it.
    """

    id: str
    study: str
    spec: dict[str, Any]
    folder: str
    data: str
    weights: str | None
    engine_key: str
    width: int
    stage: str = FINALS
    cell: dict[str, Any] = field(default_factory=dict)
    drawn: dict[str, Any] | None = None


@dataclass
class Entry:
    """An order and what became of it."""

    order: Order
    state: str = "queued"
    lane: str | None = None
    attempts: int = 0
    followers: set[str] = field(default_factory=set)
    cancelled: bool = False
    last: dict[str, Any] = field(default_factory=dict)
    evaluated: list[dict[str, Any]] = field(default_factory=list)
    outcome: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None
    scores: dict[str, float] | None = None
    started: float | None = None
    ended: float | None = None


class OrderBook:
    """Who trains what. Every method is quick; callers poll."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.lanes: dict[str, dict[str, Any]] = {}
        self._closing: set[str] = set()
        self._changes: list[str] = []

    # ------------------------------------------------------------- followers

    def place(self, order: Order, follower: str) -> str:
        """Queue an order, or follow the equal one that is there; returns its state.

        A trial of the search that is placed for the final stage is not trained again, but scored for that stage.
        """
        entry = self.entries.get(order.id)
        if entry is None:
            entry = self.entries[order.id] = Entry(order)
            self._changed(order.id)
        elif entry.state == "stopped" or (entry.cancelled and entry.state == "running"):
            # Wanted again by somebody after its only follower gave up.
            entry.cancelled = False
            if entry.state == "stopped":
                self._requeue(entry)
        if entry.order.stage != order.stage == FINALS:
            entry.order = replace(order, drawn=entry.order.drawn)
            if entry.state == "done":
                entry.state = "trained"
                self._changed(order.id)
        entry.followers.add(follower)
        return entry.state

    def record(self, order: Order, state: str, outcome: dict[str, Any], scores: dict[str, float] | None) -> None:
        """Enter an order that an earlier run of the same folder has done, or trained without scoring all of it."""
        assert state in ("done", "trained")
        self.entries[order.id] = Entry(order, state=state, outcome=outcome, scores=scores)
        if state == "trained":
            self._changed(order.id)

    def cancel(self, order_id: str, follower: str) -> None:
        """A follower gives up; without any other the order stops at the lane's next step."""
        entry = self.entries.get(order_id)
        if entry is None or entry.state in FINAL or entry.state == "trained":
            return
        entry.followers.discard(follower)
        if entry.followers:
            return
        entry.cancelled = True
        if entry.state == "queued":
            self._end(entry, "stopped", "stopped before it started")

    def abandon(self, study: str, keep: str) -> None:
        """The search of a study is over (its time is up, say): of its followers only `keep` still waits."""
        for entry in self.entries.values():
            if entry.order.study == study:
                for follower in entry.followers - {keep}:
                    self.cancel(entry.order.id, follower)

    def poll(self, order_id: str, after: int) -> dict[str, Any]:
        """Metrics with a validation loss of steps later than `after`, the state, and how it ended."""
        entry = self.entries[order_id]
        return {
            "state": entry.state,
            "metrics": [metrics for metrics in entry.evaluated if metrics["step"] > after],
            "outcome": entry.outcome,
            "reason": entry.reason,
            "scores": entry.scores,
        }

    # ----------------------------------------------------------------- lanes

    def lane_up(self, lane: str, width: int, host: str) -> None:
        """A lane's workers are ready; an order that it had before it was restarted goes back into the queue."""
        self.lane_down(lane, "its worker died")
        self.lanes[lane] = {"width": width, "host": host, "order": None}

    def lane_down(self, lane: str, reason: str) -> None:
        """A lane is gone; its order is queued again, or fails after `MAX_ATTEMPTS` lost lanes."""
        self.lanes.pop(lane, None)
        for entry in self.entries.values():
            if entry.lane == lane and entry.state == "running":
                if entry.cancelled:
                    self._end(entry, "stopped", "stopped")
                elif entry.attempts >= MAX_ATTEMPTS:
                    self._end(entry, "failed", f"{entry.reason or reason} (tried {entry.attempts} times)")
                else:
                    self._requeue(entry)

    def take(self, lane: str, engine_key: str | None) -> Order | None:
        """The next order for a lane: one that fits the engine it has, else the oldest of its width."""
        width = self.lanes[lane]["width"]
        waiting = [e for e in self.entries.values() if e.state == "queued" and e.order.width == width]
        if not waiting or lane in self._closing:
            return None
        fitting = [entry for entry in waiting if entry.order.engine_key == engine_key]
        entry = (fitting or waiting)[0]
        entry.state, entry.lane, entry.started = "running", lane, time.time()
        entry.attempts += 1
        self.lanes[lane]["order"] = entry.order.id
        self._changed(entry.order.id)
        return entry.order

    def closing(self, lane: str) -> bool:
        return lane in self._closing

    def close(self, lane: str) -> None:
        """Ask a lane to end once its order is finished."""
        self._closing.add(lane)

    def progress(self, order_id: str, metrics: dict[str, Any]) -> bool:
        """Take the metrics of a step; False tells the lane to stop."""
        entry = self.entries[order_id]
        entry.last = metrics
        # A retried order repeats the steps after its last checkpoint: the first word on a step has been passed on.
        if metrics.get("eval_loss") is not None and all(m["step"] != metrics["step"] for m in entry.evaluated):
            entry.evaluated.append(metrics)
        return not entry.cancelled

    def trained(self, order_id: str, outcome: dict[str, Any]) -> None:
        """A fine-tuning has ended with its adapter on disk."""
        entry = self.entries[order_id]
        self._release(entry)
        entry.outcome = outcome
        if outcome["status"] == "stopped" and not entry.cancelled:
            # Wanted again after its lane had been told to stop: it goes on from its newest checkpoint.
            entry.attempts -= 1
            self._requeue(entry)
        elif outcome["status"] == "stopped":
            self._end(entry, "stopped", f"stopped at step {outcome['step']} of {outcome['total_steps']}")
        else:
            entry.state = "trained"
            self._changed(order_id)

    def failed(self, order_id: str, state: str, reason: str) -> None:
        """A fine-tuning has ended without an adapter; `state` is failed or diverged."""
        assert state in ("failed", "diverged")
        entry = self.entries[order_id]
        self._release(entry)
        self._end(entry, state, reason)

    def lost(self, order_id: str, reason: str) -> None:
        """The lane is about to die under an order; keep why, in case it is not tried again."""
        self.entries[order_id].reason = reason

    # ------------------------------------------------------------ supervisor

    def scored(self, order_id: str, scores: dict[str, float], reason: str | None) -> None:
        """All benchmarks of a trained order are through; `reason` names those that failed."""
        entry = self.entries[order_id]
        entry.scores = scores
        self._end(entry, "done", reason)

    def changes(self) -> list[Entry]:
        """Entries whose state changed since the last call."""
        changed, self._changes = dict.fromkeys(self._changes), []
        return [self.entries[order_id] for order_id in changed]

    def snapshot(self) -> dict[str, Any]:
        """What a progress table shows."""
        rows = []
        for entry in self.entries.values():
            steps = entry.outcome.get("total_steps")
            rows.append(
                {
                    "id": entry.order.id,
                    "study": entry.order.study,
                    "stage": entry.order.stage,
                    "state": entry.state,
                    "last": entry.last,
                    "total_steps": steps,
                    "reason": entry.reason,
                }
            )
        return {"orders": rows, "lanes": dict(self.lanes)}

    # --------------------------------------------------------------- details

    def _requeue(self, entry: Entry) -> None:
        """Back into the queue as if it had never ended; a lost lane's reason is kept for the last attempt."""
        if entry.state == "stopped":
            entry.reason, entry.attempts = None, 0
        entry.state, entry.lane, entry.ended, entry.outcome = "queued", None, None, {}
        self._changed(entry.order.id)

    def _release(self, entry: Entry) -> None:
        if entry.lane in self.lanes:
            self.lanes[entry.lane]["order"] = None

    def _end(self, entry: Entry, state: str, reason: str | None) -> None:
        entry.state, entry.reason, entry.ended = state, reason, time.time()
        self._changed(entry.order.id)

    def _changed(self, order_id: str) -> None:
        self._changes.append(order_id)
