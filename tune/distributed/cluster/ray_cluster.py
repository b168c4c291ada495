"""Joins or starts a Ray cluster, and checks that it has the resources that a run needs."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources
from ray.util.placement_group import placement_group_table

from tune.config.run_spec import RaySpec
from tune.distributed.cluster import orphans, ray_internals
from tune.errors import ResourceError
from tune.preflight.host import check_start, start_failure
from tune.scheduling.resources import gpu_shares, resources
from tune.storage.capacity import cpus
from tune.storage.places import direct_loopback, own_token, ray_root, token_file

#: The exit code of a shell after SIGTERM.
TERMINATED = 143
#: Nodes report free resources periodically: a run that has just ended may seem to hold some for this long.
GIVEN_BACK_S = 10.0
LOOK_EVERY_S = 0.5
SHARE = (
    "on few GPUs let workers and evaluators share them, for example ray.gpus_per_worker=0.5 ray.gpus_per_evaluator=0.5."
)
#: Set before Ray starts. Train V2 polls its workers twice a second, and takes one that is silent for two minutes (not
#: ten) for dead; Tune's own loggers and the usage report are off.
SETTINGS = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",
    # Controllers do not restart anything on a spot notice: lanes are drained by the driver (lane_pool).
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # The newer output prints boxes whatever the verbosity.
    "RAY_AIR_NEW_OUTPUT": "0",
    # Ctrl-C ends the whole run with its own exit code; Tune's handler would end one study and start the next.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # A searched score exists only in a trial's last report.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
#: Options of `ray.init`: workers' output goes to files.
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}


def connect(spec: RaySpec, tell: Callable[[str], None] | None = None) -> tuple[str, bool]:
    """Join the cluster at `spec.address`, or start Ray on this machine, unless this process has joined one already.

    tell: shows what of this machine makes a local Ray slower.

    Returns the dashboard's address, and whether this call joined or started Ray: then the caller owes a `ray.shutdown`.

    Raises:
        ResourceError: there is no cluster at the address, or Ray cannot start on this machine.
    """
    if ray.is_initialized():
        return "", False
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    os.environ["PYTHONUTF8"] = "1"  # whatever the locale: libraries in workers read their own files in its encoding
    # The run itself reports failed trials, with the reason; Tune would print a whole traceback for each.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    for name in ("ray.train", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    direct_loopback()
    before = signal.getsignal(signal.SIGTERM)
    address = _start(spec, tell) if spec.address is None else _join(spec.address)
    if threading.current_thread() is threading.main_thread():
        # Ray's own handler aborts the process; SIGTERM should close the run as Ctrl-C does.
        signal.signal(signal.SIGTERM, before if callable(before) else lambda *_: sys.exit(TERMINATED))
    return address, True


def _start(spec: RaySpec, tell: Callable[[str], None] | None) -> str:
    """Start Ray for this process alone: at 127.0.0.1, with a token of its own, in a folder that is closed to others."""
    for note in check_start():
        if tell is not None:
            tell(note)
    orphans.remove_old_sessions(ray_root())
    os.environ.update(own_token())
    ray_internals.read_environment()
    options: dict[str, Any] = {"num_cpus": cpus(), "include_dashboard": spec.dashboard, "_temp_dir": str(ray_root())}
    try:
        with ray_internals.on_loopback():
            context = ray.init(address="local", **QUIET, **options)
    except Exception as error:  # of Ray, its processes, the system: see `start_failure`
        ray.shutdown()
        raise start_failure(error) from None
    orphans.remember_driver(ray_internals.session_dir())
    return context.dashboard_url or ""


def _join(address: str) -> str:
    try:
        return ray.init(address=address, **QUIET).dashboard_url or ""
    except Exception as error:  # of Ray, its token, the network
        reason = str(error).strip() or type(error).__name__
        raise ResourceError(
            f"No Ray cluster at ray.address {address!r}: {reason}\n"
            f"Start one (`ray start --head`), or leave ray.address out to use this machine.{token_hint()}"
        ) from None


def token_hint() -> str:
    """Return one line on what this machine lacks to join a cluster with a token; Ray only says that it cannot."""
    token = token_file()
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return f"\nA cluster with a token needs RAY_AUTH_MODE=token here, and its token in {token}."
    if not token.is_file() and "RAY_AUTH_TOKEN" not in os.environ:
        return f"\nThere is no token in {token}: copy the one on the cluster's head (mode 600)."
    return "\nDoes the token of this machine match the cluster's?"


def check_cluster(spec: RaySpec, tell: Callable[[str], None]) -> float:
    """Compare what a run needs with what the cluster has; return the cluster's GPUs.

    On one machine all of it must be free now, or as soon as a run that has just ended has released it. The nodes of a
    cluster come and go: one lane and one evaluator must fit, whether the nodes are busy or not; they are requested from
    the autoscaler and waited for, and the other lanes start when there is room.

    Raises:
        ResourceError: with the arithmetic and the current holders.
    """
    if spec.address is None:
        return _all_now(spec)
    least = spec.model_copy(update={"lanes": 1, "evaluators": 1})
    deadline, requested = time.monotonic() + spec.patience_s, False
    try:
        while short := _short(least, _total()):
            if time.monotonic() > deadline:
                raise ResourceError(f"{short}\nNo node came within ray.resource_timeout_s = {spec.patience_s:g} s.")
            if not requested:
                tell(f"{short}\nWaiting for nodes, for up to {spec.patience_s:g} s. If none will come: {SHARE}")
                request_resources(bundles=_bundles(least))
                requested = True
            time.sleep(LOOK_EVERY_S)
    finally:
        if requested:
            request_resources(bundles=[])
    if short := _short(spec, _total()):
        tell(f"{short}\nThe rest starts when there is room.")
    return _total().get("GPU", 0.0)


def check_models(
    rays: Mapping[str, RaySpec], tell: Callable[[str], None], *, skip: bool
) -> tuple[float, dict[str, str]]:
    """Check that the cluster can hold each model; return its GPUs, and why some models are left out if `skip`.

    Raises:
        ResourceError: one model cannot be held, with `skip` none can.
    """
    gpus, lacking = 0.0, {}
    for ray_spec in dict.fromkeys(rays.values()):
        try:
            gpus = check_cluster(ray_spec, tell)
        except ResourceError as error:
            lacking[ray_spec] = error
    reasons = {name: lacking[ray_spec] for name, ray_spec in rays.items() if ray_spec in lacking}
    if reasons and (not skip or len(reasons) == len(rays)):
        name, reason = next(iter(reasons.items()))
        if len(rays) == 1:
            raise reason
        raise ResourceError(f"{name}: {reason}\nOr run the others with --skip-unplaceable.")
    return gpus, {name: str(reason) for name, reason in reasons.items()}


def _all_now(spec: RaySpec) -> float:
    deadline = time.monotonic() + GIVEN_BACK_S
    while True:
        never, now = _short(spec, _total()), _short(spec, ray.available_resources(), "free")
        if not never and not now:
            return _total().get("GPU", 0.0)
        if never or time.monotonic() > deadline:
            remedy = f"Lower ray.num_workers, ray.lanes or ray.evaluators; {SHARE}"
            raise ResourceError(f"{never or now}\n{holders()}\n{remedy}")
        time.sleep(LOOK_EVERY_S)


def _total() -> dict[str, float]:
    return ray.cluster_resources()


def _short(spec: RaySpec, there: dict[str, float], word: str = "there") -> str | None:
    """Return what a run lacks, with the sum of its needs; None if nothing."""
    needs = resources(spec, cluster_gpus=_total().get("GPU", 0.0))
    lines = [
        f"{name}: needs {need:g}, {word} {there.get(name, 0.0):g}"
        for name, need in (("CPU", needs.cpus), ("GPU", needs.gpus))
        if need > there.get(name, 0.0)
    ]
    return "\n".join([f"The run needs {needs.sum}.", *lines]) if lines else None


def _bundles(spec: RaySpec) -> list[dict[str, float]]:
    """Return one resource bundle per process of a run, for the autoscaler."""
    gpus = gpu_shares(spec, 0.0)
    worker = {"CPU": spec.cpus_per_worker, "GPU": gpus.per_worker}
    evaluator = {"CPU": spec.cpus_per_evaluator, "GPU": gpus.per_evaluator}
    bundles = [worker] * spec.num_workers * spec.lanes + [evaluator] * spec.evaluators
    found = [{name: amount for name, amount in bundle.items() if amount} for bundle in bundles]
    return [bundle for bundle in found if bundle]


def holders() -> str:
    """Return who holds the cluster's CPUs and GPUs: totals, then one line per placement group."""
    lines = []
    for group in placement_group_table().values():
        if group["state"] != "REMOVED":
            bundles = ", ".join(str(bundle) for bundle in group["bundles"].values())
            name = group["name"] or group["placement_group_id"][:8]
            lines.append(f"  placement group {name} ({group['state']}): {bundles}")
    total, free = ray.cluster_resources(), ray.available_resources()
    used = ", ".join(
        f"{total[name] - free.get(name, 0.0):g} of {total[name]:g} {name}" for name in ("CPU", "GPU") if name in total
    )
    return "\n".join([f"In use: {used}.", *lines])
