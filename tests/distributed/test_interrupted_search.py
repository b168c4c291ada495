"""An interrupted search draws and decides what an undisturbed one does: real searcher, real ASHA. Starts no Ray.

Trials are simulated: a loss that falls with the step towards a function of the drawn values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from tune.config.run_spec import RunSpec, load
from tune.scheduling import history as past
from tune.scheduling.early_stopping import cuts
from tune.scheduling.history import OPEN
from tune.scheduling.study import Study, studies
from tune.storage.records import TrialRecord
from tune.storage.states import TaskState

TOTAL, EVERY = 40, 4
ONE = "{name: eval_loss}"
TWO = "[{name: zero_shot/a/acc, goal: maximize}, {name: eval_loss}]"


def planned(*overrides: str) -> tuple[RunSpec, Study]:
    settings = [
        "model=m",
        "validation.zero_shot=[a]",
        "eval_steps=4",
        "macdrop.schedule=exp",
        "macdrop.alpha=1.0",
        "sweep.parameters.learning_rate={min: 1e-5, max: 1e-2, distribution: log_uniform}",
        "sweep.num_samples=14",
        "sweep.parameters.macdrop.p0={min: 0.2, max: 1.0}",
        "sweep.parameters.lora_rank=[2, 4, 8]",
    ]
    spec = load(None, [*settings, *overrides])
    (study,) = studies(spec)
    return spec, study


def record(**content: Any) -> TrialRecord:
    about = {"trial": "t", "model": "m", "arm": "macdrop", "seed": 0, "status": "running"}
    return TrialRecord(**{**about, **content})


@dataclass
class Kept:
    """What a run folder keeps of a search: the draws, and of each trial its record and its validations."""

    draws: list[dict[str, Any]] = field(default_factory=list)
    objectives: dict[str, tuple[float, ...]] = field(default_factory=dict)
    records: dict[str, TrialRecord] = field(default_factory=dict)
    metrics: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def loss(values: dict[str, Any], step: int) -> float:
    end = (math.log10(values["learning_rate"]) + 3.5) ** 2 + values["macdrop.p0"] + 1 / values["lora_rank"]
    return end + 3.0 * math.exp(-step / 10)


def search(spec: RunSpec, study: Study, kept: Kept, trials: int, die_at: int | None = None) -> None:
    """Resume a search and run it, one trial at a time, up to `trials` of them; the last one stops after `die_at` steps.

    Follows `tune.distributed.sweep.study_run` without the lanes and Tune.
    """
    from ray.tune.schedulers import TrialScheduler

    from tune.distributed.sweep.schedulers import scheduler
    from tune.distributed.sweep.searcher import FINISHED, optuna_searcher, param_space

    def name(values: dict[str, Any]) -> str:
        return study.searched(values).trial_id()

    several = len(spec.sweep.metric) > 1
    standing = {
        trial: state
        for trial, each in kept.records.items()
        if (state := past.resume_state(each, adapter=True, scored=True))
    }
    reports = {trial: past.judged(kept.records[trial], kept.metrics[trial]) for trial in standing}
    known = []
    for values in kept.draws:
        trial = name(values)
        known_record = kept.records.get(trial, record())
        objectives = kept.objectives.get(trial, ())
        known.append(past.past(values, standing.get(trial), known_record, objectives, reports.get(trial, ())))
    before = len([each for each in known if each.state != OPEN])
    searcher = optuna_searcher(spec.sweep, known, lambda number, values: kept.draws.append(values))
    searcher.set_search_properties(None, None, param_space(study, None))
    asha = scheduler(study, spec.sweep, cuts(study, spec.sweep, TOTAL, TOTAL), reports)
    for number in range(before, trials):
        values = searcher.suggest(f"{before} {number}")
        trial = SimpleNamespace(trial_id=f"{before} {number}", config=values)
        rows = kept.metrics.setdefault(name(values), [])
        mine = kept.records.setdefault(name(values), record())
        asha.on_trial_add(None, trial)
        diverges, result = values["learning_rate"] > 5e-3, None
        for step in range(EVERY, TOTAL + 1, EVERY):
            if number == trials - 1 and die_at is not None and step > die_at:
                return
            if diverges and step > TOTAL // 2:
                mine.status, mine.step = TaskState.DIVERGED, step
                searcher.on_trial_complete(trial.trial_id, result)
                break
            result = {"training_iteration": step, "step": step, "eval_loss": loss(values, step)}
            if all(row["step"] != step for row in rows):
                rows.append(result)
            if asha.on_trial_result(None, trial, result) == TrialScheduler.STOP:
                # A lane is always a little ahead of the word to stop.
                rows.append({"step": step + EVERY, "eval_loss": 0.0})
                mine.status, mine.step, mine.judged = TaskState.STOPPED, step + EVERY, step
                searcher.on_trial_complete(trial.trial_id, result)
                break
            searcher.on_trial_result(trial.trial_id, result)
        else:
            accuracy = 1 / (1 + loss(values, TOTAL))
            objectives = (accuracy, result["eval_loss"]) if several else (result["eval_loss"],)
            mine.status, mine.step = TaskState.DONE, TOTAL
            kept.objectives[name(values)] = objectives
            asha.on_trial_complete(None, trial, result)
            searcher.on_trial_complete(trial.trial_id, {**result, FINISHED: True, "zero_shot/a/acc": accuracy})


@pytest.mark.parametrize("objectives", [ONE, TWO])
def test_a_search_killed_at_any_point_draws_and_cuts_what_the_undisturbed_one_did(objectives):
    spec, study = planned(
        "sweep.search_alg=optuna",
        f"sweep.metric={objectives}",
        "sweep.scheduler=asha",
        "sweep.reduction_factor=2",
    )
    alone = Kept()
    search(spec, study, alone, spec.sweep.num_samples)
    ends = [alone.records[study.searched(values).trial_id()].status for values in alone.draws]
    assert len(ends) == 14 and set(ends[7:]) > {"stopped"} and "done" in ends, ends
    for trials in range(1, spec.sweep.num_samples + 1):
        for die_at in (0, 12, TOTAL):
            kept = Kept()
            search(spec, study, kept, trials, die_at)
            search(spec, study, kept, spec.sweep.num_samples)
            assert kept == alone, (trials, die_at)
    twice = Kept()
    for trials in (3, 6, 6, 9, 14):
        search(spec, study, twice, trials, die_at=8)
    search(spec, study, twice, 14)
    assert twice == alone
    other, _ = planned("sweep.search_alg=optuna", f"sweep.metric={objectives}", "sweep.search_seed=1")
    elsewhere = Kept()
    search(spec.model_copy(update={"sweep": other.sweep}), study, elsewhere, 2)
    assert elsewhere.draws != alone.draws[:2]


def test_points_known_beforehand_are_those_of_the_seed():
    from tune.distributed.sweep.searcher import points

    spec, study = planned("sweep.search_alg=random")
    listed = points(study, spec.sweep)
    assert len(listed) == 14 and listed == points(study, spec.sweep)
    assert all(0.2 <= p["macdrop.p0"] <= 1 and type(p["lora_rank"]) is int for p in listed)
    assert len({p["learning_rate"] for p in listed}) == 14
    other, _ = planned("sweep.search_alg=random", "sweep.search_seed=1")
    assert points(study, other.sweep) != listed
    assert points(study, planned("sweep.search_alg=optuna")[0].sweep) is None


def test_a_trial_that_comes_again_counts_once_on_a_rung():
    from tune.distributed.sweep.schedulers import scheduler

    spec, study = planned("sweep.search_alg=random", "sweep.scheduler=asha", "sweep.reduction_factor=2")
    config = {"learning_rate": 1e-3, "macdrop.p0": 0.5, "lora_rank": 2}
    known = {study.searched(config).trial_id(): [(4, 2.0), (8, 1.0)], "another": [(4, 1.5)]}
    asha = scheduler(study, spec.sweep, cuts(study, spec.sweep, TOTAL, TOTAL), known)
    before = asha.debug_string()
    for trial in ("first", "second"):
        again = SimpleNamespace(trial_id=trial, config=config)
        asha.on_trial_add(None, again)
        assert asha.on_trial_result(None, again, {"step": 4, "eval_loss": 9.0}) == "CONTINUE"
        asha.on_trial_complete(None, again, {"step": 8, "eval_loss": 9.0})
        asha.on_trial_remove(None, again)
        asha.on_trial_complete(None, again, {})
    assert asha.debug_string() == before
