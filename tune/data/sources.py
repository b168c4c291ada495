"""Where training data comes from: files and hub data sets -> rows.

A row knows its place ("file, line 12"), so that every complaint about it can say so.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from macdrop.errors import DataError, nearest

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt")
_ENTRY_KEYS = ("path", "format", "split", "name", "max_samples")


@dataclass(frozen=True)
class Row:
    """One row of a data set; `where` is its place in words, for messages."""

    values: Mapping[str, Any]
    where: str


@dataclass(frozen=True)
class Source:
    """One data set of the spec: a local file, or a data set of the hub (`path` is then its id)."""

    path: str
    local: bool
    format: str
    split: str
    name: str | None
    max_samples: int | None


# --- where the data is ---


def find_sources(dataset: Any, *, format: str, max_samples: int | None) -> list[Source]:
    """Resolve the spec's `dataset` (a string, or a list of entries) to files and hub ids.

    Args:
        dataset: hub id, local path or "zoo:..." name; or a list of those and of mappings with `path`, and optionally
            `format`, `split`, `name` (the hub configuration) and `max_samples`.
        format: the format of entries that name none.
        max_samples: limit, in rows from the start, of each entry that names none.

    Raises:
        DataError: nothing given, a file that does not exist, or a kind of file that is not read.
    """
    entries = dataset if isinstance(dataset, (list, tuple)) else [dataset]
    if not entries:
        raise DataError("dataset is an empty list. Give a hub id, a local file, or a list of them.")
    sources = []
    for entry in entries:
        if isinstance(entry, str):
            entry = {"path": entry}
        unknown = [key for key in entry if key not in _ENTRY_KEYS]
        if unknown:
            hint = nearest(unknown[0], _ENTRY_KEYS)
            raise DataError(f"dataset entry {dict(entry)}: unknown key {unknown[0]!r}.{hint} "
                            f"Allowed: {', '.join(_ENTRY_KEYS)}.")  # fmt: skip
        get = entry.get
        split = get("split") or "train"
        path, local = _locate(str(get("path") or ""), split)
        limit = get("max_samples")
        wanted = get("format") or "auto"
        sources.append(
            Source(
                path=path,
                local=local,
                format=format if wanted == "auto" else wanted,
                split=split,
                name=get("name"),
                max_samples=max_samples if limit is None else limit,
            )
        )
    return sources


def _locate(given: str, split: str) -> tuple[str, bool]:
    """(path or hub id, is it local)."""
    if not given.strip():
        raise DataError("dataset is empty. Give a hub id, a local json/jsonl/csv/parquet/txt file, or zoo:train.")
    if given.startswith("zoo:"):
        from tune.zoo.catalog import resolve

        return str(resolve(given)), True
    path = Path(given).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
        named = [p for p in found if p.stem == split]
        if len(named) != 1:
            names = ", ".join(p.name for p in found) or "none"
            raise DataError(
                f"dataset {given!r} is a folder with not exactly one file named {split}.* ({'/'.join(SUFFIXES)}).\n"
                f"Data files in it: {names}. Name one of them."
            )
        path = named[0]
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise DataError(f"dataset {given!r}: files of kind {path.suffix or '(no suffix)'!r} are not read.\n"
                            f"Allowed: {', '.join(SUFFIXES)}.")  # fmt: skip
        return str(path), True
    if looks_like_a_path(given):
        parent = path.parent
        names = [p.name for p in parent.iterdir()] if parent.is_dir() else []
        hint = nearest(path.name, names) if parent.is_dir() else f" There is no folder {str(parent)!r} either."
        raise DataError(
            f"dataset {given!r}: no such file (looked in {Path.cwd()}).{hint}\n"
            "Give a file that exists, or a hub id such as 'yahma/alpaca-cleaned'."
        )
    return given, False


def looks_like_a_path(given: str) -> bool:
    """Whether a name is meant as a local file or folder, by its spelling alone."""
    return given.startswith((".", "/", "~")) or given.count("/") > 1 or Path(given).suffix in SUFFIXES


# --- reading rows ---


def open_source(source: Source) -> tuple[str, Callable[[], Iterator[Row]]]:
    """(identity of the content, function that reads its rows). The identity changes when the data does.

    Raises:
        DataError: the file cannot be read, or the hub data set cannot be reached.
    """
    if source.local:
        path = Path(source.path)
        try:
            return sha256_of(path), lambda: _read_file(path)
        except OSError as error:
            raise DataError(f"dataset {source.path!r} cannot be read: {error.strerror}.") from error
    import datasets

    try:
        table = datasets.load_dataset(source.path, source.name, split=source.split)
    except Exception as error:  # the hub client raises a dozen kinds; all of them mean "not reachable as asked"
        lines = str(error).strip().splitlines() or [""]
        raise DataError(
            f"dataset {source.path!r} (split {source.split!r}) is neither a local file nor a data set of the hub "
            f"that can be loaded here:\n  {type(error).__name__}: {lines[0][:300]}\n"
            "Check the spelling, name and split; without internet give a local json/jsonl/csv/parquet/txt file."
        ) from error

    def rows() -> Iterator[Row]:
        for number, values in enumerate(table):
            yield Row(values, f"{source.path} [{source.split}], row {number}")

    return str(table._fingerprint), rows


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_file(path: Path) -> Iterator[Row]:
    readers = {".csv": _csv_rows, ".parquet": _parquet_rows, ".txt": _txt_rows}
    try:
        yield from readers.get(path.suffix, _json_rows)(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8.") from error


#: Of brackets within brackets, which Python reads some hundreds deep.
TOO_DEEP = "a list or object within others without end. Expected a list of objects, or one object a line."


def _json_rows(path: Path) -> Iterator[Row]:
    """A list of objects, or one object a line, whatever the suffix (hub files mix them)."""
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        start = file.read(64).lstrip()
        file.seek(0)
        if start.startswith("["):
            yield from _json_list(path, file.read().removeprefix("\ufeff"))
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    values = json.loads(line.removeprefix("\ufeff"))
                except json.JSONDecodeError as error:
                    raise DataError(
                        f"{path}, line {number}: not JSON ({error.msg} at column {error.colno}).\n"
                        "Expected a list of objects, or one object a line."
                    ) from error
                except RecursionError:
                    raise DataError(f"{path}, line {number}: {TOO_DEEP}") from None
                yield _object_row(values, f"{path}, line {number}")


def _json_list(path: Path, text: str) -> Iterator[Row]:
    """Elements of one JSON list, each with the line it starts on."""
    decode = json.JSONDecoder().raw_decode
    position, counted, line = text.index("[") + 1, 0, 1

    def skip_space(at: int) -> int:
        while at < len(text) and text[at] in " \t\r\n":
            at += 1
        return at

    position = skip_space(position)
    while text[position : position + 1] != "]":
        line += text.count("\n", counted, position)
        counted = position
        try:
            values, end = decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg} at column {error.colno}).") from error
        except RecursionError:
            raise DataError(f"{path}, line {line}: {TOO_DEEP}") from None
        yield _object_row(values, f"{path}, line {line}")
        position = skip_space(end)
        if text[position : position + 1] == ",":
            position = skip_space(position + 1)
        elif text[position : position + 1] != "]":
            line += text.count("\n", counted, position)
            raise DataError(f"{path}, line {line}: not JSON (a comma or the end of the list is missing).")


def _object_row(values: Any, where: str) -> Row:
    if not isinstance(values, dict):
        raise DataError(f"{where}: expected an object with named fields, found a {type(values).__name__}.")
    return Row(values, where)


def _csv_rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        line = 2
        try:
            for values in reader:
                if None in values or None in values.values():
                    raise DataError(f"{path}, line {line}: {'more' if None in values else 'fewer'} values than the "
                                    f"{len(reader.fieldnames or [])} columns of the head line.")  # fmt: skip
                yield Row(values, f"{path}, line {line}")
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{path}, line {line}: not CSV ({error}).") from error


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
        for number, values in enumerate(values for batch in batches for values in batch.to_pylist()):
            yield Row(values, f"{path}, row {number}")
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a parquet file ({error}).") from error


def _txt_rows(path: Path) -> Iterator[Row]:
    """One example a line, as `datasets` reads text files; blank lines are passed over."""
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield Row({"text": line.rstrip("\r\n")}, f"{path}, line {number}")
