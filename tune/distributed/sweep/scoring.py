"""The evaluation actors of a run: a pool for each study that has begun, handed on to the next one of the same size."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from macdrop.errors import MacDropError
from tune.config.run_spec import RaySpec
from tune.distributed.actors.actor_pool import PoolActor
from tune.distributed.actors.eval_task import EvalTask, Result
from tune.distributed.actors.evaluators import Evaluator, EvaluatorPool, Opening
from tune.scheduling.resources import gpu_shares
from tune.scheduling.time_watch import EVALUATOR, TimeWatch

#: An actor that has not started after this long is waiting for resources.
STARTING_S = 60.0


@dataclass(frozen=True)
class _Size:
    actors: int
    cpus: float
    gpus: float


@dataclass
class _Open:
    pool: EvaluatorPool
    size: _Size
    #: When its model began to be loaded; None once it is.
    opening: float | None = None


class Scoring:
    """Pools of evaluators by study. Studies open theirs in threads of their own; all else is the control loop's."""

    def __init__(
        self,
        cluster_gpus: float,
        *,
        kind: type[PoolActor] = Evaluator,
        record: Callable[[list[dict[str, Any]]], object] = list,
    ) -> None:
        """record: takes the times of actors as they end (`TimeWatch`)."""
        self._gpus, self._kind = cluster_gpus, kind
        self._times, self._record = TimeWatch(EVALUATOR), record
        self._open: dict[str, _Open] = {}
        self._free: list[_Open] = []
        self._lock = threading.Lock()
        self._closed = False
        #: Study -> why it has no actors left.
        self.broken: dict[str, MacDropError] = {}

    def open(self, study: str, opening: Opening, ray: RaySpec) -> str | None:
        """Make a study's model resident in its actors; return the file of its massive weights, None if it has none.

        Raises:
            MacDropError: see `EvaluatorPool.open`.
        """
        with self._lock:
            if self._closed:
                raise MacDropError("the run is being closed")
            mine = self._take(ray)
            mine.opening = time.monotonic()
            self._open[study] = mine
        try:
            # Without the lock, so that the loop runs: an actor may be waiting for what an idle lane holds.
            return mine.pool.open(opening)
        finally:
            mine.opening = None

    def _take(self, ray: RaySpec) -> _Open:
        size = _Size(ray.evaluators, ray.cpus_per_evaluator, gpu_shares(ray, self._gpus).per_evaluator)
        found = next((free for free in self._free if free.size == size), None)
        if found is not None:
            self._free.remove(found)
            return found
        # Free ones hold what the new ones may need.
        for free in self._free:
            free.pool.close()
        self._free = []
        return _Open(EvaluatorPool(size.actors, cpus=size.cpus, gpus=size.gpus, kind=self._kind), size)

    def hand_on(self, study: str, *, keep: bool) -> None:
        """Take the actors of a study that has ended for one to come, or end them."""
        with self._lock:
            if (mine := self._open.pop(study, None)) is None:
                return
            # Another study may be waiting for what they hold.
            if keep and not mine.pool.busy and not self.opening:
                self._free.append(mine)
            else:
                mine.pool.close()

    def submit(self, study: str, task: EvalTask) -> None:
        """Queue a task of a study."""
        self._open[study].pool.submit(task)

    def step(self) -> list[Result]:
        """Collect finished tasks and hand out waiting ones, without blocking; a study without actors is in `broken`."""
        results = []
        for study, mine in list(self._open.items()):
            if mine.opening is None and study not in self.broken:
                try:
                    results += mine.pool.step()
                except MacDropError as error:
                    self.broken[study] = error
        self._record(self._times.see(self._at(), time.time()))
        return results

    def _at(self) -> dict[str, tuple[str, str] | None]:
        """Return the actors that are up, by name, each with the study and trial that it scores, if any."""
        found: dict[str, tuple[str, str] | None] = {}
        for free in list(self._free):
            found |= dict.fromkeys(free.pool.at())
        for study, mine in list(self._open.items()):
            found |= {name: (study, trial) if trial else None for name, trial in mine.pool.at().items()}
        return found

    def drain(self, nodes: Collection[str]) -> None:
        """Replace actors on nodes (Ray's ids) that will be taken away; busy ones finish their benchmark first."""
        for mine in self._resident():
            mine.pool.drain(nodes)

    def release(self) -> int:
        """Release idle actors until something is to be scored; return how many there were."""
        with self._lock:
            free, self._free = self._free, []
        for each in free:
            each.pool.close()
        released = sum(mine.pool.release() for mine in self._resident() if not mine.pool.busy)
        return released + sum(each.size.actors for each in free)

    @property
    def opening(self) -> bool:
        """True while a study's model is being loaded."""
        return any(mine.opening is not None for mine in list(self._open.values()))

    @property
    def wanting(self) -> bool:
        """True if benchmarks are waiting or running, or actors have been starting for long."""
        late = time.monotonic() - STARTING_S
        return bool(self.busy) or any(mine.opening and mine.opening < late for mine in list(self._open.values()))

    def left(self) -> dict[str, int]:
        """Return the number of tasks waiting or being scored, by study."""
        return {study: mine.pool.busy for study, mine in list(self._open.items()) if study not in self.broken}

    @property
    def busy(self) -> int:
        """Tasks waiting or being scored."""
        return sum(self.left().values())

    @property
    def at_work(self) -> int:
        """Tasks being scored."""
        return sum(mine.pool.at_work for mine in list(self._open.values()))

    def close(self) -> None:
        """End all actors, also of a study whose model is being loaded; safe to call twice."""
        self._closed = True
        self._record(self._times.end(time.time()))
        with self._lock:
            for mine in [*self._open.values(), *self._free]:
                mine.pool.close()
            self._open, self._free = {}, []

    def _resident(self) -> list[_Open]:
        return [mine for mine in list(self._open.values()) if mine.opening is None]
