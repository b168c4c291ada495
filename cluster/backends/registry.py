"""The registry of backends: opens a launch file with the backend that understands it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cluster.backends.base import Backend
from cluster.backends.kuberay import KubeRay
from cluster.backends.ray_up import RayUp
from cluster.backends.skypilot import SkyPilot
from cluster.backends.slurm import Slurm
from cluster.core import token
from cluster.core.launch_file import LaunchFile, Source
from cluster.core.shell import Shell
from cluster.errors import BadLaunchFile

#: Tried in this order: scripts before YAML, the narrower YAML first. A new backend registers here.
BACKENDS: tuple[type[Backend[Any]], ...] = (Slurm, KubeRay, SkyPilot, RayUp)


def load(path: str | Path) -> LaunchFile:
    """Read a launch file. Raises BadLaunchFile: missing, not text, or not a known format."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise BadLaunchFile(
            f"launch file {str(path)!r} cannot be read: {reason}. Write one with `macdrop cluster render TARGET`."
        ) from None
    return parse(text, path)


def parse(text: str, path: Path) -> LaunchFile:
    """Read the text of a launch file. Raises BadLaunchFile."""
    source = Source(path, text)
    for backend in BACKENDS:
        file = backend.file_type.read(source)
        if file is not None:
            return file
    formats = ", ".join([backend.file_format for backend in BACKENDS][::-1])
    raise BadLaunchFile(f"{path} is not a launch file: {formats}. Write one with `macdrop cluster render TARGET`.")


def backend_of(file: LaunchFile) -> type[Backend[Any]]:
    return next(backend for backend in BACKENDS if isinstance(file, backend.file_type))


def open_backend(path: Path, *, dry_run: bool = False) -> Backend[Any]:
    """Read a launch file and connect it to its backend. Raises BadLaunchFile, or Missing: a tool is not installed."""
    return connect(load(path), dry_run=dry_run)


def connect(file: LaunchFile, *, dry_run: bool = False) -> Backend[Any]:
    """The backend of a launch file. Raises Missing: this machine lacks a tool for it."""
    shell = Shell(dry_run, environment=dict(token.ENVIRONMENT), hidden=_hidden(file.secrets))
    backend = backend_of(file)(file, shell)
    shell.need(*backend.tools)
    return backend


def _hidden(names: Iterable[str]) -> tuple[str, ...]:
    """Values that must not be printed: the secrets set here, and the token."""
    found = [os.environ.get(name, "") for name in names]
    try:
        found.append(token.path().read_text(encoding="utf-8").strip())
    except OSError:
        pass
    return tuple(value for value in found if value)
