"""Folders of this machine that outlive or serve runs (home, cache, Ray's sessions), Ray's token, and proxies."""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
import urllib.parse
from pathlib import Path

from tune.errors import ResourceError

#: Names the folder of scans and tokenised data; by default ~/.cache/macdrop.
CACHE_VARIABLE = "MACDROP_CACHE"
#: Version of what `macdrop.gguf.convert` writes: a new one converts files again.
CONVERTER = 1
#: Names the folder below which Ray keeps its sessions; by default the system's temporary folder.
RAY_TEMP_VARIABLE = "RAY_TMPDIR"
#: A Unix socket's path has at most this many bytes (sys/un.h: 108 with the final zero).
SOCKET_BYTES = 107
#: The longest socket path below `ray_root` (Ray 2.60), and below a temporary folder (Python's multiprocessing).
RAY_SOCKET = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
PYTHON_SOCKET = "/pymp-xxxxxxxx/listener-xxxxxxxx"
#: Addresses of this machine that no proxy can reach.
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def check_current_folder() -> None:
    """Refuse to work in a folder that has been deleted, where not even libraries can be loaded.

    Raises:
        ResourceError: the current folder is gone.
    """
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ResourceError("The current folder is gone: it was deleted.\nChange to another: cd ~") from None


def home() -> Path:
    """The home folder of this user.

    Raises:
        ResourceError: there is none: HOME is not set, and the system does not know the user.
    """
    try:
        return Path.home()
    except RuntimeError:
        raise ResourceError(
            f"User {os.getuid()} has no home folder, which libraries keep their files in.\n"
            "Set HOME to a folder that this user can write to."
        ) from None


def cache_dir() -> Path:
    """The folder that outlives runs: scans by fingerprint, tokenised data by content.

    Raises:
        ResourceError: it is not named, and this user has no home folder.
    """
    named = os.environ.get(CACHE_VARIABLE)
    return (Path(named).expanduser() if named else home() / ".cache" / "macdrop").absolute()


def in_cache(path: str | os.PathLike[str]) -> bool:
    """Check whether a path lies in the cache."""
    try:
        return Path(path).absolute().is_relative_to(cache_dir())
    except ResourceError:
        return False


def converted_folder(sha256: str) -> Path:
    """Return where the cache keeps the model converted from a GGUF file; it is there once it is whole.

    sha256: of the GGUF file, in hex.
    """
    return cache_dir() / "models" / f"gguf-{sha256[:16]}-v{CONVERTER}"


# --- Ray ---


def ray_root() -> Path:
    """The folder of this user's local Ray sessions.

    It lies in RAY_TMPDIR; else in the temporary folder, or in /tmp if its path is too long for Ray's sockets or not
    ASCII. Ray lets everybody into it, so that its parent has to be closed (`private_folder`).

    Raises:
        OSError: no temporary folder can be written to.
    """
    name, chosen = f"macdrop-{os.getuid()}/ray", os.environ.get(RAY_TEMP_VARIABLE)
    if chosen:
        return Path(chosen).absolute() / name
    usual = Path(tempfile.gettempdir()) / name
    return usual if fits_sockets(usual, RAY_SOCKET) else Path("/tmp") / name


def fits_sockets(folder: Path, socket: str) -> bool:
    """Check that Unix sockets named `socket` can be made below a folder: the path is short and, for Ray, ASCII."""
    text = f"{folder}{socket}"
    return text.isascii() and len(text) <= SOCKET_BYTES


def private_folder(folder: Path) -> None:
    """Make a folder that no other user may enter, with its parents; one that is there is closed to others.

    Raises:
        OSError: it cannot be made.
        PermissionError: it is another user's, or not a folder.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        found = folder.lstat()  # a link could lead into another user's folder
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise PermissionError(f"{folder} is not a folder of this user") from None
        if stat.S_IMODE(found.st_mode) != 0o700:
            folder.chmod(0o700)


def token_file() -> Path:
    """The file that Ray reads a token from."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or home() / ".ray" / "auth_token").expanduser()


def own_token() -> dict[str, str]:
    """Return the environment variables that let a local Ray answer to its owner alone.

    A token that the user has chosen is kept: in RAY_AUTH_TOKEN, in a file that RAY_AUTH_TOKEN_PATH names, or in Ray's
    own file with RAY_AUTH_MODE=token; the file is closed to other users. Otherwise it is a random one, which is in no
    file: Ray would write it with the rights that the umask leaves to others. Nothing is returned if the user has
    turned tokens off.
    """
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode is not None and mode.lower() != "token":
        return {}
    wanted = {"RAY_AUTH_MODE": "token"}
    if os.environ.get("RAY_AUTH_TOKEN"):
        return wanted
    chosen = mode is not None or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if chosen and token_file().is_file():
        close_to_others(token_file())
        return wanted
    return wanted | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}


def close_to_others(file: Path) -> None:
    """Take all rights to a file of this user from other users."""
    if open_to_others(file) and file.stat().st_uid == os.getuid():
        file.chmod(0o600)


def open_to_others(file: Path) -> bool:
    """Check whether other users have any right to a file; False if there is no such file."""
    return file.is_file() and bool(file.stat().st_mode & 0o077)


# --- proxies ---


def direct_loopback() -> None:
    """Exempt this machine's own addresses from proxies, in this process and those that it starts.

    Libraries read either spelling of the variable, most of them the lower one first.
    """
    lower, upper = os.environ.get("no_proxy"), os.environ.get("NO_PROXY")
    for name, value in (("no_proxy", lower or upper or ""), ("NO_PROXY", upper or lower or "")):
        exempt = [host for host in value.split(",") if host.strip()]
        exempt += [host for host in LOOPBACK if host not in (each.strip() for each in exempt)]
        os.environ[name] = ",".join(exempt)


def without_password(url: str) -> str:
    """Return an address without the user and password that may be in it."""
    parts = urllib.parse.urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
