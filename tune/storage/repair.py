"""A run folder before it is resumed: what is damaged is mended from a good copy, or set aside and made again. No Ray.

Every damaged file is kept beside its place as NAME.damaged. Of run.json and config.yaml each is mended from the other;
a run without both is refused. A trial whose files, or whose adapter, cannot be trusted is trained again, from its
newest whole checkpoint if there is one; scores and selections that are gone are made again from what is whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from macdrop.errors import ConfigError, NoMassiveWeights
from tune.config.parse import flatten
from tune.config.run_spec import RunSpec, TrainSpec, dump, load
from tune.errors import CheckpointError
from tune.storage.atomic import (
    MORE,
    atomic_write_json,
    atomic_write_text,
    atomic_write_yaml,
    now,
    read_mapping,
)
from tune.storage.environment import version
from tune.storage.records import Finalists, RunRecord, TrialRecord, check_score, parse, read_record
from tune.storage.run_folder import LAYOUT, RunFolder
from tune.storage.sealed_folder import tidy, verify
from tune.storage.search_state import search_time
from tune.storage.states import RunStatus, TaskState

#: What went wrong with a file that cannot be believed.
UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, RecursionError)


def check_run(run_dir: Path) -> None:
    """Refuse what is no run folder.

    Raises:
        ConfigError: as said.
    """
    if not run_dir.is_dir():
        raise ConfigError(
            f"{str(run_dir)!r} is no run folder: there is no such folder.\nGive the output_dir of a sweep."
        )
    if not any((run_dir / name).is_file() for name in ("run.json", "config.yaml")):
        raise ConfigError(f"{str(run_dir)!r} is no run folder: it has no run.json.\nGive the output_dir of a sweep.")


def mend(run_dir: Path) -> list[str]:
    """Mend a run folder that nobody works in; returns what was done, a sentence each.

    Raises:
        ConfigError: neither run.json nor config.yaml is whole.
        ResourceError: the folder cannot be written.
    """
    notes = _run_files(run_dir)
    redone = [note for folder in sorted((run_dir / "trials").glob("*/")) for note in _trial(folder)]
    notes += redone
    for folder in sorted((run_dir / "models").glob("*/")):
        notes += _finding(folder / "massive_weights.json", _massive_weights, "found again")
        notes += _finding(folder / "proof.json", lambda file: read_mapping(file, needs=("verdict",)), "made again")
        notes += _finding(folder / "finalists.json", lambda file: read_record(file, Finalists), "selected again")
        notes += _finding(folder / "search_time.json", search_time, "time is counted anew")
        notes += _lines(folder / "draws.jsonl", _draw, "what is missing is drawn again")
        if redone:
            # The search is gone through once more: what it lacks is trained, and the same is selected.
            (folder / "finalists.json").unlink(missing_ok=True)
    lost = [note for file in sorted(run_dir.glob("*/*/answers/*.jsonl")) for note in _answers(run_dir, file)]
    notes += _lines(run_dir / "scores.jsonl", _score, "what is missing is scored again")
    return notes + lost


# --- the run ---


def _run_files(run_dir: Path) -> list[str]:
    about, spec = run_dir / "run.json", run_dir / "config.yaml"
    run, config = _believed(about, _run), _believed(spec, _config)
    if run is None and config is None:
        raise ConfigError(
            f"The run in {run_dir} cannot be resumed: {about} and {spec} are damaged, and each could only be mended "
            "from the other.\nPut a copy of either in its place, or start the run anew in another output_dir; trained "
            f"adapters are in {run_dir / 'trials'}."
        )
    if run is None:
        notes = [f"{_aside(about)}: run.json is written anew from config.yaml"]
        name = run_dir.resolve().name
        run = {"name": name, "created": now(), "status": RunStatus.INTERRUPTED, "command": None}
        atomic_write_json(about, {**run, "macdrop": version("macdrop"), "layout": LAYOUT, "spec": config})
        return notes
    copy = run.get("spec")
    if copy is not None and not _is_whole(copy) and config is not None:
        # A copy that is damaged itself mends nothing.
        notes = [f"{_aside(about)}: what it holds of the spec is written anew from config.yaml"]
        atomic_write_json(about, {**run, "spec": config})
        return notes
    if _is_whole(copy) and (config is None or flatten(config) != flatten(copy)):
        notes = [f"{_aside(spec)}: config.yaml is written anew as the run was started, from run.json"]
        atomic_write_yaml(spec, copy)
        return notes
    if config is None:
        raise ConfigError(
            f"The run in {run_dir} cannot be resumed: {spec} is damaged.\nPut the run file that it was started with in "
            "its place, or start the run anew in another output_dir."
        )
    return []


def _run(file: Path) -> dict[str, Any]:
    run = read_mapping(file)
    parse(RunRecord, run)
    return run


def _config(file: Path) -> dict[str, Any]:
    """A run file with all its keys: one that was cut off may still be a run file, but of another run."""
    config = read_mapping(file)
    whole = dump(load(file))
    missing = flatten(whole).keys() - flatten(config).keys()
    if missing:
        raise ValueError(f"it has no {', '.join(sorted(missing))}")
    return config


def _is_whole(copy: Any) -> bool:
    """Whether the spec in run.json is one, with all its keys."""
    try:
        return flatten(dump(RunSpec.model_validate(copy))).keys() <= flatten(copy).keys()
    except UNREADABLE:
        return False


# --- trials ---


def _trial(folder: Path) -> list[str]:
    """Mend one trial's folder."""
    told = f"{folder.name} is trained again"
    file, config = folder / "trial.json", folder / "config.yaml"
    notes = _lines(folder / "metrics.jsonl", _metrics, "its curve has a gap")
    notes += _finding(folder / "trackers.json", read_mapping, "trackers see the trial as a new one")
    if not file.exists():
        return notes
    record = _believed(file, _record)
    if record is None:
        return [*notes, f"{_aside(file)}: {told}"]
    if _believed(config, lambda path: _named(path, folder.name)) is None:
        aside = _aside(config)
        _aside(file)
        return [*notes, f"{aside}: {told}"]
    adapter = folder / "adapter"
    tidy(folder)
    if (record["status"] == TaskState.DONE or record.get("trained")) and adapter.exists():
        try:
            verify(adapter)
        except CheckpointError as error:
            _aside(adapter)
            reason = str(error).splitlines()[0]
            kept = {key: value for key, value in record.items() if key not in ("trained", "finished")}
            atomic_write_json(file, {**kept, "status": TaskState.RUNNING, "reason": None})
            return [*notes, f"{reason} {told}"]
    return notes


def _record(file: Path) -> dict[str, Any]:
    """trial.json, with all that a resumed run makes of it."""
    record = read_mapping(file)
    if parse(TrialRecord, record).trial != file.parent.name:
        raise ValueError(f"{file} is the record of another trial")
    return record


def _named(file: Path, name: str) -> TrainSpec:
    """A fine-tuning whose content has this name."""
    spec = TrainSpec.model_validate(read_mapping(file))
    if spec.trial_id() != name:
        raise ValueError(f"{file} is the fine-tuning {spec.trial_id()}")
    return spec


def _metrics(row: dict[str, Any]) -> bool:
    return type(row.get("step")) is int and all(_number(value) for value in row.values())


# --- models and scores ---


def _massive_weights(file: Path) -> Any:
    from macdrop import MassiveWeights

    try:
        return MassiveWeights.load(file)
    except NoMassiveWeights as error:
        raise ValueError(error) from None


def _draw(row: dict[str, Any]) -> bool:
    return type(row.get("number")) is int and isinstance(row.get("values"), dict)


def _score(row: dict[str, Any]) -> bool:
    check_score(row)
    return isinstance(row.get("arm"), str)


def _number(value: Any) -> bool:
    return value is None or type(value) in (int, float)


def _answers(run_dir: Path, file: Path) -> list[str]:
    """Of answers that are damaged the scores go, too: a new evaluation makes both. They are written whole, so that no
    file of them is ever torn by a crash."""
    if _whole(file, lambda row: True):
        return []
    run_folder = RunFolder(run_dir)
    aside = _aside(file)
    _rewrite(run_folder.scores_file, lambda row: not run_folder.holds_answers_of(file, row))
    return [f"{aside}: these answers, and their scores, are made again"]


# --- files ---


def _believed(file: Path, read: Callable[[Path], Any]) -> Any:
    """What a file holds; None if it is missing or makes no sense."""
    try:
        return read(file)
    except UNREADABLE:
        return None


def _finding(file: Path, read: Callable[[Path], Any], remedy: str) -> list[str]:
    if not file.exists() or _believed(file, read) is not None:
        return []
    return [f"{_aside(file)}: {remedy}"]


def _groups(file: Path) -> Iterable[list[str]]:
    """Lines of a file of `append_jsonl`, those of one call together; the last may be torn."""
    group: list[str] = []
    text = file.read_text(encoding="utf-8", errors="replace")
    for line in text.split("\n"):
        group.append(line)
        if not line.endswith(MORE):
            yield group
            group = []
    if group:
        yield group


def _sound(group: list[str], fits: Callable[[dict[str, Any]], bool]) -> bool:
    try:
        rows = [json.loads(line) for line in group]
        return all(isinstance(row, dict) and fits(row) for row in rows)
    except UNREADABLE:
        return False


def _whole(file: Path, fits: Callable[[dict[str, Any]], bool]) -> bool:
    """Whether every line of a file that is written at once fits, the last one ended."""
    *groups, end = _groups(file)
    return end == [""] and bool(groups) and all(_sound(group, fits) for group in groups)


def _lines(file: Path, fits: Callable[[dict[str, Any]], bool], remedy: str) -> list[str]:
    """Take lines that do not fit out of a file, with all that was written together with them."""
    if not file.exists():
        return []
    *groups, _torn = _groups(file)  # what a crash tore is cut off by whoever appends next
    if all(_sound(group, fits) for group in groups):
        return []
    aside = _aside(file, keep=True)
    _rewrite(file, fits)
    return [f"{aside}: lines that are damaged were taken out; {remedy}"]


def _rewrite(file: Path, fits: Callable[[dict[str, Any]], bool]) -> None:
    if not file.exists():
        return
    *groups, _torn = _groups(file)
    kept = [line for group in groups if _sound(group, fits) for line in group]
    atomic_write_text(file, "".join(f"{line}\n" for line in kept))


def _aside(path: Path, *, keep: bool = False) -> str:
    """Move a damaged file (or folder) out of the way, or copy it; returns both names, for people."""
    names = [f"{path.name}.damaged", *(f"{path.name}.damaged-{number}" for number in range(2, 1000))]
    to = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    if not path.exists():
        return f"{path} is missing"
    if keep:
        to.write_bytes(path.read_bytes())
    else:
        os.replace(path, to)
    return f"{path} is damaged (kept as {to.name})"
