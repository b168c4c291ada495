"""Taking a cluster down: jobs, machines, and every Ray process that is left."""

from __future__ import annotations

from pathlib import Path

from cluster.backends.base import RUNNING
from cluster.backends.registry import open_kind
from cluster.core.shell import confirmed
from cluster.errors import LaunchError


def down(path: Path, *, yes: bool, dry_run: bool) -> int:
    """Stop jobs, take the cluster down, look at every host: 0 when nothing is left."""
    kind = open_kind(path, dry_run=dry_run)
    try:
        running = [job for job in kind.jobs(timeout=60) if job["status"] in RUNNING]
    except LaunchError as error:
        running = []
        kind.shell.say(f"its jobs cannot be asked for, and the cluster is taken down all the same: {error}")
    names = f", which runs {', '.join(job['run'] for job in running)}" if running else ""
    if not dry_run and not confirmed(f"Take down cluster {kind.file.name!r}{names}?", yes=yes):
        return 1
    for job in running:
        kind.stop(job["id"])
    problems = kind.destroy()
    for problem in problems:
        kind.shell.say(f"left: {problem}")
    if not problems and not dry_run:
        kind.shell.say(
            f"cluster {kind.file.name} is down; results are on its storage ({kind.file.storage or 'unknown'})"
        )
    return 1 if problems else 0
