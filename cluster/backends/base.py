"""The interface of a backend, and what all backends with a Ray head share: questions to the head, and Ray jobs."""

from __future__ import annotations

import json
import os
import re
import shlex
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from cluster.backends import advice
from cluster.backends.advice import Origin
from cluster.check.finding import Finding
from cluster.core.launch_file import LaunchFile
from cluster.core.shell import Result, Shell
from cluster.errors import LaunchFailed
from cluster.remote.head import answer

#: Seconds for an answer from the head: a remote login shell, Python and Ray have to start.
ANSWER = 120.0
#: Seconds between attempts to submit a job to a head that is still starting, and how many.
RETRY, ATTEMPTS = 5.0, 12
#: Status of a job that has not ended.
RUNNING = ("PENDING", "RUNNING")
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
#: Lines that a remote terminal adds to the output of a command.
NOISE = re.compile(
    r"^(Fetched IP: |Shared connection to \S+ closed|bash: (cannot set terminal|no job control)|Loaded cached provider"
    r"|If you experience issues with the cloud|Tip: use `pip install|Connection to \S+ closed"
    r"|Defaulted container |Killed by signal 2)"
)
#: Ray stops jobs with SIGTERM, which ends a sweep at once; on SIGINT it saves its state and says how to resume.
JOB_ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    "RAY_JOB_STOP_SIGNAL": "SIGINT",
    "RAY_JOB_STOP_WAIT_TIME_S": "60",
}

#: Shell text that exempts a machine's own addresses from the proxy of its site, which cannot reach them.
DIRECT = (
    'own="127.0.0.1,localhost,::1,$(hostname -I 2>/dev/null | tr " " ",")"; '
    'export no_proxy="$own$no_proxy" NO_PROXY="$own$NO_PROXY"'
)

FileT = TypeVar("FileT", bound=LaunchFile)


@dataclass(frozen=True)
class Job:
    """A sweep to run on the cluster. `recipe`: a shipped name, or a file of this machine."""

    run: str
    recipe: str | Path
    overrides: tuple[str, ...] = ()
    stamp: str = ""

    @property
    def id(self) -> str:
        return f"{self.run}-{self.stamp}"

    @property
    def upload(self) -> str:
        """The path of a recipe file on the head, before it moves to the storage."""
        return f"/tmp/macdrop-recipe-{self.id}.yaml"


def stamp() -> str:
    return datetime.now(UTC).strftime("%Y%m%d-%H%M%S")


class Backend(ABC, Generic[FileT]):
    """One cluster, given by its launch file: how to check, create, reach and destroy it."""

    #: The launch files it takes, and how to recognize one.
    file_type: ClassVar[type[LaunchFile]]
    file_format: ClassVar[str]
    #: Programs that this machine must have.
    tools: ClassVar[tuple[str, ...]] = ()

    def __init__(self, file: FileT, shell: Shell) -> None:
        self.file, self.shell = file, shell

    # --- what a backend defines ---

    @classmethod
    @abstractmethod
    def check(cls, file: FileT, crd: Path | None = None) -> Iterator[Finding]:
        """Offline findings about a launch file. `crd`: folder with KubeRay's resource definitions."""

    @abstractmethod
    def prepare(self, secrets_found: dict[str, str]) -> None:
        """Hand over the secrets before anything starts."""

    @abstractmethod
    def create(self) -> None:
        """Start the cluster. Raises LaunchFailed."""

    @abstractmethod
    def on_head(self, script: str) -> list[str]:
        """The command that runs shell text on the head."""

    @abstractmethod
    def put(self, source: Path, target: str) -> None:
        """Copy a file of this machine to the head."""

    @abstractmethod
    def get(self, source: str, target: Path, exclude: Sequence[str]) -> None:
        """Copy the contents of a folder on the head into a folder of this machine, without the names in `exclude`."""

    @abstractmethod
    def destroy(self) -> list[str]:
        """Take everything down; return what is left or could not be verified."""

    @abstractmethod
    def diagnose(self, nodes: list[dict[str, Any]] | None) -> list[str]:
        """Causes of missing nodes. nodes: those that the head knows, None if it did not answer."""

    # --- what a backend may change ---

    @property
    def sends_token(self) -> bool:
        """True if the token of this machine is copied to the cluster."""
        return False

    @property
    def expected_nodes(self) -> int:
        """Nodes that must come up, including the head."""
        return 1 + self.file.workers[0]

    @property
    def next_command(self) -> str:
        """The command to type after `up`."""
        return f"macdrop cluster submit {self.file.quoted} demo"

    @property
    def head_name(self) -> str:
        return "the head"

    @property
    def login(self) -> str:
        """The user who logs in to hosts by ssh."""
        return os.environ.get("USER", "root")

    # --- questions ---

    def directly(self, script: str) -> list[str]:
        """The command that runs shell text on the head, whose requests to itself go through no proxy."""
        return self.on_head(f"{DIRECT}; {script}")

    def ask(self, *topics: str, shown: bool = True, timeout: float = ANSWER) -> dict[str, Any]:
        """Ask the head; see `cluster.remote.head`. A dry run gets empty answers.

        Raises:
            LaunchFailed: no answer; the message has the cause and the remedy.
        """
        script = f"macdrop cluster on-head {' '.join(topics)}"
        result = self.shell.capture(self.directly(script), shown=shown, timeout=timeout)
        if self.shell.dry_run:
            return {"problems": {}, **{topic: [] for topic in topics}}
        found = answer(result.text)
        if found is None:
            raise LaunchFailed(self.explain(result))
        return found

    def explain(self, result: Result) -> str:
        """The reason why a command on the head gave no answer."""
        remedy = advice.find(Origin.HEAD, result.text, file=self.file.quoted)
        remedy = remedy or advice.find(Origin.SSH, result.text, host=self.head_name, user=self.login)
        output = without_noise(result.tail) or "no output"
        return remedy or f"the head gave no answer (exit code {result.code}):\n{output}"

    def topic(self, found: dict[str, Any], topic: str) -> Any:
        """One topic of an answer. Raises LaunchFailed: the head could not answer it; the message has the remedy."""
        if topic in found:
            return found[topic]
        problem = found["problems"].get(topic, "no answer")
        remedy = advice.find(Origin.RAY, problem, file=self.file.quoted)
        raise LaunchFailed(f"{remedy}\n    {problem}" if remedy else f"the head cannot list its {topic}: {problem}")

    def jobs(self, *, shown: bool = True, timeout: float = ANSWER) -> list[dict[str, Any]]:
        """Jobs, oldest first: id, run, status, code."""
        found: list[dict[str, Any]] = self.topic(self.ask("jobs", shown=shown, timeout=timeout), "jobs")
        return found

    def runs(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.topic(self.ask("runs"), "runs")
        return found

    # --- jobs ---

    def submit(self, job: Job) -> str:
        """Start a job and return its id. Raises LaunchFailed."""
        if isinstance(job.recipe, Path):
            self.put(job.recipe, job.upload)
        command = self.directly(submission(job))
        for attempt in range(ATTEMPTS):
            result = self.shell.capture(command)
            if advice.NO_AGENT not in result.text or attempt + 1 == ATTEMPTS:
                break
            self.shell.say(f"Ray is still starting on the head; retrying in {RETRY:.0f} s")
            time.sleep(RETRY)
        if not result.ok:
            raise LaunchFailed(f"the job of run {job.run!r} was not started: {self.explain(result)}")
        if result.text:
            self.shell.say(without_noise(result.text))
        return job.id

    def follow(self, job: str, show: Callable[[str], None], *, until_ended: bool = True) -> Result:
        """Print the log of a job from its beginning: until the job ends, or what there is now."""
        words = ["ray", "job", "logs", *(["--follow"] if until_ended else []), job]
        return self.shell.follow(self.directly(shlex.join(words)), quietly(show))

    def stop(self, job: str) -> None:
        self.shell.run(self.directly(shlex.join(["ray", "job", "stop", job])))


def submission(job: Job) -> str:
    """Shell text for the head: copies the recipe to the storage, submits the job; resumes a run that has a folder."""
    storage, run = '"$MACDROP_STORAGE"', f'"$MACDROP_STORAGE"/runs/{job.run}'
    steps = [
        'test -n "$MACDROP_STORAGE" || { echo "MACDROP_STORAGE is not set on the head (setup_commands)"; exit 3; }',
        f"mkdir -p {storage}/runs {storage}/recipes || exit 3",
    ]
    recipe = shlex.quote(str(job.recipe))
    if isinstance(job.recipe, Path):
        recipe = f"{storage}/recipes/{job.run}.yaml"
        steps.append(f"cp {job.upload} {recipe} || exit 3")
    steps.append(f"resume=; test -e {run}/run.json && resume=--resume")
    options = {
        "--submission-id": job.id,
        "--metadata-json": json.dumps({"run": job.run}),
        "--runtime-env-json": json.dumps({"env_vars": JOB_ENVIRONMENT}),
    }
    given = shlex.join([word for option in options.items() for word in option])
    keys = " ".join([*map(shlex.quote, job.overrides), "ray.address=auto", f"output_dir={run}"])
    steps.append(f"ray job submit --no-wait {given} -- macdrop sweep {recipe} {keys} $resume")
    return "; ".join(steps)


def quietly(show: Callable[[str], None]) -> Callable[[str], None]:
    """`show` without the lines that a remote terminal adds."""
    return lambda line: None if NOISE.match(line) else show(line)


def without_noise(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not NOISE.match(line))
