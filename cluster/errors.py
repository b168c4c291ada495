"""Every error that the launcher raises on purpose, each with its exit code.

They are separate from macdrop's own, because `cluster` imports neither of the other packages. A message says what is
wrong, the value, what is allowed, and the remedy; never the value of a secret.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class LaunchError(Exception):
    """Base of all errors below."""

    #: What the command line ends with.
    exit_code: ClassVar[int] = 1


class LaunchFailed(LaunchError):
    """A command on a host, cluster or queue failed, or something expected never came up."""


class BadLaunchFile(LaunchError, ValueError):
    """A launch file, or a field that one is rendered from, cannot be used; the user has to fix it."""

    exit_code = 2


class Missing(LaunchError):
    """A tool, token or permission that the launch needs is missing here; the message says how to get it."""

    exit_code = 3


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest of `allowed`, or an empty string."""
    matches = difflib.get_close_matches(str(name), list(allowed), n=1, cutoff=0.6)
    return f" Did you mean {matches[0]!r}?" if matches else ""
