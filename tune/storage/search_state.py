"""Persistent state of a search in the run folder: its draws and the time it has spent."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from macdrop.errors import ConfigError
from tune.storage.atomic import atomic_write_json, read_mapping
from tune.storage.json_lines import append_jsonl, read_jsonl
from tune.storage.records import TrialRecord

#: Interval in seconds at which the time spent searching is saved; a killed run loses no more than this.
KEEP_EVERY_S = 5.0


def remember(file: Path, number: int, values: Mapping[str, Any]) -> None:
    """Keep what the searcher drew."""
    append_jsonl(file, [{"number": number, "values": values}])


def draws(file: Path, records: Iterable[TrialRecord]) -> list[dict[str, Any]]:
    """The values of all draws by their number, up to the first number that is missing.

    Without the file those that the trials themselves remember, by their start; draws that were never begun are lost.
    """
    kept = {row["number"]: row["values"] for row in read_jsonl(file, needs=("number", "values"))}
    if kept:
        whole = itertools.takewhile(kept.__contains__, itertools.count())
        return [kept[number] for number in whole]
    return [record.drawn for record in records if record.drawn is not None]


class SearchTime:
    """Seconds spent searching for a model, earlier runs of the folder included: a time budget is for all of them.

    They pass within the `with` block. `within` is a folder above the file that is there.

    Raises:
        ConfigError: the file is damaged.
    """

    def __init__(self, file: Path, within: Path) -> None:
        self._file, self._within = file, within
        self._before = search_time(file) if file.is_file() else 0.0
        self._began: float | None = None
        self._next = 0.0

    @property
    def seconds(self) -> float:
        return self._before + (0.0 if self._began is None else time.monotonic() - self._began)

    def keep(self) -> None:
        """Write them down, if that is `KEEP_EVERY_S` ago."""
        if time.monotonic() >= self._next:
            self._write()

    def _write(self) -> None:
        atomic_write_json(self._file, {"seconds": round(self.seconds, 3)}, within=self._within)
        self._next = time.monotonic() + KEEP_EVERY_S

    def __enter__(self) -> SearchTime:
        self._began = time.monotonic()
        return self

    def __exit__(self, *_: Any) -> None:
        self._before, self._began = self.seconds, None
        self._write()


def search_time(file: Path) -> float:
    """Read the seconds of a search_time.json.

    Raises:
        ConfigError: it is damaged.
    """
    seconds = read_mapping(file, needs=("seconds",))["seconds"]
    if type(seconds) not in (int, float) or not 0 <= seconds < math.inf:
        raise ConfigError(f"{file} is damaged: seconds cannot be {seconds!r:.80}.")
    return float(seconds)
