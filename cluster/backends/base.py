"""What the verbs need of a kind of cluster, and what all kinds with a Ray head share: questions and Ray jobs."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster.backends import ssh_hosts
from cluster.core.launch_file import ClusterFile
from cluster.core.shell import Done, Shell
from cluster.errors import LaunchFailed
from cluster.remote.head import answer

#: Seconds for an answer from the head: a remote login shell, Python and Ray have to start.
ANSWER = 120
#: What Ray answers to a job in the first seconds of its head; seconds until it is asked again, and how often.
NOT_YET, AGAIN, ATTEMPTS = "No available agent to submit job", 5.0, 12
#: Status of a job that has not ended.
RUNNING = ("PENDING", "RUNNING")
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
#: Lines that a remote terminal adds to what a command prints.
NOISE = re.compile(
    r"^(Fetched IP: |Shared connection to \S+ closed|bash: (cannot set terminal|no job control)|Loaded cached provider"
    r"|If you experience issues with the cloud|Tip: use `pip install|Connection to \S+ closed"
    r"|Defaulted container |Killed by signal 2)"
)
#: Ray's own stop signal would end a sweep without a word; by SIGINT it saves its state and says how to go on.
JOB_ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    "RAY_JOB_STOP_SIGNAL": "SIGINT",
    "RAY_JOB_STOP_WAIT_TIME_S": "60",
}
#: What a failed question to the head may have said -> the remedy.
UNANSWERED: dict[str, str] = {
    r"Head node of cluster .* not found|could not be found|no cluster|not found: .*raycluster": "the cluster is not up."
    " Start it: macdrop cluster up {file}",
    r"macdrop: (command )?not found": "the head has no `macdrop`: install it there (setup_commands, or the image)",
    r"No such command|No such option": "the head has an older macdrop than this machine: install the same there",
    r"[Uu]nauthenticated|[Aa]uthentication token|AuthenticationError": "the head's shell lacks the token that its Ray "
    "wants: ~/.ray/auth_token (file_mounts) and `export RAY_AUTH_MODE=token` in ~/.bashrc (setup_commands)",
    NOT_YET: "the part of Ray that starts jobs does not run on the head: most likely a process of another Ray holds "
    "its port there, 52365 (dashboard_agent.log in /tmp/ray/session_latest/logs). End that one, then: macdrop cluster "
    "up {file}",
    r"rsync: (command )?not found": "the head has no rsync: apt install rsync there",
    r"ray: (command )?not found": "the head has no `ray` on the PATH of a login shell (setup_commands, ~/.bashrc)",
}
#: What Ray said on the head -> the remedy.
REFUSED: dict[str, str] = {
    r"[Aa]uthenticat|[Uu]nauthorized|\btoken\b": "the head's shell lacks the token that its Ray wants: "
    "~/.ray/auth_token (file_mounts) and `export RAY_AUTH_MODE=token` in ~/.bashrc (setup_commands), as "
    "`macdrop cluster render` writes them",
    r"Could not find any running Ray|Failed to connect|ConnectionError|Connection refused|ConnectTimeout"
    r"|Unable to connect": "Ray does not run on the head. Start it again: macdrop cluster up {file}",
    r"No module named 'ray'": "the head has no Ray for the Python of its `macdrop` (setup_commands, or the image)",
}


@dataclass(frozen=True)
class Job:
    """A sweep to be run on the cluster. `recipe`: a shipped name, or a file of this machine."""

    run: str
    recipe: str | Path
    overrides: tuple[str, ...] = ()
    stamp: str = ""

    @property
    def id(self) -> str:
        return f"{self.run}-{self.stamp}"

    @property
    def copied(self) -> str:
        """Where a recipe file is put on the head, before it moves to the storage."""
        return f"/tmp/macdrop-recipe-{self.id}.yaml"


def stamp() -> str:
    return datetime.now(UTC).strftime("%Y%m%d-%H%M%S")


class Kind:
    """One cluster, by its file. Kinds say how to create and destroy it, reach its head, and copy to and fro."""

    #: Programs that this machine must have.
    tools: tuple[str, ...] = ()
    #: Whether this machine's token travels with the file.
    carries_token = False

    def __init__(self, file: ClusterFile, shell: Shell) -> None:
        self.file, self.shell = file, shell

    @property
    def wanted(self) -> int:
        """Nodes that must come, the head among them."""
        return 1 + self.file.workers[0]

    @property
    def next(self) -> str:
        """The command to type after `up`."""
        return f"macdrop cluster submit {self.file.path} demo"

    # --- what a kind defines ---

    def prepare(self, secrets: dict[str, str]) -> None:
        """Hand the secrets over before anything starts."""
        raise NotImplementedError

    def create(self) -> None:
        raise NotImplementedError

    def on_head(self, script: str) -> list[str]:
        """The command that runs shell text on the head."""
        raise NotImplementedError

    def put(self, source: Path, target: str) -> None:
        """Copy a file of this machine to the head."""
        raise NotImplementedError

    def get(self, source: str, target: Path, leave: Sequence[str]) -> None:
        """Copy what is in a folder of the head into a folder of this machine; `leave`: names to leave out."""
        raise NotImplementedError

    def destroy(self) -> list[str]:
        """Take everything down; what is left or could not be looked at, in words."""
        raise NotImplementedError

    def why(self, nodes: list[dict[str, Any]] | None) -> list[str]:
        """Causes for which nodes are missing, in words. nodes: those that the head knows, None without an answer."""
        raise NotImplementedError

    # --- questions ---

    def ask(self, *topics: str, shown: bool = True, timeout: float = ANSWER) -> dict[str, Any]:
        """Ask the head; see `launch_head`. A dry run answers with nothing.

        Raises:
            LaunchFailed: no answer; the message says why and what to do.
        """
        done = self.shell.ask(self.on_head(f"macdrop cluster on-head {' '.join(topics)}"), shown=shown, timeout=timeout)
        if self.shell.dry_run:
            return {"problems": {}, **{topic: [] for topic in topics}}
        found = answer(done.text)
        if found is None:
            raise LaunchFailed(self.unanswered(done))
        return found

    def unanswered(self, done: Done) -> str:
        for pattern, remedy in UNANSWERED.items():
            if re.search(pattern, done.text):
                return remedy.format(file=self.file.path) + "."
        for pattern, words in ssh_hosts.WORDS.items():
            if re.search(pattern, done.text):
                head = self.file.head_host or "the head"
                return f"{head} {words.format(host=head, user=self.file.ssh_user)}."
        return f"the head gave no answer (code {done.code}):\n{quiet(done.tail) or 'it said nothing'}"

    def told(self, found: dict[str, Any], topic: str) -> Any:
        """One topic of an answer. Raises LaunchFailed: the head could not tell, with the remedy."""
        if topic in found:
            return found[topic]
        problem = found["problems"].get(topic, "no answer")
        for pattern, remedy in REFUSED.items():
            if re.search(pattern, problem):
                raise LaunchFailed(f"{remedy.format(file=self.file.path)}.\n    {problem}")
        raise LaunchFailed(f"the head cannot tell its {topic}: {problem}")

    def nodes(self) -> list[dict[str, Any]]:
        return self.told(self.ask("nodes"), "nodes")

    def jobs(self, **more: Any) -> list[dict[str, Any]]:
        """Jobs, oldest first: id, run, status, code."""
        return self.told(self.ask("jobs", **more), "jobs")

    def runs(self) -> list[dict[str, Any]]:
        return self.told(self.ask("runs"), "runs")

    # --- jobs ---

    def submit(self, job: Job) -> str:
        """Start a job; its id. Raises LaunchFailed."""
        if isinstance(job.recipe, Path):
            self.put(job.recipe, job.copied)
        command = self.on_head(submission(job))
        for attempt in range(ATTEMPTS):
            done = self.shell.ask(command)
            if NOT_YET not in done.text or attempt + 1 == ATTEMPTS:
                break
            self.shell.say(f"Ray is still starting on the head; again in {AGAIN:.0f} s")
            time.sleep(AGAIN)
        if done.ok:
            if done.text:
                self.shell.say(quiet(done.text))
            return job.id
        raise LaunchFailed(f"the job of run {job.run!r} was not started: {self.unanswered(done)}")

    def follow(self, job: str, show: Callable[[str], None], *, go_on: bool = True) -> Done:
        """Print a job's log from its beginning, until the job ends (go_on) or the log does."""
        words = ["ray", "job", "logs", *(["--follow"] if go_on else []), job]
        return self.shell.follow(self.on_head(shlex.join(words)), quietly(show))

    def stop(self, job: str) -> None:
        self.shell.run(self.on_head(shlex.join(["ray", "job", "stop", job])))


def submission(job: Job) -> str:
    """Shell text for the head: the recipe to the storage, the job to Ray; resumed where the run's folder is there."""
    storage, run = '"$MACDROP_STORAGE"', f'"$MACDROP_STORAGE"/runs/{job.run}'
    steps = [
        'test -n "$MACDROP_STORAGE" || { echo "MACDROP_STORAGE is not set on the head (setup_commands)"; exit 3; }',
        f"mkdir -p {storage}/runs {storage}/recipes || exit 3",
    ]
    recipe = shlex.quote(str(job.recipe))
    if isinstance(job.recipe, Path):
        recipe = f"{storage}/recipes/{job.run}.yaml"
        steps.append(f"cp {job.copied} {recipe} || exit 3")
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


def quiet(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not NOISE.match(line))
