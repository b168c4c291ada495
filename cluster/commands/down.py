"""`macdrop cluster down`: stopping jobs, machines, and every Ray process that is left."""

from __future__ import annotations

from pathlib import Path

from cluster.backends.base import RUNNING
from cluster.backends.registry import open_backend
from cluster.core.shell import confirmed
from cluster.errors import LaunchError


def down(path: Path, *, yes: bool, dry_run: bool) -> int:
    """Stop jobs, take the cluster down, verify every host; return 0 if nothing is left."""
    backend = open_backend(path, dry_run=dry_run)
    try:
        running = [job for job in backend.jobs(timeout=60) if job["status"] in RUNNING]
    except LaunchError as error:
        running = []
        backend.shell.say(f"its jobs cannot be listed; taking the cluster down anyway: {error}")
    names = f", which runs {', '.join(job['run'] for job in running)}" if running else ""
    if not dry_run and not confirmed(f"Take down cluster {backend.file.name!r}{names}?", yes=yes):
        return 1
    for job in running:
        backend.stop(job["id"])
    problems = backend.destroy()
    for problem in problems:
        backend.shell.say(f"left: {problem}")
    if not problems and not dry_run:
        backend.shell.say(
            f"cluster {backend.file.name} is down; results are on its storage ({backend.file.storage or 'unknown'})"
        )
    return 1 if problems else 0
