"""A run in virtual time: which model trains when, by the queue and the sharing that a real run uses. Pure; no Ray.

Studies, lanes and evaluation actors are events of a clock; only how long each part takes is given.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from tune.scheduling.allocation import RESERVE_AFTER_S, LaneKind, Room
from tune.scheduling.queue import TaskQueue
from tune.scheduling.sharing import LaneSharing, Phase, StudyNeeds
from tune.scheduling.tasks import TrainTask
from tune.training.observer import Ending


@dataclass(frozen=True)
class StageTimes:
    """Seconds of each fine-tuning of a stage and of the scores of each; at most `at_once` of them are under way."""

    train_s: tuple[float, ...]
    score_s: float
    at_once: int


@dataclass(frozen=True)
class StudyTimes:
    """A study's stages in their order, what its lanes and evaluation actors hold, and the seconds before it trains.

    open_s: the evaluation actors load the model. base_s: they score the base model. load_s: a lane loads the model.
    """

    name: str
    kind: LaneKind
    evaluators: int
    evaluator: Room
    stages: tuple[StageTimes, ...]
    open_s: float = 0.0
    base_s: float = 0.0
    load_s: float = 0.0


@dataclass(frozen=True)
class Span:
    """A time that a lane or an evaluation actor was held, or worked for a study (`what`: a trial or benchmark)."""

    holder: str
    begin: float
    end: float
    room: Room
    study: str | None = None
    what: str | None = None


@dataclass
class Timeline:
    """Times held and times worked in a run, in seconds since its start."""

    held: list[Span] = field(default_factory=list)
    worked: list[Span] = field(default_factory=list)
    studies: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def end(self) -> float:
        return max((end for _, end in self.studies.values()), default=0.0)

    def utilisation(self, holders: str) -> float:
        """Return the busy share of the GPU time (CPU time without GPUs) that holders with this prefix held."""

        def cost(spans: Sequence[Span]) -> float:
            mine = [span for span in spans if span.holder.startswith(holders)]
            return sum((span.end - span.begin) * (span.room.gpus or span.room.cpus) for span in mine)

        return cost(self.worked) / max(cost(self.held), 1e-9)


@dataclass
class _Lane:
    kind: LaneKind
    placed: float
    model: str | None = None
    up: bool = False


@dataclass
class _Study:
    times: StudyTimes
    began: float
    #: When its evaluation actors got their room.
    placed: float | None = None
    stage: int = -1
    to_place: deque[tuple[str, float]] = field(default_factory=deque)
    under_way: set[str] = field(default_factory=set)
    to_score: deque[tuple[str, float]] = field(default_factory=deque)
    idle: int = 0


class Simulation:
    """One run in virtual time; `most` studies at once, None as gaps allow. start_s: seconds until a lane is up."""

    def __init__(
        self, studies: Sequence[StudyTimes], room: Room, *, most: int | None = None, start_s: float = 0.0
    ) -> None:
        self.timeline = Timeline()
        self._waiting, self._room, self._most, self._start_s = deque(studies), room, most, start_s
        self._queue, self._sharing = TaskQueue(), LaneSharing({study.name: _needs(study) for study in studies})
        self._mark = self._queue.snapshot()["mark"]
        self._active: dict[str, _Study] = {}
        self._lanes: dict[str, _Lane] = {}
        self._coming: list[LaneKind] = []
        self._in_use: set[LaneKind] = set()
        self._train_s: dict[str, float] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._now = 0.0

    def run(self) -> Timeline:
        """Return what happened."""
        self._settle()
        while self._events:
            self._now, _, happen = heapq.heappop(self._events)
            happen()
            self._settle()
        assert not self._active and not self._waiting, "a study waits for ever"
        return self.timeline

    # --- what the controller of a run does ---

    def _settle(self) -> None:
        while (study := next(filter(self._may_begin, self._waiting), None)) is not None:
            self._waiting.remove(study)
            self._begin(study)
        snapshot = self._queue.snapshot(self._mark)
        self._mark = snapshot["mark"]
        self._sharing.look(snapshot)
        demands = self._sharing.demands(self._now)
        for kind, target in self._sharing.lanes(demands, self._room).items():
            if demands[kind].tasks:
                self._in_use.add(kind)
            if kind not in self._in_use:
                continue
            mine = [
                name for name, lane in self._lanes.items() if lane.kind == kind and not self._queue.asked_to_close(name)
            ]
            coming = self._coming.count(kind)
            for _ in range(target - len(mine) - coming):
                self._coming.append(kind)
            for _ in range(min(coming, len(mine) + coming - target)):
                self._coming.remove(kind)
            idle = [name for name in mine if self._lanes[name].up and not self._queue.lanes[name]["task"]]
            busy = [name for name in mine if name not in idle and self._lanes[name].up]
            for name in (idle + busy)[: max(0, len(mine) - target)]:
                self._queue.close(name)
        for name in [name for name, lane in self._lanes.items() if lane.up and not self._queue.lanes[name]["task"]]:
            self._next_task(name)
        self._place_evaluators()
        self._place_lanes()

    def _may_begin(self, study: StudyTimes) -> bool:
        if not self._active:
            return True
        if self._most is not None:
            return len(self._active) < self._most and self._sharing.leaves_a_lane(study.name, self._room)
        return self._sharing.has_gap(study.name, self._room, self._now)

    # --- lanes ---

    def _place_lanes(self) -> None:
        free = self._sharing.room(self._room)
        for lane in self._lanes.values():
            free -= lane.kind.room
        for kind in list(self._coming):
            if free.holds(kind.room):
                free -= kind.room
                self._coming.remove(kind)
                name = f"lane-{next(self._numbers)}"
                self._lanes[name] = _Lane(kind, self._now)
                self._at(self._start_s, partial(self._up, name))

    def _up(self, name: str) -> None:
        if name not in self._lanes:
            return  # the last study ended first
        self._lanes[name].up = True
        self._queue.lane_up(name, str(self._lanes[name].kind), "host")

    def _next_task(self, name: str) -> None:
        lane = self._lanes[name]
        task = self._queue.take(name, lane.model)
        if task is None:
            if self._queue.closing(name):
                self._queue.lane_down(name, "closed")
                del self._lanes[name]
                self.timeline.held.append(Span(name, lane.placed, self._now, lane.kind.room))
            return
        study = self._active[task.study]
        load = 0.0 if lane.model == task.engine_key else study.times.load_s
        lane.model = task.engine_key
        self._at(load + self._train_s[task.id], lambda: self._trained(name, task, self._now - self._train_s[task.id]))

    def _trained(self, name: str, task: TrainTask, begin: float) -> None:
        self._queue.trained(task.id, {"status": Ending.DONE, "step": 1, "total_steps": 1}, name)
        self.timeline.worked.append(Span(name, begin, self._now, self._lanes[name].kind.room, task.study, task.id))
        study = self._active[task.study]
        study.to_score.append((task.id, study.times.stages[study.stage].score_s))
        self._score(study)

    # --- studies ---

    def _begin(self, times: StudyTimes) -> None:
        self._active[times.name] = _Study(times, self._now)
        self._sharing.turn(times.name, Phase.OPENING)

    def _place_evaluators(self) -> None:
        """Open the models whose actors find room beside the lanes: one that is to go ends its task first."""
        free = self._room
        for lane in self._lanes.values():
            free -= lane.kind.room
        # Those that have their room come first.
        for study in sorted(self._active.values(), key=lambda study: study.placed is None):
            room = study.times.evaluator * study.times.evaluators
            if study.placed is None and free.holds(room):
                study.placed = self._now
                self._at(study.times.open_s, partial(self._opened, study))
            if study.placed is not None:
                free -= room

    def _opened(self, study: _Study) -> None:
        study.idle = study.times.evaluators
        study.under_way.add("base")
        study.to_score.append(("base", study.times.base_s))
        self._score(study)
        self._next_stage(study)

    def _next_stage(self, study: _Study) -> None:
        study.stage += 1
        if study.stage == len(study.times.stages):
            self._ended(study)
            return
        stage = study.times.stages[study.stage]
        names = [f"{study.times.name}-{study.stage}-{number}" for number in range(len(stage.train_s))]
        study.to_place.extend(zip(names, stage.train_s, strict=True))
        self._place(study)
        if not study.under_way:  # no task, and the base model is scored
            self._next_stage(study)

    def _place(self, study: _Study) -> None:
        at_once = study.times.stages[study.stage].at_once
        while study.to_place and len(study.under_way - {"base"}) < at_once:
            name, seconds = study.to_place.popleft()
            study.under_way.add(name)
            self._train_s[name] = seconds
            task = TrainTask(name, study.times.name, {}, "", "", None, study.times.name, str(study.times.kind))
            self._queue.place(task, "simulation")
            self._at(RESERVE_AFTER_S, lambda: None)
        if not study.to_place and study.stage == len(study.times.stages) - 1:
            self._sharing.turn(study.times.name, Phase.LAST)

    def _score(self, study: _Study) -> None:
        while study.idle and study.to_score:
            name, seconds = study.to_score.popleft()
            study.idle -= 1
            self._at(seconds, partial(self._scored, study, name, self._now))

    def _scored(self, study: _Study, name: str, begin: float) -> None:
        study.idle += 1
        study.under_way.discard(name)
        holder = f"evaluator of {study.times.name}"
        self.timeline.worked.append(Span(holder, begin, self._now, study.times.evaluator, study.times.name, name))
        if name != "base":
            self._queue.scored(name, {}, None)
        self._score(study)
        last = study.stage == len(study.times.stages) - 1
        if study.to_place:
            self._place(study)
        elif not study.under_way or (study.under_way == {"base"} and not last):
            self._next_stage(study)

    def _ended(self, study: _Study) -> None:
        times, placed = study.times, study.placed
        assert placed is not None
        del self._active[times.name]
        self._sharing.turn(times.name, Phase.ENDED)
        self.timeline.studies[times.name] = study.began, self._now
        for _ in range(times.evaluators):
            self.timeline.held.append(Span(f"evaluator of {times.name}", placed, self._now, times.evaluator))
        if not self._active and not self._waiting:
            for name, lane in self._lanes.items():
                self.timeline.held.append(Span(name, lane.placed, self._now, lane.kind.room))
            self._lanes.clear()
            self._coming.clear()

    def _at(self, seconds: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self._now + seconds, next(self._numbers), happen))


def _needs(study: StudyTimes) -> StudyNeeds:
    first = study.stages[0]
    return StudyNeeds(study.kind, study.evaluator * study.evaluators, min(first.at_once, len(first.train_s)))
