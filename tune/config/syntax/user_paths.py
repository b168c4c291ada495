"""Paths that a user gives, in a run file or on the command line."""

from __future__ import annotations

import os
from collections.abc import Iterable

from macdrop.errors import ConfigError

#: Bytes of a file's name on every common file system.
LONGEST_NAME = 255


def expand_path(given: str) -> str:
    """Return a path, or a name that may be one, with a leading ``~`` or ``~USER`` replaced by the home folder.

    Raises:
        ConfigError: there is no such home folder, or a name in it is too long.
    """
    name = max(given.split("/"), key=len)
    if len(os.fsencode(name)) > LONGEST_NAME:
        raise ConfigError(f"{name[:40]!r}... is longer than the {LONGEST_NAME} bytes that a file's name may have")
    path = os.path.expanduser(given)
    if path.startswith("~"):
        raise ConfigError(
            f"{given!r:.100}: {given.partition('/')[0]:.60} stands for a home folder, and there is none of that name; "
            f"write the path out, or begin it with ./ if the name itself has the ~"
        )
    return path


def expand_arguments(arguments: Iterable[str]) -> list[str]:
    """Return a command line with the home folder for ``~`` where a shell leaves it: in quotes, and after ``--key=``."""
    expanded = []
    for given in arguments:
        option, sign, value = given.partition("=")
        if option.startswith("--") and value.startswith("~"):
            expanded.append(option + sign + expand_path(value))
        else:
            expanded.append(expand_path(given) if given.startswith("~") and "=" not in given else given)
    return expanded
