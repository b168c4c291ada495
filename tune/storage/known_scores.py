"""Scores in memory: those of scores.jsonl, which is read on where it grew."""

from __future__ import annotations

import itertools
import marshal
import threading
from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from tune.config.eval_spec import TEST
from tune.config.run_spec import slug
from tune.storage.json_lines import GrowingFile
from tune.storage.records import SCORE_KEY, check_score

#: What makes a score of a trial one score.
_KEY = tuple(name for name in SCORE_KEY if name != "trial")
_values_of_key: Callable[[dict[str, Any]], tuple[Any, ...]] = itemgetter(*_KEY)


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


class Piece(NamedTuple):
    """Rows of one trial and model with the same keys that stand together in the file; their values are packed."""

    names: tuple[str, ...]
    values: bytes

    def rows(self) -> Iterator[dict[str, Any]]:
        return (dict(zip(self.names, values)) for values in marshal.loads(self.values))  # noqa: B905  a fifth faster


class KnownScores:
    """Rows of a file of scores, one for each `SCORE_KEY` (the last), by trial.

    A file that one sweep writes is read once in all, however often it is asked: the cost of a trial's scores does not
    grow with the trials before it. Values are kept packed: half a million rows as mappings would take a gigabyte.
    """

    def __init__(self, file: Path, problems: list[str] | None, within: Path) -> None:
        """Read nothing yet. problems: as of `read_jsonl`; within: the run folder."""
        self._file = GrowingFile(file, problems, within=within, check=check_score)
        self._lock = threading.Lock()
        self._forget()
        #: Keys that many pieces share, each as one object.
        self._names: dict[tuple[str, ...], tuple[str, ...]] = {}

    def _forget(self) -> None:
        self._trials: dict[str, list[Piece]] = {}
        #: Model, by its name and by the slug of that -> its trials.
        self._models: dict[str, dict[str, None]] = {}

    def rows(self, trial: str | None = None) -> list[dict[str, Any]]:
        """Return the rows trial by trial, or of one trial, in the order they first came.

        Raises:
            ConfigError: a line is damaged, and no list of problems was given.
        """
        with self._lock:
            self._refresh()
            return self._made(self._trials if trial is None else [trial])

    def has_rows(self) -> bool:
        """Return whether there are rows; raises as `rows`."""
        with self._lock:
            self._refresh()
            return bool(self._trials)

    def of_model(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of a model, by the slug of its name (`tune.config.run_spec.slug`).

        Raises:
            ConfigError: as `rows`.
        """
        with self._lock:
            self._refresh()
            trials = self._models.get(name, {})
            # The base models are one trial.
            return [row for row in self._made(trials) if self._models[row["model"]] is trials]

    def _made(self, trials: Iterable[str]) -> list[dict[str, Any]]:
        made: list[dict[str, Any]] = []
        for trial in trials:
            made += {_key(row): row for piece in self._trials.get(trial, ()) for row in piece.rows()}.values()
        return made

    def _refresh(self) -> None:
        whole, rows = self._file.read()
        if whole:
            self._forget()
        complete = (row if "split" in row else {"split": TEST, **row} for row in rows)
        for (trial, model, names), together in itertools.groupby(complete, _place):
            names = self._names.setdefault(names, names)
            values = marshal.dumps([tuple(row.values()) for row in together])
            self._trials.setdefault(trial, []).append(Piece(names, values))
            self._trials_of(model)[trial] = None

    def _trials_of(self, model: str) -> dict[str, None]:
        if model not in self._models:
            # Names with the same slug are of one model.
            self._models[model] = self._models.setdefault(slug(model), {})
        return self._models[model]


def _place(row: dict[str, Any]) -> tuple[str, str, tuple[str, ...]]:
    """Return what the rows of a `Piece` have in common: trial, model and keys."""
    return row["trial"], row["model"], tuple(row)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    try:
        return _values_of_key(row)
    except KeyError:  # a row of an earlier version
        return tuple(row.get(name) for name in _KEY)
