"""The records of a run in one compressed file: what a report reads, without adapters, checkpoints and states."""

from __future__ import annotations

import io
import lzma
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath

from macdrop.errors import ConfigError
from tune.storage.atomic import atomic_write_bytes, writing
from tune.storage.environment import ENVIRONMENT_FILE
from tune.storage.records import SCORES_FILE, TIMES_FILE
from tune.storage.run_folder import RunFolder

ENDING = ".tar.xz"
#: Files of a run folder that an archive holds, and none besides: what repeats a trial names folders of its machine.
RECORDS = (
    "run.json",
    "config.yaml",
    ENVIRONMENT_FILE,
    SCORES_FILE,
    TIMES_FILE,
    "models/*/*.json",
    "models/*/*.jsonl",
    "models/*/answers/*.jsonl",
    "models/*/judgements/*.jsonl",
    "trials/*/trial.json",
    "trials/*/config.yaml",
    "trials/*/metrics.jsonl",
    "trials/*/answers/*.jsonl",
    "trials/*/judgements/*.jsonl",
)
#: Bytes that an archive may hold unpacked; a run of 10,000 trials has less.
LARGEST = 4 * 2**30


def check_archive(file: Path, runs: Sequence[Path]) -> None:
    """Refuse a name that is not an archive's, and several runs in one, with a ConfigError."""
    if not file.name.endswith(ENDING) or file.name == ENDING:
        raise ConfigError(f"--archive {str(file)!r} does not end in {ENDING}. Give a name such as evidence{ENDING}.")
    if len(runs) > 1:
        raise ConfigError(f"--archive holds one run, and {len(runs)} are given. Archive them one by one.")


def write_archive(run_dir: Path, file: Path) -> Path:
    """Write the records of a run into one file, whole or not at all; return its path.

    The same records are the same bytes: neither times nor owners of files are kept.

    Raises:
        ConfigError: `run_dir` is not a run folder, or a record of it cannot be read.
        ResourceError: the file cannot be written.
    """
    RunFolder.open(run_dir, lenient=True)
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:xz", format=tarfile.PAX_FORMAT) as archive:
        for found in sorted({path for pattern in RECORDS for path in run_dir.glob(pattern) if path.is_file()}):
            read = _content(found)
            entry = tarfile.TarInfo(found.relative_to(run_dir).as_posix())
            entry.size = len(read)
            archive.addfile(entry, io.BytesIO(read))
    return atomic_write_bytes(file, content.getvalue())


@contextmanager
def unpacked(runs: Sequence[Path]) -> Iterator[list[Path]]:
    """Yield the folders of runs, those of archives unpacked into temporary ones that are gone at the end.

    Raises:
        ConfigError: a file is not an archive of a run, is damaged or unreadable, or holds what no archive of a run has.
        ResourceError: there is no room for the temporary folders.
    """
    with ExitStack() as stack:
        yield [_unpack(run, stack) if run.is_file() else run for run in runs]


def _unpack(file: Path, stack: ExitStack) -> Path:
    content = io.BytesIO(_content(file))
    try:
        with writing("a temporary folder"), tarfile.open(fileobj=content, mode="r:xz") as archive:
            entries = _checked(file, archive)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="macdrop-"))) / "run"
            archive.extractall(folder, entries, filter="data")
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise ConfigError(
            f"{str(file)!r} is not an archive of a run, or is damaged: {error}\n"
            f"Give a run folder, or a file of `macdrop report RUN --archive FILE{ENDING}`."
        ) from error
    return folder


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{str(file)!r} cannot be read: {error.strerror or error}.") from error


def _checked(file: Path, archive: tarfile.TarFile) -> list[tarfile.TarInfo]:
    """Return the entries, each looked at before the next is unpacked: a small file may hold any number of bytes."""
    entries, size = [], 0
    for entry in archive:
        path = PurePosixPath(entry.name)
        if not entry.isfile() or ".." in path.parts or not any(_matches(path, pattern) for pattern in RECORDS):
            raise ConfigError(f"{str(file)!r} is not an archive of a run: it holds {entry.name!r}.")
        entries.append(entry)
        if (size := size + entry.size) > LARGEST:
            raise ConfigError(f"{str(file)!r} holds {size:,} bytes; an archive of a run may hold {LARGEST:,}.")
    return entries


def _matches(path: PurePosixPath, pattern: str) -> bool:
    """Return whether a relative path is of a pattern part by part; `PurePath.match` would accept any folder above."""
    return len(path.parts) == pattern.count("/") + 1 and not path.is_absolute() and path.match(pattern)
