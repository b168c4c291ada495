"""Versions and hardware of this machine, read without loading torch, and what a run folder keeps of them."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from tune.storage.atomic import atomic_write_json, now, read_mapping
from tune.storage.capacity import cpus, memory

ENVIRONMENT_FILE = "environment.json"
#: The key of later environments, those of resumed runs, in the file.
_RESUMED = "resumed"
_PACKAGES = (
    "macdrop",
    "torch",
    "transformers",
    "peft",
    "deepspeed",
    "ray",
    "lm-eval",
    "datasets",
    "optuna",
    "numpy",
    "bitsandbytes",
    "schedulefree",
)


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


def environments(run_dir: Path, problems: list[str] | None = None) -> list[dict[str, Any]]:
    """Return the environments in which the trials of a run were made.

    The first has the keys of `environment`, or none if it was lost; the others also `at`, the time of the resume.
    """
    file = run_dir / ENVIRONMENT_FILE
    content = (read_mapping(file, problems) if file.exists() else None) or {}
    later = content.pop(_RESUMED, [])
    later = [each for each in later if isinstance(each, dict)] if isinstance(later, list) else []
    return [content, *later] if content or later else []


def record_environment(run_dir: Path, *, resumed: bool) -> list[str]:
    """Add this machine's environment to a run folder unless it is the last one there.

    Returns:
        The differences from the last one, of a resumed run.
    """
    here, known = environment(), environments(run_dir) if resumed else []
    if not resumed:
        content: dict[str, Any] = here
    elif not known:
        content = {_RESUMED: [{"at": now(), **here}]}
    elif different := differences(known[-1], here):
        content = {**known[0], _RESUMED: [*known[1:], {"at": now(), **here}]}
    else:
        return []
    atomic_write_json(run_dir / ENVIRONMENT_FILE, content, within=run_dir)
    return different if known else []


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a phrase for each version, and each part of the machine, that differs: `peft 0.17 before, 0.18 now`."""
    before, after = _flat(then), _flat(now)
    keys = [key for key in dict.fromkeys((*after, *before)) if before.get(key) != after.get(key)]
    return [f"{key} {before.get(key) or 'none'} before, {after.get(key) or 'none'} now" for key in keys]


def _flat(found: Mapping[str, Any]) -> dict[str, str]:
    """Return what results may depend on, and what a reader asks for first: versions, then the machine."""
    versions = found.get("versions")
    named = {name: str(version) for name, version in versions.items() if version} if isinstance(versions, dict) else {}
    gpus = found.get("gpus")
    named |= {key: str(found[key]) for key in ("python", "host", "system", "cpus") if found.get(key) is not None}
    return named | ({"gpus": ", ".join(map(str, gpus))} if isinstance(gpus, list) and gpus else {})


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
