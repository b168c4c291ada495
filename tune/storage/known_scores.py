"""Scores in memory: those of scores.jsonl, which is read on where it grew."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from operator import itemgetter
from pathlib import Path
from typing import Any

from tune.config.eval_spec import TEST
from tune.config.run_spec import slug
from tune.storage.json_lines import GrowingFile
from tune.storage.records import SCORE_KEY, check_score

#: What makes a score of a trial one score.
_KEY = tuple(name for name in SCORE_KEY if name != "trial")
_key: Callable[[dict[str, Any]], tuple[Any, ...]] = itemgetter(*_KEY)


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
    grow with the trials before it. Rows are kept as their values, and those of equal keys share these: half a million
    rows as mappings would take a gigabyte.
    """

    def __init__(self, file: Path, problems: list[str] | None, within: Path) -> None:
        """Read nothing yet. problems: as of `read_jsonl`; within: the run folder."""
        self._file = GrowingFile(file, problems, within=within, check=check_score)
        self._lock = threading.Lock()
        self._forget()
        #: Tuples that many rows share, each as one object.
        self._shared: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def _forget(self) -> None:
        #: Keys and values of each row, in the order they first came.
        self._keys: list[tuple[str, ...]] = []
        self._values: list[tuple[Any, ...]] = []
        #: Trial -> what makes a score one score, but for the trial -> the number of its row.
        self._trials: dict[str, dict[tuple[Any, ...], int]] = {}
        #: Model, by its name and by the slug of that -> the numbers of its rows.
        self._models: dict[str, list[int]] = {}

    def rows(self, trial: str | None = None) -> list[dict[str, Any]]:
        """Return the rows, of one trial if it is named, in the order they first came.

        Raises:
            ConfigError: a line is damaged, and no list of problems was given.
        """
        with self._lock:
            self._refresh()
            return self._made(range(len(self._keys)) if trial is None else self._trials.get(trial, {}).values())

    def has_rows(self) -> bool:
        """Return whether there are rows; raises as `rows`."""
        with self._lock:
            self._refresh()
            return bool(self._keys)

    def of_model(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of a model, by the slug of its name (`tune.config.run_spec.slug`).

        Raises:
            ConfigError: as `rows`.
        """
        with self._lock:
            self._refresh()
            return self._made(self._models.get(name, []))

    def _made(self, numbers: Iterable[int]) -> list[dict[str, Any]]:
        keys, values = self._keys, self._values
        return [dict(zip(keys[number], values[number])) for number in numbers]  # noqa: B905  a fifth faster

    def _refresh(self) -> None:
        whole, rows = self._file.read()
        if whole:
            self._forget()
        shared = self._shared.setdefault
        for row in rows:
            if "split" not in row:
                row = {"split": TEST, **row}
            try:
                key = _key(row)
            except KeyError:  # of an earlier version
                key = tuple(row.get(name) for name in _KEY)
            names = tuple(row)
            names, key = shared(names, names), shared(key, key)
            if (known := self._trials.get(row["trial"])) is None:
                known = self._trials[row["trial"]] = {}
            if (number := known.get(key)) is None:
                known[key] = len(self._keys)
                self._of_model(row["model"]).append(len(self._keys))
                self._keys.append(names)
                self._values.append(tuple(row.values()))
            else:
                self._keys[number], self._values[number] = names, tuple(row.values())

    def _of_model(self, model: str) -> list[int]:
        if model not in self._models:
            # Names with the same slug are of one model.
            self._models[model] = self._models.setdefault(slug(model), [])
        return self._models[model]
