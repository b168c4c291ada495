"""Objects below one address, by fsspec: S3, Google Cloud Storage, a folder.

A write is atomic: S3 and GCS never show a part of an object, an upload in parts appears when it is completed, and a
read after it sees it (S3 since December 2020, GCS always). A folder gets a temporary file that is renamed. Atomicity
ends at one object, so what belongs together needs a manifest (`tune.storage.remote.copied_units`).
"""

from __future__ import annotations

import importlib.util
import re
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec

from macdrop.errors import ConfigError

#: Scheme -> the package that serves it, and the extra that installs the package.
PACKAGES = {"s3": ("s3fs", "macdrop[s3]"), "gs": ("gcsfs", "macdrop[gcs]")}
#: Seconds until a store that does not answer is an error, as it is tried again later.
CONNECT_S, READ_S = 10, 60
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {
        "config_kwargs": {"connect_timeout": CONNECT_S, "read_timeout": READ_S, "retries": {"max_attempts": 2}},
        "use_listings_cache": False,
    },
    "gs": {"use_listings_cache": False},
    "file": {},
}
#: Identifiers of AWS keys, which errors may quote.
_KEY_ID = re.compile(r"A(?:KIA|SIA)[0-9A-Z]{16}")
_REFUSED = re.compile(r"credential|ExpiredToken|token.*expired|Unauthorized|Forbidden|\b40[13]\b|RefreshError", re.I)


def check_package(url: str) -> None:
    """Refuse an address whose package is missing.

    Raises:
        ConfigError: with the command that installs it.
    """
    scheme = url.partition(":")[0]
    package, extra = PACKAGES.get(scheme, ("fsspec", "fsspec"))
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"sync_to is {url}, but the package {package} is not installed.\n"
            f"Run: pip install '{extra}', or leave sync_to out."
        )


class ObjectStore:
    """The objects below an address; keys are relative, with slashes. Errors of the store are raised as they come."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._scheme = url.partition(":")[0]
        self._opened: tuple[Any, str] | None = None

    def forget(self) -> None:
        """Connect again at the next use: with credentials that may have been renewed."""
        self._opened = None

    def _at(self, key: str) -> tuple[Any, str]:
        if self._opened is None:
            self._opened = fsspec.core.url_to_fs(self.url, skip_instance_cache=True, **_OPTIONS.get(self._scheme, {}))
        files, root = self._opened
        return files, f"{root.rstrip('/')}/{key}"

    def read(self, key: str) -> bytes | None:
        """Return an object's content; None if there is none."""
        files, path = self._at(key)
        try:
            return bytes(files.cat_file(path))
        except FileNotFoundError:
            return None

    def holds(self, key: str) -> bool:
        files, path = self._at(key)
        return bool(files.exists(path))

    def write(self, key: str, content: bytes) -> None:
        """Write an object, whole or not at all."""
        files, path = self._at(key)
        with _Placed(files, path, self._scheme) as place:
            files.pipe_file(place, content)

    def upload(self, key: str, file: Path) -> None:
        """Copy a file into an object, whole or not at all."""
        files, path = self._at(key)
        with _Placed(files, path, self._scheme) as place:
            files.put_file(str(file), place)

    def download(self, key: str, file: Path) -> None:
        """Copy an object into a file. Raises FileNotFoundError: there is no such object."""
        files, path = self._at(key)
        files.get_file(path, str(file))

    def delete(self, key: str) -> None:
        files, path = self._at(key)
        with suppress(FileNotFoundError):
            files.rm_file(path)

    def keys(self, below: str) -> list[str]:
        """List the keys of all objects below a folder."""
        files, path = self._at(below)
        root = path.removesuffix(below)
        try:
            found = files.find(path)
        except FileNotFoundError:
            return []
        return sorted(name.removeprefix(root) for name in map(str, found) if not name.endswith(".tmp"))


class _Placed:
    """The path that a write goes to: of a folder a temporary one, renamed at the end."""

    def __init__(self, files: Any, path: str, scheme: str) -> None:
        self._files, self._path = files, path
        self._direct = scheme in PACKAGES
        folder, _, name = path.rpartition("/")
        self._place = path if self._direct else f"{folder}/.{name}.{uuid.uuid4().hex[:8]}.tmp"
        if not self._direct:
            files.makedirs(folder, exist_ok=True)

    def __enter__(self) -> str:
        return self._place

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._direct:
            return
        if kind is None:
            self._files.mv(self._place, self._path)
        else:
            with suppress(Exception):
                self._files.rm_file(self._place)


def why(error: BaseException) -> str:
    """Return an error of a store as one line, with the store's own code and without key identifiers."""
    response = getattr(error.__cause__ or error, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    text = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    if text == "Bad Request":  # S3 gives no reason where it may send no text
        text += " (which is also S3's answer to expired credentials)"
    return _KEY_ID.sub("...", f"{code or type(error).__name__}: {text}")


def is_refusal(error: BaseException) -> bool:
    """Return whether the store, or the search for credentials, refuses this user: no retry helps until they change."""
    return isinstance(error, PermissionError) or bool(_REFUSED.search(f"{type(error).__name__} {why(error)}"))
