"""Answers to the launcher on the head (by `ray exec` or `kubectl exec`): nodes, jobs, runs, the log of the autoscaler.

The answer is one line of JSON after `MARK`, because a remote login shell prints lines of its own around it.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cluster.remote import ray_internals

MARK = "macdrop-head: "
#: The last lines of each log file of the autoscaler.
LOG_LINES = 150


def report(topics: Iterable[str]) -> None:
    """Print the answer for these topics."""
    print(MARK + json.dumps(collect(topics)), flush=True)


def collect(topics: Iterable[str]) -> dict[str, Any]:
    """Answer topics of `TOPICS`; "problems" maps a topic without an answer to the reason."""
    found: dict[str, Any] = {"problems": {}}
    for topic in topics:
        try:
            found[topic] = TOPICS[topic]()
        except Exception as error:  # whatever Ray raises without a head, without a token, or in another version
            found["problems"][topic] = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    return found


def answer(text: str) -> dict[str, Any] | None:
    """Extract what `report` printed from the output of a remote command; None if it is not there."""
    for line in reversed(text.splitlines()):
        _, mark, found = line.partition(MARK)
        if mark:
            try:
                decoded: dict[str, Any] = json.loads(found)
                return decoded
            except ValueError:
                return None
    return None


def _nodes() -> list[dict[str, Any]]:
    nodes, draining = ray_internals.node_table()
    return [
        {
            "id": node["NodeID"],
            "address": node["NodeManagerAddress"],
            "host": node["NodeManagerHostname"],
            "alive": node["Alive"],
            "head": ray_internals.HEAD_RESOURCE in node["Resources"],
            "draining": node["NodeID"] in draining,
            "reason": node.get("DeathReasonMessage") or "",
            "resources": {k: v for k, v in node["Resources"].items() if k in ("CPU", "GPU")},
            "ray": version("ray"),
        }
        for node in nodes
    ]


def _jobs() -> list[dict[str, Any]]:
    """Submitted jobs, oldest first; times in ms since 1970."""
    from ray.job_submission import JobSubmissionClient

    jobs = [
        {
            "id": job.submission_id,
            "run": (job.metadata or {}).get("run", job.submission_id),
            "status": getattr(job.status, "value", str(job.status)),
            "start": job.start_time,
            "end": job.end_time,
            "message": job.message or "",
            "code": job.driver_exit_code,
        }
        for job in JobSubmissionClient().list_jobs()
        if job.submission_id
    ]
    return sorted(jobs, key=lambda job: job["start"] or 0)


def runs(storage: str | None = None) -> list[dict[str, Any]]:
    """The runs in the storage's folder `runs`, by name: status, times, number of trials per status."""
    storage = storage or os.environ.get("MACDROP_STORAGE")
    if not storage:
        raise ValueError("MACDROP_STORAGE is not set on the head")
    found = []
    for file in sorted(Path(storage, "runs").glob("*/run.json")):
        run = _json(file)
        trials = Counter(_json(trial).get("status", "?") for trial in file.parent.glob("trials/*/trial.json"))
        known = {key: run.get(key) for key in ("status", "created", "finished")}
        found.append(
            {"run": file.parent.name, "folder": str(file.parent), **known, "trials": dict(sorted(trials.items()))}
        )
    return found


def _log() -> list[str]:
    return ray_internals.autoscaler_log(LOG_LINES)


def _json(file: Path) -> dict[str, Any]:
    """A JSON object; a file that is unreadable or being replaced only counts as damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {"status": "damaged"}
    return found if isinstance(found, dict) else {"status": "damaged"}


TOPICS: dict[str, Callable[[], list[Any]]] = {"nodes": _nodes, "jobs": _jobs, "runs": runs, "log": _log}
