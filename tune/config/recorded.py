"""Lenient reading of recorded run files: the models and benchmarks of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tune.config.parse import SECTIONS


def models_of(config: Mapping[str, Any]) -> list[str]:
    """List the names of a run's models, in the order of its spec."""
    entries = block_of(config, "sweep").get("models") or [config.get("model_name_or_path")]
    names = [entry.get("model_name_or_path") if isinstance(entry, Mapping) else entry for entry in entries]
    return [name for name in names if isinstance(name, str) and name]


def asked_for(config: Mapping[str, Any]) -> dict[str, str | None]:
    """Map the run's benchmarks, and the lm-eval tasks behind them, to the metric that tables show."""
    names: dict[str, str | None] = {}
    for block in ("validation", "eval"):
        for section in SECTIONS:
            for name, entry in block_of(block_of(config, block), section).items():
                entry = entry if isinstance(entry, Mapping) else {}
                names |= dict.fromkeys((name, entry.get("task") or name), entry.get("metric"))
    return names


def block_of(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return a block of a run file; empty if it is missing or is not a block."""
    found = config.get(key)
    return found if isinstance(found, Mapping) else {}
