"""`macdrop cluster fetch`: copying the folder of a run from the storage to this machine."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from cluster.backends.base import RUN_NAME
from cluster.backends.registry import open_backend
from cluster.errors import BadLaunchFile, LaunchFailed

#: Names within the folder of a run that are not copied: large, or useless elsewhere.
EXCLUDED = ("/ray/", "checkpoints/", "*.tmp")


def fetch(path: Path, run: str, *, to: Path, everything: bool, dry_run: bool) -> int:
    """Copy the folder of a run here. An earlier copy is updated; another run of that name is never touched."""
    backend, target = open_backend(path, dry_run=dry_run), to / run
    if not RUN_NAME.fullmatch(run):
        raise BadLaunchFile(f"{run!r} is not a valid run name.")
    runs = backend.runs()
    if dry_run:
        runs = [{"run": run, "folder": f"$MACDROP_STORAGE/runs/{run}", "created": None, "status": "done"}]
    found = next((other for other in runs if other["run"] == run), None)
    if found is None:
        raise LaunchFailed(
            f"no run {run!r} is on the storage. Known runs: {', '.join(r['run'] for r in runs) or 'none'}."
        )
    if not dry_run:
        _refuse_another(target, found)
        target.mkdir(parents=True, exist_ok=True)
    backend.get(found["folder"], target, () if everything else EXCLUDED)
    if dry_run:
        return 0
    if found["status"] == "running":
        backend.shell.say("the run has not ended: fetch it again later, and only what is new will be copied")
    backend.shell.say(f"{target}\nnext: macdrop report {shlex.quote(str(target))}")
    return 0


def _refuse_another(target: Path, found: dict[str, Any]) -> None:
    """Check that a folder here is an earlier copy of this run, or empty. Raises BadLaunchFile."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    try:
        here = json.loads((target / "run.json").read_text(encoding="utf-8"))["created"]
    except (OSError, ValueError, KeyError, TypeError):
        here = None
    if here is None or here != found["created"]:
        what = f"another run, started {here}" if here else "something that is not a run"
        raise BadLaunchFile(f"{target} holds {what}; nothing was copied. Use another folder: --to FOLDER.")
