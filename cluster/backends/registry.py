"""All backends, by the kind of launch file that they take."""

from __future__ import annotations

import os
from pathlib import Path

from cluster.backends.base import Kind
from cluster.backends.kuberay import Kube
from cluster.backends.ray_up import Ray
from cluster.backends.slurm import Slurm
from cluster.core import launch_file, token
from cluster.core.shell import Shell

BACKENDS: dict[str, type[Kind]] = {launch_file.RAY: Ray, launch_file.KUBERAY: Kube, launch_file.SLURM: Slurm}


def open_kind(path: Path, *, dry_run: bool = False) -> Kind:
    """The cluster of a launch file. Raises BadLaunchFile, or Missing where this machine lacks a tool for it."""
    file = launch_file.load(path)
    known = _readable(file.secrets)
    shell = Shell(dry_run, environment=dict(token.ENVIRONMENT), hidden=known)
    kind = BACKENDS[file.kind](file, shell)
    shell.need(*kind.tools)
    return kind


def _readable(names: tuple[str, ...]) -> tuple[str, ...]:
    """Values that no printed line may hold: the secrets that are set here, and the token."""
    found = [os.environ.get(name, "") for name in names]
    try:
        found.append(token.path().read_text(encoding="utf-8").strip())
    except OSError:
        pass
    return tuple(value for value in found if value)
