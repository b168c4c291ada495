"""Every pydantic model that the configuration defines."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import tune.config
from tune.config.sections import Strict


def config_models() -> list[type]:
    found = []
    for module in pkgutil.walk_packages(tune.config.__path__, "tune.config."):
        members = inspect.getmembers(importlib.import_module(module.name), inspect.isclass)
        found += [kind for _, kind in members if hasattr(kind, "model_fields") and kind.__module__ == module.name]
    return [kind for kind in found if kind is not Strict]
