"""Decay schedules of the drop probability p: pure functions of the position in training (paper, section 5).

Optimizer steps t and epochs e both count from 1, so that `step` and `epoch_after` reach p = 0 in the last step or
epoch.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable

from macdrop.errors import ConfigError, nearest

#: The share of p0 that p has to fall to before a curriculum counts as decayed, unless another is given.
DECAYED = 0.1
#: Keeps a step whose p is the limit itself but for rounding.
SLACK = 1e-9


def _step(p0: float, t: int, total: int, e: int, epochs: int, alpha: float | None) -> float:
    return p0 * (1 - t / total)


def _epoch_before(p0: float, t: int, total: int, e: int, epochs: int, alpha: float | None) -> float:
    return p0 * (1 - (e - 1) / epochs)


def _epoch_after(p0: float, t: int, total: int, e: int, epochs: int, alpha: float | None) -> float:
    return p0 * (1 - e / epochs)


def _exp(p0: float, t: int, total: int, e: int, epochs: int, alpha: float | None) -> float:
    assert alpha is not None, "the exp schedule needs alpha; MacDropConfig checks it"
    return p0 * math.exp(-alpha * t)


def _constant(p0: float, t: int, total: int, e: int, epochs: int, alpha: float | None) -> float:
    return p0


SCHEDULES: dict[str, Callable[..., float]] = {
    "step": _step,
    "epoch_before": _epoch_before,
    "epoch_after": _epoch_after,
    "exp": _exp,
    "constant": _constant,
}


def check_schedule(schedule: str, alpha: float | None = None) -> None:
    """Raise `ConfigError` unless `schedule` is known and `alpha` is given exactly when it is needed (`exp`)."""
    if not isinstance(schedule, str) or schedule not in SCHEDULES:
        hint = nearest(schedule, SCHEDULES)
        raise ConfigError(f"unknown MacDrop schedule {schedule!r}.{hint}\nAllowed: {', '.join(SCHEDULES)}.")
    if schedule == "exp":
        number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
        if alpha is None or not (number and math.isfinite(alpha) and alpha > 0):
            raise ConfigError(
                f"alpha is {alpha!r}, but the schedule 'exp' (p0 * exp(-alpha * t)) needs a number above 0.\n"
                "The paper uses 0.01, 0.05 and 0.10."
            )
    elif alpha is not None:
        raise ConfigError(
            f"alpha is {alpha!r}, but the schedule {schedule!r} has no alpha.\n"
            "Remove alpha, or set the schedule to 'exp'."
        )


def probability(
    schedule: str,
    *,
    p0: float,
    step: int,
    total_steps: int,
    epoch: int,
    total_epochs: int,
    alpha: float | None = None,
) -> float:
    """Return the drop probability p for optimizer step `step` of `total_steps` in epoch `epoch` of `total_epochs`.

    Raises `ConfigError` for an unknown schedule, for an alpha that is missing or superfluous, and for a position
    outside of the training.
    """
    check_schedule(schedule, alpha)
    for name, at, end in (("step", step, total_steps), ("epoch", epoch, total_epochs)):
        if not 1 <= at <= end:
            raise ConfigError(f"{name} {at} of {end}: {name}s count from 1 up to their total.")
    return SCHEDULES[schedule](p0, step, total_steps, epoch, total_epochs, alpha)


def decayed_step(
    schedule: str, alpha: float | None, limit: float, total_steps: int, steps_per_epoch: int
) -> int | None:
    """Return the first optimizer step t (from 1) with p(t) <= limit * p0, None without one up to `total_steps`."""
    epochs = (total_steps - 1) // steps_per_epoch + 1

    def reached(step: int) -> bool:
        epoch = (step - 1) // steps_per_epoch + 1
        at = {"step": step, "total_steps": total_steps, "epoch": epoch, "total_epochs": epochs}
        return probability(schedule, p0=1.0, alpha=alpha, **at) <= limit + SLACK

    # p never rises, so that the steps where it is low enough are the last ones.
    step = bisect.bisect_left(range(1, total_steps + 1), True, key=reached) + 1
    return step if step <= total_steps else None
