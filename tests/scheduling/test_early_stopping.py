"""ASHA cuts no trial before its curriculum has decayed."""

from __future__ import annotations

import math

import pytest

from macdrop.errors import ConfigError
from macdrop.schedules import SCHEDULES, decayed_step
from tune.config.run_spec import MacDropSpec, RunSpec, load
from tune.scheduling.early_stopping import LENGTH_KEYS, Cuts, cuts
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


def rule(*overrides: str, total: int = 100, epoch: int = 100) -> Cuts:
    spec, study = run(*overrides)
    return cuts(study, spec.sweep, total, epoch)


# --- the first step at which p has decayed ---


@pytest.mark.parametrize("total, epoch", [(1, 1), (10, 10), (100, 100), (100, 34), (97, 10), (60, 7), (12, 1)])
@pytest.mark.parametrize("limit", [0.05, 0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_step_equals_a_search_step_by_step(schedule, limit, total, epoch):
    for alpha in (0.001, 0.01, 0.05, 0.5) if schedule == "exp" else (None,):
        epochs = math.ceil(total / epoch)
        slow = None
        for t in range(total, 0, -1):
            e = math.ceil(t / epoch)
            p = {
                "step": 1 - t / total,
                "epoch_before": 1 - (e - 1) / epochs,
                "epoch_after": 1 - e / epochs,
                "exp": math.exp(-(alpha or 0) * t),
                "constant": 1.0,
            }[schedule]
            if p > limit + 1e-9:
                break
            slow = t
        assert decayed_step(schedule, alpha, limit, total, epoch) == slow


# --- the rule for a search ---


def test_the_first_rung_is_where_the_slowest_schedule_has_decayed():
    exp = "sweep.parameters.macdrop.alpha=[0.05, 0.5]"
    assert rule("sweep.parameters.macdrop.schedule=[exp]", exp).first == 47  # ln 10 / 0.05 = 46.05
    both = rule("sweep.parameters.macdrop.schedule=[step, exp, constant]", exp)
    assert both.first == 90 and both.never == ("constant",)
    told = both.describe()
    assert "no cut before step 90 of 100" in told and "exp(0.05) from step 47" in told and "constant never cut" in told
    assert rule("sweep.grace_period=95", "eval_steps=1").first == 95
    assert rule("sweep.decayed=0.5").first == 50
    assert rule("macdrop.schedule=epoch_after", epoch=25).first == 76


def test_only_decayed_trials_are_compared():
    found = rule(
        "sweep.parameters.macdrop.schedule=[exp, constant]", "sweep.parameters.macdrop.alpha={min: 0.001, max: 0.5}"
    )
    assert found.first == 5 and found.never == ("exp(0.001)", "constant")
    block = {"schedule": "exp", "k": 5, "p0": 0.8}
    assert found.comparable(MacDropSpec(**block, alpha=0.5))
    assert not found.comparable(MacDropSpec(**block, alpha=0.4)), "decays one step after the first rung"
    assert not found.comparable(MacDropSpec(schedule="constant"))
    assert found.comparable(MacDropSpec(k=0, p0=0.0)), "a plain adapter has nothing to decay"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["macdrop.schedule=constant"], "within 100 steps with constant"),
        (["eval_steps=50"], "no validation comes between"),
        (["sweep.grace_period=100"], "no cut before step 100 of 100"),
        *([[f"sweep.parameters.{key}=[1, 2]"], f"has {key}, by which"] for key in LENGTH_KEYS[:4]),
    ],
)
def test_asha_that_could_cut_nothing_or_the_wrong_is_refused(overrides, told):
    with pytest.raises(ConfigError) as caught:
        rule(*overrides)
    assert told in str(caught.value) and "sweep.scheduler to none" in str(caught.value)


def test_asha_without_a_search_is_refused():
    spec = load(None, ["model=m", "sweep.scheduler=asha", "eval_steps=5"])
    with pytest.raises(ConfigError, match="nothing to stop"):
        cuts(studies(spec)[0], spec.sweep, 100, 100)
