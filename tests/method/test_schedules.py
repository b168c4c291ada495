import math

import pytest

from macdrop.errors import ConfigError
from macdrop.schedules import SCHEDULES, probability

AT = {"p0": 0.8, "step": 1, "total_steps": 10, "epoch": 1, "total_epochs": 5}


def curve(schedule: str, alpha: float | None = None) -> list[float]:
    """Return p at every step of a training of 3 epochs with 4 steps each."""
    return [
        probability(schedule, p0=0.8, step=t, total_steps=12, epoch=(t - 1) // 4 + 1, total_epochs=3, alpha=alpha)
        for t in range(1, 13)
    ]


def test_values_are_those_of_the_paper():
    assert curve("step") == pytest.approx([0.8 * (1 - t / 12) for t in range(1, 13)])
    assert curve("epoch_before") == pytest.approx([0.8] * 4 + [0.8 * 2 / 3] * 4 + [0.8 / 3] * 4)
    assert curve("epoch_after") == pytest.approx([0.8 * 2 / 3] * 4 + [0.8 / 3] * 4 + [0.0] * 4)
    assert curve("exp", 0.05) == pytest.approx([0.8 * math.exp(-0.05 * t) for t in range(1, 13)])
    assert curve("constant") == [0.8] * 12


def test_step_and_epoch_after_end_at_exactly_zero():
    for epochs in range(1, 9):
        for total in range(1, 40):
            at = {"step": total, "total_steps": total, "epoch": epochs, "total_epochs": epochs}
            assert probability("step", p0=0.7, **at) == 0
            assert probability("epoch_after", p0=0.7, **at) == 0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_never_rises_and_stays_within_zero_and_p0(schedule):
    values = curve(schedule, 0.1 if schedule == "exp" else None)
    assert all(a >= b for a, b in zip(values, values[1:], strict=False))
    assert all(0 <= p <= 0.8 for p in values)


def test_an_unknown_schedule_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="(?s)epoch_befor.*mean 'epoch_before'.*Allowed: step, "):
        probability("epoch_befor", **AT)


@pytest.mark.parametrize("alpha", [None, 0, -0.1, math.inf, math.nan, "0.1", True])
def test_exp_needs_an_alpha_above_zero(alpha):
    with pytest.raises(ConfigError, match="alpha"):
        probability("exp", alpha=alpha, **AT)


def test_other_schedules_refuse_alpha():
    with pytest.raises(ConfigError, match="has no alpha"):
        probability("step", alpha=0.1, **AT)


@pytest.mark.parametrize("wrong", [{"step": 0}, {"step": 11}, {"epoch": 0}, {"epoch": 6}])
def test_a_position_outside_of_training_is_refused(wrong):
    with pytest.raises(ConfigError, match="count from 1"):
        probability("step", **{**AT, **wrong})
