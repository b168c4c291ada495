"""The verbs on a cluster that is up: submit, status, logs, fetch, down. Each answers with its exit code."""

from __future__ import annotations

import json
import os
import re
import shlex
import time
from pathlib import Path
from typing import Any

from cluster import files, token
from cluster.errors import BadLaunchFile, LaunchError, LaunchFailed, Missing
from cluster.launch_kind import Job, Kind, stamp
from cluster.launch_shell import Shell, confirmed, table

#: Seconds before a dropped line is taken up again, and how often. Doubled each time: a laptop may be away for a minute.
AGAIN, ATTEMPTS = 3.0, 5
#: Names within a run's folder that stay on the storage: large, or of no use elsewhere.
STAYS = ("/ray/", "checkpoints/", "*.tmp")
RUNNING = ("PENDING", "RUNNING")
INTERRUPTED = 130
_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
#: Keys that submit gives itself -> what to give instead.
OURS = {
    "output_dir": "--name NAME (the folder is runs/NAME on the storage)",
    "ray.address": "nothing: it is the cluster",
}


def open_kind(path: Path, *, dry_run: bool = False) -> Kind:
    """The cluster of a launch file. Raises BadLaunchFile, or Missing where this machine lacks a tool for it."""
    from cluster.launch_kube import Kube
    from cluster.launch_ray import Ray
    from cluster.launch_slurm import Slurm

    file = files.load(path)
    known = _readable(file.secrets)
    shell = Shell(dry_run, environment=dict(token.ENVIRONMENT), hidden=known)
    kind = {files.RAY: Ray, files.KUBERAY: Kube, files.SLURM: Slurm}[file.kind](file, shell)
    shell.need(*kind.tools)
    return kind


def _readable(names: tuple[str, ...]) -> tuple[str, ...]:
    """Values that no printed line may hold: the secrets that are set here, and the token."""
    found = [os.environ.get(name, "") for name in names]
    try:
        found.append(token.path().read_text(encoding="utf-8").strip())
    except OSError:
        pass
    return tuple(value for value in found if value)


# --- submit, logs ---


def submit(path: Path, recipe: str, overrides: list[str], *, name: str | None, follow: bool, dry_run: bool) -> int:
    """Start a sweep and follow its log: the job's exit code, or 0 at once without `follow`."""
    kind = open_kind(path, dry_run=dry_run)
    job = _job(recipe, overrides, name)
    for name in _stays_here(job):
        kind.shell.say(f"note: {name} is a file of this machine. The sweep looks for it on the cluster: copy it to the "
                       f"storage, {kind.file.storage}, and give that path.")  # fmt: skip
    if not dry_run:
        running = [other for other in kind.jobs() if other["run"] == job.run and other["status"] in RUNNING]
        if running:
            raise LaunchFailed(
                f"run {job.run!r} is running as job {running[-1]['id']}. Look: {_look(kind, job.run)}; or give another "
                "--name."
            )
    started = kind.submit(job)
    if dry_run:
        if follow:
            kind.follow(started, kind.shell.say)
        return 0
    kind.shell.say(f"run {job.run}, job {started}. It goes on without this machine; to look: {_look(kind, job.run)}")
    return _follow(kind, job.run, started) if follow else 0


def _job(recipe: str, overrides: list[str], name: str | None) -> Job:
    """Raises BadLaunchFile: no such recipe, no key=value, a key that is not the user's here, or no name of a run."""
    file = Path(recipe).expanduser()
    if file.suffix in (".yaml", ".yml") or file.exists():
        if not file.is_file():
            raise BadLaunchFile(
                f"recipe {recipe!r} is not there. Give a YAML file, or a name of `macdrop sweep --recipes`."
            )
    elif not _RUN.fullmatch(recipe) or "=" in recipe:
        raise BadLaunchFile(f"recipe {recipe!r} is neither a file nor a name of `macdrop sweep --recipes`.")
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals:
            raise BadLaunchFile(f"{override!r} is no key=value.")
        if key in OURS:
            raise BadLaunchFile(f"{key} is given by submit itself. Give instead {OURS[key]}.")
    run = name or file.stem
    if not _RUN.fullmatch(run):
        raise BadLaunchFile(
            f"--name {run!r}: a run's name has letters, digits, dots, dashes and underscores, at most 63."
        )
    return Job(run, file if file.is_file() else recipe, tuple(overrides), stamp())


def _stays_here(job: Job) -> list[str]:
    """Files of this machine that recipe and overrides name; a copied recipe does not bring them along."""
    import yaml

    waiting: list[Any] = [override.partition("=")[2] for override in job.overrides]
    if isinstance(job.recipe, Path):
        try:
            waiting.append(yaml.safe_load(job.recipe.read_text(encoding="utf-8")))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise BadLaunchFile(f"recipe {job.recipe}: {' '.join(str(error).split())}") from None
    found = []
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict | list):
            waiting += value.values() if isinstance(value, dict) else value
        elif isinstance(value, str) and re.search(r"\.\w+$", value) and Path(value).is_file():
            found.append(value)
    return sorted(set(found))


def _look(kind: Kind, run: str) -> str:
    return f"macdrop cluster logs {kind.file.path} {run} --follow"


def _follow(kind: Kind, run: str, job: str) -> int:
    """Print a job's log until it ends, over dropped lines; the exit code of the job."""
    shell, shown = kind.shell, 0
    for attempt in range(ATTEMPTS):
        passed = 0

        def show(line: str) -> None:
            nonlocal passed, shown
            passed += 1
            if passed > shown:  # a log that is followed again comes from its beginning
                shown = passed
                shell.say(line)

        try:
            kind.follow(job, show)
            found = next((other for other in kind.jobs(shown=False) if other["id"] == job), None)
        except KeyboardInterrupt:
            shell.say(f"\nThe job goes on. To look again: {_look(kind, run)}")
            return INTERRUPTED
        except LaunchError as error:
            found = None
            shell.say(f"the line to the cluster dropped: {error}")
        if found and found["status"] not in RUNNING:
            return _ended(kind, run, found)
        if attempt + 1 < ATTEMPTS:
            shell.say(f"the log broke off; asking again ({attempt + 1} of {ATTEMPTS - 1})")
            time.sleep(AGAIN * 2**attempt)
    shell.say(f"The job may well go on. To look again: {_look(kind, run)}")
    return Missing.exit_code


def _ended(kind: Kind, run: str, job: dict[str, Any]) -> int:
    path = kind.file.path
    if job["status"] == "SUCCEEDED":
        kind.shell.say(f"run {run} is done. Its results: macdrop cluster fetch {path} {run}")
        return 0
    kind.shell.say(f"job {job['id']}: {job['status'].lower()}. {job['message']}".rstrip())
    kind.shell.say(f"to go on with it: the same `macdrop cluster submit {path} ... --name {run}` again")
    return job["code"] or (INTERRUPTED if job["status"] == "STOPPED" else 1)


def logs(path: Path, run: str | None, *, follow: bool, dry_run: bool) -> int:
    kind = open_kind(path, dry_run=dry_run)
    jobs = kind.jobs()
    if dry_run:
        jobs = [{"id": "JOB", "run": run or "RUN", "status": "RUNNING"}]
    found = [job for job in jobs if run is None or job["run"] == run]
    if not found:
        there = ", ".join(sorted({job["run"] for job in jobs})) or "none"
        raise LaunchFailed(
            f"no job of run {run!r} is on this cluster. There: {there}." if run else "no job was submitted."
        )
    newest = found[-1]
    if follow and newest["status"] in RUNNING:
        return _follow(kind, newest["run"], newest["id"])
    try:
        return 0 if kind.follow(newest["id"], kind.shell.say, go_on=False).ok else 1
    except KeyboardInterrupt:
        return INTERRUPTED


# --- status ---


def status(path: Path, *, dry_run: bool) -> int:
    """Nodes, jobs and runs; what cannot be told is said, and the code is then 1."""
    kind, code = open_kind(path, dry_run=dry_run), 0
    answer = kind.ask("nodes", "jobs", "runs")
    if dry_run:
        return 0
    running: set[str] | None = None
    for topic, tell in (("nodes", _nodes_told), ("jobs", _jobs_told), ("runs", _runs_told)):
        try:
            found = kind.told(answer, topic)
        except LaunchFailed as error:
            kind.shell.say(f"{topic}: {error}\n")
            code = 1
            continue
        if topic == "jobs":
            running = {job["run"] for job in found if job["status"] in RUNNING}
        kind.shell.say((tell(found, running) if found else f"no {topic}") + "\n")
    return code


def _nodes_told(nodes: list[dict[str, Any]], _: set[str] | None) -> str:
    def state(node: dict[str, Any]) -> str:
        return "dead" if not node["alive"] else "draining" if node["draining"] else "alive"

    def row(node: dict[str, Any]) -> tuple[str, ...]:
        counts = (f"{node['resources'].get(name, 0):g}" for name in ("CPU", "GPU"))
        return (node["address"], node["host"], "head" if node["head"] else "worker", state(node), *counts,
                node["reason"][:80])  # fmt: skip

    ordered = sorted(nodes, key=lambda node: (not node["alive"], not node["head"], node["address"]))
    return table(("node", "host", "part", "state", "CPUs", "GPUs", "reason"), map(row, ordered))


def _jobs_told(jobs: list[dict[str, Any]], _: set[str] | None) -> str:
    rows = [(job["id"], job["run"], job["status"].lower(), "" if job["code"] is None else job["code"]) for job in jobs]
    return table(("job", "run", "state", "exit code"), rows)


def _runs_told(runs: list[dict[str, Any]], running: set[str] | None) -> str:
    rows = []
    for run in runs:
        state = run["status"] or "?"
        if state == "running" and running is not None and run["run"] not in running:
            state = "broken off (submit it again to go on)"
        trials = ", ".join(f"{count} {name}" for name, count in run["trials"].items())
        rows.append((run["run"], state, run["created"] or "", run["finished"] or "", trials))
    return table(("run", "state", "begun", "ended", "trials"), rows)


# --- fetch ---


def fetch(path: Path, run: str, *, to: Path, everything: bool, dry_run: bool) -> int:
    """Copy a run's folder home; an earlier copy is brought up to date, another run of that name is not touched."""
    kind, target = open_kind(path, dry_run=dry_run), to / run
    if not _RUN.fullmatch(run):
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


# --- down ---


def down(path: Path, *, yes: bool, dry_run: bool) -> int:
    """Stop jobs, take the cluster down, look at every host: 0 when nothing is left."""
    kind = open_kind(path, dry_run=dry_run)
    try:
        running = [job for job in kind.jobs(timeout=60) if job["status"] in RUNNING]
    except LaunchError as error:
        running = []
        kind.shell.say(f"its jobs cannot be asked for, and the cluster is taken down all the same: {error}")
    names = f", which runs {', '.join(job['run'] for job in running)}" if running else ""
    if not dry_run and not confirmed(f"Take down cluster {kind.file.name!r}{names}?", yes=yes):
        return 1
    for job in running:
        kind.stop(job["id"])
    problems = kind.destroy()
    for problem in problems:
        kind.shell.say(f"left: {problem}")
    if not problems and not dry_run:
        kind.shell.say(
            f"cluster {kind.file.name} is down; results are on its storage ({kind.file.storage or 'unknown'})"
        )
    return 1 if problems else 0
