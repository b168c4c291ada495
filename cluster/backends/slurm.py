"""Jobs of Slurm, from a login node: the queue is the cluster, so there is nothing to bring up or take down but jobs."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cluster.backends.base import Job, Kind
from cluster.core import secrets
from cluster.core.shell import Done
from cluster.errors import BadLaunchFile, LaunchFailed
from cluster.remote import head

POLL = 5.0
#: Seconds until cancelled jobs must have left the queue: a minute to save their state, then Slurm's own time to kill.
GONE = 150
#: Slurm's words -> ours; what is not here waits or runs.
STATES = {
    "COMPLETED": "SUCCEEDED",
    **dict.fromkeys(("CANCELLED", "PREEMPTED", "REVOKED"), "STOPPED"),
    **dict.fromkeys(("FAILED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE"), "FAILED"),
}
MESSAGES = {
    "TIMEOUT": "its time limit was over (#SBATCH --time)",
    "OUT_OF_MEMORY": "Slurm killed it for its memory (#SBATCH --mem)",
    "NODE_FAIL": "a node failed",
}


class Slurm(Kind):
    tools = ("sbatch", "squeue", "scancel")
    carries_token = True

    @property
    def storage(self) -> Path:
        """The folder that login node and nodes share. Raises BadLaunchFile: the script names none."""
        if not self.file.storage:
            raise BadLaunchFile(f"{self.file.path} sets no MACDROP_STORAGE, the folder that all nodes share.")
        return Path(os.path.expandvars(self.file.storage)).expanduser()

    @property
    def wanted(self) -> int:
        return 0

    def prepare(self, values: dict[str, str]) -> None:
        self.shell.say("Slurm starts nodes with a job: there is nothing to bring up.")

    def create(self) -> None:
        self.shell.run(["sbatch", "--test-only", str(self.file.path)], check="Slurm refuses the script")

    def on_head(self, script: str) -> list[str]:
        return ["bash", "-c", script]

    def get(self, source: str, target: Path, leave: Sequence[str]) -> None:
        self.shell.need("rsync")
        command = ["rsync", "-a", *(f"--exclude={name}" for name in leave), f"{source}/", f"{target}/"]
        self.shell.run(command, check=f"{source} was not copied")

    def destroy(self) -> list[str]:
        """Jobs were cancelled; see that they leave the queue."""
        deadline = time.monotonic() + (0 if self.shell.dry_run else GONE)
        while left := [job["id"] for job in self._queue()]:
            if time.monotonic() > deadline:
                return [f"job {job} is still in the queue (scancel --signal=KILL {job})" for job in left]
            time.sleep(POLL)
        return []

    def why(self, nodes: list[dict[str, Any]] | None) -> list[str]:
        done = self.shell.ask(["squeue", "--me", "-h", "-o", "job %i (%j): %T, %r"], shown=False)
        return done.text.splitlines()

    # --- questions ---

    def ask(self, *topics: str, **more: Any) -> dict[str, Any]:
        found: dict[str, Any] = {"problems": {}}
        tellers = {"nodes": list, "log": list, "jobs": self._jobs, "runs": lambda: head.runs(str(self.storage))}
        for topic in topics:
            found[topic] = tellers[topic]()
        return found

    def _queue(self) -> list[dict[str, Any]]:
        """Our jobs that wait or run; those whose log is in our storage are ours."""
        done = self.shell.ask(["squeue", "--me", "-h", "-o", "%i|%T|%j"], timeout=60)
        if not done.ok:
            raise LaunchFailed(f"squeue ended with {done.code}: {done.tail}")
        rows = [line.split("|", 2) for line in done.text.splitlines() if line.count("|") >= 2]
        logs = {file.name for file in self.storage.glob("logs/*.log")} if rows else set()
        return [
            _job(number, run, "PENDING" if state == "PENDING" else "RUNNING")
            for number, state, run in rows
            if state not in STATES and (f"{run}-{number}.log" in logs or self._note(number).exists())
        ]

    def _note(self, number: str) -> Path:
        """Left beside the logs when a job is submitted: while it waits it has no log yet."""
        return self.storage / "logs" / f".{number}.submitted"

    def _jobs(self) -> list[dict[str, Any]]:
        """All jobs that left a log, oldest first."""
        queued = self._queue()
        known, ended = {job["id"] for job in queued}, []
        for file in sorted(self.storage.glob("logs/*.log"), key=lambda file: file.stat().st_mtime):
            run, _, number = file.stem.rpartition("-")
            if run and number not in known:
                ended.append(self._ended(_job(number, run, "ENDED")))
        return [*ended, *queued]

    def _ended(self, job: dict[str, Any]) -> dict[str, Any]:
        """How a job ended: from the accounting where there is one, else from what Slurm still remembers."""
        state, code = "", ""
        if shutil.which("sacct"):
            asked = ["sacct", "-n", "-X", "-P", "-j", job["id"], "-o", "State,ExitCode"]
            state, _, code = self.shell.ask(asked, shown=False, timeout=60).text.strip().partition("|")
        if not code:
            text = self.shell.ask(["scontrol", "-o", "show", "job", job["id"]], shown=False, timeout=60).text
            found = {key: value for key, value in re.findall(r"\b(JobState|ExitCode)=(\S+)", text)}
            state, code = found.get("JobState", ""), found.get("ExitCode", "")
        word = state.split(" ")[0].rstrip("+")
        number = code.partition(":")[0]
        return {**job, "status": STATES.get(word, "ENDED"), "message": MESSAGES.get(word, ""),
                "code": int(number) if number.isdigit() else None}  # fmt: skip

    # --- jobs ---

    def submit(self, job: Job) -> str:
        """Secrets are taken by sbatch from this environment, all of which it hands on by itself."""
        secrets.values(self.file.secrets)
        logs = self.storage / "logs"
        recipe = job.recipe
        if isinstance(recipe, Path):
            recipe = self.storage / "recipes" / f"{job.run}.yaml"
            self.shell.show(["cp", str(job.recipe), str(recipe)])
        if not self.shell.dry_run:
            logs.mkdir(parents=True, exist_ok=True)
            if isinstance(job.recipe, Path):
                recipe.parent.mkdir(parents=True, exist_ok=True)
                recipe.write_bytes(job.recipe.read_bytes())
        self.shell.environment["MACDROP_RUN"] = job.run
        command = ["sbatch", "--parsable", "--export=ALL", f"--job-name={job.run}", f"--output={logs}/%x-%j.log",
                   str(self.file.path), str(recipe), *job.overrides]  # fmt: skip
        done = self.shell.ask(command)
        number = done.text.strip().splitlines()[-1].partition(";")[0] if done.text.strip() else ""
        if self.shell.dry_run:
            return "JOB"
        if not done.ok or not number.isdigit():
            raise LaunchFailed(
                f"the job of run {job.run!r} was not taken: {done.tail or f'sbatch ended with {done.code}'}"
            )
        self._note(number).touch()
        return number

    def follow(self, job: str, show: Callable[[str], None], *, go_on: bool = True) -> Done:
        """Tail the job's log from its beginning, until the job has left the queue and the log says no more."""
        if self.shell.dry_run:
            return self.shell.follow(["tail", "-n", "+1", "-F", f"{self.storage}/logs/RUN-{job}.log"], show)
        waits = True
        while not (file := next(self.storage.glob(f"logs/*-{job}.log"), None)):
            if not self._in_queue(job) or not go_on:
                return Done(1, "")
            if waits:
                show(f"job {job} waits in the queue: {self._reason(job)}")
                waits = False
            time.sleep(POLL)
        self.shell.show(["tail", "-n", "+1", *(["-F"] if go_on else []), str(file)])
        with open(file, encoding="utf-8", errors="replace") as stream:
            ended, rest = not go_on, ""
            while True:
                while line := stream.readline():
                    rest += line
                    if rest.endswith("\n") or ended:
                        show(rest.rstrip("\n"))
                        rest = ""
                if ended:
                    return Done(0, "")
                ended = not self._in_queue(job)
                if not ended:
                    time.sleep(POLL)

    def stop(self, job: str) -> None:
        self.shell.run(["scancel", job])

    def _in_queue(self, job: str) -> bool:
        done = self.shell.ask(["squeue", "-h", "-j", job, "-o", "%T"], shown=False, timeout=60)
        return done.ok and bool(done.text.strip()) and done.text.split()[0] not in STATES

    def _reason(self, job: str) -> str:
        return self.shell.ask(["squeue", "-h", "-j", job, "-o", "%r"], shown=False, timeout=60).text.strip()


def _job(number: str, run: str, status: str) -> dict[str, Any]:
    return {"id": number, "run": run, "status": status, "message": "", "code": None}
