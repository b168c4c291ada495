"""Arms of a sweep: names, placebos, and a placebo that is registered from outside."""

from __future__ import annotations

import json

import pytest
import yaml
from helpers import tiny

from macdrop.config import SCOPES, MacDropConfig, Scope
from macdrop.errors import ConfigError
from macdrop.hooks import MacDrop
from tune.config.run_spec import TrainSpec, dump, load
from tune.config.schema import json_schema
from tune.config.sections import ARMS, Arm, placebos, register_placebo
from tune.scheduling.selection import placebo
from tune.scheduling.study import studies

MODEL = "model=zoo:planted-llama"
BOTTOM = Scope(lambda weights, k, seed: weights.indices[-k:])


@pytest.fixture
def bottom_rows():
    """A placebo arm that drops the k least massive rows."""
    SCOPES["bottom"] = BOTTOM
    register_placebo("bottom_rows", "bottom")
    yield "bottom_rows"
    del SCOPES["bottom"], ARMS["bottom_rows"]


def test_every_arm_has_a_name_and_every_placebo_a_scope():
    assert set(ARMS) < set(Arm) and set(ARMS.values()) == set(SCOPES)
    assert placebos() == ["random_rows", "all_rows", "activations"]


def test_arms_are_written_as_plain_texts():
    written = yaml.safe_dump(dump(load(None, [MODEL])))
    assert yaml.safe_load(written)["sweep"]["arms"] == ["base", "plain", "macdrop"]
    assert type(load(None, [MODEL]).studies()[0].arm) is str


def test_a_registered_placebo_is_planned_like_any_other(bottom_rows):
    (study,) = studies(load(None, [MODEL, f"sweep.arms=[base, plain, macdrop, {bottom_rows}]"]))
    assert study.placebos == (bottom_rows,)
    setting = TrainSpec(model_name_or_path="zoo:planted-llama", macdrop={"k": 3, "p0": 0.5})
    trial = placebo(setting, bottom_rows)
    assert trial.arm == bottom_rows and f"-{bottom_rows}-" in trial.trial_id()
    assert (trial.macdrop.k, trial.macdrop.p0) == (3, 0.5)
    assert bottom_rows in json.dumps(json_schema()["$defs"]["SweepSpec"]["properties"]["arms"])
    with pytest.raises(ConfigError, match="Did you mean 'bottom_rows'"):
        load(None, [MODEL, "sweep.arms=[macdrop, bottom_row]"])


def test_a_registered_placebo_drops_its_rows(bottom_rows):
    weights = tiny.massive_weights()
    drop = MacDrop(tiny.build(), weights, MacDropConfig(k=3, p0=0.5, scope="bottom"))
    assert drop.attach() == 2 * 3
    assert drop._rows == weights.indices[-3:]


@pytest.mark.parametrize("name", ["base", "plain", "macdrop", "random_rows", "Bottom", "two words", ""])
def test_a_name_that_is_taken_or_cannot_be_written_is_not_registered(name):
    before = dict(ARMS)
    with pytest.raises(ValueError, match="cannot name an arm"):
        register_placebo(name, "random")
    with pytest.raises(ValueError, match="unknown scope 'bottom'"):
        register_placebo("bottom_rows", "bottom")
    assert ARMS == before
