"""Local data: the files that a path, a pattern such as ``data/*.jsonl``, or a folder stands for.

A folder is one that `datasets` saved, or one laid out for the Hub: a README.md with configurations, names of splits in
folders or files, several shards. Which of its files belong to a split is decided by `datasets` itself.
"""

from __future__ import annotations

import glob
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from macdrop.errors import DataError, nearest
from macdrop.fingerprint import is_lfs_pointer
from tune.zoo.catalog import resolve

ROW_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
TEXT_SUFFIXES = (".txt", ".md", ".text")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
#: Kinds of files with training data; a txt file has one row per line.
SUFFIXES = (*ROW_SUFFIXES, ".txt")


def kind_of(file: str | os.PathLike) -> str:
    """Return the ending that says what a file holds, in lower case: ``rows.JSONL.gz`` -> ``.jsonl``."""
    name = os.fspath(file).lower()
    return Path(name.removesuffix(compression_of(file))).suffix


def compression_of(file: str | os.PathLike) -> str:
    """Return the ending that says how a file is compressed, empty if it is not."""
    name = os.fspath(file).lower()
    return next((ending for ending in COMPRESSED if name.endswith(ending)), "")


def looks_like_a_path(given: str) -> bool:
    """Return whether a name means a local file or folder, by its spelling alone."""
    known = kind_of(given) in ROW_SUFFIXES + TEXT_SUFFIXES
    return known or given.startswith((".", "/", "~")) or given.count("/") > 1 or glob.has_magic(given)


def is_local(path: str) -> bool:
    """Return whether a name means local data, not a hub id: a path by its spelling, ``zoo:``, or an existing file."""
    return looks_like_a_path(path) or path.startswith("zoo:") or os.path.exists(path)


def locate(path: str) -> list[Path]:
    """Return the file of a path or ``zoo:`` name, or the files of a pattern, sorted.

    Raises:
        DataError: there is no such file, it is a folder or empty, or the file's content is elsewhere (Git LFS).
        ConfigError: the ``zoo:`` name is unknown.
    """
    given = resolve(path)
    if not os.path.exists(given) and glob.has_magic(given):
        files = sorted(Path(found) for found in glob.glob(given, recursive=True) if os.path.isfile(found))
        if not files:
            raise DataError(f"No file matches {path!r:.200}.{_relative(given)}")
    else:
        files = [Path(given)]
    for file in files:
        _check_file(file, path)
    return files


def locate_split(path: str, split: str, name: str | None) -> list[Path]:
    """Return the files of one split of local data: those that `locate` finds, or those in a folder.

    Args:
        name: the configuration, where the folder has several.

    Raises:
        DataError: no file, or one of a kind that is not read.
    """
    if os.path.isdir(path):
        files = _of_folder(Path(path), split, name)
        for file in files:
            _check_file(file, str(file))
    else:
        files = locate(path)
    for file in files:
        if kind_of(file) not in SUFFIXES:
            raise DataError(
                f"dataset {str(file)!r:.200}: files of kind {file.suffix or '(no suffix)'!r} are not supported.\n"
                f"Allowed: {', '.join(SUFFIXES)}, also compressed ({', '.join(COMPRESSED)})."
            )
    return files


def _check_file(file: Path, given: str) -> None:
    if not os.path.isfile(file):
        siblings = [name for name in os.listdir(file.parent) if name != file.name] if os.path.isdir(file.parent) else []
        raise DataError(f"Data file {given!r:.200} {_kind(file)}{nearest(file.name, siblings)}{_relative(file)}")
    if not file.stat().st_size:
        raise DataError(f"Data file {str(file)!r} is empty.")
    if is_lfs_pointer(file):
        raise DataError(
            f"Data file {str(file)!r} is a Git LFS pointer, not the data.\nRun: git lfs pull   (in its repository)"
        )


def _kind(place: Path) -> str:
    """Say what is there in place of a file."""
    if os.path.isdir(place):
        return f"is a folder, not a file.{_inside(place)}"
    if os.path.exists(place):
        return "is a pipe or device, and rows are read more than once. Save them to a file."
    if os.path.islink(place):
        return f"is a link to {os.readlink(place)!r:.200}, which leads nowhere."
    return "does not exist."


def _relative(path: str | Path) -> str:
    return "" if Path(path).is_absolute() else f"\nPaths are relative to the current directory, {Path.cwd()}."


def _inside(folder: Path) -> str:
    """Say how to name the files of a folder as a pattern, by the first data file in it."""
    first = next((file for file in sorted(folder.rglob("*")) if kind_of(file) in SUFFIXES), None)
    if first is None:
        return " It holds no data file."
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        first = next(iter(sorted(folder.rglob("*.arrow"))), first)
    return f" Give its files, for example {str(first.parent / f'*{first.suffix}')!r}."


# --- folders ---


def _of_folder(folder: Path, split: str, name: str | None) -> list[Path]:
    found = [each for each in folder.iterdir() if kind_of(each) in SUFFIXES]
    named = [each for each in found if each.name.lower().removesuffix(compression_of(each)) == split + kind_of(each)]
    if len(named) == 1:
        return named
    if (folder / "dataset_dict.json").is_file():
        splits = _content(folder / "dataset_dict.json").get("splits") or []
        _require_split(folder, split, map(str, splits))
        folder = folder / split
    if (folder / "state.json").is_file():
        state = _content(folder / "state.json")
        if (kept := state.get("_split")) not in (None, split):
            _require_split(folder, split, [str(kept)])
        if not state.get("_data_files"):
            raise DataError(f"dataset {str(folder)!r} holds no rows: its state.json lists no file.")
        return [folder / str(each["filename"]) for each in state["_data_files"]]
    return _by_layout(folder, split, name)


def _content(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and all("filename" in each for each in content.get("_data_files") or []):
            return content
    except (OSError, ValueError, TypeError, RecursionError):
        pass
    raise DataError(f"{file} is damaged, so the folder cannot be read as a data set saved by `datasets`.")


def _require_split(folder: Path, split: str, splits: Iterable[str]) -> None:
    known = sorted(splits)
    if split not in known:
        raise DataError(
            f"dataset {str(folder)!r} has no split {split!r}.{nearest(split, known)} Splits: {', '.join(known)}."
        )


def _by_layout(folder: Path, split: str, name: str | None) -> list[Path]:
    """Return the files of a split as `datasets` finds them; it leaves nothing behind."""
    import datasets

    with tempfile.TemporaryDirectory() as cache:
        try:
            files = datasets.load_dataset_builder(str(folder), name, cache_dir=cache).config.data_files or {}
        except Exception as error:  # `datasets` raises a dozen kinds; all mean that it finds no data there
            listed = ", ".join(sorted(each.name for each in folder.iterdir())[:8]) or "nothing"
            why = " ".join(str(error).split())
            raise DataError(
                f"dataset {str(folder)!r} is a folder in which `datasets` finds no data: {why:.300}\n"
                f"It holds: {listed}. Give a file, or a pattern such as {str(folder / '*.jsonl')!r}."
            ) from error
    _require_split(folder, split, map(str, files))
    return [Path(file) for file in files[split]]
