"""The sweep, from the command line down to files: one package per layer; imports only point down this list.

cli           the `macdrop` command
report        what a run says, in every format
analysis      score rows -> paired comparisons -> verdict
distributed   sweeps on a Ray cluster; nothing else imports Ray
preflight     checks and forecasts before anything starts
trackers      TensorBoard, Weights & Biases, MLflow
scheduling    what to train, when to stop, how often to retry
evaluation    one model, one benchmark, one attack -> score rows
training      one fine-tuning in one process group
forward       forward passes: packed rows, and logits only where they are read
data          rows of text -> token ids
zoo           models and data by name: built in, fetched, or converted from a GGUF file
storage       the run folder and the cache on disk
config        YAML and key=value -> RunSpec
errors        errors raised on purpose

For notebooks and scripts, `sweep` and `Run` are loaded on first use, so that `import tune` costs nothing.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

# Where it is imported, bitsandbytes advises to install a kernel for some CPUs, which `macdrop.quantised` does not use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_HOME = {"Run": "cli.python_sweep", "sweep": "cli.python_sweep"}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tune' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tune.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
