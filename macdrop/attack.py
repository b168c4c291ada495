"""Attacks on the massive weights (arXiv 2410.01866, section 3): the rows of W_gate and W_up that are set to zero.

`macdrop.masking.attacked` carries an attack out on a model. A kind is one function, registered by `attack`; parser,
configuration, scoring and reports take it from the registry. torch is not loaded until rows are drawn.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from macdrop.errors import ConfigError, nearest
from macdrop.weights import MassiveWeights

#: The model as it is, written where an attack could be.
NONE = "none"
#: The rows that an attack with k sets to zero; a seed decides where they are drawn.
Rows = Callable[[MassiveWeights, int, int], tuple[int, ...]]
#: Every kind of attack, by name.
ATTACKS: dict[str, Rows] = {}


def attack(kind: str) -> Callable[[Rows], Rows]:
    """Register a function as the rows of a kind of attack; every process that reads attacks or scores has to import it.

    Raises `ValueError` for a name that cannot be written as ``kind@k``, or that is taken.
    """
    if not re.fullmatch(r"[a-z_]+", kind) or kind == NONE or kind in ATTACKS:
        raise ValueError(f"{kind!r} cannot name an attack: use letters a to z and _, and a name that is not taken")

    def register(rows: Rows) -> Rows:
        ATTACKS[kind] = rows
        return rows

    return register


@dataclass(frozen=True, order=True)
class Attack:
    """An attack by its kind and k, as written in recipes: ``zeroing@3``; ``none`` is the untouched model."""

    kind: str
    k: int = 0

    def __str__(self) -> str:
        return self.kind if self.kind == NONE else f"{self.kind}@{self.k}"

    @classmethod
    def parse(cls, text: str) -> Attack:
        """Read ``zeroing@3``, ``retaining@5``, ``random@5`` or ``none``. Raises `ConfigError` for anything else."""
        if text == NONE:
            return cls(NONE)
        kind, _, k = text.partition("@") if isinstance(text, str) else (str(text), "", "")
        if kind in ATTACKS and re.fullmatch(r"[0-9]+", k):
            return cls(kind, int(k))
        hint = "" if kind in ATTACKS else nearest(kind, (*ATTACKS, NONE))
        raise ConfigError(
            f"{text!r} is not an attack.{hint} Write {NONE!r}, or one of {', '.join(ATTACKS)} with the number of rows "
            "after an @, at least 0: zeroing@3."
        )


def largest_k(kind: str, rows: int) -> int:
    """Return the largest k of an attack on a layer of so many rows: random rows are drawn beside the top k."""
    return rows // 2 if kind == "random" else rows


def attacked_rows(weights: MassiveWeights, kind: str, k: int, *, seed: int = 0) -> tuple[int, ...]:
    """Return the rows that an attack sets to zero. Raises `ConfigError` for an unknown kind and for an impossible k."""
    if kind == NONE:
        return ()
    if kind not in ATTACKS:
        raise ConfigError(f"Unknown attack {kind!r}.{nearest(kind, ATTACKS)} Allowed: {', '.join(ATTACKS)}, {NONE}.")
    limit = largest_k(kind, weights.intermediate_size)
    if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k <= limit:
        raise ConfigError(
            f"k = {k!r} is not possible for the attack {kind!r}: layer {weights.layer} of {weights.model} has "
            f"{weights.intermediate_size} rows.\nGive a whole number from 0 to {limit}."
        )
    return ATTACKS[kind](weights, k, seed)


@attack("zeroing")
def _zeroing(weights: MassiveWeights, k: int, seed: int) -> tuple[int, ...]:
    """The top k; k = 0 is the untouched model."""
    return weights.top(k)


@attack("retaining")
def _retaining(weights: MassiveWeights, k: int, seed: int) -> tuple[int, ...]:
    """All but the top k; k = 0 zeroes the whole matrices."""
    return weights.indices[k:]


@attack("random")
def _random(weights: MassiveWeights, k: int, seed: int) -> tuple[int, ...]:
    """k rows drawn by the seed from all but the top k."""
    return random_rows(weights, k, spared=k, seed=seed)


def random_rows(weights: MassiveWeights, k: int, *, spared: int, seed: int) -> tuple[int, ...]:
    """Draw k rows by `seed`, without replacement, from all but the top `spared` (at least k).

    Raises `ConfigError` when the layer has fewer than k + spared rows.
    """
    rest = weights.indices[spared:]
    if k > len(rest):
        size = weights.intermediate_size
        raise ConfigError(
            f"{k} random rows beside the top {spared} are not possible: layer {weights.layer} of {weights.model} has "
            f"{size} rows in all.\nGive k of at most {max(0, size - spared) if k < spared else size // 2}."
        )
    import torch

    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed)).tolist()
    return tuple(rest[i] for i in order[:k])
