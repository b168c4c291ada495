"""Local files as one table of rows, or as documents: what benchmarks read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from macdrop.errors import DataError, nearest
from tune.data.locations import ROW_SUFFIXES, kind_of, locate
from tune.data.readers import quoted, read_file, read_text, rows_inside


@dataclass(frozen=True)
class Table:
    """Rows of one or several files; `places[i]` is the file and line that row i came from."""

    rows: list[dict[str, Any]]
    places: list[str]

    def require(self, columns: Iterable[str], purpose: str) -> None:
        """Raise DataError, naming file, line and columns, at the first row that lacks one of `columns`."""
        columns = list(columns)
        for row, place in zip(self.rows, self.places, strict=True):
            missing = [column for column in columns if column not in row]
            if missing:
                hints = "".join(nearest(column, row) for column in missing) + rows_inside(row)
                raise DataError(
                    f"{place}: no {quoted(missing)} for {purpose}.{hints}\n"
                    f"The row has {quoted(row)}; needed: {quoted(columns)}."
                )
            empty = [column for column in columns if row[column] is None]
            if empty:
                raise DataError(f"{place}: {quoted(empty)} is null, and needed for {purpose}.")


def read_rows(paths: Sequence[str]) -> Table:
    """Read json, jsonl, csv, tsv or parquet files into one table.

    Raises:
        DataError: naming file and line where a row cannot be read.
    """
    rows: list[dict[str, Any]] = []
    places: list[str] = []
    for path in paths:
        for file in locate(path):
            if kind_of(file) not in ROW_SUFFIXES:
                raise DataError(f"{file}: rows are read from files that end in {', '.join(ROW_SUFFIXES)}.")
            for row in read_file(file):
                rows.append(dict(row.values))
                places.append(row.place)
    if not rows:
        raise DataError(f"No row in {', '.join(map(repr, paths))}.")
    return Table(rows, places)


def read_documents(paths: Sequence[str], column: str) -> list[str]:
    """Read texts: a text file is one document, a row file one document per row, its `column`.

    Raises:
        DataError: a file cannot be read, a row has no text in `column`, or all texts are blank.
    """
    documents: list[str] = []
    for file in (file for path in paths for file in locate(path)):
        if kind_of(file) in ROW_SUFFIXES:
            table = read_rows([str(file)])
            documents += text_column(zip(table.rows, table.places, strict=True), column)
        else:
            documents.append(read_text(file))
    if not any(document.strip() for document in documents):
        raise DataError(f"No text in {', '.join(map(repr, paths))}.")
    return documents


def text_column(rows: Iterable[tuple[Mapping[str, Any], str]], column: str) -> list[str]:
    """Return the texts in a column of rows, each given with its place.

    Raises:
        DataError: a row lacks the column, or holds something other than text.
    """
    texts = []
    for values, place in rows:
        Table([dict(values)], [place]).require([column], "the text to measure perplexity on")
        if not isinstance(values[column], str):
            raise DataError(f"{place}: {column!r:.60} must be text, not {values[column]!r:.60}.")
        texts.append(values[column])
    return texts
