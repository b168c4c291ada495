"""The time left of a sweep: against simulated sweeps of known pace, at the start, monotone, with its basis."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field

import pytest

from tune.config.run_spec import load
from tune.config.sweep_spec import Metric
from tune.scheduling.study import benchmark_runs, studies
from tune.scheduling.time_left import Meter, StageLeft, StageWork, StudyWork, Work, makespan, work_of
from tune.storage.states import TaskState

TICK = 0.5


@dataclass
class Trial:
    id: str
    left: float = 0.0
    state: TaskState = TaskState.QUEUED
    began: float = 0.0
    scores: int = 0
    row: dict = field(default_factory=dict)


@dataclass
class Sweep:
    """A sweep of one study and stage by a simulated clock: `trials` of `start` + `steps` x `step` seconds in lanes."""

    trials: int
    lanes: int
    evaluators: int = 1
    steps: int = 40
    step: float = 0.25
    start: float = 5.0
    tests: int = 2
    benchmark: float = 3.0

    def work(self, budget: float | None = None) -> Work:
        stage = StageWork("final", self.trials, self.tests)
        study = StudyWork("model", self.steps, (stage,))
        return Work((study,), 1, self.lanes, self.evaluators, 4, budget, Metric())

    def run(self) -> tuple[list, float]:
        """Return (time, estimate) of each tick, and the time of the end."""
        meter, now, waiting, busy = Meter(self.work()), 0.0, 0, []
        meter.open("model")
        meter.begin("model", "final", self.trials, now)
        trials, seen = [Trial(f"t{n}") for n in range(self.trials)], []
        while not all(trial.state == TaskState.DONE for trial in trials):
            now += TICK
            for trial in trials:
                if trial.state == TaskState.RUNNING and now - trial.began >= self.start + self.steps * self.step:
                    trial.state, waiting = TaskState.TRAINED, waiting + self.tests
                    trial.scores = self.tests
            free = self.lanes - sum(trial.state == TaskState.RUNNING for trial in trials)
            for trial in [t for t in trials if t.state == TaskState.QUEUED][:free]:
                trial.state, trial.began = TaskState.RUNNING, now
            for end in [end for end in busy if end <= now]:
                busy.remove(end)
                meter.scored("model", self.benchmark)
                owner = next(t for t in trials if t.state == TaskState.TRAINED)
                owner.scores -= 1
                owner.state = TaskState.TRAINED if owner.scores else TaskState.DONE
            while waiting and len(busy) < self.evaluators:
                busy.append(now + self.benchmark)
                waiting -= 1
            meter.see([self.row(trial, now) for trial in trials], now)
            seen.append((now, meter.estimate({"model": waiting + len(busy)}, now)))
        return seen, now

    def row(self, trial: Trial, now: float) -> dict:
        last = {}
        if trial.state == TaskState.RUNNING:
            taken = int((now - trial.began - self.start) / self.step)
            last = {"step": min(taken, self.steps)} if taken >= 1 else {}
        elif trial.state != TaskState.QUEUED:
            last = {"step": self.steps}
        ended = trial.state in (TaskState.TRAINED, TaskState.DONE)
        return {
            "id": trial.id,
            "study": "model",
            "stage": "final",
            "state": trial.state,
            "last": last,
            "total_steps": self.steps if ended else None,
        }


SWEEPS = [Sweep(12, 1), Sweep(12, 3), Sweep(13, 4, evaluators=2), Sweep(8, 2, benchmark=20.0, tests=3)]


@pytest.mark.parametrize("sweep", SWEEPS)
def test_the_estimate_is_that_of_the_simulated_sweep(sweep):
    """Once a first trial has been scored, within a tenth of what is left or a trial's own length."""
    seen, end = sweep.run()
    ready = [(now, each) for now, each in seen if each.seconds is not None and each.whole]
    one = sweep.start + sweep.steps * sweep.step + sweep.tests * sweep.benchmark
    assert len(ready) > len(seen) / 2
    for now, each in ready:
        assert abs(each.seconds - (end - now)) <= max(0.1 * (end - now), 0.75 * one), (now, each)
    assert ready[-1][1].seconds <= sweep.benchmark


@pytest.mark.parametrize("sweep", SWEEPS)
def test_the_estimate_hardly_rises(sweep):
    """By no more than a benchmark from one look to the next, after the first trial."""
    seen, _ = sweep.run()
    ready = [each.seconds for _, each in seen if each.seconds is not None and each.whole]
    rises = [later - earlier for earlier, later in itertools.pairwise(ready)]
    assert max(rises) <= sweep.benchmark + TICK
    assert ready == [each.seconds for _, each in sweep.run()[0] if each.seconds is not None and each.whole]


def test_at_the_start_nothing_is_known_then_training_then_all():
    seen, _ = Sweep(4, 1).run()
    first = seen[0][1]
    assert first.seconds is None and first.basis == "nothing measured yet"
    assert (first.trials, first.steps) == ((0, 4), (0, 160))
    some = next(each for _, each in seen if each.seconds is not None)
    assert not some.whole and "s per step" in some.basis and "benchmark" not in some.basis
    last = next(each for _, each in seen if each.whole)
    assert "0.25 s per step, 3 s per benchmark, 1 lane, 1 evaluator" == last.basis
    assert seen[-1][1].trials == (4, 4) and seen[-1][1].steps == (160, 160)


def reference(running: list[float], waiting: int, each: float, lanes: int) -> float:
    """The same by a clock of small ticks."""
    free, now, tick = [*running, *([0.0] * (lanes - len(running)))], 0.0, 0.25
    while waiting or max(free) > now:
        for lane, end in enumerate(free):
            if end <= now and waiting:
                free[lane], waiting = now + each, waiting - 1
        now += tick
    return max(free)


def test_lanes_are_shared_as_a_clock_would():
    draws = random.Random(0)
    for _ in range(200):
        lanes = draws.randint(1, 5)
        running = [draws.randint(0, 40) / 4 for _ in range(draws.randint(0, lanes))]
        waiting, each = draws.randint(0, 12), draws.randint(1, 40) / 4
        assert makespan(running, waiting, each, lanes) == reference(running, waiting, each, lanes)
    assert makespan([], 0, 1.0, 2) == 0.0


def test_scoring_counts_where_it_takes_longer_than_training():
    left = StageLeft("final", (5.0,), 3, 10.0, benchmarks=100, per_trial=4, benchmark_s=2.0)
    assert left.seconds(lanes=2, evaluators=4) == 100 * 2.0 / 4
    few = StageLeft("final", (5.0,), 3, 10.0, benchmarks=4, per_trial=4, benchmark_s=2.0)
    assert few.seconds(lanes=2, evaluators=4) == 20.0 + 2.0, "the last adapter is scored after its training"


def test_steps_that_a_lost_lane_repeats_do_not_count_twice():
    meter = Meter(Sweep(1, 1, tests=0).work())
    meter.begin("model", "final", 1, 0.0)
    row = {"id": "t", "study": "model", "stage": "final", "state": TaskState.RUNNING, "total_steps": None}
    steps = [(0, None), (10, 0), (20, 10), (30, 20), (50, 5), (60, 15)]
    for now, step in steps:
        meter.see([{**row, "last": {} if step is None else {"step": step}}], float(now))
    assert meter.pace("model").step == pytest.approx(1.0)
    assert meter.estimate({}, 60.0).seconds == pytest.approx(25.0)
    assert meter.estimate({}, 70.0).seconds == pytest.approx(15.0), "it falls with the clock between two reports"
    assert meter.estimate({}, 900.0).seconds == 0.0


def test_trials_of_an_earlier_run_do_not_count_twice_in_a_stage_to_come():
    meter = Meter(Sweep(3, 1).work())
    row = {"study": "model", "stage": "final", "state": TaskState.DONE, "last": {"step": 40}, "total_steps": 40}
    meter.see([{**row, "id": f"t{number}"} for number in range(2)], 0.0)
    found = meter.estimate({}, 0.0)
    assert (found.trials, found.steps) == ((2, 3), (80, 120))


def test_a_model_that_has_not_begun_is_taken_to_be_as_fast_as_the_others():
    parts = (StageWork("final", 2, 1),)
    two = Work((StudyWork("one", 10, parts), StudyWork("two", 20, parts)), 1, 1, 1, 4, None, Metric())
    meter = Meter(two)
    meter.begin("two", "final", 2, 0.0)
    assert meter.estimate({}, 0.0).trials == (0, 2), "a study before the one in progress is over"
    meter = Meter(two)
    meter.begin("one", "final", 2, 0.0)
    row = {"id": "t", "study": "one", "stage": "final", "state": TaskState.RUNNING, "total_steps": None}
    for step in (1, 2, 3):
        meter.see([{**row, "last": {"step": step}}], float(step))
    meter.scored("one", 2.0)
    found = meter.estimate({}, 3.0)
    assert found.trials == (0, 4) and found.steps == (3, 60)
    assert found.seconds == pytest.approx((7 + 10 + 2) + (40 + 2))


def test_studies_that_overlap_take_as_long_as_the_longest_or_as_their_lanes():
    parts = (StageWork("final", 4, 0),)

    def left(lanes: int, at_once: int) -> float:
        work = Work(tuple(StudyWork(name, 10, parts) for name in "abc"), at_once, lanes, 1, 4, None, Metric())
        meter = Meter(work)
        for name in "abc"[:at_once]:
            meter.begin(name, "final", 4, 0.0)
        row = {"id": "t", "study": "a", "stage": "final", "state": TaskState.RUNNING, "total_steps": None}
        for step in (1, 2, 3):
            meter.see([{**row, "last": {"step": step}}], float(step))
        meter.end("c", 3.0)
        return meter.estimate({}, 3.0).seconds

    one_after_the_other = left(1, 1)
    assert one_after_the_other == pytest.approx(7 + 30 + 40)
    assert left(1, 2) == one_after_the_other, "one lane gains nothing"
    assert left(4, 2) < left(4, 1), "the second uses the lanes that the first leaves"


def test_a_search_ends_with_its_time_budget():
    stages = (StageWork("search", 100, 0), StageWork("final", 1, 0))
    work = Work((StudyWork("model", 10, stages),), 1, 1, 1, 4, 30.0, Metric())
    meter = Meter(work)
    meter.begin("model", "search", 100, 0.0)
    row = {"id": "t", "study": "model", "stage": "search", "state": TaskState.RUNNING, "total_steps": None}
    for step in (1, 2, 3):
        meter.see([{**row, "last": {"step": step}}], float(step))
    assert meter.estimate({}, 3.0).seconds == pytest.approx(27.0 + 10.0)


def test_the_work_of_a_run_is_what_the_plan_counts():
    for overrides in (
        [],
        ["sweep.parameters.macdrop.p0=[0.2,0.8]"],
        ["sweep.parameters.macdrop.p0=[0.2,0.8]", "sweep.seeds=0"],
        ["sweep.arms=[base]"],
    ):
        benchmarks = ["eval.zero_shot=[zoo:qa]", "validation.perplexity.text.data=zoo:text"]
        run = load(None, ["model_name_or_path=zoo:planted-llama", "sweep.seeds=2", *benchmarks, *overrides])
        planned = studies(run)
        work = work_of(run, planned, {planned[0].name: 7})
        (study,) = work.studies
        assert study.steps == 7
        assert sum(stage.trials for stage in study.stages) == planned[0].count
        counted = sum(stage.trials * stage.benchmarks + stage.others for stage in study.stages)
        assert counted == benchmark_runs(run, planned)
