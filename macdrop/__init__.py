"""MacDrop: massive weights curriculum dropout (arXiv 2410.01866), the method alone.

Names are loaded on first use, so that `import macdrop` costs nothing and never imports Ray, DeepSpeed, PEFT or lm-eval.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "MacDrop": "hooks",
    "MacDropCallback": "callback",
    "MacDropConfig": "config",
    "MassiveWeights": "weights",
    "Span": "masking.layout",
    "attacked": "masking",
    "checkpoint_fingerprint": "fingerprint",
    "check_model": "load",
    "find_ffns": "families",
    "find_massive_weights": "scan",
    "load_model": "load",
    "load_tokenizer": "load",
    "open_model": "load",
    "probability": "schedules",
    "prove": "proof",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'macdrop' has no attribute {name!r}")
    return getattr(importlib.import_module(f"macdrop.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
