"""Jobs of Slurm, from a login node: the queue is the cluster, so only jobs are started and stopped."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cluster.backends.base import ANSWER, Backend, Job
from cluster.check import slurm as slurm_check
from cluster.check.finding import Finding
from cluster.core import secrets
from cluster.core.shell import Result
from cluster.core.slurm_file import SlurmFile
from cluster.errors import BadLaunchFile, LaunchFailed
from cluster.remote.head import runs

POLL = 5.0
#: Seconds until cancelled jobs must have left the queue: a minute to save their state, then Slurm's time to kill them.
GONE_TIMEOUT = 150
#: Slurm's states of ended jobs -> ours; all others are pending or running.
STATES = {
    "COMPLETED": "SUCCEEDED",
    **dict.fromkeys(("CANCELLED", "PREEMPTED", "REVOKED"), "STOPPED"),
    **dict.fromkeys(("FAILED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE"), "FAILED"),
}
MESSAGES = {
    "TIMEOUT": "it hit its time limit (#SBATCH --time)",
    "OUT_OF_MEMORY": "it exceeded its memory and was killed (#SBATCH --mem)",
    "NODE_FAIL": "a node failed",
}


class Slurm(Backend[SlurmFile]):
    """The queue, seen through one sbatch script."""

    file_type = SlurmFile
    file_format = "a Slurm script has #SBATCH lines"
    tools = ("sbatch", "squeue", "scancel")

    @classmethod
    def check(cls, file: SlurmFile, crd: Path | None = None) -> Iterator[Finding]:
        return slurm_check.findings(file)

    @property
    def sends_token(self) -> bool:
        return True

    @property
    def storage(self) -> Path:
        """The folder that login node and compute nodes share. Raises BadLaunchFile: the script does not name one."""
        if not self.file.storage:
            raise BadLaunchFile(f"{self.file.path} does not set MACDROP_STORAGE, the folder that all nodes share.")
        return Path(os.path.expandvars(self.file.storage)).expanduser()

    @property
    def expected_nodes(self) -> int:
        return 0

    def prepare(self, secrets_found: dict[str, str]) -> None:
        self.shell.say("Slurm allocates nodes when a job starts: there is nothing to bring up.")

    def create(self) -> None:
        self.shell.run(["sbatch", "--test-only", str(self.file.path)], failure="Slurm rejects the script")

    def on_head(self, script: str) -> list[str]:
        return ["bash", "-c", script]

    def put(self, source: Path, target: str) -> None:
        self.shell.show(["cp", str(source), target])
        if not self.shell.dry_run:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            Path(target).write_bytes(source.read_bytes())

    def get(self, source: str, target: Path, exclude: Sequence[str]) -> None:
        self.shell.need("rsync")
        command = ["rsync", "-a", *(f"--exclude={name}" for name in exclude), f"{source}/", f"{target}/"]
        self.shell.run(command, failure=f"{source} was not copied")

    def destroy(self) -> list[str]:
        """Wait until the cancelled jobs have left the queue."""
        deadline = time.monotonic() + (0 if self.shell.dry_run else GONE_TIMEOUT)
        while left := [job["id"] for job in self._queue()]:
            if time.monotonic() > deadline:
                return [f"job {job} is still in the queue (scancel --signal=KILL {job})" for job in left]
            time.sleep(POLL)
        return []

    def diagnose(self, nodes: list[dict[str, Any]] | None) -> list[str]:
        result = self.shell.capture(["squeue", "--me", "-h", "-o", "job %i (%j): %T, %r"], shown=False)
        return result.text.splitlines()

    # --- questions ---

    def ask(self, *topics: str, shown: bool = True, timeout: float = ANSWER) -> dict[str, Any]:
        """Answered here, from the queue and the shared storage."""
        answers: dict[str, Callable[[], list[Any]]] = {
            "nodes": list,
            "log": list,
            "jobs": self._jobs,
            "runs": lambda: runs(str(self.storage)),
        }
        return {"problems": {}, **{topic: answers[topic]() for topic in topics}}

    def _queue(self) -> list[dict[str, Any]]:
        """Our pending and running jobs: those whose log or note is in our storage."""
        result = self.shell.capture(["squeue", "--me", "-h", "-o", "%i|%T|%j"], timeout=60)
        if not result.ok:
            raise LaunchFailed(f"squeue failed with exit code {result.code}: {result.tail}")
        rows = [line.split("|", 2) for line in result.text.splitlines() if line.count("|") >= 2]
        logs = {file.name for file in self.storage.glob("logs/*.log")} if rows else set()
        return [
            _job(number, run, "PENDING" if state == "PENDING" else "RUNNING")
            for number, state, run in rows
            if state not in STATES and (f"{run}-{number}.log" in logs or self._note(number).exists())
        ]

    def _note(self, number: str) -> Path:
        """A file next to the logs, created at submission: a pending job has no log yet."""
        return self.storage / "logs" / f".{number}.submitted"

    def _jobs(self) -> list[dict[str, Any]]:
        """All jobs that have a log, oldest first, then the queue."""
        queued = self._queue()
        known, ended = {job["id"] for job in queued}, []
        for file in sorted(self.storage.glob("logs/*.log"), key=lambda file: file.stat().st_mtime):
            run, _, number = file.stem.rpartition("-")
            if run and number not in known:
                ended.append(self._ended(_job(number, run, "ENDED")))
        return [*ended, *queued]

    def _ended(self, job: dict[str, Any]) -> dict[str, Any]:
        """The outcome of a job: from the accounting if there is one, else from what Slurm still remembers."""
        state, code = "", ""
        if shutil.which("sacct"):
            asked = ["sacct", "-n", "-X", "-P", "-j", job["id"], "-o", "State,ExitCode"]
            state, _, code = self.shell.capture(asked, shown=False, timeout=60).text.strip().partition("|")
        if not code:
            text = self.shell.capture(["scontrol", "-o", "show", "job", job["id"]], shown=False, timeout=60).text
            found = {key: value for key, value in re.findall(r"\b(JobState|ExitCode)=(\S+)", text)}
            state, code = found.get("JobState", ""), found.get("ExitCode", "")
        word = state.split(" ")[0].rstrip("+")
        number = code.partition(":")[0]
        return {
            **job,
            "status": STATES.get(word, "ENDED"),
            "message": MESSAGES.get(word, ""),
            "code": int(number) if number.isdigit() else None,
        }

    # --- jobs ---

    def submit(self, job: Job) -> str:
        """Submit; sbatch passes on this environment, secrets included."""
        secrets.values(self.file.secrets)
        logs = self.storage / "logs"
        recipe = str(job.recipe)
        if not self.shell.dry_run:
            logs.mkdir(parents=True, exist_ok=True)
        if isinstance(job.recipe, Path):
            recipe = str(self.storage / "recipes" / f"{job.run}.yaml")
            self.put(job.recipe, recipe)
        self.shell.environment["MACDROP_RUN"] = job.run
        options = ["--parsable", "--export=ALL", f"--job-name={job.run}", f"--output={logs}/%x-%j.log"]
        command = ["sbatch", *options, str(self.file.path), recipe, *job.overrides]
        result = self.shell.capture(command)
        number = result.text.strip().splitlines()[-1].partition(";")[0] if result.text.strip() else ""
        if self.shell.dry_run:
            return "JOB"
        if not result.ok or not number.isdigit():
            reason = result.tail or f"sbatch failed with exit code {result.code}"
            raise LaunchFailed(f"the job of run {job.run!r} was not accepted: {reason}")
        self._note(number).touch()
        return number

    def follow(self, job: str, show: Callable[[str], None], *, until_ended: bool = True) -> Result:
        """Print the log of a job from its beginning, until the job has left the queue and the log has ended."""
        if self.shell.dry_run:
            return self.shell.follow(["tail", "-n", "+1", "-F", f"{self.storage}/logs/RUN-{job}.log"], show)
        waits = True
        while not (file := next(self.storage.glob(f"logs/*-{job}.log"), None)):
            if not self._in_queue(job) or not until_ended:
                return Result(1, "")
            if waits:
                show(f"job {job} is waiting in the queue: {self._reason(job)}")
                waits = False
            time.sleep(POLL)
        self.shell.show(["tail", "-n", "+1", *(["-F"] if until_ended else []), str(file)])
        with open(file, encoding="utf-8", errors="replace") as stream:
            ended, rest = not until_ended, ""
            while True:
                while line := stream.readline():
                    rest += line
                    if rest.endswith("\n") or ended:
                        show(rest.rstrip("\n"))
                        rest = ""
                if ended:
                    return Result(0, "")
                ended = not self._in_queue(job)
                if not ended:
                    time.sleep(POLL)

    def stop(self, job: str) -> None:
        self.shell.run(["scancel", job])

    def _in_queue(self, job: str) -> bool:
        result = self.shell.capture(["squeue", "-h", "-j", job, "-o", "%T"], shown=False, timeout=60)
        return result.ok and bool(result.text.strip()) and result.text.split()[0] not in STATES

    def _reason(self, job: str) -> str:
        return self.shell.capture(["squeue", "-h", "-j", job, "-o", "%r"], shown=False, timeout=60).text.strip()


def _job(number: str, run: str, status: str) -> dict[str, Any]:
    return {"id": number, "run": run, "status": status, "message": "", "code": None}
