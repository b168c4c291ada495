"""Overrides by which a run reads local files in place of the models and data of the Hub that it names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tune.config.eval_entries import ZeroShot
from tune.config.eval_spec import EvalSpec
from tune.config.parse import SECTIONS
from tune.config.resume import shell_command
from tune.config.run_spec import RunSpec
from tune.data.locations import is_local
from tune.evaluation import catalogue
from tune.evaluation.own import own_tasks
from tune.zoo.real_models import find_here, real_model

#: In place of a file or folder of the user's.
PATH = "PATH"


def local_overrides(spec: RunSpec) -> list[tuple[str, str]]:
    """List one override `key=PATH` for each model and data set of the Hub, with the Hub's name for it.

    Overrides are quoted for a shell. A benchmark's rows have the schema of its Hub data set. Downloads nothing.
    """
    found = _models(spec) + _datasets(spec)
    for block in ("validation", "eval"):
        found += _benchmarks(block, getattr(spec, block))
    return found


def _models(spec: RunSpec) -> list[tuple[str, str]]:
    if not spec.sweep.models:
        name = _hub_name(spec.model_name_or_path) if spec.model_name_or_path else None
        return [(f"model_name_or_path={PATH}", name)] if name else []
    return _listed("sweep.models", "model_name_or_path", spec.sweep.models)


def _datasets(spec: RunSpec) -> list[tuple[str, str]]:
    if isinstance(spec.dataset, str):
        return [] if is_local(spec.dataset) else [(f"dataset={PATH}", spec.dataset)]
    entries = [
        {"path": item} if isinstance(item, str) else item.model_dump(exclude_unset=True) for item in spec.dataset
    ]
    return _listed("dataset", "path", entries)


def _listed(key: str, name: str, entries: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return the override of a list, in which the names of the Hub are replaced; empty if there are none."""
    remote = [found for entry in entries if (found := _hub_name(entry[name]))]
    if not remote:
        return []
    replaced = [{**entry, name: PATH} if _hub_name(entry[name]) else entry for entry in entries]
    short = [entry[name] if len(entry) == 1 else entry for entry in replaced]
    texts = [item if isinstance(item, str) else json.dumps(item) for item in short]
    return [(shell_command(f"{key}=[{','.join(texts)}]"), ", ".join(remote))]


def _hub_name(name: str) -> str | None:
    """Return the Hub's name for a model or data set, also of a real model of the zoo; None if it is here."""
    real = real_model(name)
    if real is not None:
        return None if find_here(real) else f"{real.hub}, or {real.fetch_command}"
    return None if is_local(name) else name


def _benchmarks(block: str, spec: EvalSpec) -> list[tuple[str, str]]:
    found = []
    for section in SECTIONS:
        for name, entry in spec.entries(section).items():
            data, key = getattr(entry, "data", None), f"{block}.{section}.{name}"
            if isinstance(entry, ZeroShot) and not data:
                file = own_tasks.find_task(entry.task or name, spec.task_path)
                if file and own_tasks.is_own(entry.task or name, spec.task_path) and own_tasks.reads_local_data(file):
                    continue
                # A suite takes its own split out where there is data; one of the run file has to be taken out.
                own = entry.split and (not entry.suite or "+split" in entry.suite)
                words = [f"{key}.data={PATH}", *([f"{key}.split=null"] if own else [])]
                found.append((shell_command(*words), _of_task(name, entry, file)))
            elif data and not all(map(is_local, data)):
                about = _of_hub(data[0], getattr(entry, "name", None), getattr(entry, "split", None))
                found.append((shell_command(f"{key}.data={PATH}"), about))
    return found


def _of_task(name: str, entry: ZeroShot, file: Path | None) -> str:
    """Name the Hub data set that a task, defined in `file`, reads; of a group, the group."""
    definition: dict[str, Any] = catalogue.read_definition(file) if file else {}
    split = entry.split or definition.get("test_split") or definition.get("validation_split")
    return _of_hub(definition.get("dataset_path") or entry.task or name, definition.get("dataset_name"), split)


def _of_hub(path: str, name: str | None, split: str | None) -> str:
    about = ", ".join(filter(None, [name, f"split {split}" if split else ""]))
    return f"{path} ({about})" if about else path
