"""Errors that the method raises on purpose; each class holds the exit code of a command that ends with it.

They carry one message and nothing else, so that they cross process borders (Ray pickles exceptions) unchanged.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MacDropError(Exception):
    """Base of all errors that are raised on purpose."""

    exit_code = 1


class ConfigError(MacDropError, ValueError):
    """A value given by the user cannot be used; the message says what is allowed. Nothing was started."""

    exit_code = 2


class UnsupportedModel(ConfigError):
    """The model has no feed-forward network that macdrop knows how to mask, or is not a causal language model."""


class NoMassiveWeights(ConfigError):
    """The scan found no row to drop, or the file with the scan does not belong to this model."""


class DataError(ConfigError):
    """A data file is missing, empty, or has a row that cannot be used."""


class TrainingInvariantError(MacDropError):
    """Training ended in a state it must never reach: base weights changed, or the adapter did not move."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest of `allowed`, or an empty string."""
    matches = difflib.get_close_matches(f"{name!s:.100}", list(allowed), n=1, cutoff=0.6)  # its time is quadratic
    return f" Did you mean {matches[0]!r}?" if matches else ""
