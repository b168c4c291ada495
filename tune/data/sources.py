"""Sources of training data: the files and hub data sets that a spec names, and their rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from macdrop.errors import DataError, nearest
from tune.data.readers import Row, looks_like_a_path, read_file
from tune.storage.sealed_folder import sha256
from tune.zoo.catalog import resolve

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")
_ENTRY_KEYS = ("path", "format", "split", "name", "max_samples")


@dataclass(frozen=True)
class Source:
    """One data set of the spec: a local file, or a data set on the hub (`path` is then its id)."""

    path: str
    local: bool
    format: str
    split: str
    name: str | None
    max_samples: int | None


# --- where the data is ---


def find_sources(
    dataset: str | Sequence[str | Mapping[str, Any]], *, format: str, max_samples: int | None
) -> list[Source]:
    """Resolve the spec's `dataset` (a string, or a list of entries) to files and hub ids.

    Args:
        dataset: hub id, local path or "zoo:..." name; or a list of those and of mappings with `path`, and optionally
            `format`, `split`, `name` (the hub configuration) and `max_samples`.
        format: the format of entries that do not name one.
        max_samples: limit, in rows from the start, of entries that do not name one.

    Raises:
        DataError: nothing given, a file that does not exist, or an unsupported kind of file.
    """
    entries: Sequence[Any] = dataset if isinstance(dataset, (list, tuple)) else [dataset]
    if not entries:
        raise DataError("dataset is an empty list. Give a hub id, a local file, or a list of them.")
    sources = []
    for given in entries:
        entry: Mapping[str, Any] = {"path": given} if isinstance(given, str) else given
        unknown = [key for key in entry if key not in _ENTRY_KEYS]
        if unknown:
            hint = nearest(unknown[0], _ENTRY_KEYS)
            raise DataError(
                f"dataset entry {dict(entry)}: unknown key {unknown[0]!r}.{hint} Allowed: {', '.join(_ENTRY_KEYS)}."
            )
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
    """Return the path or hub id, and whether it is local."""
    if not given.strip():
        raise DataError("dataset is empty. Give a hub id, a local json/jsonl/csv/tsv/parquet/txt file, or zoo:train.")
    if given.startswith("zoo:"):
        return str(resolve(given)), True
    path = Path(given).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
        named = [p for p in found if p.stem == split]
        if len(named) != 1:
            listed = ", ".join(p.name for p in found) or "none"
            raise DataError(
                f"dataset {given!r} is a folder without exactly one file named {split}.* ({'/'.join(SUFFIXES)}).\n"
                f"Data files in it: {listed}. Name one of them."
            )
        path = named[0]
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise DataError(
                f"dataset {given!r}: files of kind {path.suffix or '(no suffix)'!r} are not supported.\n"
                f"Allowed: {', '.join(SUFFIXES)}."
            )
        return str(path), True
    if looks_like_a_path(given):
        parent = path.parent
        names = [p.name for p in parent.iterdir()] if parent.is_dir() else []
        hint = nearest(path.name, names) if parent.is_dir() else f" The folder {str(parent)!r} does not exist either."
        raise DataError(
            f"dataset {given!r}: no such file (looked in {Path.cwd()}).{hint}\n"
            "Give a file that exists, or a hub id such as 'yahma/alpaca-cleaned'."
        )
    return given, False


# --- reading rows ---


def open_source(source: Source) -> tuple[str, Callable[[], Iterator[Row]]]:
    """Return the identity of the content, which changes when the data do, and a function that reads its rows.

    Raises:
        DataError: the file cannot be read, or the hub data set cannot be reached.
    """
    if source.local:
        path = Path(source.path)
        try:
            return sha256(path), lambda: read_file(path)
        except OSError as error:
            raise DataError(f"dataset {source.path!r} cannot be read: {error.strerror}.") from error
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
