"""Figures that were drawn before, by the hash of their numbers: in the cache of this user, and never a stale one.

The key holds all that a figure is drawn from, the code that draws, and the libraries whose ticks and numbers it uses.
They lie in the user's cache and not in the run folder: SVG goes into pages as it is, and a run may be somebody else's.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from macdrop import errors
from tune.errors import ResourceError
from tune.storage.atomic import atomic_write_bytes
from tune.storage.places import cache_dir

LARGEST = 256 * 2**20
"""Bytes of all entries; the ones used longest ago go first."""
LIBRARIES = ("matplotlib", "numpy")


def key_of(*numbers: object) -> str:
    """Return the key of figures that are drawn from these values; two differ where their `repr` does."""
    found = hashlib.sha256(_code().encode())
    for each in numbers:
        found.update(repr(each).encode("utf-8", errors="surrogatepass") + b"\0")
    return found.hexdigest()


def recall(key: str) -> Any:
    """Return the JSON value kept under a key; None where there is none."""
    try:
        file = _file(key)
        found = json.loads(file.read_bytes())
        with suppress(OSError):
            os.utime(file)
        return found
    except (OSError, ResourceError, ValueError):  # none, or none that is whole
        return None


def remember(key: str, value: Any) -> Any:
    """Keep a JSON value under a key, where the cache can be written; return it as it will be recalled."""
    content = json.dumps(value).encode()
    with suppress(OSError, ResourceError):
        atomic_write_bytes(_file(key), content, durable=False)
    return json.loads(content)


def tidy_up(largest: int = LARGEST) -> None:
    """Delete the entries used longest ago, down to `largest` bytes."""
    with suppress(OSError, ResourceError):
        files = [(file.stat(), file) for file in (cache_dir() / "figures").glob("*/*.json")]
        left = sum(state.st_size for state, _ in files)
        for state, file in sorted(files, key=lambda pair: pair[0].st_mtime):
            if left <= largest:
                return
            left -= state.st_size
            file.unlink(missing_ok=True)


def _file(key: str) -> Path:
    return cache_dir() / "figures" / key[:2] / f"{key}.json"


@cache
def _code() -> str:
    """A hash of all code of ours, and the versions of the libraries that draw."""
    here, found = Path(__file__).parents[1], hashlib.sha256()
    for package in (here, Path(errors.__file__).parent):
        for file in sorted(package.rglob("*.py")):
            found.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return found.hexdigest() + " ".join(f"{name} {version(name)}" for name in LIBRARIES)
