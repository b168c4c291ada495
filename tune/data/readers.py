"""Reader of local data files: json, jsonl, csv, tsv, parquet, arrow and txt, for training and for every benchmark.

Reading is strict, and every row knows its place ("file, line 12"), so that an error can name it. A byte order mark is
skipped, an ending may be in capitals, and texts may be compressed (gz, bz2, xz, zst). JSON is a list of objects or one
object per line, whatever the ending (hub files mix them); a .json file may be one object of columns.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from macdrop.errors import DataError
from tune.data.locations import compression_of, kind_of

_JSON_SHAPE = "Expected a list of objects, or one object per line."
#: Characters of a file that are looked at to say what it holds, where its first line is not a row.
_LOOK = 2**26


@dataclass(frozen=True)
class Row:
    """One row of a data set; `place` is where it stands, for messages."""

    values: Mapping[str, Any]
    place: str


def quoted(names: Iterable[str]) -> str:
    """List names for a message, the first 20 of them."""
    return ", ".join(repr(f"{name:.60}") for name in list(names)[:20]) or "no column"


def rows_inside(values: Mapping[str, Any]) -> str:
    """Return a hint if the columns of a row look like an object around the rows, such as ``{"data": [...]}``."""
    lists = [key for key, value in values.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if len(lists) != 1:
        return ""
    return f" If the rows are the list under {lists[0]!r:.60}, save that list as the file."


def read_text(file: Path) -> str:
    """Return the whole text of a file.

    Raises:
        DataError: it is not text, or cannot be read.
    """
    with _problems_of(file), _open(file) as opened:
        return opened.read()


def read_file(path: Path) -> Iterator[Row]:
    """Rows of one file, by its ending; a txt file has one row per line, with the column `text`.

    Raises:
        DataError: naming file and line where a row cannot be read.
    """
    with _problems_of(path):
        yield from _READERS.get(kind_of(path), _json_rows)(path)


@contextmanager
def _problems_of(path: Path) -> Iterator[None]:
    """Turn what decoding and unpacking raise into a DataError."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8.") from error
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: not a whole {compression_of(path)} file ({error}).") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:
        if type(error).__name__ != "ZstdError":  # of a package that is imported only where it is used
            raise
        raise DataError(f"{path}: not a whole .zst file ({error}).") from error


def _open(path: Path, newline: str | None = None) -> TextIO:
    """Open a text file, compressed or not; its byte order mark is skipped."""
    ending = compression_of(path)
    if ending == ".zst":
        try:
            import zstandard
        except ImportError:
            raise DataError(
                f"{path} is compressed with zstandard, which is not installed.\nUnpack it, or: pip install zstandard"
            ) from None
        opener: Any = partial(zstandard.open, mode="r")
    else:
        opener = partial(_OPENERS[ending], mode="rt")
    opened: TextIO = opener(path, encoding="utf-8-sig", newline=newline)
    return opened


def _json_rows(path: Path) -> Iterator[Row]:
    with _open(path, newline="\n") as file:
        begin = file.read(64).lstrip()[:1]
    if begin == "[":
        with _open(path, newline="\n") as whole:
            yield from _json_list(path, whole.read())
        return
    if begin == "{" and kind_of(path) == ".json":  # in a .jsonl, one line with lists is one row
        with _open(path, newline="\n") as whole:
            columns = _columns_of(whole.read())
        if columns is not None:
            yield from _column_rows(path, columns)
            return
    with _open(path, newline="\n") as file:
        first = True
        for number, line in enumerate(file, 1):
            if line.strip():
                place = f"{path}, line {number}"
                try:
                    values = _DECODER.decode(line)
                except (ValueError, RecursionError) as error:
                    hint = _one_object(line + file.read(_LOOK)) if first else ""
                    raise _json_error(place, error, hint) from None
                yield _object_row(values, place, line)
                first = False


def _columns_of(text: str) -> dict[str, list[Any]] | None:
    """Return the columns that a text holds as one JSON object; None if it holds something else.

    A list of objects is not a column, but the turns of one conversation, or rows under a key of their own.
    """
    try:
        values = _DECODER.decode(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or not values:
        return None
    columns = [each for each in values.values() if isinstance(each, list) and each and not isinstance(each[0], dict)]
    return values if len(columns) == len(values) else None


def _column_rows(path: Path, columns: dict[str, list[Any]]) -> Iterator[Row]:
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{name!r:.40} {length}" for name, length in list(lengths.items())[:20])
        raise DataError(f"{path}: the columns differ in length: {counts}.")
    for number, values in enumerate(zip(*columns.values(), strict=True), 1):
        yield Row(dict(zip(columns, values, strict=True)), f"{path}, row {number}")


def _one_object(text: str) -> str:
    """Say so if a text begins with one object on several lines."""
    try:
        values, end = _DECODER.raw_decode(text, _skip_space(text, 0))
    except (ValueError, RecursionError):
        return ""
    if not isinstance(values, dict):
        return ""
    if _skip_space(text, end) < len(text):
        return "Its objects take several lines each. "
    return f"It holds one object with the keys {quoted(values)}.{rows_inside(values)} "


def _json_list(path: Path, text: str) -> Iterator[Row]:
    """Elements of one JSON list, each with the line it starts on, and its number where all are on one."""
    decode = _DECODER.raw_decode
    lines = _Lines(path, text)
    position = _skip_space(text, text.index("[") + 1)
    more = text[position : position + 1] != "]"
    one_line, number = "\n" not in text.strip(), 0
    while more:
        number += 1
        place = lines.place(position) + (f", row {number}" if one_line else "")
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


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{_twice(key for key, _ in pairs)!r:.60} is given twice in one object")
    return found


def _twice(names: Iterable[str]) -> str | None:
    """Return the first name that occurs twice."""
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)  # type: ignore[func-returns-value]


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)


def _json_error(place: str, error: Exception, hint: str = "") -> DataError:
    if isinstance(error, RecursionError):
        return DataError(f"{place}: nested too deeply. {_JSON_SHAPE}")
    why = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
    if "integer string conversion" in why:  # Python's advice to raise its limit is for programs
        why = "a number with thousands of digits"
    return DataError(f"{place}: not valid JSON ({why:.200}).\n{hint}{_JSON_SHAPE}")


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
    with _open(path, newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        line = 1
        try:
            columns = next(reader, None)
            if columns == []:
                raise DataError(f"{path}, line 1: no column names.")
            _check_columns(path, columns or ())
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


def _check_columns(path: Path, columns: Iterable[str]) -> None:
    if (name := _twice(columns)) is not None:
        raise DataError(f"{path}: the column {name!r:.60} is there twice. Remove or rename one of them.")


def _arrow_rows(path: Path, open_batches: Callable[[Path], tuple[Any, Iterable[Any]]]) -> Iterator[Row]:
    """Rows of a columnar file; `open_batches` returns its schema and its record batches."""
    import pyarrow  # type: ignore[import-untyped]

    if compression_of(path):
        raise DataError(f"{path} cannot be read compressed. Unpack it first.")
    try:
        schema, batches = open_batches(path)
        _check_columns(path, schema.names)
        for number, values in enumerate((values for batch in batches for values in batch.to_pylist()), 1):
            yield Row(values, f"{path}, row {number}")
    except UnicodeDecodeError:
        raise
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not a valid {kind_of(path)[1:]} file ({error!s:.200}).") from error


def _parquet_batches(path: Path) -> tuple[Any, Iterable[Any]]:
    import pyarrow.parquet  # type: ignore[import-untyped]

    file = pyarrow.parquet.ParquetFile(path)
    return file.schema_arrow, file.iter_batches()


def _stream_batches(path: Path) -> tuple[Any, Iterable[Any]]:
    """Arrow's stream format, which `datasets` writes, or its file format."""
    import pyarrow.ipc  # type: ignore[import-untyped]

    source = pyarrow.memory_map(str(path))
    if source.read(6) == b"ARROW1":
        file = pyarrow.ipc.open_file(source)
        return file.schema, map(file.get_batch, range(file.num_record_batches))
    source.seek(0)
    stream = pyarrow.ipc.open_stream(source)
    return stream.schema, stream


def _text_rows(path: Path) -> Iterator[Row]:
    """One row per line, as `datasets` reads text files; blank lines are skipped."""
    with _open(path, newline="\n") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield Row({"text": line.rstrip("\r\n")}, f"{path}, line {number}")


_OPENERS: dict[str, Callable[..., Any]] = {"": open, ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".csv": partial(_csv_rows, delimiter=","),
    ".tsv": partial(_csv_rows, delimiter="\t"),
    ".parquet": partial(_arrow_rows, open_batches=_parquet_batches),
    ".arrow": partial(_arrow_rows, open_batches=_stream_batches),
    ".txt": _text_rows,
}
