"""Jobs on a cluster: starting a sweep, and its log."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import yaml

from cluster.backends.base import RUN_NAME, RUNNING, Job, Kind, stamp
from cluster.backends.registry import open_kind
from cluster.errors import BadLaunchFile, LaunchError, LaunchFailed, Missing

#: Seconds before a dropped line is taken up again, and how often. Doubled each time: a laptop may be away for a minute.
AGAIN, ATTEMPTS = 3.0, 5
INTERRUPTED = 130
#: Keys that submit gives itself -> what to give instead.
OURS = {
    "output_dir": "--name NAME (the folder is runs/NAME on the storage)",
    "ray.address": "nothing: it is the cluster",
}


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
    elif not RUN_NAME.fullmatch(recipe) or "=" in recipe:
        raise BadLaunchFile(f"recipe {recipe!r} is neither a file nor a name of `macdrop sweep --recipes`.")
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals:
            raise BadLaunchFile(f"{override!r} is no key=value.")
        if key in OURS:
            raise BadLaunchFile(f"{key} is given by submit itself. Give instead {OURS[key]}.")
    run = name or file.stem
    if not RUN_NAME.fullmatch(run):
        raise BadLaunchFile(
            f"--name {run!r}: a run's name has letters, digits, dots, dashes and underscores, at most 63."
        )
    return Job(run, file if file.is_file() else recipe, tuple(overrides), stamp())


def _stays_here(job: Job) -> list[str]:
    """Files of this machine that recipe and overrides name; a copied recipe does not bring them along."""
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
