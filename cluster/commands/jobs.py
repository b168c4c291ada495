"""`macdrop cluster submit` and `logs`: starting a sweep as a job, and its log."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import yaml

from cluster.backends.base import RUN_NAME, RUNNING, Backend, Job, stamp
from cluster.backends.registry import open_backend
from cluster.errors import BadLaunchFile, LaunchError, LaunchFailed, Missing

#: Seconds before reconnecting to a log, doubled each time (a laptop may sleep for a minute), and attempts.
RETRY, ATTEMPTS = 3.0, 5
INTERRUPTED = 130
#: Keys that submit sets itself -> what to use instead.
RESERVED = {
    "output_dir": "--name NAME (the folder is runs/NAME on the storage)",
    "ray.address": "nothing: it is the cluster",
}


def submit(path: Path, recipe: str, overrides: list[str], *, name: str | None, follow: bool, dry_run: bool) -> int:
    """Start a sweep and follow its log; return the exit code of the job, or 0 at once without `follow`."""
    backend = open_backend(path, dry_run=dry_run)
    job = _job(recipe, overrides, name)
    for local in _local_files(job):
        backend.shell.say(
            f"note: {local} is a file of this machine. The sweep looks for it on the cluster: copy it to the storage, "
            f"{backend.file.storage}, and use that path."
        )
    if not dry_run:
        running = [other for other in backend.jobs() if other["run"] == job.run and other["status"] in RUNNING]
        if running:
            raise LaunchFailed(
                f"run {job.run!r} is running as job {running[-1]['id']}. See {_log_command(backend, job.run)}; or use "
                "another --name."
            )
    started = backend.submit(job)
    if dry_run:
        if follow:
            backend.follow(started, backend.shell.say)
        return 0
    log = _log_command(backend, job.run)
    backend.shell.say(f"run {job.run}, job {started}. It continues without this machine; to see its log: {log}")
    return _follow(backend, job.run, started) if follow else 0


def _job(recipe: str, overrides: list[str], name: str | None) -> Job:
    """Build a job. Raises BadLaunchFile: unknown recipe, not key=value, a reserved key, or an invalid run name."""
    file = Path(recipe).expanduser()
    if file.suffix in (".yaml", ".yml") or file.exists():
        if not file.is_file():
            raise BadLaunchFile(
                f"recipe {recipe!r} does not exist. Use a YAML file, or a name from `macdrop sweep --recipes`."
            )
    elif not RUN_NAME.fullmatch(recipe) or "=" in recipe:
        raise BadLaunchFile(f"recipe {recipe!r} is neither a file nor a name from `macdrop sweep --recipes`.")
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals:
            raise BadLaunchFile(f"not a key=value override: {override!r}.")
        if key in RESERVED:
            raise BadLaunchFile(f"{key} is set by submit itself. Use instead {RESERVED[key]}.")
    run = name or file.stem
    if not RUN_NAME.fullmatch(run):
        raise BadLaunchFile(
            f"--name {run!r}: a run's name has letters, digits, dots, dashes and underscores, at most 63."
        )
    return Job(run, file if file.is_file() else recipe, tuple(overrides), stamp())


def _local_files(job: Job) -> list[str]:
    """Files of this machine that recipe and overrides name: they are not copied along with a recipe."""
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


def _log_command(backend: Backend[Any], run: str) -> str:
    return f"macdrop cluster logs {backend.file.quoted} {run} --follow"


def _follow(backend: Backend[Any], run: str, job: str) -> int:
    """Print the log of a job until it ends, reconnecting when necessary; return the exit code of the job."""
    shell, shown = backend.shell, 0
    for attempt in range(ATTEMPTS):
        passed = 0

        def show(line: str) -> None:
            nonlocal passed, shown
            passed += 1
            if passed > shown:  # a log that is followed again starts from its beginning
                shown = passed
                shell.say(line)

        try:
            backend.follow(job, show)
            found = next((other for other in backend.jobs(shown=False) if other["id"] == job), None)
        except KeyboardInterrupt:
            shell.say(f"\nThe job continues. To see its log again: {_log_command(backend, run)}")
            return INTERRUPTED
        except LaunchError as error:
            found = None
            shell.say(f"the connection to the cluster dropped: {error}")
        if found and found["status"] not in RUNNING:
            return _ended(backend, run, found)
        if attempt + 1 < ATTEMPTS:
            shell.say(f"the log stopped; reconnecting ({attempt + 1} of {ATTEMPTS - 1})")
            time.sleep(RETRY * 2**attempt)
    shell.say(f"The job may still be running. To see its log again: {_log_command(backend, run)}")
    return Missing.exit_code


def _ended(backend: Backend[Any], run: str, job: dict[str, Any]) -> int:
    path = backend.file.quoted
    if job["status"] == "SUCCEEDED":
        backend.shell.say(f"run {run} is done. To copy its results: macdrop cluster fetch {path} {run}")
        return 0
    backend.shell.say(f"job {job['id']}: {job['status'].lower()}. {job['message']}".rstrip())
    backend.shell.say(f"to resume it, repeat: macdrop cluster submit {path} ... --name {run}")
    code: int | None = job["code"]
    return code or (INTERRUPTED if job["status"] == "STOPPED" else 1)


def logs(path: Path, run: str | None, *, follow: bool, dry_run: bool) -> int:
    """Print the log of the newest job, of a run if one is named."""
    backend = open_backend(path, dry_run=dry_run)
    jobs = backend.jobs()
    if dry_run:
        jobs = [{"id": "JOB", "run": run or "RUN", "status": "RUNNING"}]
    found = [job for job in jobs if run is None or job["run"] == run]
    if not found:
        known = ", ".join(sorted({job["run"] for job in jobs})) or "none"
        raise LaunchFailed(
            f"no job of run {run!r} is on this cluster. Known runs: {known}." if run else "no job was submitted."
        )
    newest = found[-1]
    if follow and newest["status"] in RUNNING:
        return _follow(backend, newest["run"], newest["id"])
    try:
        return 0 if backend.follow(newest["id"], backend.shell.say, until_ended=False).ok else 1
    except KeyboardInterrupt:
        return INTERRUPTED
