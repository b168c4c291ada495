"""Rules for when a trial may be stopped early: never before the curriculum has decayed. Pure; no Ray.

Of the schedulers `asha` cuts at rungs, `hyperband` at the rungs of several brackets, and `median` at each validation.

A trial under a high p looks worse on the validation loss than it will be, masks off or not, as it has learnt around
rows that were missing. So trials are compared only where p(t) <= decayed * p0 for all that are compared:

- the first rung is at the first optimizer step where that holds for every schedule in the search that ever gets there,
  or at `sweep.grace_period` if that is later;
- a trial whose p has not decayed by then (constant, or a decay longer than the fine-tuning) is never cut, nor is
  another one measured against it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from macdrop.errors import ConfigError
from macdrop.schedules import DECAYED, decayed_step
from tune.config.run_spec import TrainSpec, values_of
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
#: Other trials that the median is taken over, at least.
MEDIAN_OF = 3


@dataclass(frozen=True)
class Cuts:
    """Limits on a scheduler: no cut before optimizer step `first` of `total`; `never` are the schedules never cut.

    `decayed` maps each schedule that decays, with its slowest alpha, to the step from which its trials are comparable.
    `brackets` are those of HyperBand: number s has its first rung at `first` x reduction_factor^s.
    """

    first: int
    total: int
    limit: float
    steps_per_epoch: int
    decayed: dict[str, int]
    never: tuple[str, ...]
    brackets: int = 1

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
        more = f", in {self.brackets} brackets" if self.brackets > 1 else ""
        return f"no cut before step {self.first} of {self.total}{more} ({'; '.join(parts) or 'nothing is dropped'})"


def cuts(study: Study, sweep: SweepSpec, total: int, steps_per_epoch: int) -> Cuts:
    """Work out the limits on the scheduler in the search of one model whose fine-tunings have `total` optimizer steps.

    Raises:
        ConfigError: nothing could ever be cut, or trials of different length would be compared.
    """
    spec, parameters, name = study.spec, study.parameters, sweep.scheduler
    if not study.search:
        raise ConfigError(
            f"sweep.scheduler {name} has nothing to stop: {study.name} has one setting of each arm, and no search.\n"
            "List what to search under sweep.parameters, or set sweep.scheduler to none."
        )
    longer = [key for key in LENGTH_KEYS if key in parameters]
    if longer:
        raise ConfigError(
            f"sweep.scheduler {name} compares trials at equal steps, but sweep.parameters has {', '.join(longer)}, by "
            "which their length differs.\nTake it out of the search, or set sweep.scheduler to none."
        )
    decayed: dict[str, int] = {}
    never: list[str] = []
    for label, schedule, alpha in _searched(spec, parameters):
        step = decayed_step(schedule, alpha, sweep.decayed, total, steps_per_epoch)
        if step is None:
            never.append(label)
        else:
            decayed[label] = step
    first = max([sweep.grace_period, *decayed.values()])
    found = Cuts(first, total, sweep.decayed, steps_per_epoch, decayed, tuple(never))
    if never and not decayed:
        raise ConfigError(
            f"sweep.scheduler {name} could never cut a trial: p does not fall to sweep.decayed {sweep.decayed:g} x p0 "
            f"within {total} steps with {', '.join(never)}.\n{REMEDY}"
        )
    assert spec.eval_steps is not None, "the spec refuses a scheduler without eval_steps"
    if _validation_from(first, spec.eval_steps) >= total:
        raise ConfigError(
            f"sweep.scheduler {name} could never cut a trial: {found.describe()}, and with eval_steps "
            f"{spec.eval_steps} no validation comes between that step and the end.\n{REMEDY}"
        )
    if name == "median" and study.samples <= MEDIAN_OF:
        raise ConfigError(
            f"sweep.scheduler median could never cut a trial: it takes the median of at least {MEDIAN_OF} others, and "
            f"the search of {study.name} has {study.samples} trials.\nSearch more, or set sweep.scheduler to none."
        )
    return replace(found, brackets=_brackets(found, sweep, spec.eval_steps)) if name == "hyperband" else found


def _validation_from(step: int, eval_steps: int) -> int:
    """Return the step of the first validation at `step` or later."""
    return -(-step // eval_steps) * eval_steps


def _brackets(found: Cuts, sweep: SweepSpec, eval_steps: int) -> int:
    """Return the number of brackets whose first rung has a validation before the end.

    Raises:
        ConfigError: there is one, which is ASHA.
    """
    starts = itertools.takewhile(
        lambda first: _validation_from(first, eval_steps) < found.total,
        (found.first * sweep.reduction_factor**s for s in itertools.count()),
    )
    count = len(list(starts))
    if count < 2:
        raise ConfigError(
            f"sweep.scheduler hyperband has no second bracket: {found.describe()}, and {sweep.reduction_factor} times "
            f"that step is not before the end.\nSet sweep.scheduler to asha, which has one bracket, lower "
            "sweep.reduction_factor or sweep.grace_period, or search schedules that decay earlier (exp)."
        )
    return count


def check_patience(spec: TrainSpec, parameters: dict[str, Space], total: int, steps_per_epoch: int) -> list[str]:
    """Return a note on when early stopping counts; nothing without it.

    Raises:
        ConfigError: it could never stop a fine-tuning that drops anything.
    """
    patience = [each for each in values_of(spec, parameters, "early_stopping_patience") if each is not None]
    every = [each for each in values_of(spec, parameters, "eval_steps") if each is not None]
    if not patience or not every:
        return []
    soonest = min(patience) * min(every)
    searched: list[tuple[str, str | None, float | None]] = [*_searched(spec, parameters)]
    searched = searched or [("nothing dropped", None, None)]
    from_step = {}
    for label, schedule, alpha in searched:
        step = 1 if schedule is None else decayed_step(schedule, alpha, DECAYED, total, steps_per_epoch)
        if step is not None and _validation_from(step, min(every)) + soonest < total:
            from_step[label] = step
    never = [label for label, _, _ in searched if label not in from_step]
    if not from_step:
        raise ConfigError(
            f"early_stopping_patience {min(patience)} could never end a fine-tuning: validations count once p is at "
            f"most {DECAYED:g} p0, and {min(patience) + 1} of them, {min(every)} steps apart, do not come before step "
            f"{total} with {', '.join(never)}.\nLower early_stopping_patience or eval_steps, choose a schedule that "
            "decays earlier (exp), or leave early_stopping_patience out."
        )
    counts = ", ".join(f"from step {step} ({label})" for label, step in from_step.items())
    more = f"; {', '.join(never)}: trains to the end" if never else ""
    return [f"early_stopping_patience counts validations {counts} of {total}{more}"]


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
