"""The lanes of one kind, kept alive from the driver: each `run_lane` blocks in a thread of its own.

A lane that dies while it trains counts against its task (`failures` says how often a task is retried), and a lane that
waits for resources has not failed. A run ends only if idle lanes keep dying, or if there is no lane for too long.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from tune.config.resume import resume_command
from tune.config.run_spec import RaySpec
from tune.distributed.cluster.placement_groups import end_runs, end_waiting_runs, groups, without_resources
from tune.distributed.cluster.ray_cluster import holders
from tune.distributed.lanes.dispatcher import call
from tune.distributed.lanes.lane import report_loss, run_lane
from tune.errors import ResourceError
from tune.scheduling.allocation import LaneKind
from tune.scheduling.failures import of_run

#: How many Train runs per lane may end in a row before a lane takes a task.
RELAUNCHES = 2
#: How long closing lanes are waited for; then their processes are killed.
CLOSE_S = 20.0
#: How often it is looked at who lacks room.
LOOK_EVERY_S = 1.0
#: Evaluators that have work but no resources for this long get those of an idle lane.
ROOM_AFTER_S = 10.0
#: After this long without any lane, idle evaluators release their resources; lanes take less to start or restart.
STARVING_S = 60.0


class LanePool:
    """Starts the lanes, replaces dead ones, closes them; needs a running `Reaper`."""

    #: Of the lanes of all pools.
    _numbers = itertools.count(1)

    def __init__(
        self, dispatcher: ActorHandle, spec: RaySpec, kind: LaneKind, storage: Path, *, evaluator: type
    ) -> None:
        """evaluator: the class of the actors that idle lanes make room for."""
        self._dispatcher, self._spec, self._kind, self._storage = dispatcher, spec, kind, storage
        self._gpus = kind.each.gpus
        self._evaluator = evaluator
        self._threads: dict[str, threading.Thread] = {}
        self._errors: dict[str, Exception] = {}
        self._opened = False
        self._wanted = 0  # how many lanes there should be
        self._allowed = kind.most
        self._stillborn = 0  # lanes that ended before any took a task
        self._none_since: float | None = None
        self._starving_since: float | None = None
        self._looked = 0.0
        self._yielding: set[str] = set()  # lanes that this pool has ended, or asked to end, for others

    def open(self, lanes: int | None = None) -> None:
        """Start so many lanes, all that there may be without a number, without waiting for them."""
        self._opened = True
        self._allowed = self._wanted = self._kind.most if lanes is None else lanes
        for _ in range(self._wanted):
            self._launch()

    def allow(self, lanes: int) -> None:
        """Have this many lanes, as the room is shared with other pools; lanes above end once their task is finished."""
        if self._opened and lanes != self._allowed:
            self._allowed = self._wanted = lanes

    def check(self, snapshot: dict[str, Any], *, scoring: bool = False, working: bool = False) -> None:
        """Replace lanes that ended, make room for evaluation actors and other pools.

        snapshot: the queue's. scoring: benchmarks are waiting or running. working: some are running, on resources that
        a lane may get next.

        Raises:
            ResourceError: there was no lane for `ray.resource_timeout_s`, or lanes keep ending without a task.
        """
        up = {name: lane for name, lane in snapshot["lanes"].items() if lane["pool"] == str(self._kind)}
        if any(lane["task"] for lane in up.values()):
            self._stillborn = 0
        queued = str(self._kind) in snapshot["queued"]
        now = time.monotonic()
        if now > self._looked + LOOK_EVERY_S:
            self._looked = now
            self._share(up, queued, scoring)
            self._yield_to_others(up)
        for name, thread in list(self._threads.items()):
            if not thread.is_alive():
                del self._threads[name]
                self._ended(name)
                self._yielding.discard(name)
        while self._staying < self._wanted:
            self._launch()
        self._check_any(up, working)

    @property
    def _staying(self) -> int:
        """The number of lanes, with those that are coming, without those that make room for others."""
        return len(self._threads.keys() - self._yielding)

    @property
    def starving(self) -> bool:
        """True if there has been no lane for long, though there should be one."""
        return self._waited_s > min(STARVING_S, self._spec.patience_s / 2)

    @property
    def _waited_s(self) -> float:
        return time.monotonic() - self._none_since if self._none_since else 0.0

    def close(self) -> None:
        """Have every lane save its state and end, and wait for it; safe to call twice.

        A thread still inside Ray would break Ray's shutdown, so runs that do not respond are killed.
        """
        self.ask_to_close()
        with contextlib.suppress(Exception):
            self.join(CLOSE_S, waiting=False)
        if any(thread.is_alive() for thread in self._threads.values()):
            with contextlib.suppress(Exception):
                end_runs()
            self.join(CLOSE_S, waiting=True)
        self._threads = {}

    def ask_to_close(self) -> None:
        """Have every lane save its state and end."""
        self._opened, self._wanted = False, 0
        with contextlib.suppress(Exception):
            nodes = [node for lane in call(self._dispatcher, "snapshot")["lanes"].values() for node in lane["nodes"]]
            call(self._dispatcher, "drain", nodes)
            for name in self._threads:
                call(self._dispatcher, "close", name)

    # --- details ---

    def _share(self, up: dict[str, Any], queued: bool, scoring: bool) -> None:
        """Give idle lanes' resources to evaluation actors that have none; restart lanes when tasks are queued."""
        if queued and self._opened:
            self._wanted = self._allowed
        starving = scoring and not queued and without_resources(self._evaluator)
        self._starving_since = (self._starving_since or self._looked) if starving else None
        idle = [name for name, lane in up.items() if not lane["task"]]
        if idle and self._starving_since and self._looked - self._starving_since >= ROOM_AFTER_S:
            self._starving_since = None
            self._wanted = max(0, len(up) - 1)
            # A lane that waits for resources would be the first to take them.
            self._end_waiting(len(self._threads))
            call(self._dispatcher, "close", idle[0])

    def _yield_to_others(self, up: dict[str, Any]) -> None:
        """End lanes above the number that the pool may have: those that wait for room, then idle ones, then others."""
        above = self._staying - self._allowed
        if above <= 0:
            return
        if self._staying > len(up.keys() - self._yielding):
            self._end_waiting(above)
            return
        idle_first = sorted(up, key=lambda name: up[name]["task"] is not None)
        ending = [name for name in idle_first if name not in self._yielding][:above]
        for name in ending:
            self._yielding.add(name)
            call(self._dispatcher, "close", name)

    def _end_waiting(self, most: int) -> None:
        """End up to `most` of the lanes that wait for resources, the newest first."""
        staying = [name for name in reversed(self._threads) if name not in self._yielding]
        self._yielding.update(end_waiting_runs(staying, most))

    def _ended(self, name: str) -> None:
        error = self._errors.pop(name, None)
        if error is None:
            call(self._dispatcher, "lane_down", name, "the lane ended")
            return
        failure = of_run(error)
        if report_loss(self._dispatcher, name, failure) or name in self._yielding or self._staying >= self._wanted:
            return
        self._stillborn += 1
        if self._stillborn > RELAUNCHES * self._kind.most:
            raise ResourceError(f"The lanes keep failing before they take a task. {failure.reason}\n{self._resume()}")

    def _check_any(self, up: dict[str, Any], working: bool) -> None:
        """Raise if there should be lanes and all have been waiting for too long."""
        waiting = self._wanted and not up
        self._none_since = (self._none_since or time.monotonic()) if waiting else None
        if self._waited_s > self._spec.patience_s and not working:
            gpus = f" and {self._gpus:g} GPU(s)" if self._gpus else ""
            raise ResourceError(
                f"No lane got its {self._spec.num_workers} worker(s) of {self._spec.cpus_per_worker:g} CPU(s){gpus} "
                f"within ray.resource_timeout_s = {self._spec.patience_s:g} s.\n{holders()}\n"
                f"{self._slow_start()}{self._resume()}"
            )

    def _slow_start(self) -> str:
        """Return a line with the remedy if a lane lacks only time: it has room, or this machine has."""
        free, workers = ray.available_resources(), self._spec.num_workers
        needs = {"CPU": workers * self._spec.cpus_per_worker, "GPU": workers * self._gpus}
        finds = self._spec.address is None and all(free.get(name, 0.0) >= need for name, need in needs.items())
        if not finds and not any(group.placed and group.creator for group in groups()):
            return ""
        return (
            "There is room for it, but its processes start slowly, as on a busy machine. End other programs, or raise "
            "ray.resource_timeout_s.\n"
        )

    def _resume(self) -> str:
        return f"Finished work is kept. To resume: {resume_command(self._storage.parent)}"

    def _launch(self) -> None:
        name = f"lane-{next(self._numbers)}-{int(time.time())}"
        thread = threading.Thread(target=self._run, args=(name,), name=name, daemon=True)
        self._threads[name] = thread
        thread.start()

    def _run(self, name: str) -> None:
        try:
            run_lane(name, self._dispatcher, self._spec, self._kind, self._storage)
        except Exception as error:
            logging.getLogger(__name__).debug("lane %s", name, exc_info=True)
            self._errors[name] = error

    def join(self, seconds: float, *, waiting: bool) -> None:
        """Wait for the threads; for those of lanes that are not up only if `waiting`."""
        deadline = time.monotonic() + seconds
        up = set(self._threads) if waiting else set(call(self._dispatcher, "snapshot")["lanes"])
        for name, thread in self._threads.items():
            if name in up:
                thread.join(timeout=max(0.0, deadline - time.monotonic()))
