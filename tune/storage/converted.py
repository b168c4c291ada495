"""Models converted from GGUF files, kept in the cache: each file is converted once, by one process at a time."""

from __future__ import annotations

import json
import logging
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from macdrop.fingerprint import file_digest
from macdrop.gguf.convert import convert_gguf
from macdrop.gguf.header import read_header, require_file
from tune.storage.atomic import writing
from tune.storage.places import cache_dir, converted_folder
from tune.storage.sealed_folder import MANIFEST, write_folder

log = logging.getLogger(__name__)

#: In the folder of a converted model: what it was converted from.
ORIGIN = "origin.json"
#: Folder of the cache with the digests of weight files, each of which is read whole only once.
DIGESTS = "digests"


def converted(file: Path) -> Path:
    """Return the folder of the model in a GGUF file, which is converted unless the cache has it.

    The cache knows a file by its SHA-256, wherever it lies; a file whose size and times are unchanged is not read
    again for that.

    Raises:
        ConfigError: the file cannot be used (`macdrop.gguf.convert.convert_gguf`).
        ResourceError: the cache cannot be written.
    """
    require_file(file)
    digest = file_digest(file, memory=cache_dir() / DIGESTS)
    folder = converted_folder(digest)
    if not is_whole(folder):
        read_header(file)  # refuses most of what cannot be converted before anything is made
        convert_once(digest, lambda _: file, {"file": str(file.resolve())})
    return folder


def is_whole(folder: Path) -> bool:
    """Return whether a converted model is there: its manifest is written last, before the folder has its name."""
    return (folder / MANIFEST).is_file()


def convert_once(digest: str, find: Callable[[Path], Path], origin: dict[str, Any]) -> None:
    """Convert a GGUF file of this SHA-256 into the cache, unless another process has done it in the meantime.

    It is made beside its final place and renamed when it is whole. What a killed process left is removed by the next.

    Args:
        find: returns the GGUF file; it may write it into the folder that it is given, which is removed afterwards.
        origin: where the file comes from, for `ORIGIN`.

    Raises:
        ConfigError: the file cannot be used.
        ResourceError: the cache cannot be written.
    """
    folder, cache = converted_folder(digest), cache_dir()

    def write(staging: Path) -> None:
        with tempfile.TemporaryDirectory(dir=staging, prefix=".source-") as place:
            perplexity = convert_gguf(find(Path(place)), staging)
        about = {**origin, "sha256": digest, "perplexity": perplexity}
        (staging / ORIGIN).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        for path in staging.iterdir():
            # safetensors makes its files private; others may share the cache, as far as the folder lets them.
            path.chmod(stat.S_IMODE((staging / ORIGIN).stat().st_mode))

    with _locked(folder):
        if not is_whole(folder):
            write_folder(folder, write, cache)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait for another process that makes the folder. The lock goes with its holder, however that ends."""
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f".{folder.name}.lock"))
        try:
            lock.acquire(blocking=False)
        except Timeout:
            log.warning("Another process is converting the model %s: waiting for it.", folder.name)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()
