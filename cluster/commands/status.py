"""`macdrop cluster status`: nodes, jobs, and the runs on the storage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.backends.base import RUNNING
from cluster.backends.registry import open_backend
from cluster.core.tables import table
from cluster.errors import LaunchFailed


def status(path: Path, *, dry_run: bool) -> int:
    """Print nodes, jobs and runs. Unavailable topics are reported and set exit code 1."""
    backend, code = open_backend(path, dry_run=dry_run), 0
    answer = backend.ask("nodes", "jobs", "runs")
    if dry_run:
        return 0
    running: set[str] | None = None
    for topic in ("nodes", "jobs", "runs"):
        try:
            found = backend.topic(answer, topic)
        except LaunchFailed as error:
            backend.shell.say(f"{topic}: {error}\n")
            code = 1
            continue
        if topic == "jobs":
            running = {job["run"] for job in found if job["status"] in RUNNING}
        shown = _nodes(found) if topic == "nodes" else _jobs(found) if topic == "jobs" else _runs(found, running)
        backend.shell.say((shown if found else f"no {topic}") + "\n")
    return code


def _nodes(nodes: list[dict[str, Any]]) -> str:
    def state(node: dict[str, Any]) -> str:
        return ("draining" if node["draining"] else "alive") if node["alive"] else "dead"

    def row(node: dict[str, Any]) -> tuple[str, ...]:
        counts = (f"{node['resources'].get(name, 0):g}" for name in ("CPU", "GPU"))
        role = "head" if node["head"] else "worker"
        return (node["address"], node["host"], role, state(node), *counts, node["reason"][:80])

    ordered = sorted(nodes, key=lambda node: (not node["alive"], not node["head"], node["address"]))
    return table(("node", "host", "role", "state", "CPUs", "GPUs", "reason"), map(row, ordered))


def _jobs(jobs: list[dict[str, Any]]) -> str:
    rows = [(job["id"], job["run"], job["status"].lower(), "" if job["code"] is None else job["code"]) for job in jobs]
    return table(("job", "run", "state", "exit code"), rows)


def _runs(runs: list[dict[str, Any]], running: set[str] | None) -> str:
    """`running`: runs with a live job, None if unknown."""
    rows = []
    for run in runs:
        state = run["status"] or "?"
        if state == "running" and running is not None and run["run"] not in running:
            state = "interrupted (submit it again to resume)"
        trials = ", ".join(f"{count} {name}" for name, count in run["trials"].items())
        rows.append((run["run"], state, run["created"] or "", run["finished"] or "", trials))
    return table(("run", "state", "started", "ended", "trials"), rows)
