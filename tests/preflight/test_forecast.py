"""`macdrop plan`: the arithmetic alone, a probe of a built-in model, and what is asked or refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from macdrop.errors import ConfigError
from tune.cli.verbs import plan
from tune.config.run_spec import RaySpec, RunSpec
from tune.errors import ResourceError
from tune.preflight import forecast
from tune.preflight.forecast import START_S, TRIAL_S, Forecast, Measured, forecast_study, price_of, read_prices, total
from tune.scheduling.study import studies

FOUND = Measured(
    load=10,
    step=2.0,
    fast=1.5,
    slow=3.0,
    validation=5.0,
    memory=2**30,
    adapter=1000,
    data=50,
    tests=60.0,
    validations=20.0,
    answers=7,
)
RUN = {
    "model_name_or_path": "zoo:planted-llama",
    "max_steps": 10,
    "eval_steps": 5,
    "val_size": 8,
    "cutoff_len": 64,
    "per_device_train_batch_size": 4,
    "sweep": {"parameters": {"macdrop.p0": [0.2, 0.4, 0.6]}, "seeds": 2},
    "eval": {"zero_shot": {"qa": {"data": "zoo:qa"}}, "attacks": ["none", "zeroing@3"], "limit": 20},
}


def study(**changes):
    (only,) = studies(RunSpec.model_validate(RUN | changes))
    return only


def test_hours_are_rounds_of_trials_plus_scoring():
    """By hand: 4 searched and 4 final trials (2 arms, 2 seeds), each 10 steps and validations at 0, 5 and 10."""
    made = forecast_study(study(), 10, FOUND, RaySpec())
    one = 10 * 2.0 + 3 * 5.0 + TRIAL_S
    assert made.trials == 8 and made.training_h == pytest.approx(8 * one / 3600)
    assert made.scoring_h == pytest.approx((4 * 20 + 4 * 60 + 60) / 3600)
    search = max(4 * one + 20, 4 * 20)
    final = max(4 * one + 60, 4 * 60)
    assert made.hours == pytest.approx((10 + 60 + 20 + search + final) / 3600)
    assert made.low == pytest.approx(made.hours * 0.75)
    assert made.high == pytest.approx(made.hours * 1.5 * forecast.SLACK)
    checkpoints = 3 * 3 * 1000  # two kept and one in the making, each weights and two moments, of one lane
    assert made.disk == 8 * 1000 + checkpoints + 50 + 9 * 7 * forecast.ANSWER_BYTES
    none = forecast_study(study(save_steps=0), 10, FOUND, RaySpec())
    assert none.disk == made.disk - checkpoints


def test_more_lanes_and_evaluators_shorten_only_the_wall_clock():
    slow = replace(FOUND, tests=600.0)  # scoring is the bottleneck
    one, more = (forecast_study(study(), 10, slow, RaySpec(lanes=n, evaluators=n)) for n in (1, 2))
    assert (one.training_h, one.scoring_h) == (more.training_h, more.scoring_h)
    assert one.hours / 2 < more.hours < one.hours / 1.5


def test_cost_is_device_hours_by_the_first_matching_price(tmp_path):
    part = Forecast("m", 1, 1, 1, 1, 5.0, 4.0, 9.0, 1, 1)
    prices = read_prices(None)
    whole = total([part, part], 8.0, "NVIDIA H100 80GB HBM3", price_of(prices, "NVIDIA H100 80GB HBM3"))
    assert whole.hours == pytest.approx(10 + START_S / 3600)
    assert whole.device_hours == pytest.approx(8 * whole.hours)
    assert whole.cost == pytest.approx(whole.device_hours * 3.0) and whole.large
    assert not total([replace(part, hours=0.1)], 1.0, "cpu", 0.2).large
    assert price_of(prices, "Unheard-of 9000") is None and total([part], 1, "x", None).cost is None


@pytest.mark.parametrize("text", ["devices: 3", "devices: [{match: A}]", "- 1", "devices: [{match: A, per_hour: -1}]"])
def test_invalid_price_file_is_refused_with_an_example(tmp_path, text):
    (tmp_path / "prices.yaml").write_text(text)
    with pytest.raises(ConfigError, match="prices.yaml"):
        read_prices(tmp_path / "prices.yaml")


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(monkeypatch):
    from tune.preflight import probe as timing

    monkeypatch.setattr(timing, "memory", lambda: (2**20, 2**30))
    monkeypatch.setattr(timing, "Engine", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(ResourceError, match="GiB of weights"):
        timing.probe(RunSpec.model_validate(RUN), study())


def test_large_run_needs_confirmation_and_is_refused_without_a_terminal(monkeypatch):
    whole = total([Forecast("m", 1, 1, 1, 1, 50.0, 40.0, 90.0, 1, 1)], 1.0, "cpu", 0.2)
    with pytest.raises(ConfigError, match="Add --yes"):
        plan._agreed(whole)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    for answer, agreed in (("", False), ("y", True), ("n", False)):
        monkeypatch.setattr("builtins.input", lambda answer=answer: answer)
        assert plan._agreed(whole) is agreed


@pytest.mark.zero
def test_a_probe_of_a_built_in_model_measures_everything(tmp_path, monkeypatch):
    from tune.preflight.probe import probe

    monkeypatch.setenv("MACDROP_CACHE", str(tmp_path))
    found = probe(RunSpec.model_validate(RUN), study())
    assert 0 < found.fast <= found.step <= found.slow < 5
    assert found.tests > 0 and found.validations == 0 and found.answers == 2 * 20
    assert found.adapter > 1000 and found.data > 1000 and found.memory > 2**27
