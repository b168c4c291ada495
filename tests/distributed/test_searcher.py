"""Ray Tune's scheduler and searcher: what ASHA cuts, and what Optuna makes of it. Starts no Ray."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from optuna.trial import TrialState
from ray.tune.schedulers import TrialScheduler

from tune.config.run_spec import RunSpec, load
from tune.distributed.sweep.searcher import optuna_searcher, param_space, scheduler
from tune.scheduling.early_stopping import cuts
from tune.scheduling.study import Study, studies

SEARCH = [
    "model=m",
    "sweep.scheduler=asha",
    "sweep.search_alg=random",
    "eval_steps=5",
    "sweep.parameters.macdrop.p0={min: 0.2, max: 1.0}",
]


def run(*overrides: str) -> tuple[RunSpec, Study]:
    spec = load(None, [*SEARCH, *overrides])
    (study,) = studies(spec)
    return spec, study


def test_the_scheduler_cuts_the_worse_of_what_is_comparable():
    spec, study = run(
        "sweep.parameters.macdrop.schedule=[step, constant]",
        "sweep.decayed=0.5",
        "sweep.reduction_factor=2",
    )
    asha = scheduler(study, spec.sweep, cuts(study, spec.sweep, 100, 100))
    assert scheduler(study, spec.sweep, None) is None
    cut = {}
    for name, loss in (("step", 1.0), ("constant", 9.0), ("step", 2.0), ("step", 0.5)):
        config = {"macdrop.schedule": name, "macdrop.p0": 0.5 + loss / 100}
        trial = SimpleNamespace(trial_id=f"{name} {loss}", config=config)
        asha.on_trial_add(None, trial)
        for step in range(5, 101, 5):
            decision = asha.on_trial_result(None, trial, {"step": step, "eval_loss": loss})
            if decision == TrialScheduler.STOP:
                cut[trial.trial_id] = step
                asha.on_trial_remove(None, trial)
                break
        else:
            asha.on_trial_complete(None, trial, {"step": 100, "eval_loss": loss})
    assert cut == {"step 2.0": 50}


@pytest.mark.parametrize("several", [False, True])
def test_a_trial_without_its_objectives_counts_as_pruned(several):
    score = {"name": "zero_shot/a/acc", "goal": "maximize"}
    spec = load(
        None,
        ["model=m", "sweep.search_alg=optuna", "validation.zero_shot=[a]", SEARCH[-1]],
        replace={"sweep.metric": [{"name": "eval_loss"}, score] if several else score},
    )
    (study,) = studies(spec)
    found = optuna_searcher(spec.sweep)
    found.set_search_properties(None, None, param_space(study, None))
    last = {"training_iteration": 2, "step": 9, "eval_loss": 0.5}
    results = {
        "whole": {**last, "finished": True, "zero_shot/a/acc": 0.75},
        "cut": last,
        "benchmark failed": {**last, "finished": True},
        "not a number": {**last, "finished": True, "zero_shot/a/acc": float("nan")},
        "died": None,
    }
    for name, result in results.items():
        assert 0.2 <= found.suggest(name)["macdrop.p0"] <= 1.0
        found.on_trial_result(name, last)
        found.on_trial_complete(name, result, error=result is None)
    states = [trial.state for trial in found._ot_study.trials]
    assert states == [TrialState.COMPLETE, *[TrialState.PRUNED] * 3, TrialState.FAIL]
    assert found._ot_study.trials[0].values == ([0.5, 0.75] if several else [0.75])
    for number in range(8):  # past the random start: the sampler lives with what was pruned
        found.suggest(f"next {number}")
        found.on_trial_complete(f"next {number}", results["whole" if number % 2 else "cut"])
