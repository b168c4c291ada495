"""`macdrop cluster up`: starting a cluster, waiting for its nodes, and why one does not come."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from cluster.backends.advice import causes
from cluster.backends.base import RUNNING, Backend
from cluster.backends.registry import connect, load, open_backend
from cluster.commands import check
from cluster.core import secrets, token
from cluster.errors import BadLaunchFile, LaunchError, LaunchFailed

#: Seconds between two looks at the nodes.
POLL = 5.0


def up(path: Path, *, nodes: int | None, timeout: float, dry_run: bool) -> int:
    """Check the file, hand over token and secrets, start, and wait for nodes: 0 if all come, else 1 with causes."""
    file = load(path)
    if check.report(file):
        raise BadLaunchFile(f"nothing was started: first fix {path} as described above.")
    backend = connect(file, dry_run=dry_run)
    found = secrets.values(file.secrets)
    if backend.sends_token:
        token.ensure(backend.shell)
    if not dry_run:
        _refuse_if_busy(backend)
    backend.prepare(found)
    backend.create()
    code = wait(backend, nodes or backend.expected_nodes, timeout)
    if not code and not dry_run:
        backend.shell.say(f"next: {backend.next_command}")
    return code


def _refuse_if_busy(backend: Backend[Any]) -> None:
    """Starting again restarts Ray on the head, which would end running jobs. Raises LaunchFailed."""
    try:
        running = [job for job in backend.jobs(shown=False, timeout=45) if job["status"] in RUNNING]
    except LaunchError:
        return  # no cluster, or a dead one: what `up` is for
    if running:
        names, path = ", ".join(job["run"] for job in running), backend.file.quoted
        raise LaunchFailed(
            f"the cluster is up and runs {names}: `up` would restart Ray and end it. See macdrop cluster status "
            f"{path}; or end it: macdrop cluster down {path}"
        )


def check_after(path: Path, *, nodes: int | None, timeout: float) -> int:
    """Wait for the nodes of a cluster that was started before."""
    backend = open_backend(path)
    if backend.sends_token:
        token.check()
    return wait(backend, nodes or backend.expected_nodes, timeout)


def wait(backend: Backend[Any], wanted: int, timeout: float) -> int:
    """Wait until this many nodes are alive, reporting each change; return 1 on timeout, after printing the causes."""
    if not wanted or _Watch(backend, wanted).wait(timeout):
        return 0
    return 1


class _Watch:
    """Nodes as they come up. Every change, cause and problem is printed once."""

    def __init__(self, backend: Backend[Any], wanted: int) -> None:
        self.backend, self.wanted = backend, wanted
        self.nodes: list[dict[str, Any]] | None = None
        self._alive: list[str] | None = None
        self._causes: set[str] = set()
        self._problem = ""

    def wait(self, timeout: float) -> bool:
        deadline, first = time.monotonic() + timeout, True
        while not self._look(shown=first):
            first = False
            if time.monotonic() >= deadline:
                self._explain(timeout)
                return False
            time.sleep(min(POLL, max(0.0, deadline - time.monotonic())))
        return True

    def _look(self, *, shown: bool) -> bool:
        """Ask the head; return whether all nodes are alive. A dry run shows the command only."""
        shell = self.backend.shell
        try:
            found = self.backend.ask("nodes", "log", shown=shown)
            if shell.dry_run:
                return True
            self.nodes, self._problem = self.backend.topic(found, "nodes"), ""
        except LaunchError as error:
            if str(error) != self._problem:
                shell.say(f"the head: {error}\nwaiting for it (Ctrl-C stops waiting, not the cluster)")
            self._problem = str(error)
            return False
        for cause in causes(found.get("log", [])):
            headline = cause.splitlines()[0]
            if headline not in self._causes:
                self._causes.add(headline)
                shell.say(f"the autoscaler's log says: {cause}")
        alive = self._now()
        if alive != self._alive:
            shell.say(f"{len(alive)} of {self.wanted} nodes: {', '.join(alive) or 'none yet'}")
            self._alive = alive
        return len(alive) >= self.wanted

    def _now(self) -> list[str]:
        return sorted(_described(node) for node in self.nodes or [] if node["alive"])

    def _explain(self, timeout: float) -> None:
        shell = self.backend.shell
        shell.say(f"{len(self._now())} of {self.wanted} nodes came within {timeout:.0f} s. Looking for the cause ...")
        found = self.backend.diagnose(self.nodes)
        for cause in found or ["none found in the logs; they are on the head: /tmp/ray/session_latest/logs"]:
            shell.say(f"cause: {cause}")
        shell.say(f"to keep waiting: macdrop cluster check {self.backend.file.quoted} --after --nodes {self.wanted}")


def _described(node: dict[str, Any]) -> str:
    resources = " ".join(f"{count:g} {name}" for name, count in sorted(node["resources"].items()) if count)
    state = ", draining" if node["draining"] else ""
    return f"{node['address']} ({'head, ' if node['head'] else ''}{resources or 'no CPUs or GPUs'}{state})"
