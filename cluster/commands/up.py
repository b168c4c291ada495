"""Starting a cluster, and waiting for its nodes; when one does not come, why."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from cluster.backends.advice import causes
from cluster.backends.base import RUNNING, Kind
from cluster.backends.registry import open_kind
from cluster.commands import check
from cluster.core import secrets, token
from cluster.errors import BadLaunchFile, LaunchError, LaunchFailed

#: Seconds between two looks at the nodes.
POLL = 5.0


def up(path: Path, *, nodes: int | None, timeout: float, dry_run: bool) -> int:
    """Check, token, secrets, start, and wait for the nodes: 0 when they are all there, else 1 with the causes."""
    if check.run(path):
        raise BadLaunchFile(f"nothing was started: mend {path} first, as told above.")
    kind = open_kind(path, dry_run=dry_run)
    values = secrets.values(kind.file.secrets)
    if kind.carries_token:
        token.ensure(kind.shell)
    if not dry_run:
        _refuse_if_busy(kind)
    kind.prepare(values)
    kind.create()
    code = wait(kind, nodes or kind.wanted, timeout)
    if not code and not dry_run:
        kind.shell.say(f"next: {kind.next}")
    return code


def _refuse_if_busy(kind: Kind) -> None:
    """Starting again restarts Ray on the head, which would end what runs there."""
    try:
        running = [job for job in kind.jobs(shown=False, timeout=45) if job["status"] in RUNNING]
    except LaunchError:
        return  # no cluster, or a dead one: what `up` is for
    if running:
        names = ", ".join(job["run"] for job in running)
        raise LaunchFailed(
            f"the cluster is up and runs {names}: `up` would restart Ray and end it. Look: macdrop cluster status "
            f"{kind.file.path}; or end it: macdrop cluster down {kind.file.path}"
        )


def check_after(path: Path, *, nodes: int | None, timeout: float) -> int:
    kind = open_kind(path)
    if kind.carries_token:
        token.check()
    return wait(kind, nodes or kind.wanted, timeout)


def wait(kind: Kind, wanted: int, timeout: float) -> int:
    """Wait until so many nodes are alive, telling each change; 1 if they are not in time, after telling the causes."""
    if not wanted:
        return 0
    deadline, seen, told, known, problem = time.monotonic() + timeout, None, set(), None, ""
    first = True
    while True:
        try:
            answer = kind.ask("nodes", "log", shown=first)
            if kind.shell.dry_run:
                return 0
            known, problem = kind.told(answer, "nodes"), ""
            for cause in causes(answer.get("log", [])):
                if cause.splitlines()[0] not in told:
                    told.add(cause.splitlines()[0])
                    kind.shell.say(f"the autoscaler's log says: {cause}")
        except LaunchError as error:
            if str(error) != problem:
                kind.shell.say(f"the head: {error}\nwaiting for it (Ctrl-C ends the waiting, not the cluster)")
            problem = str(error)
        first = False
        alive = sorted(_shown(node) for node in known or [] if node["alive"])
        if not problem and alive != seen:
            kind.shell.say(f"{len(alive)} of {wanted} nodes: {', '.join(alive) or 'none yet'}")
            seen = alive
        if not problem and len(alive) >= wanted:
            return 0
        if time.monotonic() >= deadline:
            break
        time.sleep(min(POLL, max(0.0, deadline - time.monotonic())))
    kind.shell.say(f"{len(alive)} of {wanted} nodes came within {timeout:.0f} s. Looking for the cause ...")
    for cause in kind.why(known) or [
        "no cause was found in the logs; they are on the head: /tmp/ray/session_latest/logs"
    ]:
        kind.shell.say(f"cause: {cause}")
    kind.shell.say(f"to wait on: macdrop cluster check {kind.file.path} --after --nodes {wanted}")
    return 1


def _shown(node: dict[str, Any]) -> str:
    resources = " ".join(f"{count:g} {name}" for name, count in sorted(node["resources"].items()) if count)
    state = ", draining" if node["draining"] else ""
    return f"{node['address']} ({'head, ' if node['head'] else ''}{resources or 'no CPUs or GPUs'}{state})"
