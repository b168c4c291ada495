"""A thread that copies the numbers of a run folder's trials into trackers while the run is going.

It reads what the run writes anyway (trial.json, metrics.jsonl, scores.jsonl) and remembers in each trial's
trackers.json how far it came. So a tracker can fail, or a run be resumed, and neither a step is sent twice nor does a
trial notice.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from macdrop.errors import MacDropError
from tune.config.parse import flatten
from tune.config.run_spec import TrainSpec
from tune.storage.atomic import atomic_write_json
from tune.storage.run_folder import RunFolder, TrialRecord
from tune.storage.states import TaskState
from tune.trackers.backends import TRACKERS, RunInfo, Tracker, TrackerRun

EVERY_S = 2.0
#: After a failure a tracker is left alone for so long; at the end of a run it is tried once more.
RETRY_S = 60.0
CLOSE_S = 60.0
#: How a trial ended -> how trackers call it. Of a run that ends early, open trials are killed.
ENDS = {
    TaskState.DONE: "finished",
    TaskState.STOPPED: "finished",
    TaskState.FAILED: "failed",
    TaskState.DIVERGED: "failed",
}


@dataclass(frozen=True)
class Seen:
    """A trial as the mirror sees it. `end` is empty while it trains or waits for scores."""

    name: str
    record: TrialRecord
    end: str
    scores: Callable[[], dict[str, float]] = dict


@dataclass
class _Copy:
    """One trial in one tracker."""

    run: TrackerRun | None = None
    id: str | None = None
    step: int = -1
    end: str = ""
    stamp: tuple[int, int] = field(default=(0, 0))


class TrackerSync:
    """Follows `trials()` from its making until `close`.

    warn: told once of each tracker that fails; called from the mirror's thread.
    """

    def __init__(
        self, names: Iterable[str], run_dir: Path, trials: Callable[[], Iterable[Seen]], warn: Callable[[str], None]
    ) -> None:
        self._trackers: dict[str, Tracker] = {name: TRACKERS[name](run_dir.absolute()) for name in names}
        self._trials, self._warn = trials, warn
        self._copies: dict[tuple[str, str], _Copy] = {}
        self._rest_until: dict[str, float] = {}
        self._warned: set[str] = set()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="trackers", daemon=True)
        if self._trackers:
            self._thread.start()

    def close(self) -> None:
        """Copy what is left, end what is open, and wait for it, but not for ever."""
        if not self._trackers:
            return
        self._end.set()
        self._thread.join(timeout=CLOSE_S)
        if self._thread.is_alive():
            self._warn(f"The trackers did not take everything within {CLOSE_S:.0f} s; the run folder has it all.")

    # ---------------------------------------------------------------- thread

    def _loop(self) -> None:
        while not self._end.wait(EVERY_S):
            self._sync(last=False)
        self._rest_until.clear()
        self._sync(last=True)

    def _sync(self, *, last: bool) -> None:
        for seen in self._trials():
            for name, tracker in self._trackers.items():
                if time.monotonic() < self._rest_until.get(name, 0.0):
                    continue
                try:
                    self._copy(name, tracker, seen, seen.end or ("killed" if last else ""))
                except Exception as error:  # whatever a tracker's package raises, no trial may suffer from it
                    self._rest_until[name] = time.monotonic() + RETRY_S
                    if name not in self._warned:
                        self._warned.add(name)
                        told = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
                        self._warn(f"{name} does not take the run's numbers ({told}). The run goes on without it.")

    def _copy(self, name: str, tracker: Tracker, seen: Seen, end: str) -> None:
        key = (name, seen.name)
        copy = self._copies.setdefault(key, _remembered(seen.record, name))
        if copy.end and copy.end == end:
            return
        new = _new_rows(seen.record, copy)
        if not new and not end and copy.run is not None:
            return
        if copy.run is None:
            copy.run = tracker.open(_card(seen), copy.id)
            copy.id, copy.end = copy.run.id, ""
        before = copy.step
        if new:
            copy.step = new[-1]["step"]
        # Remembered first: after a crash in between, a few steps may be missing, but none is there twice.
        _remember(seen.record, name, copy)
        try:
            for row in new:
                copy.run.log(row["step"], _numbers(row))
                before = row["step"]
            if end:
                copy.run.close(end, seen.scores())
                copy.run, copy.end = None, end
        except BaseException:
            copy.step, copy.run, copy.stamp = before, None, (0, 0)
            raise
        finally:
            _remember(seen.record, name, copy)


def _new_rows(record: TrialRecord, copy: _Copy) -> list[dict[str, Any]]:
    """Logged steps that the copy has not; the file is read where it has changed."""
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


def _card(seen: Seen) -> RunInfo:
    config = yaml.safe_load((seen.record.folder / "config.yaml").read_text(encoding="utf-8"))
    spec = TrainSpec.model_validate(config)
    return RunInfo(seen.name, spec.setting_id(), f"seed-{spec.seed}", flatten(config))


def _remembered(record: TrialRecord, name: str) -> _Copy:
    known = _memory(record).get(name)
    return _Copy(id=known["run"], step=known["step"], end=known["end"]) if known else _Copy()


def _remember(record: TrialRecord, name: str, copy: _Copy) -> None:
    told = {"run": copy.id, "step": copy.step, "end": copy.end}
    atomic_write_json(record.folder / "trackers.json", {**_memory(record), name: told})


def _memory(record: TrialRecord) -> dict[str, Any]:
    file = record.folder / "trackers.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


# --- what is followed ---


def trials_of_run(run_folder: RunFolder) -> Iterator[Seen]:
    """The trials of a sweep's run folder, with their scores once they have ended."""
    for file in sorted((run_folder.run_dir / "trials").glob("*/trial.json")):
        record = TrialRecord(file.parent)
        yield Seen(record.id, record, ENDS.get(record.status, ""), partial(scores_of, run_folder, record.id))


def scores_of(run_folder: RunFolder, trial: str) -> dict[str, float]:
    """Scores of a trial by the name benchmark/task/metric[@attack], with `validation/` before those of that split and
    `-merged` behind those of an attack on merged weights."""
    found = {}
    for row in run_folder.score_rows():
        if row["trial"] == trial and row["value"] is not None:
            split = "validation/" if row.get("split") == "validation" else ""
            merged = "-merged" if row["attack_on"] == "merged" else ""
            suffix = "" if row["attack"] == "none" else f"@{row['attack']}{merged}"
            found[f"{split}{row['benchmark']}/{row['task']}/{row['metric']}{suffix}"] = row["value"]
    return found


class OneTrial:
    """The folder of `macdrop train`, followed while the `with` block trains into it; `status` is how that ended."""

    def __init__(self, names: Iterable[str], spec: TrainSpec, folder: Path, warn: Callable[[str], None]) -> None:
        self.status = ""
        self._name, self._record = spec.trial_id(), TrialRecord(folder)
        self._sync = TrackerSync(names, folder, self._seen, warn)

    def __enter__(self) -> OneTrial:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is not None and issubclass(kind, MacDropError):
            self.status = TaskState.FAILED
        self._sync.close()

    def _seen(self) -> list[Seen]:
        """Nothing before config.yaml is written."""
        there = (self._record.folder / "config.yaml").exists()
        return [Seen(self._name, self._record, ENDS.get(self.status, ""))] if there else []
