"""Errors of the sweep that are raised on purpose; those of the method are in `macdrop.errors`.

Each class says with which code a command ends (`exit_code`), and carries one message and nothing else, so that it
crosses process borders (Ray pickles exceptions) unchanged.
"""

from __future__ import annotations

from macdrop.errors import ConfigError, MacDropError


class CheckpointError(MacDropError, ValueError):
    """A checkpoint is damaged or belongs to another run."""


class BenchmarkError(MacDropError):
    """A benchmark could not be scored."""


class TrainingDiverged(MacDropError):
    """A loss or gradient norm is not finite."""


class PackageUnavailable(ConfigError):
    """The package index does not provide a package that was asked for, or cannot be reached."""


class ResourceError(MacDropError):
    """The machine or cluster has less than the run needs; the message holds the arithmetic."""

    exit_code = 3
