"""Copying the folder of a run from the storage of the cluster to this machine."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from cluster.backends.base import RUN_NAME
from cluster.backends.registry import open_kind
from cluster.errors import BadLaunchFile, LaunchFailed

#: Names within a run's folder that stay on the storage: large, or of no use elsewhere.
STAYS = ("/ray/", "checkpoints/", "*.tmp")


def fetch(path: Path, run: str, *, to: Path, everything: bool, dry_run: bool) -> int:
    """Copy a run's folder home; an earlier copy is brought up to date, another run of that name is not touched."""
    kind, target = open_kind(path, dry_run=dry_run), to / run
    if not RUN_NAME.fullmatch(run):
        raise BadLaunchFile(f"{run!r} is no name of a run.")
    runs = kind.runs()
    if dry_run:
        runs = [{"run": run, "folder": f"$MACDROP_STORAGE/runs/{run}", "created": None, "status": "done"}]
    found = next((other for other in runs if other["run"] == run), None)
    if found is None:
        raise LaunchFailed(f"no run {run!r} is on the storage. There: {', '.join(r['run'] for r in runs) or 'none'}.")
    if not dry_run:
        _refuse_another(target, found)
        target.mkdir(parents=True, exist_ok=True)
    kind.get(found["folder"], target, () if everything else STAYS)
    if dry_run:
        return 0
    if found["status"] == "running":
        kind.shell.say("the run is not over: fetch it again later, only what is new will be copied")
    kind.shell.say(f"{target}\nnext: macdrop report {shlex.quote(str(target))}")
    return 0


def _refuse_another(target: Path, found: dict[str, Any]) -> None:
    """Raises BadLaunchFile: the folder here holds something else than an earlier copy of this run."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    try:
        here = json.loads((target / "run.json").read_text(encoding="utf-8"))["created"]
    except (OSError, ValueError, KeyError, TypeError):
        here = None
    if here is None or here != found["created"]:
        what = f"another run, begun {here}" if here else "something that is no run"
        raise BadLaunchFile(f"{target} holds {what}; nothing was copied. Give another folder: --to FOLDER.")
