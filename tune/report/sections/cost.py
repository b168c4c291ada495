"""The parts on cost and reproduction: time spent, and how to repeat the run."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Iterable
from typing import Any

from tune.analysis.display_names import arm_name
from tune.analysis.results import Line, ModelResults
from tune.config.resume import shell_command
from tune.data.batching import describe_mixture
from tune.data.lost_rows import COUNTS, describe_cutoff, describe_skipped
from tune.report.sections.subject import Subject
from tune.report.tables import Part, Table
from tune.report.text import count, hours, number
from tune.storage.run_folder import BASE, RunFolder
from tune.storage.segments import describe, recorded, worker_seconds
from tune.storage.states import Stage, TaskState
from tune.training.trial_setup import SETUP, reproduce_command


def cost(subject: Subject) -> Part:
    """Time by arm and stage, speed, and steps saved by early stopping."""
    model, run_folder = subject.model, subject.run_folder
    trained = [line for line in model.lines if line.arm != BASE]
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in model.lines:
        groups.setdefault((line.stage if line.arm != BASE else "", line.arm), []).append(line)
    rows = []
    for (stage, arm), lines in groups.items():
        known = [line.info["seconds"] for line in lines if line.info.get("seconds") is not None]
        speeds = list(filter(None, (_speed(subject, line) for line in lines if line.arm != BASE)))
        scored = sum(line.scoring_s for line in lines)
        row = [arm_name(arm), stage, str(len(known) or ""), hours(sum(known)) if known else ""]
        row += [hours(scored) if scored else "", number(statistics.median(speeds)) if speeds else ""]
        rows.append(row)
    head = ["", "stage", "trials", "training", "scoring", "tokens per\nsecond"]
    if not any(row[3] or row[4] for row in rows):
        return Part("Cost")
    training, total = spent(model)
    ray = run_folder.config().get("ray") or {}
    on_workers = _on_workers(trained, run_folder.workers_at_start(model.display))
    devices = _devices(
        run_folder.environments(),
        ray,
        training,
        total,
        *on_workers,
    )
    about = [devices, *_saved(trained), *optimizer_state(trained)]
    return Part("Cost", about, [Table("Time by arm", head, rows)])


def other_workers(trained: Iterable[Line], begun: int) -> list[str]:
    """Say which trials were trained on other workers than those that the run began with, and from which step on."""
    found: dict[str, list[str]] = {}
    for line in trained:
        if (words := describe(recorded(line.info), begun)) is not None:
            found.setdefault(words, []).append(line.trial)
    return [f"Trial{'s' if len(trials) > 1 else ''} {', '.join(trials)}: {words}." for words, trials in found.items()]


def spent(model: ModelResults) -> tuple[float, float]:
    """Total seconds of training and of scoring of a model's trials."""
    training = sum(line.info.get("seconds") or 0.0 for line in model.lines)
    return training, sum(line.scoring_s for line in model.lines)


def unpacking(run_folder: RunFolder) -> list[str]:
    """Return the command that unpacks a run's archive into the folder that other commands show; none for a folder."""
    archive = run_folder.archive
    return [shell_command("python", "-m", "tarfile", "-e", archive, run_folder.shown)] if archive else []


def reproduce(subject: Subject) -> Part:
    """Return command, versions, seeds, and how to train one of the compared trials again."""
    run_folder, model = subject.run_folder, subject.model
    run, config = run_folder.run(), run_folder.config()
    final = [line for line in model.lines if line.arm != BASE and line.stage != Stage.SEARCH]
    seeds = sorted({line.seed for line in final if line.seed is not None})
    lines = [f"Started with: {run.get('command', 'unknown')}"]
    lines += [f"Unpack the archive first: {command}" for command in unpacking(run_folder)]
    rerun = shell_command("macdrop", "sweep", run_folder.shown / "config.yaml", "output_dir=FOLDER")
    lines += [f"Rerun: {rerun} (spec {spec_digest(config)})."]
    lines += [f"Seeds of the compared trials: {', '.join(map(str, seeds))}."] if seeds else []
    lines += _versions(run_folder.environments())
    begun = run_folder.workers_at_start(model.display)
    lines += other_workers([line for line in model.lines if line.arm != BASE], begun)
    whole = [line for line in final if len(recorded(line.info)) <= 1]
    folders = [folder for line in whole if ((folder := run_folder.trial(line.trial).folder) / SETUP).is_file()]
    if folders:
        setup = run_folder.finding(folders[0] / SETUP) or {}
        workers, data = setup.get("workers") or 1, setup.get("data") or {}
        lines += [f"Training data: {describe_cutoff(data)}."] if data.keys() >= set(COUNTS) else []
        lines += [f"{sentence}." for sentence in (*describe_mixture(data), *describe_skipped(data))]
        share = f"{len(folders)} of {len(final)} trials have what it needs"
        if not run_folder.archive:  # which has no adapter to compare with
            lines.append(f"One trial without Ray: {reproduce_command(folders[0], workers)} ({share}).")
    return Part("Reproduce", lines)


def _versions(environments: list[dict[str, Any]]) -> list[str]:
    """One sentence per environment of the run."""
    lines = []
    for environment in environments:
        installed = environment.get("versions") or {}
        versions = ", ".join(f"{name} {version}" for name, version in installed.items() if version)
        when = f" since {str(environment['at'])[:19]} UTC" if environment.get("at") else ""
        lines += [f"Versions{when}: {versions}."] if versions else []
    return lines


def spec_digest(config: dict[str, Any]) -> str:
    """12 hex digits that identify a run's effective spec, its output folder aside."""
    content = {key: value for key, value in config.items() if key != "output_dir"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _speed(subject: Subject, line: Line) -> float | None:
    """Median tokens per second over a trial's logged steps."""
    rows = subject.run_folder.trial(line.trial).metrics()
    speeds = [row["tokens_per_second"] for row in rows if row.get("tokens_per_second")]
    return statistics.median(speeds) if speeds else None


def _on_workers(trained: list[Line], begun: int) -> tuple[float, list[int]]:
    """Return the seconds of training times the workers that were trained on, and how many workers these were."""
    total, counts = 0.0, set()
    for line in trained:
        seconds, segments = line.info.get("seconds") or 0.0, recorded(line.info)
        total += worker_seconds(segments, seconds) if segments else seconds * begun
        counts |= {each["workers"] for each in segments} or {begun}
    return total, sorted(counts)


def _devices(
    environments: list[dict[str, Any]],
    ray: dict[str, Any],
    training: float,
    scoring: float,
    worker_time: float,
    counts: list[int],
) -> str:
    """Total time and device hours; a worker has one GPU if there are any, else its CPUs.

    worker_time: seconds of training times workers. counts: the numbers of workers, ascending.
    """
    gpus = [name for environment in environments for name in environment.get("gpus") or []]
    each = 1 if gpus else max(ray.get("cpus_per_worker") or 1, 1)
    device = f"GPU hours ({gpus[0]})" if gpus else "CPU hours"
    spent = worker_time * each + scoring
    with_workers = f" on {' or '.join(map(str, counts))} workers" if counts and counts[-1] > 1 else ""
    return f"Training {hours(training)}{with_workers}, scoring {hours(scoring)}: {spent / 3600:.3g} {device}."


def optimizer_state(trained: Iterable[Line]) -> list[str]:
    """Say what the optimizers of trials kept, where that is less than AdamW keeps; a sentence for each size."""
    sizes = {(line.info.get("optimizer_bytes") or 0, line.info.get("adamw_bytes") or 0) for line in trained}
    return [
        f"Optimizer state of a trial: {kept / 2**20:.3g} MiB, {1 - kept / whole:.0%} less than AdamW's "
        f"{whole / 2**20:.3g} MiB."
        for kept, whole in sorted(sizes)
        if 0 < kept < whole
    ]


def _saved(trained: list[Line]) -> list[str]:
    stopped = [line for line in trained if line.status == TaskState.STOPPED]
    if not stopped:
        return []
    totals = [(line.info.get("step") or 0, line.info.get("total_steps") or 0) for line in stopped]
    saved, planned = sum(total - step for step, total in totals), sum(total for _, total in totals)
    share = f"{saved} of their {planned} steps saved" if planned else "number of steps saved unknown"
    return [f"{len(stopped)} trial(s) stopped early, {share} (all trials: {count(line.status for line in trained)})."]
