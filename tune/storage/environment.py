"""Versions and hardware of this machine, read without loading torch."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from typing import Any

from tune.storage.capacity import cpus, memory

_PACKAGES = ("macdrop", "torch", "transformers", "peft", "deepspeed", "ray", "lm-eval", "datasets", "optuna", "numpy")


def environment() -> dict[str, Any]:
    """Describe the machine a run is started on, for environment.json."""
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "cpus": cpus(),
        "memory_gib": round(memory()[1] / 2**30, 1),
        "gpus": gpu_names(),
        "versions": {name: version(name) for name in _PACKAGES},
    }


def version(package: str) -> str | None:
    """The installed version; None where the package is missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def gpu_names() -> list[str]:
    """Names of the GPUs by nvidia-smi; empty where there is none."""
    try:
        command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return found.stdout.strip().splitlines() if found.returncode == 0 else []
