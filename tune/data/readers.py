"""Reader of local data files: json, jsonl, csv, tsv, parquet and txt, for training and for every benchmark.

Reading is strict, and every row knows its place ("file, line 12"), so that an error can name it. A byte order mark is
skipped. JSON is a list of objects or one object per line, whatever the suffix (hub files mix them).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from macdrop.errors import DataError, nearest
from tune.zoo.catalog import resolve

ROW_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
TEXT_SUFFIXES = (".txt", ".md", ".text")
_JSON_SHAPE = "Expected a list of objects, or one object per line."


@dataclass(frozen=True)
class Row:
    """One row of a data set; `place` is where it stands, for messages."""

    values: Mapping[str, Any]
    place: str


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


# --- where a file is ---


def locate(path: str) -> Path:
    """Resolve ``zoo:`` names and ``~``, and check that the file exists and is not empty.

    Raises:
        DataError: the file is missing, a folder, or empty.
        ConfigError: the ``zoo:`` name is unknown.
    """
    file = Path(resolve(path)).expanduser()
    if not file.is_file():
        kind = "is a folder, not a file" if file.is_dir() else "does not exist"
        siblings = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
        where = "" if file.is_absolute() else f"\nPaths are relative to the current directory, {Path.cwd()}."
        raise DataError(f"Data file {path!r} {kind}.{nearest(file.name, siblings)}{where}")
    if not file.stat().st_size:
        raise DataError(f"Data file {path!r} is empty.")
    return file


def looks_like_a_path(given: str) -> bool:
    """Return whether a name means a local file or folder, by its spelling alone."""
    known = Path(given).suffix in ROW_SUFFIXES + TEXT_SUFFIXES
    return known or given.startswith((".", "/", "~")) or given.count("/") > 1


def is_local(path: str) -> bool:
    """Return whether a name means local data, not a hub id: a path by its spelling, ``zoo:``, or an existing file."""
    return looks_like_a_path(path) or path.startswith("zoo:") or Path(path).expanduser().exists()


# --- whole data sets ---


def read_rows(paths: Sequence[str]) -> Table:
    """Read json, jsonl, csv, tsv or parquet files into one table.

    Raises:
        DataError: naming file and line where a row cannot be read.
    """
    rows: list[dict[str, Any]] = []
    places: list[str] = []
    for path in paths:
        file = locate(path)
        if file.suffix not in ROW_SUFFIXES:
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
    for path in paths:
        file = locate(path)
        if file.suffix not in ROW_SUFFIXES:
            documents.append(_read_text(file))
            continue
        table = read_rows([path])
        table.require([column], "the text to measure perplexity on")
        for row, place in zip(table.rows, table.places, strict=True):
            if not isinstance(row[column], str):
                raise DataError(f"{place}: {column!r} must be text, not {row[column]!r:.60}.")
            documents.append(row[column])
    if not any(document.strip() for document in documents):
        raise DataError(f"No text in {', '.join(map(repr, paths))}.")
    return documents


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8.") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}.") from None


# --- one file ---


def read_file(path: Path) -> Iterator[Row]:
    """Rows of one file, by its suffix; a txt file has one row per line, with the column `text`.

    Raises:
        DataError: naming file and line where a row cannot be read.
    """
    try:
        yield from _READERS.get(path.suffix, _json_rows)(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error


def _json_rows(path: Path) -> Iterator[Row]:
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        start = file.read(64).lstrip()
        file.seek(0)
        if start.startswith("["):
            yield from _json_list(path, file.read().removeprefix("\ufeff"))
            return
        for number, line in enumerate(file, 1):
            line = line.removeprefix("\ufeff")  # the codec lets it through after a seek
            if line.strip():
                place = f"{path}, line {number}"
                try:
                    values = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise _json_error(place, error) from None
                yield _object_row(values, place, line)


def _json_list(path: Path, text: str) -> Iterator[Row]:
    """Elements of one JSON list, each with the line it starts on."""
    decode = json.JSONDecoder().raw_decode
    lines = _Lines(path, text)
    position = _skip_space(text, text.index("[") + 1)
    more = text[position : position + 1] != "]"
    while more:
        place = lines.place(position)
        try:
            values, end = decode(text, position)
        except json.JSONDecodeError as error:
            raise _json_error(lines.place(error.pos), error) from None
        except (ValueError, RecursionError) as error:
            raise _json_error(place, error) from None
        yield _object_row(values, place, text[position:end])
        position = _skip_space(text, end)
        more = text[position : position + 1] == ","
        if more:
            position = _skip_space(text, position + 1)
        elif text[position : position + 1] != "]":
            raise DataError(f"{lines.place(position)}: not valid JSON (a comma or the end of the list is missing).")
    position = _skip_space(text, position + 1)
    if position < len(text):
        raise DataError(f"{lines.place(position)}: not valid JSON (there is more after the end of the list).")


class _Lines:
    """Line numbers of ascending positions in a text, counted in one pass."""

    def __init__(self, path: Path, text: str) -> None:
        self._path, self._text = path, text
        self._counted, self._line = 0, 1

    def place(self, position: int) -> str:
        self._line += self._text.count("\n", self._counted, position)
        self._counted = position
        return f"{self._path}, line {self._line}"


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _json_error(place: str, error: Exception) -> DataError:
    if isinstance(error, RecursionError):
        return DataError(f"{place}: nested too deeply. {_JSON_SHAPE}")
    why = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
    return DataError(f"{place}: not valid JSON ({why:.200}).\n{_JSON_SHAPE}")


def _object_row(values: Any, place: str, source: str) -> Row:
    if not isinstance(values, dict):
        raise DataError(f"{place}: expected an object with named columns, found {type(values).__name__}.")
    if "\\u" in source:  # only an escape can spell half a character: the file itself was decoded strictly
        try:
            json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise DataError(f"{place}: {half} is half of a surrogate pair, which no tokenizer can encode.") from None
    return Row(values, place)


def _csv_rows(path: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        line = 1
        try:
            columns = next(reader, None)
            if columns == []:
                raise DataError(f"{path}, line 1: no column names.")
            line = reader.line_num + 1
            for values in reader:
                if values and columns is not None:
                    place = f"{path}, line {line}"
                    if len(values) != len(columns):
                        kind = "more" if len(values) > len(columns) else "fewer"
                        raise DataError(f"{place}: {kind} values than the {len(columns)} columns of the header.")
                    yield Row(dict(zip(columns, values, strict=True)), place)
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{path}, line {line}: not valid CSV ({error}).") from error


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
        for number, values in enumerate((values for batch in batches for values in batch.to_pylist()), 1):
            yield Row(values, f"{path}, row {number}")
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a parquet file ({error}).") from error


def _text_rows(path: Path) -> Iterator[Row]:
    """One row per line, as `datasets` reads text files; blank lines are skipped."""
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield Row({"text": line.rstrip("\r\n")}, f"{path}, line {number}")


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".csv": partial(_csv_rows, delimiter=","),
    ".tsv": partial(_csv_rows, delimiter="\t"),
    ".parquet": _parquet_rows,
    ".txt": _text_rows,
}
