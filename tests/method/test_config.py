import dataclasses
import math

import pytest

from macdrop.config import MacDropConfig, dora_warning
from macdrop.errors import ConfigError


def test_the_defaults_are_those_of_the_paper():
    config = MacDropConfig()
    assert (config.k, config.p0, config.schedule, config.alpha, config.seed) == (5, 0.8, "step", None, 0)
    assert config.enabled


def test_probability_follows_the_schedule():
    assert MacDropConfig().probability(3, 10, 1, 2) == pytest.approx(0.8 * 0.7)
    assert MacDropConfig(schedule="exp", alpha=0.1).probability(3, 10, 1, 2) == pytest.approx(0.8 * math.exp(-0.3))
    assert MacDropConfig(p0=1, schedule="epoch_before").probability(3, 10, 2, 2) == 0.5


@pytest.mark.parametrize(
    "off", [{"k": 0}, {"p0": 0}, {"p0": 0.0, "schedule": "exp", "alpha": 0.1, "seed": 4}, {"k": 0, "p0": 0.5}]
)
def test_all_disabled_configs_are_equal_in_canonical_form(off):
    config = MacDropConfig(**off)
    assert not config.enabled
    assert config.canonical() == MacDropConfig(k=0, p0=0.0, schedule="step")


def test_an_enabled_config_is_its_own_canonical_form_and_frozen():
    config = MacDropConfig(k=3, seed=7)
    assert config.canonical() is config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.k = 4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"k": -1}, "k is -1"),
        ({"k": 2.0}, "k is 2.0"),
        ({"k": True}, "k is True"),
        ({"p0": 1.01}, "p0 is 1.01"),
        ({"p0": -0.1}, "p0 is -0.1"),
        ({"p0": math.nan}, "p0 is nan"),
        ({"p0": "0.8"}, "p0 is '0.8'"),
        ({"p0": None}, "p0 is None"),
        ({"schedule": "stepp"}, "mean 'step'"),
        ({"schedule": None}, "unknown MacDrop schedule None"),
        ({"schedule": "exp"}, "alpha is None"),
        ({"alpha": 0.1}, "has no alpha"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed is"),
        ({"seed": 1.5}, "seed is 1.5"),
    ],
)
def test_wrong_values_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        MacDropConfig(**wrong)


def test_positional_values_are_refused():
    with pytest.raises(TypeError):
        MacDropConfig(5, 0.8)


@pytest.mark.parametrize(("p0", "entries", "most"), [(1.0, 4096, "0.998"), (0.8, 8, "0.515"), (0.995, 576, "0.99")])
def test_dora_users_are_warned_where_rows_may_be_emptied(p0, entries, most):
    warning = dora_warning(p0, entries)
    assert f"{entries} non-zero entries" in warning and f"Take p0 of at most {most} here" in warning
    assert dora_warning(float(most), entries) is None


def test_no_warning_where_rows_keep_some_entries():
    for p0, entries in ((0.0, 8), (0.5, 8), (0.8, 576), (0.98, 576), (0.99, 4096)):
        assert dora_warning(p0, entries) is None
