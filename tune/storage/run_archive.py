"""The records of a run in one compressed file: what a report reads, without adapters, checkpoints and states."""

from __future__ import annotations

import io
import lzma
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath

from macdrop.errors import ConfigError
from tune.storage.atomic import atomic_write_bytes, writing
from tune.storage.environment import ENVIRONMENT_FILE
from tune.storage.records import SCORES_FILE
from tune.storage.run_folder import RunFolder

ENDING = ".zip"
#: Files of a run folder that an archive holds, and none besides: what repeats a trial names folders of its machine.
RECORDS = (
    "run.json",
    "config.yaml",
    ENVIRONMENT_FILE,
    SCORES_FILE,
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
#: The earliest time that the format knows: an archive of the same records is the same bytes.
ALWAYS = (1980, 1, 1, 0, 0, 0)


def check_archive(file: Path, runs: Sequence[Path]) -> None:
    """Refuse a name that is not an archive's, and several runs in one, with a ConfigError."""
    if file.suffix != ENDING:
        raise ConfigError(f"--archive {str(file)!r} does not end in {ENDING}. Give a name such as evidence{ENDING}.")
    if len(runs) > 1:
        raise ConfigError(f"--archive holds one run, and {len(runs)} are given. Archive them one by one.")


def write_archive(run_dir: Path, file: Path) -> Path:
    """Write the records of a run into one file, whole or not at all; return its path.

    Raises:
        ConfigError: `run_dir` is not a run folder, or a record of it cannot be read.
        ResourceError: the file cannot be written.
    """
    RunFolder.open(run_dir, lenient=True)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_LZMA) as archive:
        for found in sorted({path for pattern in RECORDS for path in run_dir.glob(pattern) if path.is_file()}):
            entry = zipfile.ZipInfo(found.relative_to(run_dir).as_posix(), ALWAYS)
            entry.compress_type = zipfile.ZIP_LZMA
            archive.writestr(entry, _content(found))
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
        with writing("a temporary folder"), zipfile.ZipFile(content) as archive:
            _check(file, archive.infolist())
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="macdrop-"))) / "run"
            archive.extractall(folder)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError) as error:
        raise ConfigError(
            f"{str(file)!r} is not an archive of a run, or is damaged: {error}\n"
            "Give a run folder, or a file of `macdrop report RUN --archive FILE.zip`."
        ) from error
    return folder


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{str(file)!r} cannot be read: {error.strerror or error}.") from error


def _check(file: Path, entries: Sequence[zipfile.ZipInfo]) -> None:
    for entry in entries:
        path = PurePosixPath(entry.filename)
        if ".." in path.parts or not any(_matches(path, pattern) for pattern in RECORDS):
            raise ConfigError(f"{str(file)!r} is not an archive of a run: it holds {entry.filename!r}.")
    if (size := sum(entry.file_size for entry in entries)) > LARGEST:
        raise ConfigError(f"{str(file)!r} holds {size:,} bytes; an archive of a run may hold {LARGEST:,}.")


def _matches(path: PurePosixPath, pattern: str) -> bool:
    """Return whether a relative path is of a pattern part by part; `PurePath.match` would accept any folder above."""
    return len(path.parts) == pattern.count("/") + 1 and not path.is_absolute() and path.match(pattern)
