"""Scores in memory: those of scores.jsonl, which is read on where it grew."""

from __future__ import annotations

import threading
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

from tune.config.eval_spec import TEST
from tune.config.run_spec import slug
from tune.storage.json_lines import GrowingFile
from tune.storage.records import SCORE_KEY, check_score

_key: Callable[[dict[str, Any]], tuple[Any, ...]] = itemgetter(*SCORE_KEY)


class GivenScores:
    """The scores of one model that were read already, as `KnownScores` has them; may be pickled."""

    def __init__(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Name: the slug of the model's name."""
        self._name, self._rows = name, rows
        self._trials: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            self._trials.setdefault(row["trial"], []).append(row)

    def rows(self, trial: str | None = None) -> list[dict[str, Any]]:
        """Return the rows, of one trial if it is named."""
        return [dict(row) for row in (self._rows if trial is None else self._trials.get(trial, []))]

    def has_rows(self) -> bool:
        """Return whether there are rows."""
        return bool(self._rows)

    def of_model(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of a model: none of another one than this."""
        return self.rows() if name == self._name else []


class KnownScores:
    """Rows of a file of scores, one for each `SCORE_KEY` (the last), by trial.

    A file that one sweep writes is read once in all, however often it is asked: the cost of a trial's scores does not
    grow with the trials before it.
    """

    def __init__(self, file: Path, problems: list[str] | None, within: Path) -> None:
        """Read nothing yet. problems: as of `read_jsonl`; within: the run folder."""
        self._file = GrowingFile(file, problems, within=within, check=check_score)
        self._lock = threading.Lock()
        self._rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._trials: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {}
        self._models: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {}
        self._slugs: dict[str, str] = {}

    def rows(self, trial: str | None = None) -> list[dict[str, Any]]:
        """Return the rows, of one trial if it is named, in the order they first came.

        Raises:
            ConfigError: a line is damaged, and no list of problems was given.
        """
        with self._lock:
            self._refresh()
            return [dict(row) for row in (self._rows if trial is None else self._trials.get(trial, {})).values()]

    def has_rows(self) -> bool:
        """Return whether there are rows; raises as `rows`."""
        with self._lock:
            self._refresh()
            return bool(self._rows)

    def of_model(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of a model, by the slug of its name (`tune.config.run_spec.slug`).

        Raises:
            ConfigError: as `rows`.
        """
        with self._lock:
            self._refresh()
            return [dict(row) for row in self._models.get(name, {}).values()]

    def _refresh(self) -> None:
        whole, rows = self._file.read()
        if whole:
            self._rows, self._trials, self._models = {}, {}, {}
        for row in rows:
            if "split" not in row:
                row = {"split": TEST, **row}
            try:
                key = _key(row)
            except KeyError:  # of an earlier version
                key = tuple(row.get(name) for name in SCORE_KEY)
            self._rows[key] = row
            self._trials.setdefault(row["trial"], {})[key] = row
            model = row["model"]
            if model not in self._slugs:
                self._slugs[model] = slug(model)
            self._models.setdefault(self._slugs[model], {})[key] = row
