"""Local data files of benchmarks: rows or text, with the place of every row so that an error can name it."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from macdrop.errors import DataError, nearest

ROW_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
TEXT_SUFFIXES = (".txt", ".md", ".text")


@dataclass(frozen=True)
class Table:
    """Rows of one or several files; `places[i]` is the file and line that row i came from."""

    rows: list[dict[str, Any]]
    places: list[str]

    def require(self, columns: Iterable[str], purpose: str) -> None:
        """Raise DataError, naming file, line and columns, at the first row that lacks one of `columns`."""
        columns = list(columns)
        for row, place in zip(self.rows, self.places, strict=True):
            missing = [column for column in columns if row.get(column) is None]
            if missing:
                hints = "".join(nearest(column, row) for column in missing)
                raise DataError(
                    f"{place}: no {_quoted(missing)} for {purpose}.{hints}\n"
                    f"The row has {_quoted(row)}; needed: {_quoted(columns)}."
                )


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(repr(str(name)) for name in names) or "no column"


def locate(path: str) -> Path:
    """Resolve ``zoo:`` names and ``~``, and make sure that a file with something in it is there.

    Raises:
        DataError: the file is missing, a folder, or empty.
        ConfigError: the ``zoo:`` name is unknown.
    """
    if path.startswith("zoo:"):
        from tune.zoo.catalog import resolve

        path = str(resolve(path))
    file = Path(path).expanduser()
    if not file.is_file():
        kind = "is a folder, not a file" if file.is_dir() else "does not exist"
        siblings = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
        where = "" if file.is_absolute() else f"\nPaths are relative to the current directory, {Path.cwd()}."
        raise DataError(f"Data file {path!r} {kind}.{nearest(file.name, siblings)}{where}")
    if not file.stat().st_size:
        raise DataError(f"Data file {path!r} is empty.")
    return file


def is_local(path: str) -> bool:
    """Tell a local file (existing, ``zoo:``, or with a known suffix) from the id of a hub data set."""
    known = Path(path).suffix in ROW_SUFFIXES + TEXT_SUFFIXES
    return known or path.startswith(("zoo:", "/", "./", "../", "~")) or Path(path).expanduser().exists()


def read_rows(paths: Sequence[str]) -> Table:
    """Read json (one array), jsonl, csv, tsv or parquet files into one table.

    Raises:
        DataError: naming file and line where a row cannot be read.
    """
    rows: list[dict[str, Any]] = []
    places: list[str] = []
    for path in paths:
        for place, row in _rows_of(locate(path)):
            if not isinstance(row, dict):
                raise DataError(f"{place}: a row must be an object with named columns, not {type(row).__name__}.")
            rows.append(row)
            places.append(place)
    if not rows:
        raise DataError(f"No row in {', '.join(map(repr, paths))}.")
    return Table(rows, places)


def _rows_of(file: Path) -> Iterable[tuple[str, Any]]:
    if file.suffix not in ROW_SUFFIXES:
        raise DataError(f"{file}: rows are read from files that end in {', '.join(ROW_SUFFIXES)}.")
    if file.suffix == ".parquet":
        import pandas as pd

        try:
            frame = pd.read_parquet(file)
        except (OSError, ValueError) as error:
            raise DataError(f"{file}: cannot be read as parquet: {error}") from None
        return [(f"{file}, row {i}", row) for i, row in enumerate(frame.to_dict("records"), 1)]
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start}).") from None
    if file.suffix in (".csv", ".tsv"):
        reader = csv.DictReader(text.splitlines(keepends=True), delimiter="\t" if file.suffix == ".tsv" else ",")
        return [(f"{file}, line {reader.line_num}", row) for row in reader]
    if text.lstrip().startswith("["):
        return [(f"{file}, row {i}", row) for i, row in enumerate(_json(text, str(file)), 1)]
    lines = enumerate(text.split("\n"), 1)
    return [(f"{file}, line {i}", _json(line, f"{file}, line {i}")) for i, line in lines if line.strip()]


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not valid JSON ({error.msg}, column {error.colno}).") from None


def read_documents(paths: Sequence[str], column: str) -> list[str]:
    """Read texts: a text file is one document, a row file one document for each row's `column`."""
    documents: list[str] = []
    for path in paths:
        file = locate(path)
        if file.suffix in ROW_SUFFIXES:
            table = read_rows([path])
            table.require([column], "the text to measure perplexity on")
            documents += [str(row[column]) for row in table.rows]
        else:
            try:
                documents.append(file.read_text(encoding="utf-8"))
            except UnicodeDecodeError as error:
                raise DataError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start}).") from None
    if not any(document.strip() for document in documents):
        raise DataError(f"No text in {', '.join(map(repr, paths))}.")
    return documents
