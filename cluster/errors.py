"""Every error that the launcher raises on purpose, with the exit code it ends in.

The kinds stand apart from macdrop's own, because `cluster` imports neither of the other packages. Each carries one
message: what, the value, what is allowed, the remedy; never the value of a secret.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LaunchError(Exception):
    """Base of all errors below."""

    exit_code = 1


class LaunchFailed(LaunchError):
    """A command on a host, cluster or queue ended badly, or what should come never came."""


class BadLaunchFile(LaunchError, ValueError):
    """A launch file, or an answer that one is made from, cannot be used; the user mends it."""

    exit_code = 2


class Missing(LaunchError):
    """A tool, a token or a right that the launch needs is not on this machine; the message says how to get it."""

    exit_code = 3


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest of `allowed`, or an empty string."""
    matches = difflib.get_close_matches(str(name), list(allowed), n=1, cutoff=0.6)
    return f" Did you mean {matches[0]!r}?" if matches else ""
