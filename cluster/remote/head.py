"""What the launcher asks on the head (by `ray exec` or `kubectl exec`): nodes, jobs, runs, the autoscaler's log.

The answer is one line of JSON behind `MARK`, because a remote login shell prints lines of its own around it.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MARK = "macdrop-head: "
#: The last lines of each file of the autoscaler.
LOG_LINES = 150
LOG_FILES = ("monitor.log", "monitor.out", "monitor.err")


def tell(what: Iterable[str]) -> None:
    """Print what is asked for; what cannot be told is an entry of `problems` and not an error."""
    print(MARK + json.dumps(collect(what)), flush=True)


def collect(what: Iterable[str]) -> dict[str, Any]:
    """topic -> answer, for topics of `TOPICS`; "problems" has topic -> why there is no answer."""
    found: dict[str, Any] = {"problems": {}}
    for topic in what:
        try:
            found[topic] = TOPICS[topic]()
        except Exception as error:  # whatever Ray raises where no head, no token or another version is
            found["problems"][topic] = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    return found


def answer(text: str) -> dict[str, Any] | None:
    """What `tell` printed, out of all that a remote command printed; None where it did not come to that."""
    for line in reversed(text.splitlines()):
        _, mark, told = line.partition(MARK)
        if mark:
            try:
                return json.loads(told)
            except ValueError:
                return None
    return None


def address(given: str | None = None) -> str:
    """host:port of the head of the Ray that runs on this machine. Raises ConnectionError: none does, or several."""
    from ray._private.services import canonicalize_bootstrap_address_or_die

    if given is None and os.environ.get("RAY_ADDRESS", "").startswith("http"):
        del os.environ["RAY_ADDRESS"]  # meant for job commands
    return canonicalize_bootstrap_address_or_die(given)


def _nodes() -> list[dict[str, Any]]:
    """All nodes that the head has seen."""
    import ray
    from ray._private.state import GlobalState
    from ray._raylet import GcsClientOptions

    state = GlobalState()
    state._initialize_global_state(
        GcsClientOptions.create(address(), None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False)
    )
    draining = state.get_draining_nodes()
    return [
        {
            "id": node["NodeID"],
            "address": node["NodeManagerAddress"],
            "host": node["NodeManagerHostname"],
            "alive": node["Alive"],
            "head": "node:__internal_head__" in node["Resources"],
            "draining": node["NodeID"] in draining,
            "reason": node.get("DeathReasonMessage") or "",
            "resources": {k: v for k, v in node["Resources"].items() if k in ("CPU", "GPU")},
            "ray": ray.__version__,
        }
        for node in state.node_table()
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
    """The runs in the storage's folder `runs`, by name: status, times, trials by status."""
    storage = storage or os.environ.get("MACDROP_STORAGE")
    if not storage:
        raise ValueError("MACDROP_STORAGE is not set on the head")
    found = []
    for file in sorted(Path(storage, "runs").glob("*/run.json")):
        run = _json(file)
        trials = Counter(_json(trial).get("status", "?") for trial in file.parent.glob("trials/*/trial.json"))
        told = {key: run.get(key) for key in ("status", "created", "finished")}
        found.append(
            {"run": file.parent.name, "folder": str(file.parent), **told, "trials": dict(sorted(trials.items()))}
        )
    return found


def _log() -> list[str]:
    """The end of the autoscaler's log, of its newest session."""
    from ray._common.utils import get_ray_temp_dir

    folder = Path(get_ray_temp_dir(), "session_latest", "logs")
    lines: list[str] = []
    for name in LOG_FILES:
        if (folder / name).is_file():
            lines += (folder / name).read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
    return lines


def _json(file: Path) -> dict[str, Any]:
    """A file that is being replaced or damaged counts as empty: this only tells."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {"status": "damaged"}
    return found if isinstance(found, dict) else {"status": "damaged"}


TOPICS = {"nodes": _nodes, "jobs": _jobs, "runs": runs, "log": _log}
