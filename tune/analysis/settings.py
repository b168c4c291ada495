"""Settings of trials: which of them differ, and what makes two trials the same setting."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tune.config.sections import Arm
from tune.config.train_spec import WITHOUT_EFFECT

MACDROP_KEYS = ("k", "p0", "schedule", "alpha")
NOT_SETTINGS = (*WITHOUT_EFFECT, "eval_steps", "output_dir")
"""Keys that do not affect training; trials that differ only in these are the same setting."""


def varied(trials: Sequence[Mapping[str, Any]], searched: Iterable[str]) -> list[str]:
    """Return the settings to show in tables: MacDrop's, the searched ones, and all that differ between trials."""
    own = [f"macdrop.{key}" for key in MACDROP_KEYS]
    every = dict.fromkeys(key for settings in trials for key in settings)
    differing = [
        key
        for key in every
        if not key.startswith("macdrop.")
        and key.partition(".")[0] not in (*NOT_SETTINGS, "seed", "slimadam_rules")  # rules follow from the optimizer
        and _differs(trials, key)
    ]
    return [key for key in dict.fromkeys([*own, *searched, *differing]) if key != "seed"]


def _differs(trials: Sequence[Mapping[str, Any]], key: str) -> bool:
    """Return whether two trials differ in a setting."""
    values = [settings.get(key) for settings in trials]
    try:
        return len({(type(value), value) for value in values}) > 1
    except TypeError:  # lists and mappings
        return len({json.dumps(value, default=str) for value in values}) > 1


def setting_text(settings: Mapping[str, Any], arm: str) -> str:
    """Return an id of a setting without its seed, for older runs whose trials have no `setting`."""
    kept = {key: value for key, value in settings.items() if key not in ("seed", *NOT_SETTINGS)}
    if arm == Arm.PLAIN:
        kept = {key: value for key, value in kept.items() if not key.startswith("macdrop.")}
    return json.dumps(kept, sort_keys=True, default=str)
