"""The folder of one trial in a run folder, and the trial.json files of all of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from tune.config.syntax.yaml_core import write_blocks
from tune.storage.atomic import Stamp, atomic_write_json, atomic_write_text, now, plain, read_mapping, stamp_of, stat
from tune.storage.json_lines import append_jsonl, read_jsonl
from tune.storage.records import TrialRecord, config_seal, read_record
from tune.storage.states import Stage, TaskState

T = TypeVar("T")


class TrialFolder:
    """The folder of one trial, written by one process at a time. `within`: an existing folder above it."""

    def __init__(self, folder: Path, problems: list[str] | None = None, within: Path | None = None) -> None:
        self.folder, self.problems, self._within = folder, problems, within
        self._last_step: int | None = None

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def adapter_dir(self) -> Path:
        return self.folder / "adapter"

    def record(self) -> TrialRecord | None:
        """Read trial.json; None before `start`."""
        file = self.folder / "trial.json"
        return None if stat(file, self._within) is None else read_record(file, TrialRecord, within=self._within)

    def _content(self) -> dict[str, Any]:
        file = self.folder / "trial.json"
        return {} if stat(file, self._within) is None else read_mapping(file, within=self._within)

    def start(
        self,
        config: Mapping[str, Any],
        *,
        model: str,
        arm: str,
        seed: int,
        stage: Stage = Stage.FINAL,
        setting: str | None = None,
        cell: Mapping[str, Any] | None = None,
        drawn: Mapping[str, Any] | None = None,
    ) -> None:
        """Record that the trial runs. Called again after a restart, it counts the attempt and keeps the first start.

        setting: `TrainSpec.setting_id`, equal for trials that differ in their seed alone.
        cell: the searched kind of adapter (`tune.scheduling.selection`), within which plain and MacDrop are compared.
        drawn: the searched values behind the trial; None for one that no search asked for.
        """
        before = self._content()
        text = write_blocks(plain(config))
        atomic_write_text(self.folder / "config.yaml", text, within=self._within)
        self._write(
            trial=self.id,
            model=model,
            arm=arm,
            seed=seed,
            stage=stage,
            setting=setting,
            cell=dict(cell or {}),
            drawn=drawn,
            status=TaskState.RUNNING,
            reason=None,
            started=before.get("started") or now(),
            attempts=before.get("attempts", 0) + 1,
            config_seal=config_seal(text),
        )

    def log(self, step_metrics: Iterable[Mapping[str, Any]]) -> None:
        """Append metrics of logged steps, each with its `step`, ascending.

        A resumed trial repeats the steps after its last checkpoint: their earlier lines are replaced.
        """
        rows = [dict(row) for row in step_metrics]
        if not rows:
            return
        file = self.folder / "metrics.jsonl"
        first = rows[0]["step"]
        if self._last_step is None:
            self._last_step = max((row["step"] for row in read_jsonl(file, within=self._within)), default=-1)
        if first <= self._last_step:
            rows = [row for row in read_jsonl(file, within=self._within) if row["step"] < first] + rows
            atomic_write_text(file, "".join(json.dumps(plain(row)) + "\n" for row in rows), within=self._within)
        else:
            append_jsonl(file, rows, within=self._within)
        self._last_step = rows[-1]["step"]

    def metrics(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl, by step."""
        return read_jsonl(self.folder / "metrics.jsonl", self.problems, within=self._within)

    def note(self, **content: Any) -> None:
        """Add to what is recorded, whatever the status."""
        self._write(**{**self._content(), **content})

    def finish(self, status: TaskState, reason: str | None = None, **summary: Any) -> None:
        """Record how the trial ended (a final state) and anything to keep of it: eval_loss, steps, seconds ..."""
        assert status.is_final, status
        self._write(**{**self._content(), "status": status, "reason": reason, "finished": now(), **summary})

    def _write(self, **content: Any) -> None:
        atomic_write_json(self.folder / "trial.json", content, within=self._within)


class TrialFiles(Generic[T]):
    """The trial.json files of a run folder, and what `read` makes of each: called again once the file has changed."""

    def __init__(self, run_dir: Path, read: Callable[[Path], T]) -> None:
        self._folder, self._read = run_dir / "trials", read
        self._known: dict[str, tuple[Stamp, T]] = {}

    def __iter__(self) -> Iterator[tuple[str, Stamp, T]]:
        """Yield each trial by name, with the stamp of its file and what was read."""
        for name in self._names():
            file = self._folder / name / "trial.json"
            stamp = stamp_of(file)  # first: what changes while it is read is read again
            if stamp is None:
                continue
            known = self._known.get(name)
            if known is None or known[0] != stamp:
                known = self._known[name] = stamp, self._read(file)
            yield name, *known

    def _names(self) -> list[str]:
        try:
            with os.scandir(self._folder) as found:
                return sorted(entry.name for entry in found if entry.is_dir())
        except FileNotFoundError:
            return []
