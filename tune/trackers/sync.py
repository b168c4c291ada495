"""A thread that copies the metrics of a run folder's trials into trackers during the run.

It reads what the run writes anyway (trial.json, metrics.jsonl, scores.jsonl) and records its progress in each trial's
trackers.json. So a tracker may fail or a run be resumed: no step is sent twice, and no trial is affected.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from macdrop.errors import MacDropError
from tune.config.eval_spec import NO_ATTACK
from tune.config.parse import flatten
from tune.config.run_spec import TrainSpec
from tune.storage.atomic import atomic_write_json, read_mapping
from tune.storage.run_folder import RunFolder
from tune.storage.states import TaskState
from tune.storage.trial_folder import TrialFiles, TrialFolder
from tune.trackers.backends import TRACKERS, RunInfo, Tracker, TrackerRun

EVERY_S = 2.0
#: How long a tracker is left alone after a failure; at the end of a run it is retried once.
RETRY_S = 60.0
CLOSE_S = 60.0
#: The final state of a trial -> its name in trackers. When a run ends early, open trials count as killed.
ENDS: dict[str, str] = {
    TaskState.DONE: "finished",
    TaskState.STOPPED: "finished",
    TaskState.FAILED: "failed",
    TaskState.DIVERGED: "failed",
}


@dataclass(frozen=True)
class SyncedTrial:
    """A trial that is copied. `end` is empty while it trains or waits for scores; `alone`: its run has no other."""

    name: str
    record: TrialFolder
    end: str
    scores: Callable[[], dict[str, float]] = dict
    alone: bool = False


@dataclass
class _Copy:
    """One trial in one tracker."""

    run: TrackerRun | None = None
    id: str | None = None
    step: int = -1
    end: str = ""
    stamp: tuple[int, int] = field(default=(0, 0))


class TrackerSync:
    """Copies `trials()` from its creation until `close`.

    warn: called once per tracker that fails, from the thread that copies.
    """

    def __init__(
        self,
        names: Iterable[str],
        run_dir: Path,
        trials: Callable[[], Iterable[SyncedTrial]],
        warn: Callable[[str], None],
    ) -> None:
        self._trackers: dict[str, Tracker] = {name: TRACKERS[name](run_dir.absolute()) for name in names}
        self._trials, self._warn = trials, warn
        self._copies: dict[tuple[str, str], _Copy] = {}
        self._paused_until: dict[str, float] = {}
        self._warned: set[str] = set()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="trackers", daemon=True)
        if self._trackers:
            self._thread.start()

    def close(self) -> None:
        """Copy the rest, end open runs, and wait for it for up to `CLOSE_S`; safe to call twice."""
        if not self._trackers:
            return
        self._end.set()
        self._thread.join(timeout=CLOSE_S)
        if self._thread.is_alive():
            self._warn(f"The trackers did not accept all metrics within {CLOSE_S:.0f} s; the run folder has them.")

    # --- thread ---

    def _loop(self) -> None:
        while not self._end.wait(EVERY_S):
            self._sync(last=False)
        self._paused_until.clear()
        self._sync(last=True)

    def _sync(self, *, last: bool) -> None:
        for trial in self._trials():
            for name, tracker in self._trackers.items():
                if time.monotonic() < self._paused_until.get(name, 0.0):
                    continue
                try:
                    self._copy(name, tracker, trial, trial.end or ("killed" if last else ""))
                except Exception as error:  # whatever a tracker's package raises must not affect a trial
                    self._paused_until[name] = time.monotonic() + RETRY_S
                    if name not in self._warned:
                        self._warned.add(name)
                        why = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
                        self._warn(f"{name} does not accept the run's metrics ({why}). The run continues without it.")

    def _copy(self, name: str, tracker: Tracker, trial: SyncedTrial, end: str) -> None:
        key = (name, trial.name)
        if key not in self._copies:
            self._copies[key] = _recorded(trial.record, name)
        copy = self._copies[key]
        if copy.end and copy.end == end:
            return
        new = _new_rows(trial.record, copy)
        if not new and not end and copy.run is not None:
            return
        if copy.run is None:
            copy.run = tracker.open(_run_info(trial), copy.id)
            copy.id, copy.end = copy.run.id, ""
        before = copy.step
        if new:
            copy.step = new[-1]["step"]
        # Recorded first: after a crash in between, a few steps may be missing, but none is sent twice.
        _record(trial.record, name, copy)
        try:
            for row in new:
                copy.run.log(row["step"], _numbers(row))
                before = row["step"]
            if end:
                copy.run.close(end, trial.scores())
                copy.run, copy.end = None, end
        except BaseException:
            copy.step, copy.run, copy.stamp = before, None, (0, 0)
            raise
        finally:
            _record(trial.record, name, copy)


def _new_rows(record: TrialFolder, copy: _Copy) -> list[dict[str, Any]]:
    """Return the logged steps that have not been copied; the file is read only if it has changed."""
    try:
        state = (record.folder / "metrics.jsonl").stat()
    except FileNotFoundError:
        return []
    stamp = (state.st_size, state.st_mtime_ns)
    if stamp == copy.stamp:
        return []
    copy.stamp = stamp
    return [row for row in record.metrics() if row["step"] > copy.step]


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in row.items() if isinstance(v, (int, float)) and k != "step"}


def _run_info(trial: SyncedTrial) -> RunInfo:
    config = read_mapping(trial.record.folder / "config.yaml")
    spec = TrainSpec.model_validate(config)
    return RunInfo(trial.name, spec.setting_id(), f"seed-{spec.seed}", flatten(config), trial.alone)


def _recorded(record: TrialFolder, name: str) -> _Copy:
    known = _records(record).get(name)
    return _Copy(id=known["run"], step=known["step"], end=known["end"]) if known else _Copy()


def _record(record: TrialFolder, name: str, copy: _Copy) -> None:
    progress = {"run": copy.id, "step": copy.step, "end": copy.end}
    atomic_write_json(record.folder / "trackers.json", {**_records(record), name: progress})


def _records(record: TrialFolder) -> dict[str, Any]:
    file = record.folder / "trackers.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


# --- sources ---


def trials_of_run(run_folder: RunFolder) -> Callable[[], Iterable[SyncedTrial]]:
    """Return a source of the trials of a sweep's run folder, with their scores once they have ended.

    Each call lists the trials there are then, and reads the records that are new or have changed.
    """
    files = TrialFiles(run_folder.run_dir, partial(_synced, run_folder))
    return lambda: (trial for _, _, trial in files)


def _synced(run_folder: RunFolder, file: Path) -> SyncedTrial:
    folder = TrialFolder(file.parent)
    record = folder.record()
    end = ENDS.get(record.status, "") if record else ""
    return SyncedTrial(folder.id, folder, end, partial(scores_of, run_folder, folder.id))


def scores_of(run_folder: RunFolder, trial: str) -> dict[str, float]:
    """Return a trial's scores as benchmark/task/metric[@attack].

    Scores of the validation split are prefixed with `validation/`, those of attacks on merged weights end in `-merged`.
    """
    found = {}
    for row in run_folder.trial_scores(trial):
        if row["value"] is not None:
            split = "validation/" if row.get("split") == "validation" else ""
            merged = "-merged" if row["attack_on"] == "merged" else ""
            suffix = "" if row["attack"] == NO_ATTACK else f"@{row['attack']}{merged}"
            found[f"{split}{row['benchmark']}/{row['task']}/{row['metric']}{suffix}"] = row["value"]
    return found


class OneTrial:
    """The folder of `macdrop train`, copied while the `with` block trains into it; `status` is its final state."""

    def __init__(self, names: Iterable[str], spec: TrainSpec, folder: Path, warn: Callable[[str], None]) -> None:
        self.status = ""
        self._name, self._record = spec.trial_id(), TrialFolder(folder)
        self._sync = TrackerSync(names, folder, self._trials, warn)

    def __enter__(self) -> OneTrial:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is not None and issubclass(kind, MacDropError):
            self.status = TaskState.FAILED
        self._sync.close()

    def _trials(self) -> list[SyncedTrial]:
        """Return the trial once config.yaml is written."""
        started = (self._record.folder / "config.yaml").exists()
        return [SyncedTrial(self._name, self._record, ENDS.get(self.status, ""), alone=True)] if started else []
