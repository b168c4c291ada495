"""Launch files: one ordinary file per cluster, read once and handed on.

A Ray cluster YAML, a KubeRay manifest or an sbatch script; written by `macdrop cluster render`, by hand, or by somebody
else. Each format is a subclass of `LaunchFile` that answers what every verb needs to know.
"""

from __future__ import annotations

import functools
import re
import shlex
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml

from cluster.errors import BadLaunchFile

#: libyaml where it is installed: launch files and KubeRay's definitions are long.
LOADER: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)


@dataclass(frozen=True)
class Source:
    """The text of a launch file whose format is not known yet."""

    path: Path
    text: str

    @functools.cached_property
    def documents(self) -> tuple[dict[str, Any], ...]:
        """The YAML documents; none unless all of them are mappings. Raises BadLaunchFile: not YAML."""
        try:
            found = tuple(each for each in yaml.load_all(self.text, Loader=LOADER) if each is not None)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            where = getattr(error, "problem_mark", None)
            line = f", line {where.line + 1}" if where else ""
            problem = getattr(error, "problem", None) or error
            raise BadLaunchFile(f"{self.path}{line}: not valid YAML: {problem}") from None
        return found if all(isinstance(document, dict) for document in found) else ()


@dataclass(frozen=True)
class LaunchFile(ABC):
    """A launch file as read. `documents`: its YAML documents, none for a script."""

    path: Path
    text: str
    documents: tuple[dict[str, Any], ...] = ()

    @property
    def quoted(self) -> str:
        """The path as a word of a command to type."""
        return shlex.quote(str(self.path))

    @classmethod
    @abstractmethod
    def read(cls, source: Source) -> Self | None:
        """The launch file, or None for another format. Raises BadLaunchFile: this format, but unusable."""

    @property
    @abstractmethod
    def provider(self) -> str:
        """The source of the machines: aws, gcp, azure, local, ...; kuberay; slurm."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of the cluster, resource or job; by default the stem of the file."""

    @property
    @abstractmethod
    def workers(self) -> tuple[int, int]:
        """Minimum and maximum number of nodes besides the head."""

    @property
    def shell(self) -> str:
        """All shell commands of the file, without comments."""
        return ""

    @functools.cached_property
    def environment(self) -> dict[str, str]:
        """Variables that the file sets on its hosts, unexpanded; those of the head where hosts differ."""
        return assignments(self.shell)

    def assigned(self) -> Iterator[tuple[str, str]]:
        """Every name and value that commands or options of the file assign."""
        yield from assignments(self.shell).items()

    @property
    def storage(self) -> str | None:
        """The folder that all hosts share, if the file names one."""
        return self.environment.get("MACDROP_STORAGE")

    @property
    def secrets(self) -> tuple[str, ...]:
        """Names of the environment variables that travel separately from the file."""
        return tuple(name for name in self.environment.get("MACDROP_SECRETS", "").split(",") if name)

    @property
    def token(self) -> bool:
        """True if the file turns on token authentication."""
        return self.environment.get("RAY_AUTH_MODE") == "token"


def assignments(shell: str) -> dict[str, str]:
    """Variables that shell text sets or writes to a file to be set later, unquoted and unexpanded; the first wins."""
    found: dict[str, str] = {}
    for word in shell_words(shell):
        assignment = _ASSIGNMENT.fullmatch(word)
        if assignment:
            found.setdefault(assignment[1], assignment[2])
        elif "export " in word and word != shell:  # printf 'export NAME=value\n' >> ~/.bashrc
            found = assignments(word.replace("\\n", "\n")) | found
    return found


def shell_words(shell: str) -> list[str]:
    """The unquoted words of shell text; if quotes are unbalanced, those of the lines that can be read."""
    lexer = shlex.shlex(shell, posix=True, punctuation_chars=";&|()<>")
    lexer.whitespace_split, lexer.commenters = True, "#"
    try:
        return list(lexer)
    except ValueError:
        lines = shell.splitlines()
        return [word for line in lines for word in shell_words(line)] if len(lines) > 1 else []


def as_dict(value: Any) -> dict[str, Any]:
    """The value if it is a mapping, else an empty one: reading is lenient, `check` reports."""
    return value if isinstance(value, dict) else {}


def as_dicts(value: Any) -> list[dict[str, Any]]:
    """The same for a list of mappings."""
    return [as_dict(each) for each in value] if isinstance(value, list) else []


def as_count(value: Any, default: int) -> int:
    """The value if it is a whole number, else `default`."""
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return default
