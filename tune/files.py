"""Writing files so that a crash never leaves half of one: temporary file + fsync + rename, and whole-line appends.

Every failure to write (disk full, no permission) is a `ResourceError` that names the path and the remedy.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from macdrop.errors import ResourceError


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turn an `OSError` raised inside into a `ResourceError` that says what to do about `path`."""
    try:
        yield
    except OSError as error:
        remedies = {
            errno.ENOSPC: "The disk is full: free some space, or choose another output_dir.",
            errno.EDQUOT: "The disk quota is used up: free some space, or choose another output_dir.",
            errno.EROFS: "The file system is read-only: choose another output_dir.",
        }
        remedy = remedies.get(error.errno, "Choose an output_dir that this user can write to.")
        raise ResourceError(f"Cannot write {os.fspath(path)}: {error.strerror or error}.\n{remedy}") from error


def sync_folder(folder: str | os.PathLike) -> None:
    """Make a rename inside `folder` survive a power cut; file systems that cannot are left alone."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def atomic_write_text(path: str | os.PathLike, text: str) -> Path:
    """Write `text` (UTF-8) so that readers see the old file or the new one, whole. Folders are made as needed."""
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
        try:
            with open(temporary, "x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    return path


def atomic_write_json(path: str | os.PathLike, value: Any) -> Path:
    """Write `value` as indented JSON; see `plain` for what is allowed in it."""
    return atomic_write_text(path, json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


def atomic_write_yaml(path: str | os.PathLike, value: Any) -> Path:
    """Write `value` as YAML in the order given; see `plain` for what is allowed in it."""
    import yaml

    return atomic_write_text(path, yaml.safe_dump(plain(value), sort_keys=False, allow_unicode=True))


def append_jsonl(path: str | os.PathLike, rows: Iterable[Mapping[str, Any]]) -> int:
    """Append rows as JSON lines and return their number.

    All of them go out in one `os.write` under an exclusive lock, so that processes writing at once never mix their
    lines and a crash can tear the last line only. A torn last line left by an earlier crash is cut off first.
    """
    path = Path(path)
    lines = [json.dumps(plain(row), allow_nan=False) + "\n" for row in rows]
    if not lines:
        return 0
    data = "".join(lines).encode()
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            end = _cut_torn_line(handle)
            written = os.write(handle, data)
            if written != len(data):  # the disk filled up in the middle: take the part back, leave whole lines only
                os.ftruncate(handle, end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(handle)
    return len(lines)


def read_jsonl(
    path: str | os.PathLike, problems: list[str] | None = None, needs: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Rows of a file written by `append_jsonl`; a missing file is an empty list, a torn last line is left out.

    Args:
        problems: where damaged lines are described, each once, instead of raised.
        needs: keys that each row must have.

    Raises:
        ValueError: a complete line is no JSON object, or lacks a key; the message has file and line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(text.split("\n")[:-1], 1):  # what follows the last newline is torn, or empty
        try:
            row = json.loads(line)
            _check_keys(row, needs)
            rows.append(row)
        except ValueError as error:
            kind = "not JSON " if isinstance(error, json.JSONDecodeError) else ""
            told = f"{path}, line {number}: {kind}({error}). The file was changed by hand?"
            if problems is None:
                raise ValueError(told) from error
            problems += [told] if told not in problems else []
    return rows


def read_mapping(
    path: str | os.PathLike, problems: list[str] | None = None, needs: Collection[str] = ()
) -> dict[str, Any] | None:
    """The mapping that a .json or .yaml file holds.

    Args:
        problems: where a damaged file is described, once, and None returned, instead of raised.
        needs: keys that the mapping must have.

    Raises:
        ValueError: the file cannot be read as a mapping, or lacks a key; the message has the path.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            found = json.loads(text)
        else:
            import yaml

            try:
                found = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ValueError(error) from error
        _check_keys(found, needs)
    except (OSError, ValueError) as error:
        told = f"{path} is damaged: {' '.join(str(error).split())}"
        if problems is None:
            raise ValueError(told) from error
        problems += [told] if told not in problems else []
        return None
    return found


def plain(value: Any) -> Any:
    """`value` with numpy and torch scalars, paths and tuples made plain JSON values; non-finite numbers become None.

    JSON has no NaN, and pandas reads None back as NaN.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):  # bool is an int
        return value
    if hasattr(value, "item"):
        return plain(value.item())
    raise TypeError(f"cannot write a {type(value).__name__} as JSON: {value!r}")


def _check_keys(found: Any, needs: Collection[str]) -> None:
    """Raise a ValueError unless `found` is a mapping with these keys."""
    if not isinstance(found, dict):
        raise ValueError("it holds no mapping")
    missing = [key for key in needs if key not in found]
    if missing:
        raise ValueError(f"it has no {', '.join(missing)}")


def _cut_torn_line(handle: int) -> int:
    """Truncate the open file after its last newline; return the size that is left, in bytes."""
    end = os.lseek(handle, 0, os.SEEK_END)
    start = end
    while start > 0:
        step = min(start, 65536)
        block = os.pread(handle, step, start - step)
        newline = block.rfind(b"\n")
        if newline >= 0:
            start = start - step + newline + 1
            break
        start -= step
    if start != end:
        os.ftruncate(handle, start)
    return start

