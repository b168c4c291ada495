"""Managed jobs of SkyPilot: one task YAML is one sweep and the machines for it, on whichever cloud has them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from cluster.backends.base import ANSWER, Backend, Job
from cluster.check import skypilot as skypilot_check
from cluster.check.finding import Finding
from cluster.core.shell import Result
from cluster.core.skypilot_file import SkyPilotFile
from cluster.errors import BadLaunchFile, LaunchFailed

#: SkyPilot's states of managed jobs that have ended -> ours; FAILED_... are failures, all others pending or running.
STATES = {"SUCCEEDED": "SUCCEEDED", "CANCELLED": "STOPPED", "CANCELLING": "STOPPED", "PENDING": "PENDING"}


class SkyPilot(Backend[SkyPilotFile]):
    """A managed job: SkyPilot starts its machines, recovers them, and removes them when the sweep has ended."""

    file_type = SkyPilotFile
    file_format = "a SkyPilot task has `resources:` and `run:`"
    tools = ("sky",)

    @classmethod
    def check(cls, file: SkyPilotFile, crd: Path | None = None) -> Iterator[Finding]:
        return skypilot_check.findings(file)

    @property
    def sends_token(self) -> bool:
        return True

    @property
    def expected_nodes(self) -> int:
        """SkyPilot waits for the machines itself."""
        return 0

    @property
    def next_command(self) -> str:
        return f"macdrop cluster logs {self.file.quoted} --follow"

    def prepare(self, secrets_found: dict[str, str]) -> None:
        """Secrets go to SkyPilot by name: `sky` reads the values from the environment, which it shares with us."""

    def create(self) -> None:
        words = [word for name in self.file.secrets for word in ("--secret", name)]
        command = ["sky", "jobs", "launch", "--yes", "--detach-run", "--name", self.file.name, *words]
        self.shell.run([*command, str(self.file.path)], failure="the managed job was not started")

    def destroy(self) -> list[str]:
        result = self.shell.run(["sky", "jobs", "cancel", "--yes", "--name", self.file.name])
        return [] if result.ok else [f"the managed job {self.file.name!r} may still run: see `sky jobs queue`"]

    def diagnose(self, nodes: list[dict[str, Any]] | None) -> list[str]:
        return []

    # --- jobs: there is one, which has the name of the task ---

    def ask(self, *topics: str, shown: bool = True, timeout: float = ANSWER) -> dict[str, Any]:
        """Jobs alone are known from here, and of them the one of this file, whatever its state."""
        answers = {"nodes": "sky jobs queue", "runs": "sky jobs queue", "log": "sky jobs logs --controller"}
        problems = {topic: f"SkyPilot shows it: {command}" for topic, command in answers.items()}
        if "jobs" not in topics:
            return {"problems": problems}
        result = self.shell.capture(["sky", "jobs", "queue", "--output", "json"], shown=shown, timeout=timeout)
        if not self.shell.dry_run and not result.ok:
            raise LaunchFailed(f"`sky jobs queue` failed with exit code {result.code}: {result.tail}")
        return {"problems": problems, "jobs": jobs_of(result.text, self.file.name)}

    def submit(self, job: Job) -> NoReturn:
        """Refused: the task names its sweep."""
        raise BadLaunchFile(
            f"{self.file.path} is one sweep, which `up` starts: macdrop cluster up {self.file.quoted}\nFor another "
            "recipe, render another file with recipe= and run=."
        )

    def follow(self, job: str, show: Callable[[str], None], *, until_ended: bool = True) -> Result:
        mode = "--follow" if until_ended else "--no-follow"
        return self.shell.follow(["sky", "jobs", "logs", mode, "--name", self.file.name], show)

    def stop(self, job: str) -> None:
        """Nothing: `destroy` cancels it."""

    # --- there is no host to reach: machines come and go ---

    def runs(self) -> NoReturn:
        self._unreachable()

    def on_head(self, script: str) -> list[str]:
        self._unreachable()

    def put(self, source: Path, target: str) -> None:
        self._unreachable()

    def get(self, source: str, target: Path, exclude: Sequence[str]) -> None:
        self._unreachable()

    def _unreachable(self) -> NoReturn:
        raise BadLaunchFile(
            f"{shlex.quote(self.file.name)} is a managed job, whose machines come and go. Its results are where "
            "sync_to says: macdrop sweep --resume output_dir=FOLDER sync_to=... brings them here."
        )


def jobs_of(text: str, name: str) -> list[dict[str, Any]]:
    """Return the managed jobs of a name in what `sky jobs queue --output json` printed, oldest first."""
    found = re.search(r"^\[.*^\]|^\[\]", text, re.MULTILINE | re.DOTALL)
    try:
        records = json.loads(found[0]) if found else []
    except ValueError:
        records = []
    ours = [record for record in records if isinstance(record, dict) and record.get("job_name") == name]
    return [_job(record, name) for record in sorted(ours, key=lambda record: record.get("job_id") or 0)]


def _job(record: dict[str, Any], name: str) -> dict[str, Any]:
    state = str(record.get("status"))
    status = "FAILED" if state.startswith("FAILED") else STATES.get(state, "RUNNING")
    message = str(record.get("failure_reason") or "")
    return {"id": str(record.get("job_id")), "run": name, "status": status, "code": None, "message": message}
