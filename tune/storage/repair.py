"""Repair of a run folder before it is resumed: damaged files are restored from a copy or set aside and made again.

Every damaged file is kept next to its place as NAME.damaged. run.json and config.yaml are each repaired from the other;
a run without both is refused. A trial whose files or adapter cannot be trusted is trained again, from its newest whole
checkpoint if there is one; lost scores and selections are made again from what is whole.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from macdrop.errors import ConfigError, NoMassiveWeights
from macdrop.weights import MassiveWeights
from tune.config.parse import flatten
from tune.config.run_spec import RunSpec, TrainSpec, dump, load
from tune.config.syntax.yaml_core import parse_blocks
from tune.errors import CheckpointError
from tune.storage.atomic import atomic_write_bytes, atomic_write_json, atomic_write_yaml, now, read_mapping
from tune.storage.environment import ENVIRONMENT_FILE, version
from tune.storage.json_lines import json_value, whole_groups
from tune.storage.records import (
    FINALISTS_FILE,
    SCORES_FILE,
    SNR_FILE,
    TIME_KEYS,
    TIMES_FILE,
    Finalists,
    RunRecord,
    TrialRecord,
    check_score,
    config_seal,
    parse,
    read_record,
)
from tune.storage.remote.restore import is_restoring
from tune.storage.run_folder import BASE, LAYOUT, RunFolder
from tune.storage.sealed_folder import tidy, verify
from tune.storage.search_state import search_time
from tune.storage.states import RunStatus, TaskState

#: What went wrong with a file that cannot be believed.
UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, RecursionError)
#: The temporary file of a write that a killed process did not end, see `atomic_write_text`.
UNFINISHED = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp")


def check_run(run_dir: Path) -> None:
    """Refuse a path that is not a run folder.

    Raises:
        ConfigError: no such folder, or not the folder of a run.
    """
    if not run_dir.is_dir():
        raise ConfigError(f"{str(run_dir)!r} is not a run folder: no such folder.\nGive the output_dir of a sweep.")
    if is_restoring(run_dir):
        raise ConfigError(
            f"{str(run_dir)!r} is being restored from a copy, which was interrupted.\nGive the command with sync_to= "
            "again: it continues where it stopped."
        )
    if not any((run_dir / name).is_file() for name in ("run.json", "config.yaml")):
        raise ConfigError(f"{str(run_dir)!r} is not a run folder: it has no run.json.\nGive the output_dir of a sweep.")


def repair_contents(run_dir: Path) -> list[str]:
    """Repair all but run.json and config.yaml (`repair_spec`); return what was done, one sentence per repair.

    Raises:
        ResourceError: the folder cannot be written.
    """
    for place, _, files in os.walk(run_dir):
        for name in filter(UNFINISHED.fullmatch, files):
            Path(place, name).unlink(missing_ok=True)
    found = {folder.name: _trial(folder) for folder in sorted((run_dir / "trials").glob("*/"))}
    redone = [note for repairs, _ in found.values() for note in repairs]
    notes = list(redone)
    for folder in sorted((run_dir / "models").glob("*/")):
        notes += _finding(folder / "massive_weights.json", _massive_weights, "found again")
        notes += _finding(folder / "proof.json", lambda file: read_mapping(file, needs=("verdict",)), "made again")
        notes += _finding(folder / "layers.json", lambda file: read_mapping(file, needs=("rows",)), "left out")
        notes += _finding(folder / SNR_FILE, lambda file: read_mapping(file, needs=("adapters",)), "measured again")
        notes += _finding(folder / FINALISTS_FILE, lambda file: read_record(file, Finalists), "selected again")
        notes += _finding(folder / "search_time.json", search_time, "the time is counted from zero")
        notes += _lines(folder / "draws.jsonl", _draw, "what is missing is drawn again")
        if redone:
            # The search is replayed: what it lacks is trained, and the same is selected.
            (folder / FINALISTS_FILE).unlink(missing_ok=True)
    notes += _finding(run_dir / ENVIRONMENT_FILE, read_mapping, "versions before this resume are unknown")
    lost = [note for file in sorted(run_dir.glob("*/*/answers/*.jsonl")) for note in _answers(run_dir, file)]
    notes += _lines(run_dir / TIMES_FILE, _time, "the timeline has a gap")
    trained = {name for name, (_, is_trained) in found.items() if is_trained}
    return notes + _scores(run_dir / SCORES_FILE, trained) + lost


# --- the run ---


def repair_spec(run_dir: Path) -> list[str]:
    """Repair run.json and config.yaml, each from the other; return what was done, one sentence per repair.

    Raises:
        ConfigError: neither is whole.
        ResourceError: the folder cannot be written.
    """
    about, spec = run_dir / "run.json", run_dir / "config.yaml"
    run = _believed(about, _run)
    config = _believed(spec, lambda file: _config(file, (run or {}).get("spec")))
    if run is None and config is None:
        raise ConfigError(
            f"The run in {run_dir} cannot be resumed: {about} and {spec} are damaged, and each can only be repaired "
            "from the other.\nPut a copy of either in its place, or start the run again in another output_dir; trained "
            f"adapters are in {run_dir / 'trials'}."
        )
    if run is None:
        notes = [f"{_aside(about)}: run.json is rewritten from config.yaml"]
        name = run_dir.resolve().name
        run = {"name": name, "created": now(), "status": RunStatus.INTERRUPTED, "command": None}
        atomic_write_json(about, {**run, "macdrop": version("macdrop"), "layout": LAYOUT, "spec": config})
        return notes
    copy = run.get("spec")
    if config is not None and config == copy:
        return []
    if copy is not None and not _is_whole(copy) and config is not None:
        # A damaged copy repairs nothing.
        notes = [f"{_aside(about)}: its copy of the spec is rewritten from config.yaml"]
        atomic_write_json(about, {**run, "spec": config})
        return notes
    if _is_whole(copy) and (config is None or flatten(config) != flatten(copy)):
        notes = [f"{_aside(spec)}: config.yaml is rewritten from run.json, as the run was started"]
        atomic_write_yaml(spec, copy)
        return notes
    if config is None:
        raise ConfigError(
            f"The run in {run_dir} cannot be resumed: {spec} is damaged.\nPut the run file that it was started with in "
            "its place, or start the run again in another output_dir."
        )
    return []


def _run(file: Path) -> dict[str, Any]:
    run = read_mapping(file)
    parse(RunRecord, run)
    return run


def _config(file: Path, copy: Any) -> dict[str, Any]:
    """A run file with all its keys: one that was cut off may still be a run file, but of another run.

    One that equals its copy in run.json was not cut off: keys that it lacks came with another version.
    """
    config = read_mapping(file)
    whole = dump(load(file))
    missing = flatten(whole).keys() - flatten(config).keys()
    if missing and config != copy:
        raise ValueError(f"it has no {', '.join(sorted(missing))}")
    return config


def _is_whole(copy: Any) -> bool:
    """Return whether the spec in run.json is valid and has all its keys."""
    try:
        return flatten(dump(RunSpec.model_validate(copy))).keys() <= flatten(copy).keys()
    except UNREADABLE:
        return False


# --- trials ---


def _trial(folder: Path) -> tuple[list[str], bool]:
    """Repair one trial's folder; return what was done, and whether it is trained, or has ended without an adapter."""
    remedy = f"{folder.name} is trained again"
    file, config = folder / "trial.json", folder / "config.yaml"
    notes = _lines(folder / "metrics.jsonl", _metrics, "its curve has a gap")
    notes += _finding(folder / "trackers.json", read_mapping, "trackers see the trial as a new one")
    if not file.exists():
        return notes, False
    record = _believed(file, _record)
    if record is None:
        return [*notes, f"{_aside(file)}: {remedy}"], False
    sealed = config.is_file() and record.get("config_seal") == config_seal(config.read_text(errors="replace"))
    if not sealed and _believed(config, lambda path: _named(path, folder.name)) is None:
        aside = _aside(config)
        _aside(file)
        return [*notes, f"{aside}: {remedy}"], False
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
            return [*notes, f"{reason} {remedy}"], False
    return notes, record.get("trained") is not None or TaskState(record["status"]).is_final


def _record(file: Path) -> dict[str, Any]:
    """trial.json, with all that a resumed run makes of it."""
    record = read_mapping(file)
    if parse(TrialRecord, record).trial != file.parent.name:
        raise ValueError(f"{file} is the record of another trial")
    return record


def _named(file: Path, name: str) -> TrainSpec:
    """A fine-tuning whose content has this name."""
    spec = TrainSpec.model_validate(read_mapping(file, parse=parse_blocks))
    if spec.trial_id() != name:
        raise ValueError(f"{file} is the fine-tuning {spec.trial_id()}")
    return spec


def _metrics(row: dict[str, Any]) -> bool:
    return type(row.get("step")) is int and all(_number(value) for value in row.values())


# --- models and scores ---


def _massive_weights(file: Path) -> Any:
    try:
        return MassiveWeights.load(file)
    except NoMassiveWeights as error:
        raise ValueError(error) from None


def _draw(row: dict[str, Any]) -> bool:
    return type(row.get("number")) is int and isinstance(row.get("values"), dict)


def _score(row: dict[str, Any]) -> bool:
    check_score(row)
    return isinstance(row.get("arm"), str)


def _time(row: dict[str, Any]) -> bool:
    return row.keys() >= set(TIME_KEYS) and isinstance(row["name"], str) and _number(row["begin"])


def _number(value: Any) -> bool:
    return value is None or type(value) in (int, float)


def _scores(file: Path, trained: Collection[str]) -> list[str]:
    """Repair the scores, and drop those of adapters that are trained again: nothing in their folder could be kept."""
    scored: dict[str, None] = {}

    def fits(row: dict[str, Any]) -> bool:
        whole = _score(row)
        if whole:
            scored[row["trial"]] = None
        return whole

    notes = _lines(file, fits, "what is missing is scored again")
    lost = dict.fromkeys(trial for trial in scored if trial != BASE and trial not in trained)
    if lost:
        _rewrite(file, lambda row: row["trial"] not in lost)
    return notes + [f"{trial} is trained again: its scores are made again" for trial in lost]


def _answers(run_dir: Path, file: Path) -> list[str]:
    """Drop damaged answers with their scores: a new evaluation makes both. Answers are written whole, so a crash never
    tears a file of them."""
    if _whole(file, lambda row: True):
        return []
    run_folder = RunFolder(run_dir)
    aside = _aside(file)
    _rewrite(run_folder.scores_file, lambda row: not run_folder.holds_answers_of(file, row))
    return [f"{aside}: these answers, and their scores, are made again"]


# --- files ---


def _believed(file: Path, read: Callable[[Path], Any]) -> Any:
    """Return the content of a file; None if it is missing or damaged."""
    try:
        return read(file)
    except UNREADABLE:
        return None


def _finding(file: Path, read: Callable[[Path], Any], remedy: str) -> list[str]:
    if not file.exists() or _believed(file, read) is not None:
        return []
    return [f"{_aside(file)}: {remedy}"]


def _groups(file: Path) -> Iterator[list[bytes]]:
    """Lines of a file of `append_jsonl`, those of one call together, without what a crash tore."""
    with file.open("rb") as opened:

        def read(start: int, size: int) -> bytes:
            opened.seek(start)
            return opened.read(size)

        yield from whole_groups(read)


def _sound(group: list[bytes], fits: Callable[[dict[str, Any]], bool]) -> bool:
    try:
        rows = [json_value(line) for line in group]
        return all(isinstance(row, dict) and fits(row) for row in rows)
    except UNREADABLE:
        return False


def _whole(file: Path, fits: Callable[[dict[str, Any]], bool]) -> bool:
    """Return whether every line of a file that is written at once fits and the last one is complete."""
    groups = list(_groups(file))
    size = sum(len(line) + 1 for group in groups for line in group)
    return bool(groups) and size == file.stat().st_size and all(_sound(group, fits) for group in groups)


def _lines(file: Path, fits: Callable[[dict[str, Any]], bool], remedy: str) -> list[str]:
    """Take lines that do not fit out of a file, with all that was written together with them.

    What a crash tore is no damage: the next append cuts it off.
    """
    if not file.exists() or all(_sound(group, fits) for group in _groups(file)):
        return []
    aside = _aside(file, keep=True)
    _rewrite(file, fits)
    return [f"{aside}: damaged lines were removed; {remedy}"]


def _rewrite(file: Path, fits: Callable[[dict[str, Any]], bool]) -> None:
    if file.exists():
        kept = [line + b"\n" for group in _groups(file) if _sound(group, fits) for line in group]
        atomic_write_bytes(file, b"".join(kept))


def _aside(path: Path, *, keep: bool = False) -> str:
    """Move a damaged file (or folder) out of the way, or copy it; return both names for a message."""
    names = [f"{path.name}.damaged", *(f"{path.name}.damaged-{number}" for number in range(2, 1000))]
    to = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    if not path.exists():
        return f"{path} is missing"
    if keep:
        to.write_bytes(path.read_bytes())
    else:
        os.replace(path, to)
    return f"{path} is damaged (kept as {to.name})"
