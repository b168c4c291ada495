"""Time left of a sweep, from seconds per step and per benchmark measured so far and its parallel lanes. Pure.

The clock is an argument: whoever follows a sweep calls `Meter.see` with the queue's rows and the time. A trial's steps
before its first report (the model is loaded, the data tokenised) count as its start, and its validations as part of its
steps. The stages of a study follow one another, studies may overlap; within a stage trials are trained in lanes while
others are scored.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tune.config.eval_spec import jobs
from tune.config.run_spec import RunSpec
from tune.config.sweep_spec import Metric
from tune.scheduling.pace import Mark, Measured, Pace, pace
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

    at_once: studies at the same time, at most. concurrent: trials of a search at once, at most. budget_s: seconds for
    all searches; None: no limit. metric: the first objective.
    """

    studies: tuple[StudyWork, ...]
    at_once: int
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
    sweep, most = run.sweep, run.sweep.max_concurrent_models
    at_once = len(found) if most == "auto" else min(most, len(found))
    # Several pools of lanes share a cluster: what the largest holds is the guess.
    lanes, evaluators = (max(getattr(study.ray, key) for study in planned) for key in ("lanes", "evaluators"))
    concurrent = sweep.max_concurrent_trials
    return Work(tuple(found), at_once, lanes, evaluators, concurrent, sweep.time_budget_s, sweep.metric[0])


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

    @property
    def lane_seconds(self) -> float:
        """Seconds that lanes will be busy, added up."""
        return sum(self.running) + self.waiting * self.trial_s


def makespan(running: Sequence[float], waiting: int, each: float, lanes: int) -> float:
    """Return when the last trial ends if the next one starts in whichever lane is free first, in seconds."""
    free = [*running, *([0.0] * (lanes - len(running)))]
    heapq.heapify(free)
    for _ in range(waiting):
        heapq.heapreplace(free, free[0] + each)
    return max(free, default=0.0)


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
class _Tally:
    """Trials of a stage that are or were in the queue: all, those that have ended, those trained, and their steps."""

    trials: int = 0
    ended: int = 0
    trained: int = 0
    steps: int = 0

    def count(self, row: Mapping[str, Any], sign: int) -> None:
        """Count a row of the queue (+1), or take it back (-1)."""
        self.trials += sign
        self.ended += sign * row["state"].is_final
        self.trained += sign * (row["state"] == TaskState.TRAINED)
        self.steps += sign * _steps(row)


class Meter:
    """Measures a sweep that it is shown, and estimates the time left."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self._measured = {study.name: Measured() for study in work.studies}
        #: Study -> its stage in progress with the announced trials, and since when; the seconds of earlier searches.
        self._stages: dict[str, tuple[str, int]] = {}
        self._begun: dict[str, float] = {}
        self._searched = 0.0
        self._past: set[tuple[str, str]] = set()
        self._rows: dict[str, dict[str, Any]] = {}
        self._tallies: dict[tuple[str, str], _Tally] = {}
        self._study = ""

    def open(self, study: str) -> None:
        """Enter a study, whose base model is scored first."""
        self._study = study

    def begin(self, study: str, stage: str, trials: int, now: float) -> None:
        """Enter a stage of at most `trials` trials; those of its study before it have ended."""
        self._search_ended(study, now)
        for each in self.work.studies:
            if each.name == study:
                stages = [part.stage for part in each.stages]
                self._past |= {(study, past) for past in stages[: stages.index(stage)]}
                break
            if self.work.at_once == 1:
                self.end(each.name, now)
        self._study, self._stages[study], self._begun[study] = study, (stage, trials), now

    def end(self, study: str, now: float) -> None:
        """Enter the end of a study, whatever was left of it."""
        self._search_ended(study, now)
        self._past |= {(study, part.stage) for each in self.work.studies if each.name == study for part in each.stages}
        self._stages.pop(study, None)

    def _search_ended(self, study: str, now: float) -> None:
        if self._stages.get(study, ("", 0))[0] == Stage.SEARCH:
            self._searched += now - self._begun[study]

    def see(self, rows: Sequence[dict[str, Any]], now: float) -> None:
        """Take the rows of the queue's tasks that have changed."""
        for row in rows:
            name, step = row["id"], row["last"].get("step")
            if name in self._rows:
                self._tally(self._rows[name]).count(self._rows[name], -1)
            self._rows[name] = row
            self._tally(row).count(row, +1)
            measured = self._of(row["study"])
            if row["state"] == TaskState.RUNNING:
                measured.live.setdefault(name, Mark(now, step)).see(step, now)
                continue
            # The last step is often reported between two looks, of which the second one sees a trained adapter.
            if row["state"] == TaskState.TRAINED and name in measured.live:
                measured.live[name].see(step, now)
            measured.leave(name)

    def scored(self, study: str, seconds: float) -> None:
        """Take the seconds of a benchmark of a study's trial, or of its base model."""
        self._of(study).scored(seconds)

    def pace(self, study: str) -> Pace:
        """Return what was measured on a study, or on all of them where nothing was on it."""
        others = [measured for name, measured in self._measured.items() if name != study]
        return pace(self._of(study), others)

    def _of(self, study: str) -> Measured:
        return self._measured.setdefault(study, Measured())

    def _tally(self, row: Mapping[str, Any]) -> _Tally:
        return self._tallies.setdefault((row["study"], row["stage"]), _Tally())

    def estimate(self, scoring: Mapping[str, int], now: float) -> Estimate:
        """Return the state of the run; `scoring` are the benchmarks of each study that are waiting or running."""
        left: dict[str, list[StageLeft]] = {}
        ahead, known, whole = 0, True, True
        tallies = self._tallies.values()
        done, steps = sum(tally.ended for tally in tallies), sum(tally.steps for tally in tallies)
        trials = done + sum(tally.trained for tally in tallies)
        for study in self.work.studies:
            pace = self.pace(study.name)
            for part in study.stages:
                if (study.name, part.stage) in self._past:
                    continue
                stage, to_do = self._left(study, part, pace, scoring.get(study.name, 0), now)
                left.setdefault(study.name, []).append(stage)
                ahead += to_do
                trials += len(stage.running) + stage.waiting
                known &= pace.step is not None or not (stage.running or stage.waiting)
                whole &= pace.benchmark is not None or not stage.benchmarks
        seconds = self._seconds(list(left.values()), now) if known else None
        basis = self._basis(self.pace(self._study))
        return Estimate((done, trials), (steps, steps + ahead), seconds, whole, basis)

    def _left(self, study: StudyWork, part: StageWork, pace: Pace, scoring: int, now: float) -> tuple[StageLeft, int]:
        """Return what is left of a stage, and the steps in it."""
        step = pace.step or 0.0
        trial_s = pace.start + study.steps * step
        current, announced = self._stages.get(study.name, ("", 0))
        tally = self._tallies.get((study.name, part.stage), _Tally())
        if current != part.stage:
            # A resumed run has trials of stages that it has not come to.
            waiting = max(0, part.trials - tally.ended - tally.trained)
            base = self._of(study.name).benchmarks if part is study.stages[0] else 0
            runs = waiting * part.benchmarks + max(0, part.others - base)
            left = StageLeft(part.stage, (), waiting, trial_s, runs, part.benchmarks, pace.benchmark or 0.0)
            return left, waiting * study.steps
        marks = self._of(study.name).live
        running = [row for row in (self._rows[name] for name in marks) if row["stage"] == part.stage]
        waiting = max(announced, tally.trials) - tally.ended - tally.trained - len(running)
        runs = scoring + (len(running) + waiting) * part.benchmarks
        times = tuple(_trial_left(marks.get(row["id"]), study.steps, pace, now) for row in running)
        ahead = waiting * study.steps + sum(max(0, study.steps - _steps(row)) for row in running)
        return StageLeft(part.stage, times, waiting, trial_s, runs, part.benchmarks, pace.benchmark or 0.0), ahead

    def _seconds(self, left: Sequence[Sequence[StageLeft]], now: float) -> float:
        """Return the seconds left of studies, given the stages left of each.

        Studies that overlap take as long as the longest of them, or as the lanes that they share.
        """
        budget = self.work.budget_s
        if budget is not None:
            going = [now - self._begun[study] for study, (stage, _) in self._stages.items() if stage == Stage.SEARCH]
            budget = max(0.0, budget - self._searched - sum(going))
        chains = []
        for stages in left:
            chain = 0.0
            for stage in stages:
                lanes = self.work.lanes
                if stage.stage == Stage.SEARCH:
                    lanes = max(1, min(lanes, self.work.concurrent))
                seconds = stage.seconds(max(lanes, len(stage.running)), self.work.evaluators)
                if stage.stage == Stage.SEARCH and budget is not None:
                    seconds = min(seconds, budget)
                    budget -= seconds
                chain += seconds
            chains.append(chain)
        if self.work.at_once == 1:
            return sum(chains)
        shared = sum(stage.lane_seconds for stages in left for stage in stages) / self.work.lanes
        return max([*chains, min(shared, sum(chains)), sum(chains) / self.work.at_once])

    def _basis(self, pace: Pace) -> str:
        work = self.work
        parts = [] if pace.step is None else [f"{pace.step:.3g} s per step"]
        parts += [] if pace.benchmark is None else [f"{pace.benchmark:.3g} s per benchmark"]
        shares = f"{work.lanes} lane{'s' * (work.lanes > 1)}, {work.evaluators} evaluator{'s' * (work.evaluators > 1)}"
        return f"{', '.join(parts)}, {shares}" if parts else "nothing measured yet"


def _steps(row: Mapping[str, Any]) -> int:
    """Return the steps that a trial has taken."""
    whole = row["total_steps"] if row["state"] in (TaskState.TRAINED, TaskState.DONE) else None
    return int(row["last"].get("step", whole or 0))  # without reports it was trained by an earlier run


def _trial_left(mark: Mark | None, steps: int, pace: Pace, now: float) -> float:
    """Return the seconds left of a running trial, which fall with the clock between its reports."""
    step = pace.step or 0.0
    if mark is None or mark.newest is None:
        return steps * step + max(0.0, pace.start - (now - mark.begun if mark else 0.0))
    at, when = mark.newest
    return max(0.0, max(0, steps - at) * step - (now - when))
