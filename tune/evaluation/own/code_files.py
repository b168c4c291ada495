"""Files of the user's code: found, named by a fingerprint, sent to other machines and laid out there.

A module travels with what it imports from its own folder, so that a score depends on nothing else there.
"""

from __future__ import annotations

import ast
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from macdrop.errors import ConfigError
from tune.storage.places import cache_dir

#: Bytes that a folder of tasks may have: it is sent to every evaluation actor.
LARGEST = 16 * 2**20
#: Hexadecimal digits of a fingerprint, in scores and folder names.
DIGITS = 12


@dataclass(frozen=True)
class CodeFiles:
    """Contents of files by their path below the folder they come from."""

    files: Mapping[str, bytes]

    @property
    def version(self) -> str:
        """The fingerprint: equal for equal names and contents, wherever they lie."""
        digest = hashlib.sha256()
        for name, content in sorted(self.files.items()):
            digest.update(f"{name}\0{hashlib.sha256(content).hexdigest()}\n".encode())
        return digest.hexdigest()[:DIGITS]

    def lay_out(self) -> Path:
        """Return a folder of this machine's cache that holds the files, made unless it is there.

        Raises:
            ConfigError: the cache cannot be written.
        """
        place = cache_dir() / "code" / self.version
        if place.is_dir() and all(_holds(place / name, content) for name, content in self.files.items()):
            return place
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(dir=place.parent))
            for name, content in self.files.items():
                (made / name).parent.mkdir(parents=True, exist_ok=True)
                (made / name).write_bytes(content)
            shutil.rmtree(place, ignore_errors=True)  # of other contents: somebody wrote to the cache
            with suppress(OSError):  # another process was faster
                os.replace(made, place)
            shutil.rmtree(made, ignore_errors=True)
        except OSError as error:
            raise ConfigError(f"{place.parent} cannot be written: {error.strerror}. Set MACDROP_CACHE.") from None
        return place


def _holds(file: Path, content: bytes) -> bool:
    try:
        return file.read_bytes() == content
    except OSError:
        return False


def code_of(folder: Path, modules: Iterable[str]) -> CodeFiles:
    """Return the files of modules (dotted names) of a folder, and of what they import from it.

    Raises:
        ConfigError: a module is not there, cannot be read, or is not valid Python (file and line).
    """
    found: dict[str, bytes] = {}
    waiting = list(modules)
    for name in waiting:
        if not _files_of(folder, name):
            there = sorted(file.stem for file in folder.glob("*.py")) if folder.is_dir() else []
            raise ConfigError(
                f"There is no module {name!r} in {folder}: {name.replace('.', '/')}.py is missing. "
                f"Modules there: {', '.join(there) or 'none'}.\nPut it beside the run file, or name its folder by "
                "code_path."
            )
    while waiting:
        for file in _files_of(folder, waiting.pop()):
            relative = file.relative_to(folder).as_posix()
            if relative in found:
                continue
            try:
                found[relative] = file.read_bytes()
                tree = ast.parse(found[relative], str(file))
            except OSError as error:
                raise ConfigError(f"{file} cannot be read: {error.strerror}.") from None
            except (SyntaxError, ValueError) as error:
                at = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
                raise ConfigError(f"{file}{at} is not valid Python: {getattr(error, 'msg', error)}.") from None
            waiting += _imported(tree, relative)
    return CodeFiles(found)


def folder_of(folder: Path) -> CodeFiles:
    """Return all files of a folder, but hidden ones and Python's caches.

    Raises:
        ConfigError: it is not a folder, or holds more than is sent to actors.
    """
    if not folder.is_dir():
        raise ConfigError(f"task_path: {folder} is not a folder. Give the folder that holds the tasks' YAML files.")
    names = [file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file()]
    names = [name for name in names if not any(part[0] == "." or part == "__pycache__" for part in name.parts)]
    size = sum((folder / name).stat().st_size for name in names)
    if size > LARGEST:
        raise ConfigError(
            f"task_path: the files in {folder} have {size / 2**20:.0f} MiB, and at most {LARGEST // 2**20} are sent to "
            "evaluation actors. Keep tasks and small data there, and name large data by absolute paths."
        )
    return CodeFiles({name.as_posix(): (folder / name).read_bytes() for name in names})


def _files_of(folder: Path, name: str) -> list[Path]:
    """Return the file of a module and those of the packages around it; empty if it is not in the folder."""
    path = folder.joinpath(*name.split("."))
    own = next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)
    if own is None:
        return []
    above = [parent / "__init__.py" for parent in path.parents if parent != folder and parent.is_relative_to(folder)]
    return [own, *(file for file in above if file.is_file())]


def _imported(tree: ast.Module, relative: str) -> Iterator[str]:
    """Yield dotted names of what may be imported, of any folder: also inside functions, and members of modules."""
    package = relative.split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from filter(None, [base])
            yield from (f"{base}.{alias.name}".lstrip(".") for alias in node.names if alias.name != "*")
