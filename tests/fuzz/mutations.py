"""Damage done to good files, drawn by hypothesis: of their text or bytes, and of the values in their JSON or YAML."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml
from hypothesis import strategies as st

ODD = st.one_of(
    st.sampled_from([None, True, False, 0, -1, 3, 2**70, 1e308, -0.0, float("nan"), float("inf"), "", " ", "0"]),
    st.sampled_from(["\x00", "é" * 40, "a/b", "../..", "zoo:", "nan", "1e400", "[", "x" * 300, "2026-01-01", "!!x"]),
    st.sampled_from([[], {}, [[]], [None], {"a": 1}, ["a", "a"], [{}], {"": None}, [1, "a", 2.5]]),
    st.integers(-5, 70),
    st.text(max_size=8),
)
FRAGMENTS = ["\x00", "\n", "{", "}", "[", "]", ":", "-", "\t", '"', "'", "&a", "*a", "<<: ", "!!python/name:os.system"]
FRAGMENTS += ["[" * 3000, "\ufeff", "NaN", "Infinity", "null", "#", "=", "  ", "\r", "\u2028", "🙂", "1e999", "%", "?"]


@dataclass(frozen=True)
class Damage:
    """What is done: `how`, and where, as fractions of the file or list, so that one damage fits every file."""

    how: str
    where: float
    what: Any = None


#: Of any file.
RAW = st.one_of(
    st.builds(Damage, st.sampled_from(["cut", "empty line", "double line", "drop line"]), st.floats(0, 1)),
    st.builds(Damage, st.just("byte"), st.floats(0, 1), st.integers(0, 255)),
    st.builds(Damage, st.just("insert"), st.floats(0, 1), st.sampled_from(FRAGMENTS)),
)
#: Of a value in a mapping or list.
VALUES = st.one_of(
    st.builds(Damage, st.just("replace"), st.floats(0, 1), ODD),
    st.builds(Damage, st.sampled_from(["delete", "rename", "double"]), st.floats(0, 1)),
)


def damaged_bytes(content: bytes, damage: Damage) -> bytes:
    """`content` after one of `RAW`."""
    at = int(damage.where * len(content))
    if damage.how == "cut":
        return content[:at]
    if damage.how == "byte":
        return content[:at] + bytes([damage.what]) + content[at + 1 :]
    if damage.how == "insert":
        return content[:at] + damage.what.encode() + content[at:]
    lines = content.splitlines(keepends=True)
    if lines:
        line = min(int(damage.where * len(lines)), len(lines) - 1)
        changed = {"double line": [lines[line]] * 2, "drop line": [], "empty line": [b"\n"]}[damage.how]
        lines[line : line + 1] = changed
    return b"".join(lines)


def damaged_values(value: Any, damage: Damage) -> Any:
    """A copy of nested lists and mappings after one of `VALUES`."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    if not places:
        return damage.what
    holder, key = places[min(int(damage.where * len(places)), len(places) - 1)]
    if damage.how == "replace":
        holder[key] = copy.deepcopy(damage.what)
    elif damage.how == "delete":
        del holder[key]
    elif isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    else:
        holder[f"{key}x"] = holder.pop(key) if damage.how == "rename" else copy.deepcopy(holder[key])
    return value


def damaged_file(name: str, content: bytes, damages: list[Damage]) -> bytes:
    """The file after all damages; those of values apply while its content can still be read."""
    for damage in damages:
        if damage.how in ("replace", "delete", "rename", "double"):
            content = _damaged_parsed(name, content, damage)
        else:
            content = damaged_bytes(content, damage)
    return content


def _damaged_parsed(name: str, content: bytes, damage: Damage) -> bytes:
    read, write = _format(name)
    if read is None:
        return content
    try:
        if name.endswith(".jsonl"):
            rows = content.splitlines()
            at = min(int(damage.where * len(rows)), len(rows) - 1)
            # The same fraction again picks the value in the row.
            rows[at] = write(damaged_values(read(rows[at]), damage))
            return b"\n".join(rows) + b"\n"
        return write(damaged_values(read(content), damage))
    except (ValueError, IndexError, RecursionError, yaml.YAMLError):
        return content


def _format(name: str) -> tuple[Callable | None, Callable]:
    if name.endswith((".json", ".jsonl")):
        return json.loads, lambda value: json.dumps(value).encode()
    if name.endswith((".yaml", ".yml")):
        return yaml.safe_load, lambda value: yaml.safe_dump(value, allow_unicode=True, sort_keys=False).encode()
    return None, bytes


def _places(value: Any):
    if isinstance(value, dict):
        for key in list(value):
            yield value, key
            yield from _places(value[key])
    elif isinstance(value, list):
        for index in range(len(value)):
            yield value, index
            yield from _places(value[index])


def damages(of_values: bool = True) -> st.SearchStrategy[list[Damage]]:
    """One to three damages."""
    return st.lists(st.one_of(RAW, VALUES) if of_values else RAW, min_size=1, max_size=3)
