"""Rules for when ASHA may stop a trial: never before the curriculum has decayed. Pure; no Ray.

A trial under a high p looks worse on the validation loss than it will be, masks off or not, as it has learnt around
rows that were missing. So trials are compared only where p(t) <= decayed * p0 for all that are compared:

- the first rung is at the first optimizer step where that holds for every schedule in the search that ever gets there,
  or at `sweep.grace_period` if that is later;
- a trial whose p has not decayed by then (constant, or a decay longer than the fine-tuning) is never cut, nor is
  another one measured against it.
"""

from __future__ import annotations

import bisect
import itertools
from dataclasses import dataclass

from macdrop.errors import ConfigError
from macdrop.schedules import probability
from tune.config.run_spec import TrainSpec
from tune.config.sections import MacDropSpec
from tune.config.sweep_spec import Space, SweepSpec
from tune.scheduling.study import Study

#: Searched keys that change how many steps a fine-tuning has: their trials stand at different points of the decay.
LENGTH_KEYS = (
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "dataset",
    "val_size",
    "max_samples",
)
#: Keeps a step whose p is the limit itself but for rounding.
SLACK = 1e-9


@dataclass(frozen=True)
class Cuts:
    """Limits on ASHA: no cut before optimizer step `first` of `total`; `never` are the schedules never cut.

    `decayed` maps each schedule that decays, with its slowest alpha, to the step from which its trials are comparable.
    """

    first: int
    total: int
    limit: float
    steps_per_epoch: int
    decayed: dict[str, int]
    never: tuple[str, ...]

    def comparable(self, block: MacDropSpec) -> bool:
        """Return whether a trial takes part: its p has decayed by the first rung, or it drops nothing."""
        if not block.config(seed=0).enabled:
            return True
        step = decayed_step(block.schedule, block.alpha, self.limit, self.total, self.steps_per_epoch)
        return step is not None and step <= self.first

    def describe(self) -> str:
        """Return the rule with its numbers, for messages."""
        slowest = ", ".join(f"{name} from step {step}" for name, step in self.decayed.items())
        parts = [f"p is at most {self.limit:g} p0 with {slowest}"] if slowest else []
        parts += [f"{' and '.join(self.never)} never cut"] if self.never else []
        return f"no cut before step {self.first} of {self.total} ({'; '.join(parts) or 'nothing is dropped'})"


def decayed_step(
    schedule: str, alpha: float | None, limit: float, total_steps: int, steps_per_epoch: int
) -> int | None:
    """The first optimizer step t (from 1) with p(t) <= limit * p0, None where there is none up to `total_steps`."""
    epochs = (total_steps - 1) // steps_per_epoch + 1

    def reached(step: int) -> bool:
        p = probability(
            schedule,
            p0=1.0,
            step=step,
            total_steps=total_steps,
            epoch=(step - 1) // steps_per_epoch + 1,
            total_epochs=epochs,
            alpha=alpha,
        )
        return p <= limit + SLACK

    # p never rises, so that the steps where it is low enough are the last ones.
    step = bisect.bisect_left(range(1, total_steps + 1), True, key=reached) + 1
    return step if step <= total_steps else None


def cuts(study: Study, sweep: SweepSpec, total: int, steps_per_epoch: int) -> Cuts:
    """Work out the limits on ASHA in the search of one model whose fine-tunings have `total` optimizer steps.

    Raises:
        ConfigError: nothing could ever be cut, or trials of different length would be compared.
    """
    spec, parameters = study.spec, study.parameters
    if not study.search:
        raise ConfigError(
            f"sweep.scheduler asha has nothing to stop: {study.name} has one setting of each arm, and no search.\n"
            "List what to search under sweep.parameters, or set sweep.scheduler to none."
        )
    longer = [key for key in LENGTH_KEYS if key in parameters]
    if longer:
        raise ConfigError(
            f"sweep.scheduler asha compares trials at equal steps, but sweep.parameters has {', '.join(longer)}, by "
            "which their length differs.\nTake it out of the search, or set sweep.scheduler to none."
        )
    decayed: dict[str, int] = {}
    never: list[str] = []
    for name, schedule, alpha in _searched(spec, parameters):
        step = decayed_step(schedule, alpha, sweep.decayed, total, steps_per_epoch)
        if step is None:
            never.append(name)
        else:
            decayed[name] = step
    first = max([sweep.grace_period, *decayed.values()])
    found = Cuts(first, total, sweep.decayed, steps_per_epoch, decayed, tuple(never))
    if never and not decayed:
        raise ConfigError(
            f"sweep.scheduler asha could never cut a trial: p does not fall to sweep.decayed {sweep.decayed:g} x p0 "
            f"within {total} steps with {', '.join(never)}.\n{REMEDY}"
        )
    assert spec.eval_steps is not None, "the spec refuses asha without eval_steps"
    if -(-first // spec.eval_steps) * spec.eval_steps >= total:
        raise ConfigError(
            f"sweep.scheduler asha could never cut a trial: {found.describe()}, and with eval_steps {spec.eval_steps} "
            f"no validation comes between that step and the end.\n{REMEDY}"
        )
    return found


REMEDY = (
    "Raise sweep.decayed, search schedules that decay earlier (exp), validate more often (eval_steps), lower "
    "sweep.grace_period, or set sweep.scheduler to none."
)


def _searched(spec: TrainSpec, parameters: dict[str, Space]) -> list[tuple[str, str, float | None]]:
    """(name, schedule, alpha) of all decays in the search; of a range of alphas both ends."""
    block = spec.macdrop
    if not block.config(seed=0).enabled and not any(key.startswith("macdrop.") for key in parameters):
        return []
    schedules = parameters["macdrop.schedule"].bounds() if "macdrop.schedule" in parameters else [block.schedule]
    alphas = parameters["macdrop.alpha"].bounds() if "macdrop.alpha" in parameters else [block.alpha]
    pairs = [(name, alpha if name == "exp" else None) for name, alpha in itertools.product(schedules, alphas)]
    return [(name if alpha is None else f"{name}({alpha:g})", name, alpha) for name, alpha in dict.fromkeys(pairs)]
