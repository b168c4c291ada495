"""Writing files so that a crash never leaves half of one: temporary file + fsync + rename.

Every failure to write (disk full, no permission) is a `ResourceError` that names the path and the remedy. Storage that
is gone for a moment is waited for, where the caller names a folder (`within`) that was there before: see `lasting`.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, overload

from macdrop.errors import ConfigError
from tune.config.syntax.yaml_core import parse_yaml, write_blocks
from tune.errors import ResourceError
from tune.storage.places import in_cache

T = TypeVar("T")
AnyPath = str | os.PathLike[str]
#: Inode, size and time of change of a file.
Stamp = tuple[int, int, int]
log = logging.getLogger(__name__)


class Trouble(NamedTuple):
    """A user-facing remedy for an errno of storage; `passes` where waiting may help."""

    remedy: str
    passes: bool


_UNREACHABLE = Trouble("The storage cannot be reached: see to the mount, then resume the run.", True)
TROUBLES = {
    errno.ENOSPC: Trouble("The disk is full: free some space, or choose another output_dir.", False),
    errno.EDQUOT: Trouble("The disk quota is used up: free some space, or choose another output_dir.", False),
    errno.EROFS: Trouble("The file system is read-only: choose another output_dir.", True),
    **dict.fromkeys(
        (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EREMOTEIO), _UNREACHABLE
    ),
}
ELSE = Trouble("Choose an output_dir that this user can write to.", False)
CACHE = "Set MACDROP_CACHE to a folder that this user can write to, with some space."
#: For how long storage is waited for, and the longest pause between two tries; seconds.
PATIENCE_S, PAUSE_S = 120.0, 5.0


@contextmanager
def writing(path: AnyPath) -> Iterator[None]:
    """Turn an `OSError` raised inside into a `ResourceError` that says what to do about `path`."""
    try:
        yield
    except OSError as error:
        remedy = CACHE if in_cache(path) else TROUBLES.get(error.errno or 0, ELSE).remedy
        raise ResourceError(f"Cannot write {os.fspath(path)}: {error.strerror or error}.\n{remedy}") from error


def lasting(action: Callable[[], T], within: AnyPath | None) -> T:
    """Run `action`, and again while the storage of the folder `within` is gone, for `PATIENCE_S` at most.

    Gone is what `TROUBLES` says passes, and a folder that is missing; without `within` nothing is tried again.
    """
    pause, until = 0.1, time.monotonic() + PATIENCE_S
    while True:
        try:
            return action()
        except OSError as error:
            gone = within is not None and error.errno == errno.ENOENT and not os.path.isdir(within)
            passes = gone or TROUBLES.get(error.errno or 0, ELSE).passes
            if within is None or not passes or time.monotonic() + pause > until:
                if gone:
                    raise OSError(errno.ENOTCONN, f"{within} is gone") from error
                raise
            if pause == 0.1:
                reason = "is not there" if gone else error.strerror
                log.warning("The storage of %s is gone (%s): waiting up to %g s for it.", within, reason, PATIENCE_S)
            time.sleep(pause)
            pause = min(2 * pause, PAUSE_S)


def ensure_folder(folder: AnyPath, within: AnyPath) -> None:
    """`make_folder`, and `within` is waited for."""
    with writing(folder):
        lasting(lambda: make_folder(folder, within), within)


def stat(path: AnyPath, within: AnyPath | None = None) -> os.stat_result | None:
    """Stat a file; None if missing: `within` is waited for, as unmounted storage is not a missing file."""

    def look() -> os.stat_result | None:
        try:
            return os.stat(path)
        except FileNotFoundError:
            if within is not None and not os.path.isdir(within):
                raise
            return None

    return lasting(look, within)


def stamp_of(path: AnyPath, within: AnyPath | None = None) -> Stamp | None:
    """Return what is another one once a file has changed; None if missing, as of `stat`."""
    found = stat(path, within)
    return None if found is None else (found.st_ino, found.st_size, found.st_mtime_ns)


def make_folder(folder: AnyPath, within: AnyPath | None = None) -> None:
    """Make a folder and those above it, but never `within` or above: that is storage which is gone.

    Raises:
        FileNotFoundError: `within` is missing.
    """
    folder = Path(folder)
    if within is None:
        folder.mkdir(parents=True, exist_ok=True)
        return
    for part in [*reversed(folder.relative_to(within).parents), folder.relative_to(within)]:
        if part.name:
            (Path(within) / part).mkdir(exist_ok=True)
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(folder))


def sync_folder(folder: AnyPath) -> None:
    """Make a rename inside `folder` survive a power cut; file systems that cannot are left alone."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def atomic_write_bytes(path: AnyPath, content: bytes, within: AnyPath | None = None, *, durable: bool = True) -> Path:
    """Write `content` so that readers see the old file or the new one, whole. Folders are made as needed.

    durable: wait for the disk, so that a power cut cannot lose it; not for what can be made from other files.
    """
    path = Path(path)

    def write() -> None:
        make_folder(path.parent, within)
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
        try:
            with open(temporary, "xb") as file:
                file.write(content)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        if durable:
            sync_folder(path.parent)

    with writing(path):
        lasting(write, within)
    return path


def atomic_write_text(path: AnyPath, text: str, within: AnyPath | None = None, *, durable: bool = True) -> Path:
    """Write `text` (UTF-8) as `atomic_write_bytes` does."""
    return atomic_write_bytes(path, text.encode("utf-8"), within, durable=durable)


def atomic_write_json(path: AnyPath, value: Any, within: AnyPath | None = None) -> Path:
    """Write `value` as indented JSON; see `plain` for what is allowed in it."""
    return atomic_write_text(path, json.dumps(plain(value), indent=2, allow_nan=False) + "\n", within)


def atomic_write_yaml(path: AnyPath, value: Mapping[str, Any], within: AnyPath | None = None) -> Path:
    """Write `value` as YAML in the order given; see `plain` for what is allowed in it."""
    return atomic_write_text(path, write_blocks(plain(value)), within)


@overload
def read_mapping(
    path: AnyPath,
    problems: None = None,
    needs: Collection[str] = (),
    within: AnyPath | None = None,
    parse: Callable[[str], Any] = parse_yaml,
) -> dict[str, Any]: ...


@overload
def read_mapping(
    path: AnyPath,
    problems: list[str] | None,
    needs: Collection[str] = (),
    within: AnyPath | None = None,
    parse: Callable[[str], Any] = parse_yaml,
) -> dict[str, Any] | None: ...


def read_mapping(
    path: AnyPath,
    problems: list[str] | None = None,
    needs: Collection[str] = (),
    within: AnyPath | None = None,
    parse: Callable[[str], Any] = parse_yaml,
) -> dict[str, Any] | None:
    """Read the mapping that a .json or .yaml file holds.

    Args:
        problems: where a damaged file is noted, once, and None returned, instead of raising.
        needs: keys that the mapping must have.
        parse: of a file of YAML.

    Raises:
        ConfigError: the file cannot be read as a mapping, or lacks a key; the message has the path.
    """
    path = Path(path)
    try:
        text = lasting(lambda: path.read_text(encoding="utf-8"), within)
        found = json.loads(text) if path.suffix == ".json" else parse(text)
        check_mapping(found, needs)
    except (OSError, ValueError, RecursionError) as error:
        report_damage(path, error, problems)
        return None
    return found


def report_damage(path: Path, error: Exception, problems: list[str] | None) -> None:
    """Note a damaged file in `problems`, once; without such a list raise a ConfigError."""
    message = f"{path} is damaged: {' '.join(str(error).split())}"
    if problems is None:
        raise ConfigError(message) from error
    if message not in problems:
        problems.append(message)


_PLAIN = frozenset({str, int, bool, type(None)})


def plain(value: Any) -> Any:
    """`value` with numpy and torch scalars, paths and tuples made plain JSON values; non-finite numbers become None.

    JSON has no NaN, and pandas reads None back as NaN.
    """
    kind = type(value)
    if kind in _PLAIN:  # nearly all of what is written: the rest costs ten times as much
        return value
    if kind is float:
        return value if math.isfinite(value) else None
    if kind is dict:
        return {key if type(key) is str else str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, str):
        return str(value)  # YAML knows no subclass of str
    if value is None or isinstance(value, int):  # bool is an int
        return value
    if hasattr(value, "item"):
        return plain(value.item())
    raise TypeError(f"cannot write a {type(value).__name__} as JSON: {value!r}")


def check_mapping(found: Any, needs: Collection[str] = ()) -> None:
    """Raise a ValueError unless `found` is a mapping with these keys."""
    if not isinstance(found, dict):
        raise ValueError("it holds no mapping")
    missing = [key for key in needs if key not in found]
    if missing:
        raise ValueError(f"it has no {', '.join(missing)}")


def now() -> str:
    """UTC time to the millisecond, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
