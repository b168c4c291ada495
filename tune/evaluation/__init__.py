"""Scores of a causal language model: zero-shot tasks, perplexity and generation, each plain or under attack.

The `eval:` block of a run file is an `EvalSpec`; `jobs(spec)` lists what there is to score, and a `Scorer`, which keeps
model, tasks and data resident, turns a `Job` into rows. `AdapterSlot` swaps adapters in and out of the resident model.
Importing this package loads neither torch nor lm-eval.
"""

from __future__ import annotations

import importlib

_HOME = {
    "AdapterSlot": "adapters",
    "EvalSpec": "spec",
    "Job": "spec",
    "Row": "scorer",
    "Scorer": "scorer",
    "check_files": "check",
    "jobs": "spec",
    "merged_weights": "adapters",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'tune.evaluation' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tune.evaluation.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
