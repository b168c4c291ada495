"""Lookup of lm-eval's task definitions by name, without its index (14 s) and without importing it (7 s).

lm-eval ships some 14,000 YAML files; a task's file is found by its path where possible, else by one pass over all
files, which is cached.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import yaml

_NAMED = re.compile(rb"""^(task|group|tag)[ \t]*:[ \t]*["']?([^\s"'#\[\]]+)["']?[ \t]*(?:#.*)?\r?$""", re.M)
_TAGGED = re.compile(rb"^tag[ \t]*:[ \t]*\r?\n((?:[ \t]*-.*\n?)+)", re.M)


@lru_cache(maxsize=1)
def tasks_root() -> Path:
    """Return the folder of lm-eval's task definitions."""
    found = importlib.util.find_spec("lm_eval")
    assert found is not None and found.origin is not None, "lm-eval is a dependency of macdrop"
    return Path(found.origin).parent / "tasks"


@lru_cache(maxsize=1)
def _files() -> list[Path]:
    return sorted(tasks_root().rglob("*.yaml"), key=lambda path: path.as_posix())


def _defines(file: Path, name: str) -> bool:
    return any(kind == b"task" and found.decode() == name for kind, found in _NAMED.findall(file.read_bytes()))


def names_of(file: Path) -> Iterator[tuple[str, bool]]:
    """Yield the names that a file defines, and whether each is a single task; else it is a group or tag."""
    content = file.read_bytes()
    for kind, found in _NAMED.findall(content):
        yield found.decode(errors="replace"), kind == b"task"
    for block in _TAGGED.findall(content):
        for name in re.findall(rb"-[ \t]*[\"']?([^\s\"']+)", block):
            yield name.decode(errors="replace"), False


@lru_cache(maxsize=1)
def known_names() -> dict[str, Path | None]:
    """Return every task, group and tag name in lm-eval's files; the path is given for single tasks only."""
    names: dict[str, Path | None] = {}
    for file in _files():
        for name, single in names_of(file):
            if single and names.get(name) is None:
                names[name] = file
            else:
                names.setdefault(name, None)
    return names


@cache
def find_task(name: str, by_path: bool = False) -> Path | None:
    """Return the YAML file of the single task `name`, or None (a group, a tag, or unknown to lm-eval).

    `by_path`: look only where file, folder or both have the task's name, as nearly all do, and skip the full pass.
    """
    near = [file for file in _files() if name in (file.stem, file.parent.name, f"{file.parent.name}_{file.stem}")]
    for file in sorted(near, key=lambda file: file.stem != name):
        if _defines(file, name):
            return file
    return None if by_path else known_names().get(name)


class _PlainLoader(yaml.SafeLoader):
    """Reads lm-eval's YAML with `!function` left as an opaque marker, so that nothing is imported."""


class Function(str):
    """The text after `!function`."""


def _function(loader: _PlainLoader, node: yaml.Node) -> Function:
    assert isinstance(node, yaml.ScalarNode), "lm-eval writes !function before the name of one"
    return Function(loader.construct_scalar(node))


_PlainLoader.add_constructor("!function", _function)


def read_plain(file: Path) -> Any:
    """Read a task definition as it stands in its file, functions left as markers."""
    return yaml.load(file.read_bytes(), Loader=_PlainLoader)  # noqa: S506 - derived from SafeLoader


def read_definition(file: Path) -> dict[str, Any]:
    """Read a task definition with its includes merged, functions left as markers."""
    definition = read_plain(file)
    includes = definition.pop("include", [])
    merged: dict[str, Any] = {}
    for include in [includes] if isinstance(includes, str) else includes:
        merged.update(read_definition(file.parent / include))
    return merged | definition


def needed_columns(file: Path) -> list[str]:
    """Return the columns that the task's templates read; empty if the task's code prepares the rows first."""
    from jinja2 import Environment, TemplateError, meta, nodes

    definition = read_definition(file)
    if "process_docs" in definition:
        return []
    columns: set[str] = set()
    for key in ("doc_to_text", "doc_to_target", "doc_to_choice"):
        template = definition.get(key)
        if not isinstance(template, str) or isinstance(template, Function):
            continue
        if key != "doc_to_text" and template.isidentifier():
            columns.add(template)
            continue
        try:
            tree = Environment().parse(template)
            found = meta.find_undeclared_variables(tree)
        except TemplateError:
            continue
        optional = [n.node for n in tree.find_all((nodes.Test, nodes.Filter)) if n.name in ("defined", "default", "d")]
        columns |= found - {node.name for node in optional if isinstance(node, nodes.Name)}
    return sorted(columns)
