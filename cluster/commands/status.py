"""The state of a cluster: its nodes, its jobs, and the runs on its storage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.backends.base import RUNNING
from cluster.backends.registry import open_kind
from cluster.core.shell import table
from cluster.errors import LaunchFailed


def status(path: Path, *, dry_run: bool) -> int:
    """Nodes, jobs and runs; what cannot be told is said, and the code is then 1."""
    kind, code = open_kind(path, dry_run=dry_run), 0
    answer = kind.ask("nodes", "jobs", "runs")
    if dry_run:
        return 0
    running: set[str] | None = None
    for topic, tell in (("nodes", _nodes_told), ("jobs", _jobs_told), ("runs", _runs_told)):
        try:
            found = kind.told(answer, topic)
        except LaunchFailed as error:
            kind.shell.say(f"{topic}: {error}\n")
            code = 1
            continue
        if topic == "jobs":
            running = {job["run"] for job in found if job["status"] in RUNNING}
        kind.shell.say((tell(found, running) if found else f"no {topic}") + "\n")
    return code


def _nodes_told(nodes: list[dict[str, Any]], _: set[str] | None) -> str:
    def state(node: dict[str, Any]) -> str:
        return "dead" if not node["alive"] else "draining" if node["draining"] else "alive"

    def row(node: dict[str, Any]) -> tuple[str, ...]:
        counts = (f"{node['resources'].get(name, 0):g}" for name in ("CPU", "GPU"))
        return (node["address"], node["host"], "head" if node["head"] else "worker", state(node), *counts,
                node["reason"][:80])  # fmt: skip

    ordered = sorted(nodes, key=lambda node: (not node["alive"], not node["head"], node["address"]))
    return table(("node", "host", "part", "state", "CPUs", "GPUs", "reason"), map(row, ordered))


def _jobs_told(jobs: list[dict[str, Any]], _: set[str] | None) -> str:
    rows = [(job["id"], job["run"], job["status"].lower(), "" if job["code"] is None else job["code"]) for job in jobs]
    return table(("job", "run", "state", "exit code"), rows)


def _runs_told(runs: list[dict[str, Any]], running: set[str] | None) -> str:
    rows = []
    for run in runs:
        state = run["status"] or "?"
        if state == "running" and running is not None and run["run"] not in running:
            state = "broken off (submit it again to go on)"
        trials = ", ".join(f"{count} {name}" for name, count in run["trials"].items())
        rows.append((run["run"], state, run["created"] or "", run["finished"] or "", trials))
    return table(("run", "state", "begun", "ended", "trials"), rows)
