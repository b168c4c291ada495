"""Time left of a sweep, from seconds per step and per benchmark measured so far and its parallel lanes. Pure.

The clock is an argument: whoever follows a sweep calls `Meter.see` with the queue's rows and the time. A trial's steps
before its first report (the model is loaded, the data tokenised) count as its start, and its validations as part of its
steps. Stages follow one another; within a stage trials are trained in lanes while others are scored.
"""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tune.config.eval_spec import jobs
from tune.config.run_spec import RunSpec
from tune.config.sweep_spec import Metric
from tune.scheduling.study import Study
from tune.storage.states import Stage, TaskState


@dataclass(frozen=True)
class StageWork:
    """Work of a stage, at most: trials, benchmarks of each, and benchmarks of what is trained already."""

    stage: str
    trials: int
    benchmarks: int
    others: int = 0


@dataclass(frozen=True)
class StudyWork:
    """Work of a study: optimizer steps of each trial, and its stages in their order."""

    name: str
    steps: int
    stages: tuple[StageWork, ...]


@dataclass(frozen=True)
class Work:
    """Work of a whole run and what shares it.

    concurrent: trials of a search at once, at most. budget_s: seconds for all searches; None: no limit. metric: the
    first objective.
    """

    studies: tuple[StudyWork, ...]
    lanes: int
    evaluators: int
    concurrent: int
    budget_s: float | None
    metric: Metric


def work_of(run: RunSpec, planned: Sequence[Study], steps: Mapping[str, int]) -> Work:
    """Return the work of a run; `steps` are the optimizer steps of a trial, by study."""
    tests, validations = len(jobs(run.eval)), len(jobs(run.validation))
    found = []
    for study in planned:
        promoted = study.search and not study.reseeded
        compared = study.cells * (bool(study.plain) + study.finalists * study.drops) if promoted else 0
        base = study.base * (tests + (validations if study.search else 0))
        final = StageWork(Stage.FINAL, study.final_count, tests, compared * tests + (0 if study.search else base))
        search = StageWork(Stage.SEARCH, study.searched_count, validations, base)
        stages = (search, final) if study.search else (final,)
        found.append(StudyWork(study.name, steps.get(study.name, 0), stages))
    ray, sweep = run.ray, run.sweep
    return Work(
        tuple(found), ray.lanes, ray.evaluators, sweep.max_concurrent_trials, sweep.time_budget_s, sweep.metric[0]
    )


@dataclass(frozen=True)
class StageLeft:
    """The rest of a stage.

    running: seconds left of each trial in a lane. waiting: trials of `trial_s` seconds each. benchmarks: all that are
    yet to be scored, `per_trial` of them for each trial yet to be trained, of `benchmark_s` seconds each.
    """

    stage: str
    running: tuple[float, ...]
    waiting: int
    trial_s: float
    benchmarks: int
    per_trial: int
    benchmark_s: float

    def seconds(self, lanes: int, evaluators: int) -> float:
        """Return the wall-clock seconds left: of training and the last adapter's scores, or of scoring if longer."""
        training = makespan(self.running, self.waiting, self.trial_s, lanes)
        if self.running or self.waiting:
            training += self.per_trial * self.benchmark_s / max(1, min(evaluators, self.per_trial))
        return max(training, self.benchmarks * self.benchmark_s / evaluators)


def makespan(running: Sequence[float], waiting: int, each: float, lanes: int) -> float:
    """Return when the last trial ends if the next one starts in whichever lane is free first, in seconds."""
    free = [*running, *([0.0] * (lanes - len(running)))]
    heapq.heapify(free)
    for _ in range(waiting):
        heapq.heapreplace(free, free[0] + each)
    return max(free, default=0.0)


@dataclass(frozen=True)
class Pace:
    """Measured seconds of a step, of a trial's start and of a benchmark; None where nothing is measured yet."""

    step: float | None
    start: float
    benchmark: float | None


@dataclass(frozen=True)
class Estimate:
    """The state of a run: trials and steps done of at most all, and the seconds left.

    seconds: None until a step has been measured. whole: no benchmark is left whose time is not known; else `seconds`
    leave all benchmarks out. basis: the measured numbers, as a text.
    """

    trials: tuple[int, int]
    steps: tuple[int, int]
    seconds: float | None
    whole: bool
    basis: str


@dataclass
class _Mark:
    """Reports of a trial since a lane took it: (step, time) of the first and the newest."""

    begun: float
    stale: int | None
    first: tuple[int, float] | None = None
    newest: tuple[int, float] | None = None

    def see(self, step: int | None, now: float) -> None:
        if step is None or (self.first is None and step == self.stale):
            return
        if self.newest is not None and step < self.newest[0]:  # replayed after a lost lane
            self.first = self.newest = (step, now)
        elif self.newest is None or step > self.newest[0]:
            self.first, self.newest = self.first or (step, now), (step, now)


class Meter:
    """Measures a sweep that it is shown, and estimates the time left."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self._marks: dict[str, dict[str, _Mark]] = {study.name: {} for study in work.studies}
        self._benchmarks: dict[str, list[float]] = {}
        #: Study and stage in progress with its announced trials, and the seconds of earlier searches.
        self._stage: tuple[str, str, int] | None = None
        self._begun, self._searched = 0.0, 0.0
        self._past: set[tuple[str, str]] = set()
        self._rows: list[dict[str, Any]] = []
        self._running: set[str] = set()
        self._study = ""

    def open(self, study: str) -> None:
        """Enter a study, whose base model is scored first."""
        self._study = study

    def begin(self, study: str, stage: str, trials: int, now: float) -> None:
        """Enter a stage of at most `trials` trials; those before it have ended."""
        if self._stage is not None and self._stage[1] == Stage.SEARCH:
            self._searched += now - self._begun
        order = [(each.name, part.stage) for each in self.work.studies for part in each.stages]
        if (study, stage) in order:
            self._past |= set(order[: order.index((study, stage))])
        self._study, self._stage, self._begun = study, (study, stage, trials), now

    def see(self, rows: Sequence[dict[str, Any]], now: float) -> None:
        """Take the rows of the queue's snapshot."""
        self._rows = list(rows)
        for row in rows:
            marks = self._marks.setdefault(row["study"], {})
            step = row["last"].get("step")
            if row["state"] != TaskState.RUNNING:
                # The last step is often reported between two looks, of which the second one sees a trained adapter.
                if row["state"] == TaskState.TRAINED and row["id"] in marks:
                    marks[row["id"]].see(step, now)
                continue
            if row["id"] not in marks or row["id"] not in self._running:
                marks[row["id"]] = _Mark(now, step)
            marks[row["id"]].see(step, now)
        self._running = {row["id"] for row in rows if row["state"] == TaskState.RUNNING}

    def scored(self, seconds: float) -> None:
        """Take the seconds of a benchmark of the study in progress, or of its base model."""
        self._benchmarks.setdefault(self._study, []).append(seconds)

    def pace(self, study: str) -> Pace:
        """Return what was measured on a study, or on all of them where nothing was on it."""
        marks = list(self._marks.get(study, {}).values())
        if _step_seconds(marks) is None:
            marks = [mark for each in self._marks.values() for mark in each.values()]
        step = _step_seconds(marks)
        starts = [max(0.0, m.first[1] - m.begun - m.first[0] * (step or 0.0)) for m in marks if m.first is not None]
        times = self._benchmarks.get(study) or [each for found in self._benchmarks.values() for each in found]
        return Pace(step, statistics.median(starts) if starts else 0.0, statistics.fmean(times) if times else None)

    def estimate(self, scoring: int, now: float) -> Estimate:
        """Return the state of the run; `scoring` benchmarks are waiting or running."""
        left, ahead, known, whole = [], 0, True, True
        done, steps = sum(row["state"].is_final for row in self._rows), sum(map(_steps, self._rows))
        trials = done + sum(row["state"] == TaskState.TRAINED for row in self._rows)
        for study in self.work.studies:
            pace = self.pace(study.name)
            for part in study.stages:
                if (study.name, part.stage) in self._past:
                    continue
                stage, to_do = self._left(study, part, pace, scoring, now)
                left.append(stage)
                ahead += to_do
                trials += len(stage.running) + stage.waiting
                known &= pace.step is not None or not (stage.running or stage.waiting)
                whole &= pace.benchmark is not None or not stage.benchmarks
        seconds = self._seconds(left, now) if known else None
        basis = self._basis(self.pace(self._study))
        return Estimate((done, trials), (steps, steps + ahead), seconds, whole, basis)

    def _left(self, study: StudyWork, part: StageWork, pace: Pace, scoring: int, now: float) -> tuple[StageLeft, int]:
        """Return what is left of a stage, and the steps in it."""
        step = pace.step or 0.0
        trial_s = pace.start + study.steps * step
        if self._stage is None or self._stage[:2] != (study.name, part.stage):
            base = len(self._benchmarks.get(study.name, ())) if part is study.stages[0] else 0
            runs = part.trials * part.benchmarks + max(0, part.others - base)
            left = StageLeft(part.stage, (), part.trials, trial_s, runs, part.benchmarks, pace.benchmark or 0.0)
            return left, part.trials * study.steps
        rows = [row for row in self._rows if (row["study"], row["stage"]) == (study.name, part.stage)]
        running = [row for row in rows if row["state"] == TaskState.RUNNING]
        past = sum(row["state"].is_final or row["state"] == TaskState.TRAINED for row in rows)
        waiting = max(self._stage[2], len(rows)) - past - len(running)
        runs = scoring + (len(running) + waiting) * part.benchmarks
        marks = self._marks.get(study.name, {})
        times = tuple(_trial_left(marks.get(row["id"]), study.steps, pace, now) for row in running)
        ahead = waiting * study.steps + sum(max(0, study.steps - _steps(row)) for row in running)
        return StageLeft(part.stage, times, waiting, trial_s, runs, part.benchmarks, pace.benchmark or 0.0), ahead

    def _seconds(self, left: Sequence[StageLeft], now: float) -> float:
        budget = self.work.budget_s
        if budget is not None:
            searching = self._stage is not None and self._stage[1] == Stage.SEARCH
            budget = max(0.0, budget - self._searched - (now - self._begun if searching else 0.0))
        total = 0.0
        for stage in left:
            lanes = self.work.lanes
            if stage.stage == Stage.SEARCH:
                lanes = max(1, min(lanes, self.work.concurrent))
            seconds = stage.seconds(max(lanes, len(stage.running)), self.work.evaluators)
            if stage.stage == Stage.SEARCH and budget is not None:
                seconds = min(seconds, budget)
                budget -= seconds
            total += seconds
        return total

    def _basis(self, pace: Pace) -> str:
        work = self.work
        parts = [] if pace.step is None else [f"{pace.step:.3g} s per step"]
        parts += [] if pace.benchmark is None else [f"{pace.benchmark:.3g} s per benchmark"]
        shares = f"{work.lanes} lane{'s' * (work.lanes > 1)}, {work.evaluators} evaluator{'s' * (work.evaluators > 1)}"
        return f"{', '.join(parts)}, {shares}" if parts else "nothing measured yet"


def _step_seconds(marks: Sequence[_Mark]) -> float | None:
    """Return the seconds per step: between the reports of trials that have two, else since their lanes took them."""
    pairs = [(mark.first, mark.newest) for mark in marks if mark.first is not None and mark.newest is not None]
    steps = sum(newest[0] - first[0] for first, newest in pairs)
    if steps:
        return sum(newest[1] - first[1] for first, newest in pairs) / steps
    spent = [(mark.newest[1] - mark.begun, mark.newest[0]) for mark in marks if mark.newest is not None]
    steps = sum(step for _, step in spent)
    return sum(seconds for seconds, _ in spent) / steps if steps else None


def _steps(row: dict[str, Any]) -> int:
    """Return the steps that a trial has taken."""
    whole = row["total_steps"] if row["state"] in (TaskState.TRAINED, TaskState.DONE) else None
    return int(row["last"].get("step", whole or 0))  # without reports it was trained by an earlier run


def _trial_left(mark: _Mark | None, steps: int, pace: Pace, now: float) -> float:
    """Return the seconds left of a running trial, which fall with the clock between its reports."""
    step = pace.step or 0.0
    if mark is None or mark.newest is None:
        return steps * step + max(0.0, pace.start - (now - mark.begun if mark else 0.0))
    at, when = mark.newest
    return max(0.0, max(0, steps - at) * step - (now - when))
