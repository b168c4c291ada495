"""Every error that macdrop raises on purpose.

A `ConfigError` is the user's to mend (exit code 2), a `ResourceError` the machine's (exit code 3). All of them carry
one message and nothing else, so that they cross process borders (Ray pickles exceptions) unchanged.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MacDropError(Exception):
    """Base of all errors below."""


class ConfigError(MacDropError, ValueError):
    """A value given by the user cannot be used; the message says what is allowed."""


class UnsupportedModel(ConfigError):
    """The model has no feed-forward network that macdrop knows how to mask, or is no causal language model."""


class NoMassiveWeights(ConfigError):
    """The scan found no row to drop, or the file with the scan does not belong to this model."""


class DataError(ConfigError):
    """A data file is missing, empty, or has a row that cannot be used."""


class CheckpointError(MacDropError, ValueError):
    """A checkpoint is damaged or belongs to another run."""


class BenchmarkError(MacDropError):
    """A benchmark could not be scored."""


class TrainingDiverged(MacDropError):
    """A loss or gradient norm is not finite."""


class TrainingInvariantError(MacDropError):
    """Training ended in a state it must never reach: base weights changed, or the adapter did not move."""


class ResourceError(MacDropError):
    """The machine or cluster has less than the run needs; the message holds the arithmetic."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest of `allowed`, or an empty string."""
    matches = difflib.get_close_matches(str(name), list(allowed), n=1, cutoff=0.6)
    return f" Did you mean {matches[0]!r}?" if matches else ""
