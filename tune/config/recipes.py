"""Shipped recipes by name."""

from __future__ import annotations

import os
import time
from pathlib import Path

from macdrop.errors import ConfigError, nearest
from tune.config.syntax.user_paths import expand_path
from tune.config.syntax.yaml_core import brief

RECIPES = Path(__file__).with_name("recipes")
DEMO = "demo"


def recipe(name: str | None) -> Path | None:
    """Return the path of a file, or of the shipped recipe of that name; `ConfigError` if there is neither."""
    if name is None:
        return None
    path = Path(expand_path(name))
    shipped = {shown.stem: shown for shown in sorted(RECIPES.glob("*.yaml"))}
    if path.suffix in (".yaml", ".yml") or os.path.isfile(path):
        return path
    if name in shipped:
        return shipped[name]
    raise ConfigError(
        f"{brief(name)} is neither a YAML file nor a shipped recipe.{nearest(name, shipped)}\n"
        f"Recipes: {', '.join(shipped)}."
    )


def fresh_folder(name: str) -> str:
    """Return the default run folder of a run that starts now."""
    return str(Path("runs") / f"{Path(name).stem}-{time.strftime('%Y%m%d-%H%M%S')}")
