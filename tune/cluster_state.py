"""Joining or starting a Ray cluster, and telling whether it has what a run needs."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import ray

from macdrop.errors import ResourceError
from tune.plan import check_local, resources
from tune.spec import RaySpec

#: Exit code after SIGTERM, as a shell has it.
TERMINATED = 143
#: Set before Ray starts. Train V2 asks its workers twice a second, and takes one that is silent for two minutes (not
#: ten) for dead; Tune's own loggers and the usage report are off.
SETTINGS = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",
    # Controllers do not restart anything on a spot notice: lanes are drained by the driver (tune.lanes).
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # The newer output prints boxes whatever the verbosity.
    "RAY_AIR_NEW_OUTPUT": "0",
    # Ctrl-C ends the whole run with its own exit code; Tune's handler would end one study and go on with the next.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # A searched score exists only in a trial's last report.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def connect(spec: RaySpec) -> tuple[str, bool]:
    """Join the cluster at `spec.address`, or start Ray on this machine, unless this process has joined one already.

    Returns the dashboard's address, and whether this call did join or start: who does so leaves with `ray.shutdown`.

    Raises:
        ConfigError: the run can never fit on this machine.
        ResourceError: there is no cluster at the address.
    """
    if ray.is_initialized():
        return "", False
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    # Trials that fail are told by the run itself, with their reason; Tune would print each one's whole traceback.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    for name in ("ray.train", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    check_local(spec)
    if spec.address is None:
        options |= {"address": "local", "num_cpus": os.cpu_count(), "include_dashboard": spec.dashboard}
        if "RAY_TMPDIR" not in os.environ and len(tempfile.gettempdir()) > 60:
            # Ray's sockets live under its temporary folder and may not have long paths.
            options["_temp_dir"] = "/tmp/ray"
    else:
        options["address"] = spec.address
    before = signal.getsignal(signal.SIGTERM)
    try:
        context = ray.init(**options)
    except (ConnectionError, RuntimeError) as error:
        raise ResourceError(
            f"No Ray cluster at ray.address {spec.address!r}: {error}\n"
            f"Start one (`ray start --head`), or leave ray.address out to use this machine.{token_hint()}"
        ) from None
    if threading.current_thread() is threading.main_thread():
        # Ray's own handler aborts the process; an end from outside should close the run as Ctrl-C does.
        signal.signal(signal.SIGTERM, before if callable(before) else lambda *_: sys.exit(TERMINATED))
    return context.dashboard_url or "", True


def token_hint() -> str:
    """What this machine lacks to join a cluster that asks for a token, as a line; Ray says only that it cannot."""
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return f"\nA cluster that asks for a token wants RAY_AUTH_MODE=token here, and its token in {token}."
    if not token.is_file() and "RAY_AUTH_TOKEN" not in os.environ:
        return f"\nThere is no token in {token}: copy that of the cluster's head (mode 600)."
    return "\nIs the token of this machine the cluster's?"


def check_cluster(spec: RaySpec) -> float:
    """Compare what the run needs with what the cluster has in all; returns the cluster's GPUs.

    Raises:
        ResourceError: with the arithmetic and who holds what.
    """
    total = ray.cluster_resources()
    gpus = total.get("GPU", 0.0)
    needs = resources(spec, cluster_gpus=gpus)
    free = ray.available_resources()
    short = [
        f"{name}: needs {need:g}, free {free.get(name, 0.0):g} of {total.get(name, 0.0):g}"
        for name, need in (("CPU", needs.cpus), ("GPU", needs.gpus))
        if need > free.get(name, 0.0)
    ]
    if short:
        raise ResourceError(
            f"The run needs {needs.sum}.\n" + "\n".join(short) + f"\n{holders()}\n"
            "Lower ray.num_workers, ray.lanes or ray.evaluators; on few GPUs let workers and evaluators share them, "
            "for example ray.gpus_per_worker=0.5 ray.gpus_per_evaluator=0.5."
        )
    return gpus


def holders() -> str:
    """Who holds the cluster's CPUs and GPUs: placement groups and actors with resources, one a line."""
    from ray.util.placement_group import placement_group_table

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
