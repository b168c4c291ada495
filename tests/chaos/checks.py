"""Invariants of a run folder after kills (`run.py`), read independently of the software under test."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ADAPTER = "adapter/adapter_model.safetensors"


def stamp(file: Path) -> int:
    """Return the modification time of a file in ns; 0 if it is missing."""
    with suppress(OSError):
        return file.stat().st_mtime_ns
    return 0


@dataclass(frozen=True)
class Found:
    """Contents of a run folder that must not depend on kills."""

    statuses: dict[str, str]
    losses: dict[str, list[tuple]]
    adapters: dict[str, str]
    scores: dict[tuple, float]


SCORE_KEY = ("model", "trial", "split", "benchmark", "task", "metric", "attack", "attack_on")


def read(folder: Path, violation: Callable[[str], None]) -> Found:
    """Read a run folder independently of the software under test; report whatever is not whole as a violation."""
    loaded: dict[Path, Any] = {}
    for file in sorted(folder.rglob("*")):
        if "ray" in file.relative_to(folder).parts[:1]:
            continue
        try:
            if file.suffix == ".json":
                loaded[file] = json.loads(file.read_text())
            elif file.suffix == ".jsonl":
                loaded[file] = [json.loads(line) for line in file.read_text().splitlines()]
            elif file.suffix == ".yaml":
                loaded[file] = yaml.safe_load(file.read_text())
            elif file.name.endswith(".tmp"):
                violation(f"leftover: {file.relative_to(folder)}")
        except ValueError as error:
            violation(f"{file.relative_to(folder)} is damaged: {error}")
    trials = {file.parent.name: rows for file, rows in loaded.items() if file.name == "trial.json"}
    rows = loaded.get(folder / "scores.jsonl", [])
    doubled = [key for key, n in Counter(tuple(row[name] for name in SCORE_KEY) for row in rows).items() if n > 1]
    if doubled:
        violation(f"duplicate scores: {doubled[:3]}")
    losses = {}
    for name in trials:
        metrics = loaded.get(folder / "trials" / name / "metrics.jsonl", [])
        steps = [row["step"] for row in metrics if "loss" in row]
        if steps != sorted(set(steps)):
            violation(f"{name}: steps {steps}")
        losses[name] = [(row["step"], row.get("loss"), row.get("eval_loss")) for row in metrics]
    if loaded.get(folder / "run.json", {}).get("status") != "done":
        violation("the status in run.json is not 'done'")
    return Found(
        statuses={name: trial["status"] for name, trial in trials.items()},
        losses=losses,
        adapters={
            name: hashlib.sha256(file.read_bytes()).hexdigest()
            for name in trials
            if (file := folder / "trials" / name / ADAPTER).is_file()
        },
        scores={tuple(row[name] for name in SCORE_KEY): row["value"] for row in rows},
    )


def differing(one: Found, two: Found, content: str) -> list[str]:
    """Return the keys of one kind of content ("statuses", "losses" ...) whose values differ."""
    here, there = getattr(one, content), getattr(two, content)
    return sorted(str(key) for key in here.keys() | there.keys() if here.get(key) != there.get(key))


def check(folder: Path, seen: dict[Path, int], reference: Found, kills: int, violation: Callable[[str], None]) -> None:
    """Compare a disturbed sweep that has ended with the undisturbed one.

    Args:
        seen: adapters that were whole before the end, with the time (`stamp`) at which each was written.
    """
    found = read(folder, violation)
    for what in ("statuses", "losses", "adapters", "scores"):
        keys = differing(found, reference, what)
        if keys:
            violation(f"{what} differ from the undisturbed sweep: {keys[:3]} ({len(keys)} in all)")
    again = [file.parts[-3] for file, when in seen.items() if stamp(folder / file) != when]
    if again:
        violation(f"trained again although done: {again}")
    attempts = {file.parent.name: json.loads(file.read_text())["attempts"] for file in folder.rglob("trial.json")}
    if sum(attempts.values()) > len(attempts) + kills:
        violation(f"more attempts than kills explain: {attempts}")
