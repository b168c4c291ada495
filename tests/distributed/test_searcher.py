"""Ray Tune's scheduler and searcher: what ASHA cuts, and what Optuna makes of it. Starts no Ray."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from optuna.trial import TrialState
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from macdrop.errors import ConfigError
from tune.config.run_spec import RunSpec, load
from tune.distributed.sweep.schedulers import scheduler
from tune.distributed.sweep.searcher import optuna_searcher, param_space
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
    assert isinstance(scheduler(study, spec.sweep, None), FIFOScheduler)
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


def cut_by(
    scheduler_name: str, losses: dict[str, float], *overrides: str, known=None, total: int = 100
) -> dict[str, int]:
    """The step at which each of some trials of constant losses was cut, all of them trained side by side."""
    spec, study = run(
        f"sweep.scheduler={scheduler_name}",
        "sweep.parameters.macdrop.schedule=[exp, constant]",
        "sweep.parameters.macdrop.alpha=[0.5]",
        *overrides,
    )
    made = scheduler(study, spec.sweep, cuts(study, spec.sweep, total, total), known)
    live = {}
    for number, name in enumerate(losses):
        config = {"macdrop.schedule": name.split()[0], "macdrop.alpha": 0.5, "macdrop.p0": 0.5 + number / 100}
        live[name] = SimpleNamespace(trial_id=name, config=config)
        made.on_trial_add(None, live[name])
    cut = {}
    for step in range(5, total + 1, 5):
        for name, trial in list(live.items()):
            decision = made.on_trial_result(None, trial, {"step": step, "eval_loss": losses[name]})
            if decision == TrialScheduler.STOP:
                cut[name] = step
                made.on_trial_remove(None, live.pop(name))
            assert decision != TrialScheduler.PAUSE, "a lane cannot pause a trial"
    for trial in live.values():
        made.on_trial_complete(None, trial, {"step": total, "eval_loss": losses[trial.trial_id]})
    return cut


MANY = {f"exp {n}": float(n) for n in range(8)}


def test_the_median_cuts_what_is_worse_than_most_and_nothing_before_the_decay():
    cut = cut_by("median", {**MANY, "constant 1": 99.0}, "sweep.grace_period=20")
    assert set(cut.values()) == {20} and "constant 1" not in cut, "p of a constant schedule never decays"
    assert {"exp 5", "exp 6", "exp 7"} <= set(cut) and not {"exp 0", "exp 1", "exp 2"} & set(cut)


def test_losses_from_before_the_decay_do_not_count_for_the_median():
    spec, study = run("sweep.scheduler=median", "macdrop.schedule=exp", "macdrop.alpha=0.5", "sweep.grace_period=20")
    made = scheduler(study, spec.sweep, cuts(study, spec.sweep, 100, 100))
    trials = [SimpleNamespace(trial_id=str(n), config={"macdrop.p0": 0.5 + n / 100}) for n in range(5)]
    decisions = []
    for step in (5, 10, 20, 20):
        # The last trial was best by far at first, which must not save it.
        for number, trial in enumerate(trials):
            loss = (0.0 if step < 20 else 9.0) if number == 4 else 1.0
            decisions.append((step, number, made.on_trial_result(None, trial, {"step": step, "eval_loss": loss})))
    assert {each[:2] for each in decisions if each[2] == TrialScheduler.STOP} == {(20, 4)}
    assert decisions[-1][2] == TrialScheduler.STOP, "one that is drawn twice is stopped again"


def test_hyperband_begins_to_cut_at_the_rungs_of_its_brackets_whatever_the_order_of_trials():
    options = ("sweep.reduction_factor=2", "sweep.grace_period=10")
    many = {f"exp {n}": float(n % 5) + n / 100 for n in range(24)}
    cut = cut_by("hyperband", many, *options)
    assert cut and min(cut.values()) == 10 and set(cut.values()) <= {10, 20, 40, 80}
    assert cut == cut_by("hyperband", many, *options), "deterministic"
    assert cut != cut_by("hyperband", many, *options, "sweep.search_seed=7"), "the brackets are those of another seed"
    asha = cut_by("asha", many, *options)
    assert set(asha) - set(cut), "brackets that begin later spare some that ASHA cuts"


def test_trials_of_an_earlier_run_are_known_to_the_median():
    spec, study = run("sweep.scheduler=median", "macdrop.schedule=exp", "macdrop.alpha=0.5")
    names = [study.searched({"macdrop.p0": 0.3 + n / 100}).trial_id() for n in range(3)]
    known = {name: [(15, 1.0), (20, 1.0)] for name in names}
    made = scheduler(study, spec.sweep, cuts(study, spec.sweep, 100, 100), known)
    trial = SimpleNamespace(trial_id="new", config={"macdrop.p0": 0.9})
    assert made.on_trial_result(None, trial, {"step": 20, "eval_loss": 2.0}) == TrialScheduler.STOP
    other = SimpleNamespace(trial_id="other", config={"macdrop.p0": 0.8})
    assert (
        made.on_trial_result(None, other, {"step": 20, "eval_loss": 2.0, "finished": True}) == TrialScheduler.CONTINUE
    )


@pytest.mark.parametrize(
    "words, said",
    [
        (
            ["sweep.scheduler=hyperband", "sweep.grace_period=60"],
            "(?s)has no second bracket.*Set sweep.scheduler to asha",
        ),
        (["sweep.scheduler=median", "sweep.num_samples=3"], "at least 3 others, and the search of m has 3 trials"),
        (["sweep.scheduler=median", "sweep.reduction_factor=2"], "has no effect with scheduler median"),
        (["sweep.scheduler=median", "eval_steps=null"], "sweep.scheduler median compares eval_loss"),
        (
            ["sweep.scheduler=hyperband", "macdrop.schedule=constant", "macdrop.alpha=null"],
            "hyperband could never cut a trial",
        ),
        (["sweep.scheduler=hyperban"], "hyperband"),
    ],
)
def test_a_scheduler_that_cannot_work_is_refused(words, said):
    with pytest.raises(ConfigError, match=said):
        spec, study = run("macdrop.schedule=exp", "macdrop.alpha=0.5", *words)
        cuts(study, spec.sweep, 100, 100)
