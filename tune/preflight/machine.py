"""Checks of this machine, each with its finding and remedy.

Whatever could hang or crash (gloo, DeepSpeed, Ray) is tried in a separate process, and leaves nothing in this one.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from macdrop.errors import MacDropError
from macdrop.load import open_model
from tune.errors import ResourceError
from tune.preflight.host import Check, start_checks
from tune.preflight.precision import bf16_sentence
from tune.storage.capacity import cpus, memory
from tune.storage.environment import gpu_names
from tune.storage.places import cache_dir
from tune.zoo.catalog import ZOO, zoo_path

MAIN_PACKAGES = ("torch", "transformers", "peft", "deepspeed", "ray", "lm-eval")
MEMORY_GIB, DISK_GIB = 4.0, 2.0
"""Least free memory and disk for the demo run; real models need what they weigh."""
PROBE_TIMEOUT_S = 180
HUB_TIMEOUT_S = 5


def checks(*, output_dir: str | os.PathLike = "runs", ray: bool = False) -> list[Check]:
    """Run all checks; `ray` also starts a local Ray with its dashboard (about ten seconds more)."""
    return list(iter_checks(output_dir=output_dir, ray=ray))


def iter_checks(*, output_dir: str | os.PathLike = "runs", ray: bool = False) -> Iterator[Check]:
    """Yield the checks one by one as they finish."""
    accelerator = {} if gpu_names() else {"DS_ACCELERATOR": "cpu"}
    with ThreadPoolExecutor(2) as pool:  # each probe spends its time on imports
        torch_probe = pool.submit(_probe, _TORCH_PROBE)
        deepspeed_probe = pool.submit(_probe, _DEEPSPEED_PROBE, **accelerator)
        yield from package_checks()
        yield from _machine()
        yield from _torch_and_gloo(*torch_probe.result())
        yield _deepspeed(*deepspeed_probe.result())
    yield writable("output folder", output_dir, "Choose an output_dir that this user can write to.")
    yield _cache()
    yield from start_checks()
    yield _zoo()
    yield bf16_check()
    yield _hub()
    if ray:
        yield _ray(*_probe(_RAY_PROBE, RAY_USAGE_STATS_ENABLED="0"))


def lines(found: list[Check]) -> list[str]:
    """Format the checks: one line each, and one more for a remedy."""
    width = max((len(check.name) for check in found), default=0)
    text = []
    for check in found:
        mark = "ok  " if check.ok else "FAIL" if check.needed else "note"
        text.append(f"{mark}  {check.name:<{width}}  {check.found}")
        if check.fix:
            text.append(f"      {'':<{width}}  -> {check.fix}")
    return text


# --- packages and machine ---


def package_checks(distribution: str = "macdrop") -> Iterator[Check]:
    """Compare installed versions with what macdrop's own metadata requires."""
    try:
        about = metadata.metadata(distribution)
    except metadata.PackageNotFoundError:
        yield Check("macdrop", False, "not installed", "Run: pip install -e . in the repository.")
        return
    wanted = SpecifierSet(about["Requires-Python"] or "")
    version = platform.python_version()
    fit = wanted.contains(version, prereleases=True)
    yield Check("python", fit, f"{version} ({wanted})", "" if fit else f"Make an environment with Python {wanted}.")
    others, broken = [], []
    for requirement in map(Requirement, metadata.requires(distribution) or []):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        check = _package(requirement)
        if requirement.name in MAIN_PACKAGES:
            yield check
        else:
            others.append(requirement.name)
            broken += [] if check.ok else [check]
    found = "; ".join(f"{check.name} {check.found}" for check in broken) or f"all {len(others)} as required"
    yield Check("other packages", not broken, found, " ".join(check.fix for check in broken))


def _package(requirement: Requirement) -> Check:
    wanted = str(requirement.specifier) or "any version"
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Check(requirement.name, False, f"not installed ({wanted})", f'Run: pip install "{requirement}"')
    fit = requirement.specifier.contains(version, prereleases=True)
    return Check(requirement.name, fit, f"{version} ({wanted})", "" if fit else f'Run: pip install "{requirement}"')


def _machine() -> Iterator[Check]:
    count, there = cpus(), os.cpu_count() or 1
    fix = "" if count >= 2 else "Keep ray.num_workers at 1: each worker takes a CPU."
    found = f"{count}" if count == there else f"{count} of {there}, by affinity or cgroup"
    yield Check("CPUs", count >= 2, found, fix, needed=False)
    free, total = (value / 2**30 for value in memory())
    fix = "" if free >= MEMORY_GIB else f"Free {MEMORY_GIB:g} GiB, or lower ray.lanes and ray.evaluators."
    yield Check("memory", free >= MEMORY_GIB, f"{free:.1f} of {total:.1f} GiB free", fix)


# --- probes in a separate process ---

_TORCH_PROBE = """
import json, os, tempfile, torch, torch.distributed as dist
found = {"cuda": torch.cuda.is_available(), "gpus": torch.cuda.device_count(), "build": torch.version.cuda}
with tempfile.TemporaryDirectory() as folder:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    x = torch.ones(3)
    dist.all_reduce(x)
    found["gloo"] = x.tolist() == [1.0, 1.0, 1.0]
    dist.destroy_process_group()
print("FOUND" + json.dumps(found))
"""
_DEEPSPEED_PROBE = """
import json, deepspeed
from deepspeed.accelerator import get_accelerator
print("FOUND" + json.dumps({"version": deepspeed.__version__, "accelerator": get_accelerator()._name}))
"""
_RAY_PROBE = """
import json, ray
from tune.config.run_spec import RaySpec
from tune.distributed.cluster.ray_cluster import connect
from tune.errors import ResourceError
try:
    address, _ = connect(RaySpec())
except ResourceError as error:
    print("FOUND" + json.dumps({"error": str(error)}))
else:
    from ray.util.state import list_nodes
    nodes = list_nodes(address="http://" + address)
    print("FOUND" + json.dumps({"dashboard": address, "nodes": len(nodes)}), flush=True)
    ray.shutdown()
"""


def _probe(code: str, **environment: str) -> tuple[dict, str]:
    """Return (what the code found, ""), or ({}, the last line of its output)."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=PROBE_TIMEOUT_S,
            env={**os.environ, **environment},
        )
    except subprocess.TimeoutExpired:
        return {}, f"no answer within {PROBE_TIMEOUT_S} s"
    for line in done.stdout.splitlines():
        if line.startswith("FOUND"):
            return json.loads(line.removeprefix("FOUND")), ""
    words = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
    return {}, words[-1][:200]


def _torch_and_gloo(found: dict, error: str) -> Iterator[Check]:
    present = gpu_names()
    if present and found and not found["cuda"]:
        yield Check(
            "GPUs",
            False,
            f"{len(present)} ({present[0]}), but torch cannot use them",
            "Install a torch build for this driver's CUDA version, see pytorch.org/get-started.",
        )
    else:
        yield Check("GPUs", True, ", ".join(present) or "none: runs on CPU")
    if found.get("gloo"):
        yield Check("gloo", True, "all_reduce works")
    else:
        fix = "Set GLOO_SOCKET_IFNAME to a network interface of this host, for example lo; or reinstall torch."
        yield Check("gloo", False, error or "wrong sum", fix)


def _deepspeed(found: dict, error: str) -> Check:
    fix = "Reinstall it: pip install --no-build-isolation --force-reinstall --no-deps deepspeed."
    words = f"imports, accelerator {found['accelerator']}" if found else error
    return Check("deepspeed import", bool(found), words, "" if found else fix)


def _ray(found: dict, error: str) -> Check:
    if "error" in found:
        what, _, fix = found["error"].partition("\n")
        return Check("ray start", False, what, fix)
    ok = found.get("nodes") == 1 and bool(found.get("dashboard"))
    words = f"starts, State API answers at {found['dashboard']}" if ok else error or "starts, but without its dashboard"
    fix = 'Run: pip install "ray[default,train,tune]" (its page and `ray job submit` need the dashboard).'
    return Check("ray start", ok, words, "" if ok else fix)


# --- folders, models, hub ---


def writable(name: str, folder: str | os.PathLike, fix: str) -> Check:
    """Check that `folder` can be created and written to, and the free space there. Leaves no file."""
    path = Path(folder).expanduser().absolute()
    place = next(parent for parent in (path, *path.parents) if parent.exists())
    probe = place / f".macdrop-{uuid.uuid4().hex[:8]}"
    try:
        probe.write_bytes(b"x")
        probe.unlink()
        free = shutil.disk_usage(place).free / 2**30
    except OSError as error:
        return Check(name, False, f"{path}: {error.strerror}", fix)
    if free < DISK_GIB:
        fix = f"Free {DISK_GIB:g} GiB there, or choose another disk."
        return Check(name, False, f"{path}: {free:.1f} GiB free", fix)
    return Check(name, True, f"{path} ({free:.0f} GiB free)")


def _cache() -> Check:
    fix = "Set MACDROP_CACHE to a folder that this user can write to."
    try:
        return writable("cache folder", cache_dir(), fix)
    except ResourceError as error:
        return Check("cache folder", False, str(error).splitlines()[0], fix)


def _zoo() -> Check:
    fix = "Reinstall macdrop: its package data are damaged."
    for name in ZOO:
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # progress bars
                model, tokenizer = open_model(zoo_path(name))
            model(**tokenizer("a", return_tensors="pt").to(model.device))
        except (MacDropError, OSError, ValueError, RuntimeError) as error:
            return Check("built-in models", False, f"{name}: {str(error).splitlines()[0][:200]}", fix)
    return Check("built-in models", True, f"{len(ZOO)} load and run: {', '.join(ZOO)}")


def bf16_check() -> Check:
    """Report what `bf16: true` brings here; measuring it takes a second."""
    return Check("bf16", True, bf16_sentence(), needed=False)


def _hub() -> Check:
    fix = "Built-in models and local files work without it; for hub ids fix the network or set HF_ENDPOINT."
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return Check("hub", True, "offline by HF_HUB_OFFLINE: cached and local files only", needed=False)
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=HUB_TIMEOUT_S) as answer:
            return Check("hub", True, f"{address} answers {answer.status}", needed=False)
    except (OSError, ValueError) as error:  # URLError, HTTPError and timeouts are OSErrors
        return Check("hub", False, f"{address} is not reachable ({error})", fix, needed=False)
