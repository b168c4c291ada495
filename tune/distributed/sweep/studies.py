"""The studies of a run, each in a thread of its own: one begins when those before it leave a gap."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from macdrop.errors import MacDropError
from tune.distributed.lanes.lane_pools import LanePools
from tune.distributed.sweep.controller import TICK_S, Closed, SweepController
from tune.errors import ResourceError
from tune.scheduling.sharing import Phase
from tune.scheduling.study import Study

#: How long threads of studies are waited for when a run is closed; they look at the controller between Ray calls.
CLOSE_S = 20.0
#: Seconds between two looks for a gap, which cost something for each study that waits.
GAP_S = 1.0


@dataclass
class StudyThreads:
    """Runs studies; `most` of them at once, or as gaps allow with None.

    run: runs one study within the seconds that its search may take (None: any), and returns those that it took.
    """

    studies: list[Study]
    run: Callable[[Study, float | None], float]
    controller: SweepController
    lanes: LanePools
    most: int | None
    budget_s: float | None
    _threads: dict[str, threading.Thread] = field(default_factory=dict)
    _errors: dict[str, BaseException] = field(default_factory=dict)
    #: Studies that wait for room though fewer than `most` are running.
    _late: set[str] = field(default_factory=set)
    #: Seconds of the budget that begun studies may take, or took.
    _shares: dict[str, float] = field(default_factory=dict)

    def run_all(self) -> None:
        """Run every study; one model that cannot be used does not stop the others.

        Raises:
            ResourceError: the cluster has too little, or the control loop has ended.
            MacDropError: the only study failed.
        """
        waiting = list(self.studies)
        while waiting or self._running():
            self.controller.check()
            self._report()
            if (study := next(filter(self._may_begin, waiting), None)) is not None:
                waiting.remove(study)
                self._begin(study, len(waiting) + 1)
            time.sleep(GAP_S if waiting and self.most is None else TICK_S)
        # Threads end without a word when the control loop has failed: they have nothing to say about it.
        self.controller.check()
        self._report()

    def close(self) -> None:
        """Wait for the threads; the control loop has ended. A thread still inside Ray would break Ray's shutdown."""
        deadline = time.monotonic() + CLOSE_S
        for thread in self._threads.values():
            thread.join(timeout=max(0.0, deadline - time.monotonic()))

    def _running(self) -> int:
        return sum(thread.is_alive() for thread in self._threads.values())

    def _may_begin(self, study: Study) -> bool:
        running = self._running()
        if not running:
            return True
        if self.most is None:
            return self.lanes.has_gap(study.name)
        if running >= self.most:
            return False
        if not self.lanes.leaves_a_lane(study.name):
            if study.name not in self._late:
                self._late.add(study.name)
                why = "its evaluation actors would leave no room for a lane"
                self.controller.note(f"{study.name} is waiting to start: {why}")
            return False
        return True

    def _begin(self, study: Study, left: int) -> None:
        share = None
        if self.budget_s is not None:
            share = self._shares[study.name] = max(1.0, (self.budget_s - sum(self._shares.values())) / left)
        thread = threading.Thread(target=self._study, args=(study, share), name=f"study-{study.name}", daemon=True)
        self._threads[study.name] = thread
        self.lanes.sharing.turn(study.name, Phase.OPENING)
        thread.start()

    def _study(self, study: Study, share: float | None) -> None:
        well, begun = False, time.monotonic()
        try:
            spent = self.run(study, share)
            if share is not None:
                self._shares[study.name] = spent
            well = True
        except Closed:
            return
        except BaseException as error:
            if self.controller.broken:  # its actors are gone because the run is being closed
                return
            self._errors[study.name] = error
            if share is not None:  # what it has not used is for the others
                self._shares[study.name] = min(share, time.monotonic() - begun)
        try:
            more = any(each.name not in self._threads for each in self.studies)
            self.controller.ended(study, well=well, more=more)
        except BaseException as error:
            self._errors.setdefault(study.name, error)

    def _report(self) -> None:
        for study in self.studies:
            if study.name in self._errors:
                self._failed(study, self._errors.pop(study.name))

    def _failed(self, study: Study, error: BaseException) -> None:
        unusable = isinstance(error, MacDropError) and not isinstance(error, ResourceError)
        if not unusable or self.controller.broken or len(self.studies) == 1:
            raise error
        self.controller.study_failed(study.name, str(error))
