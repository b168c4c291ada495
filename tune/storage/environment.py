"""Versions and hardware of this machine, read without loading torch."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("macdrop", "torch", "transformers", "peft", "deepspeed", "ray", "lm-eval", "datasets", "optuna", "numpy")


def environment() -> dict[str, Any]:
    """Describe the machine a run is started on, for environment.json."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
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


def memory() -> tuple[int, int]:
    """(free, total) bytes; a container's limit counts where there is one."""
    page = os.sysconf("SC_PAGE_SIZE")
    free, total = page * os.sysconf("SC_AVPHYS_PAGES"), page * os.sysconf("SC_PHYS_PAGES")
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024  # counts what the page cache would give back
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        if limit != "max":
            total, free = min(total, int(limit)), min(free, int(limit) - int(used))
    except (OSError, KeyError, ValueError):
        pass  # not Linux, or no such limit
    return free, total
