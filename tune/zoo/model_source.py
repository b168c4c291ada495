"""Resolution of model names, as run files and commands give them, to the folder or hub id to load from."""

from __future__ import annotations

import os
from pathlib import Path

from macdrop.gguf.header import is_gguf
from tune.storage.converted import converted
from tune.zoo.catalog import resolve
from tune.zoo.real_models import find, real_model


def model_source(name: str) -> str:
    """Return the folder or hub id to load a model from; a GGUF file is converted into the cache the first time.

    Raises:
        ConfigError: a ``zoo:`` name is unknown or has to be fetched first, or a GGUF file cannot be used.
        ResourceError: the cache cannot be written.
    """
    if is_gguf(path := os.path.expanduser(name)):
        return str(converted(Path(path)))
    return resolve(name)


def is_local_copy(name: str) -> bool:
    """Return whether each machine has a copy of its own of a model: a real one by name, or a converted GGUF file."""
    return is_gguf(os.path.expanduser(name)) or real_model(name) is not None


def source_note(name: str) -> str | None:
    """Return what a user should know of where a model comes from; None where its name says it.

    Raises:
        ConfigError: as `model_source`.
    """
    if (real := real_model(name)) is not None:
        return f"{name} is {find(real).source}"
    if is_gguf(os.path.expanduser(name)):
        return f"{name} is read as {model_source(name)}, its values dequantised to float32"
    return None
