"""Sources of training data: the files and hub data sets that a spec names, and their rows."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from macdrop.errors import DataError, nearest
from tune.config.messages import build
from tune.config.train.data_keys import DatasetEntry
from tune.data.locations import locate_split, looks_like_a_path
from tune.data.readers import Row, read_file
from tune.storage.sealed_folder import sha256
from tune.zoo.catalog import resolve


@dataclass(frozen=True)
class Source:
    """One data set of the spec: local `files`, in the order they are read, or one on the hub with the id `path`."""

    path: str
    files: tuple[str, ...]
    format: str
    split: str
    name: str | None
    max_samples: int | None


# --- where the data is ---


def find_sources(dataset: str | Sequence[str | DatasetEntry], *, format: str, max_samples: int | None) -> list[Source]:
    """Resolve the spec's `dataset` (a string, or a list of entries) to files and hub ids.

    Args:
        dataset: hub id, local path, pattern or "zoo:..." name; or a list of those and of entries.
        format: the format of entries that do not name one.
        max_samples: limit, in rows from the start, of entries that do not name one.

    Raises:
        DataError: nothing given, a file that does not exist, or an unsupported kind of file.
    """
    given = [dataset] if isinstance(dataset, str) else list(dataset)
    if not given:
        raise DataError("dataset is an empty list. Give a hub id, a local file, or a list of them.")
    sources = []
    for item in given:
        entry = build(DatasetEntry, {"path": item}) if isinstance(item, str) else item
        path, files = _locate(entry)
        sources.append(
            Source(
                path=path,
                files=files,
                format=entry.format or format,
                split=entry.split,
                name=entry.name,
                max_samples=max_samples if entry.max_samples is None else entry.max_samples,
            )
        )
    return sources


def _locate(entry: DatasetEntry) -> tuple[str, tuple[str, ...]]:
    """Return the path or hub id of a data set, and its files if it is local."""
    if not entry.path.strip():
        raise DataError("dataset is empty. Give a hub id, a local json/jsonl/csv/tsv/parquet/txt file, or zoo:train.")
    path = resolve(entry.path)
    if os.path.exists(path) or glob.has_magic(path):
        return path, tuple(map(str, locate_split(path, entry.split, entry.name)))
    if looks_like_a_path(path):
        parent, name = os.path.split(path)
        names = os.listdir(parent or ".") if os.path.isdir(parent or ".") else None
        hint = f" The folder {parent!r:.200} does not exist either." if names is None else nearest(name, names)
        raise DataError(
            f"dataset {entry.path!r:.200}: no such file (looked in {Path.cwd()}).{hint}\n"
            "Give a file that exists, or a hub id such as 'yahma/alpaca-cleaned'."
        )
    return path, ()


# --- reading rows ---


def open_source(source: Source) -> tuple[str, Callable[[], Iterator[Row]]]:
    """Return the identity of the content, which changes when the data do, and a function that reads its rows.

    Raises:
        DataError: the file cannot be read, or the hub data set cannot be reached.
    """
    if source.files:
        files = [Path(file) for file in source.files]
        try:
            digests = [sha256(file) for file in files]
        except OSError as error:
            raise DataError(f"dataset {source.path!r} cannot be read: {error.strerror}.") from error
        return "+".join(digests), lambda: chain.from_iterable(map(read_file, files))
    import datasets

    try:
        table = datasets.load_dataset(source.path, source.name, split=source.split)
    except Exception as error:  # the hub client raises a dozen kinds; all mean that it is not available as asked
        lines = str(error).strip().splitlines() or [""]
        raise DataError(
            f"dataset {source.path!r} (split {source.split!r}) is neither a local file nor a data set on the hub "
            f"that can be loaded here:\n  {type(error).__name__}: {lines[0][:300]}\n"
            "Check the spelling, name and split; without internet give a local json/jsonl/csv/tsv/parquet/txt file."
        ) from error

    def rows() -> Iterator[Row]:
        for number, values in enumerate(table):
            yield Row(values, f"{source.path} [{source.split}], row {number}")

    return str(table._fingerprint), rows
