"""The settings of one MacDrop fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from macdrop.attack import Rows, random_rows
from macdrop.errors import ConfigError, nearest
from macdrop.schedules import check_schedule, probability

#: Random rows are drawn beside the top k and at least this many, so that none of them is nearly massive.
SPARED = 10

#: Rows may lose all their entries in this share of the draws before DoRA users are warned.
EMPTIED = 0.005


def dora_warning(p0: float, entries: int) -> str | None:
    """Warn of gradients that DoRA makes large: None where rows of `entries` non-zero entries keep some almost always.

    DoRA gives a row its full magnitude whatever is left of it. Of a row that has lost all its entries that is the
    adapter's part alone, which is small in the first steps and is scaled up as far.
    """
    emptied = p0**entries
    if emptied <= EMPTIED:
        return None
    most = math.floor(1000 * EMPTIED ** (1 / entries)) / 1000
    return (
        f"p0 = {p0:g} with DoRA: a masked row of {entries} non-zero entries loses them all in {emptied:.1%} of "
        "the draws. DoRA then scales the adapter's small part of it to the magnitude of the whole row, and gradients "
        f"can grow a hundred- to thousandfold. Take p0 of at most {most:g} here, or LoRA."
    )


@dataclass(frozen=True)
class Scope:
    """A set of entries to drop: those of the rows that `rows` selects, or (None) of the intermediate state.

    uses_k: whether k says how many rows. spared: rows that the layer must have beside these k.
    """

    rows: Rows | None
    uses_k: bool = True
    spared: Callable[[int], int] = lambda k: 0


def _spared(k: int) -> int:
    return max(k, SPARED) if k else 0


#: Every scope by name. The first is MacDrop, the others are placebos for it.
SCOPES = {
    "massive": Scope(lambda weights, k, seed: weights.top(k)),
    "random": Scope(lambda weights, k, seed: random_rows(weights, k, spared=max(k, SPARED), seed=seed), spared=_spared),
    "all": Scope(lambda weights, k, seed: tuple(range(weights.intermediate_size)), uses_k=False),
    "activations": Scope(None, uses_k=False),
}


def _integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class MacDropConfig:
    """The settings of dropping: which entries, how often, and how that decays (paper, section 5).

    scope: `massive` is the paper's method. Its placebos drop with the same p in the same layer: `random` k rows that
        are none of the top max(k, 10), drawn by the seed; `all` every row; `activations` entries of the intermediate
        state instead of weights, as ordinary inverted dropout.
    k: rows taken, per matrix (0 = MacDrop off); the scopes `all` and `activations` do not use it.
    p0: drop probability of one entry at the start, within [0, 1] (0 = MacDrop off).
    schedule: a name from `macdrop.schedules.SCHEDULES`.
    alpha: decay rate per optimizer step; needed by `exp`, refused by the others.
    seed: keys the mask generator together with the micro-step; 0 to 2**63 - 1.

    Raises `ConfigError` for a value outside of these. k above the size of the FFN is refused where the model is known.
    """

    k: int = 5
    p0: float = 0.8
    schedule: str = "step"
    alpha: float | None = None
    seed: int = 0
    scope: str = "massive"

    def __post_init__(self) -> None:
        if not _integer(self.k) or self.k < 0:
            raise ConfigError(f"k is {self.k!r}; the number of massive rows must be a whole number, 0 (off) or more.")
        number = isinstance(self.p0, (int, float)) and not isinstance(self.p0, bool)
        if not (number and math.isfinite(self.p0) and 0 <= self.p0 <= 1):
            raise ConfigError(f"p0 is {self.p0!r}; the drop probability must be a number from 0 (off) to 1.")
        check_schedule(self.schedule, self.alpha)
        if not _integer(self.seed) or not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed!r}; it must be a whole number from 0 to 2**63 - 1.")
        if not isinstance(self.scope, str) or self.scope not in SCOPES:
            raise ConfigError(
                f"scope is {self.scope!r}; what is dropped must be one of {', '.join(SCOPES)}."
                f"{nearest(self.scope, SCOPES)}"
            )

    @property
    def enabled(self) -> bool:
        """True if any entry can ever be dropped."""
        return self.p0 > 0 and (self.k > 0 or not SCOPES[self.scope].uses_k)

    @property
    def rows_needed(self) -> int:
        """Rows that an FFN must have for this k."""
        scope = SCOPES[self.scope]
        return self.k + scope.spared(self.k) if scope.uses_k else 0

    def canonical(self) -> MacDropConfig:
        """Return the config with k = 0 where its scope uses none; disabled configs, which train alike, are equal."""
        if not self.enabled:
            return MacDropConfig(k=0, p0=0.0)
        return self if SCOPES[self.scope].uses_k or self.k == 0 else replace(self, k=0)

    def probability(self, step: int, total_steps: int, epoch: int, total_epochs: int) -> float:
        """Return the drop probability at optimizer step `step` of `total_steps`, epoch `epoch` of `total_epochs`."""
        return probability(
            self.schedule,
            p0=self.p0,
            step=step,
            total_steps=total_steps,
            epoch=epoch,
            total_epochs=total_epochs,
            alpha=self.alpha,
        )
