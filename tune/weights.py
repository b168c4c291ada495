"""Massive weights of a checkpoint, scanned once and kept in the user's cache by the checkpoint's fingerprint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune.spec import TrainSpec, slug

if TYPE_CHECKING:
    from macdrop import MassiveWeights

#: Names the folder of scans and tokenised data; by default ~/.cache/macdrop.
CACHE_VARIABLE = "MACDROP_CACHE"


def cache_dir() -> Path:
    """The folder that outlives runs: scans by fingerprint, tokenised data by content."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "macdrop").absolute()


def massive_weights(
    spec: TrainSpec, model: Any, tokenizer: Any, *, bos_token_id: int | None = None, fresh: bool = False
) -> MassiveWeights:
    """Return the massive weights of a loaded base model, from the cache if this checkpoint was scanned before.

    The precision is part of the name: a bf16 forward may order nearly equal rows differently than an fp32 one.
    """
    from macdrop import MassiveWeights, find_massive_weights
    from macdrop.fingerprint import checkpoint_fingerprint
    from tune.zoo import resolve

    fingerprint = checkpoint_fingerprint(resolve(spec.model_name_or_path), spec.model_revision)
    precision = "bf16" if spec.bf16 else "fp32"
    bos = "" if bos_token_id is None else f"-bos{bos_token_id}"
    name = f"{slug(spec.model_name_or_path)}-{fingerprint[:16]}-{precision}{bos}.json"
    path = cache_dir() / "scans" / name
    if path.is_file() and not fresh:
        known = MassiveWeights.load(path)
        known.check(fingerprint)
        return known
    found = find_massive_weights(
        model, tokenizer, source=spec.model_name_or_path, fingerprint=fingerprint, bos_token_id=bos_token_id
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    found.save(path)
    return found
