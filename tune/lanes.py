"""The lanes of a run, kept alive from the driver: each `run_lane` blocks in a thread of its own."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from pathlib import Path

from ray.actor import ActorHandle

from macdrop.errors import ResourceError
from tune.dispatch import call
from tune.lane import run_lane
from tune.spec import RaySpec

#: A lane whose Train run has failed for good is started anew this often before the run is given up.
RELAUNCHES = 2
#: How long closing lanes are waited for; an order that was cut by an error may hold one longer.
CLOSE_S = 20.0


class Lanes:
    """Starts the lanes, notices dead ones, closes them."""

    def __init__(self, dispatcher: ActorHandle, spec: RaySpec, gpus_per_worker: float, storage: Path) -> None:
        self._dispatcher, self._spec, self._gpus, self._storage = dispatcher, spec, gpus_per_worker, storage
        self._numbers = itertools.count(1)
        self._threads: dict[str, threading.Thread] = {}
        self._errors: dict[str, str] = {}
        self._relaunched = 0
        self._opened: float | None = None

    def open(self) -> None:
        """Start as many lanes as the spec says; returns at once."""
        self._opened = time.monotonic()
        for _ in range(self._spec.lanes):
            self._launch()

    def check(self, up: int) -> None:
        """Replace lanes that failed; `up` is the number of lanes whose workers are ready.

        Raises:
            ResourceError: no lane became ready in time, or lanes keep failing.
        """
        for name, thread in list(self._threads.items()):
            if thread.is_alive():
                continue
            del self._threads[name]
            reason = self._errors.pop(name, "the lane ended")
            call(self._dispatcher, "lane_down", name, reason)
            if self._relaunched >= RELAUNCHES * self._spec.lanes:
                raise ResourceError(f"The lanes keep failing; the last one said:\n{reason}")
            self._relaunched += 1
            self._launch()
        waited = time.monotonic() - self._opened if self._opened else 0.0
        if self._opened and not up and waited > self._spec.resource_timeout_s:
            raise ResourceError(
                f"No lane got its {self._spec.num_workers} worker(s) within ray.resource_timeout_s = "
                f"{self._spec.resource_timeout_s:g} s.\n{self._holders()}"
            )
        if up:
            self._opened = None

    def close(self) -> None:
        """Ask every lane to end after its order and wait for it: a thread still inside Ray would break its shutdown."""
        for name in self._threads:
            call(self._dispatcher, "close", name)
        for thread in self._threads.values():
            thread.join(timeout=CLOSE_S)

    def _launch(self) -> None:
        name = f"lane-{next(self._numbers)}-{int(time.time())}"
        thread = threading.Thread(target=self._run, args=(name,), name=name, daemon=True)
        self._threads[name] = thread
        thread.start()

    def _run(self, name: str) -> None:
        try:
            run_lane(name, self._dispatcher, self._spec, self._gpus, self._storage)
        except Exception as error:
            logging.getLogger(__name__).debug("lane %s", name, exc_info=True)
            self._errors[name] = f"{type(error).__name__}: {error}"

    def _holders(self) -> str:
        from tune.cluster_state import holders

        return holders()
