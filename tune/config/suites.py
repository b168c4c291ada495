"""Shipped benchmark suites: named, versioned lists of benchmarks and attacks, and how they enter an `eval:` block.

A suite is a YAML file in `tune/config/suites`: {name, version, title, about, files, get, eval}. `eval` is an `eval:`
block that may itself name suites; `files` maps each entry to its data file below a local folder, and `get` says where
to get these files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from macdrop.errors import ConfigError, DataError, nearest
from tune.config.parse import LEFT_OUT, SECTIONS, merge, named_block, read_yaml
from tune.config.syntax.user_paths import expand_path

FOLDER = Path(__file__).with_name("suites")
#: Keys of an entry that do not change what its score means: the copy of the data, how much of it, the attacks.
FREE_KEYS = {"data", "fewshot_data", "limit", "batch_size", "attacks"}
#: Keys that select a part of the Hub data set; they do not apply to other data.
HUB_KEYS = ("name", "split")


@dataclass(frozen=True)
class Suite:
    """A suite, with the suites that it names merged in. `files`: "section/entry" -> path below a local folder."""

    name: str
    version: int
    title: str
    about: str
    eval: dict[str, Any]
    files: dict[str, str] = field(default_factory=dict)
    get: str = ""


def names() -> list[str]:
    """List the shipped suites."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


@cache
def load(name: str) -> Suite:
    """Read a suite; each of its entries is marked with NAME@VERSION of the suite that defines it.

    Raises:
        ConfigError: there is no such suite.
    """
    if name not in names():
        raise ConfigError(f"unknown suite {name!r}.{nearest(name, names())} Suites: {', '.join(names())}.")
    raw = read_yaml(FOLDER / f"{name}.yaml")
    own = {"files": {}, "get": ""} | raw
    block = dict(own["eval"])
    included = [load(other) for other in block.pop("suite", [])]
    base = _merged(included)
    for section, entry in _entries(block):
        if entry not in base.get(section, {}):
            block[section] = block[section] | {entry: {"suite": f"{name}@{own['version']}", **block[section][entry]}}
    merged = _without_off(merge(base, block))
    kept = {f"{section}/{entry}" for section, entry in _entries(merged)}
    files = {entry: file for suite in included for entry, file in suite.files.items()} | own["files"]
    files = {entry: file for entry, file in files.items() if entry in kept}
    return Suite(name, own["version"], own["title"], own["about"].strip(), merged, files, own["get"].strip())


def expand(block: Mapping[str, Any]) -> dict[str, Any]:
    """Write out the entries of an `eval:` block's `suite` and the files of its `local` folder.

    Suites are merged in their order; the block's own keys override theirs. An entry set to `off` (false) is left out:
    one of a suite, or by an override any that was there.
    Idempotent.

    Raises:
        ConfigError: a suite is unknown, `off` names an entry that no suite has, or an entry needs data.
        DataError: lists the files that the local folder lacks.
    """
    own = {key: value for key, value in block.items() if key not in ("suite", "local")}
    wanted, local = block.get("suite"), block.get("local")
    if wanted is None:
        if local is not None:
            raise ConfigError("local is the folder of a suite's files, but no suite is given: add suite: NAME.")
        return _switched_off(own)
    chosen = [load(name) for name in _list(wanted)]
    base = _merged(chosen)
    files = {entry: file for suite in chosen for entry, file in suite.files.items()}
    for section in SECTIONS:
        if section in own:
            own[section] = _own_entries(section, own[section], base.get(section, {}))
    if local is not None:
        own = _with_local(base, own, files, str(local))
    for section, name in _entries(base):
        mine = own.get(section, {}).get(name)
        if mine and "data" in mine:
            kept = {key: value for key, value in base[section][name].items() if key not in HUB_KEYS}
            base[section] = base[section] | {name: kept}
    merged = _without_off(merge(base, own))
    for section, name in _entries(base):
        if section != "zero_shot" and "data" not in (merged[section].get(name) or {"data": ""}):
            raise ConfigError(
                f"{section}.{name} needs a file, because the Hub has none. {_get([base[section][name]])}\n"
                f"Then give {section}.{name}.data: FILE, or local: FOLDER with {files[f'{section}/{name}']} in it, or "
                f"leave it out: {section}.{name}: off."
            )
    return merged


def _get(entries: list[Mapping[str, Any]]) -> str:
    """Say where to get the data of entries, in the words of the suites that define them."""
    owners = dict.fromkeys(entry["suite"].partition("@")[0] for entry in entries)
    return "\n".join(get for get in (load(owner).get for owner in owners) if get)


def _list(wanted: Any) -> list[str]:
    items = [wanted] if isinstance(wanted, str) else wanted
    if not isinstance(items, (list, tuple)) or not items or not all(isinstance(item, str) for item in items):
        raise ConfigError(f"suite must be a name or a list of names, not {wanted!r}. Suites: {', '.join(names())}.")
    if len(set(items)) < len(items):
        raise ConfigError(f"suite names a suite twice: {', '.join(items)}.")
    return list(items)


def _merged(chosen: list[Suite]) -> dict[str, Any]:
    base: dict[str, Any] = {}
    for suite in chosen:
        base = merge(base, suite.eval)
    return base


def _entries(block: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(section, name) for section in SECTIONS for name in block.get(section, {})]


def _without_off(block: dict[str, Any]) -> dict[str, Any]:
    for section in SECTIONS:
        if isinstance(block.get(section), Mapping):
            block[section] = {name: entry for name, entry in block[section].items() if entry is not False}
    return block


def _switched_off(own: dict[str, Any]) -> dict[str, Any]:
    """Leave out what overrides have switched off, in a block without a suite; refuse `off` where there was nothing."""
    for section in SECTIONS:
        if not isinstance(own.get(section), Mapping):
            continue
        own[section] = {name: entry for name, entry in own[section].items() if entry is not LEFT_OUT}
        for name, entry in own[section].items():
            if entry is False or entry == "off":
                others = [other for other in own[section] if other != name]
                raise ConfigError(
                    f"{section}.{name} is off, but there is no such benchmark to leave out.{nearest(name, others)}"
                )
    return own


def _own_entries(section: str, value: Any, base: Mapping[str, Any]) -> Any:
    """Return a section's own keys by entry; the `suite` of an entry records which keys of its definition changed."""
    value = named_block(value)
    if not isinstance(value, Mapping):
        return value
    entries: dict[str, Any] = {}
    for name, entry in value.items():
        entry = False if entry == "off" else entry  # YAML 1.1 reads the word so
        if entry is LEFT_OUT:
            entry = False
        elif entry is False and name not in base:
            raise ConfigError(f"{section}.{name} is off, but no suite given has it.{nearest(name, base)}")
        entry = {} if entry is None else {"data": entry} if isinstance(entry, str) else entry
        if isinstance(entry, Mapping) and name in base:
            changed = [key for key, value in entry.items() if key not in FREE_KEYS and value != base[name].get(key)]
            entry = {**entry, "suite": "+".join([base[name]["suite"], *changed])} if changed else entry
        entries[name] = entry
    return entries


def _with_local(base: Mapping[str, Any], own: dict[str, Any], files: Mapping[str, str], folder: str) -> dict[str, Any]:
    """Return `own` with a file of the folder as the data of each suite's entry that has none."""
    missing = []
    for section, name in _entries(base):
        mine = (own.get(section) or {}).get(name, {})
        if mine is False or "data" in mine or f"{section}/{name}" not in files:
            continue
        file = Path(expand_path(folder)) / files[f"{section}/{name}"]
        if not os.path.isfile(file):
            missing.append((section, name, file))
        own = merge(own, {section: {name: {"data": [str(file)]}}})
    if missing:
        lines = "".join(f"\n  {file} (for {section}.{name})" for section, name, file in missing)
        get = _get([base[section][name] for section, name, _ in missing])
        raise DataError(
            f"local folder {folder!r} lacks {len(missing)} file(s) of the suite:{lines}\n{get}\n"
            "Put them there, give an entry its own data: FILE, or leave it out, for example "
            f"eval.{missing[0][0]}.{missing[0][1]}=off."
        )
    return own
