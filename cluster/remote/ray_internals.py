"""Every use of what Ray does not document, as read from Ray 2.60: the one file to revisit at its next minor."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import os
from pathlib import Path
from typing import Any

#: The resource that marks the head node.
HEAD_RESOURCE = "node:__internal_head__"
#: Ray's processes as `ps` shows them; zombies appear in [brackets]. The brackets in these patterns keep the search from
#: matching itself.
PROCESSES = "|".join(
    [
        "[r]aylet/raylet ",
        "gcs/[g]cs_server ",
        "(^| )[r]ay::",
        "(^| )[r]ay-dashboard",
        "/[r]ay/_private/log_monitor\\.py",
        "/[r]ay/dashboard/(agent|dashboard)\\.py",
        "/[r]ay/_private/runtime_env/agent/main\\.py",
        "/[r]ay/autoscaler/_private/monitor\\.py",
        "/[r]ay/autoscaler/v2/monitor\\.py",
        "/[r]ay/_private/workers/(default|setup)_worker\\.py",
        "/[r]ay/util/client/server",
    ]
)
#: Logs of the autoscaler, in the folder of the session.
_AUTOSCALER_LOGS = ("monitor.log", "monitor.out", "monitor.err")


# --- on the head ---


def head_address(given: str | None = None) -> str:
    """host:port of the head of the Ray that runs here. Raises ConnectionError: none, or several.

    Ray 2.60: ray/_private/services.py, canonicalize_bootstrap_address_or_die.
    """
    from ray._private.services import canonicalize_bootstrap_address_or_die

    if given is None and os.environ.get("RAY_ADDRESS", "").startswith("http"):
        del os.environ["RAY_ADDRESS"]  # meant for job commands
    return str(canonicalize_bootstrap_address_or_die(given))  # type: ignore[arg-type]  # None: look for it


def node_table() -> tuple[list[dict[str, Any]], set[str]]:
    """All nodes that the head has seen, and the ids of those that drain, without joining the cluster.

    Ray 2.60: ray/_private/state.py, GlobalState.
    """
    from ray._private.state import GlobalState
    from ray._raylet import GcsClientOptions  # type: ignore[attr-defined]  # compiled

    state = GlobalState()
    state._initialize_global_state(
        GcsClientOptions.create(head_address(), None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False)
    )
    return list(state.node_table()), set(state.get_draining_nodes())


def autoscaler_log(lines: int) -> list[str]:
    """The last lines of each log file of the autoscaler, newest session.

    Ray 2.60: ray/_common/utils.py, get_default_ray_temp_dir.
    """
    from ray._common.utils import get_default_ray_temp_dir

    folder = Path(get_default_ray_temp_dir(), "session_latest", "logs")
    files = [folder / name for name in _AUTOSCALER_LOGS if (folder / name).is_file()]
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    return [line for text in texts for line in text.splitlines()[-lines:]]


# --- on the machine that launches ---


def remembers_head(cluster: str, head: str) -> bool:
    """Check whether the note that `ray up` keeps of an on-premise cluster says that its head runs.

    Ray 2.60: ray/autoscaler/_private/local/config.py, get_state_path. A failed `ray exec` leaves a note in which the
    head does not run.
    """
    file = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", f"cluster-{cluster}.state")
    try:
        return bool(json.loads(file.read_text(encoding="utf-8"))[head]["state"] == "running")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def remember_head(provider: dict[str, Any], cluster: str) -> None:
    """Restore that note for a head that runs.

    Ray 2.60: ray/autoscaler/_private/local/node_provider.py, record_local_head_state_if_needed.
    """
    from ray.autoscaler._private.local import node_provider

    node_provider.record_local_head_state_if_needed(node_provider.LocalNodeProvider(provider, cluster))


def cluster_schema() -> dict[str, Any]:
    """The JSON schema of cluster YAMLs. Ray 2.60: ray/autoscaler/ray-schema.json."""
    import ray.autoscaler

    schema: dict[str, Any] = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    return schema


def prepared(content: dict[str, Any]) -> dict[str, Any]:
    """A cluster YAML with Ray's defaults, as `ray up` sees it. Raises RefusedByRay.

    Ray 2.60: ray/autoscaler/_private/util.py, prepare_config and validate_config.
    """
    from ray.autoscaler._private.util import prepare_config, validate_config

    printed = io.StringIO()
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            complete: dict[str, Any] = prepare_config(copy.deepcopy(content))
            validate_config(complete)
    except Exception as error:  # click's errors, KeyError, TypeError, AssertionError: whatever its code runs into
        name = type(error).__name__
        text = " ".join(str(error).split()) or " ".join(printed.getvalue().split()) or name
        raise RefusedByRay(text, name) from None
    finally:
        logging.disable(logging.NOTSET)
    return complete


class RefusedByRay(Exception):
    """Ray's own validation rejects a cluster YAML: its message, and the name of its exception."""


def azure_parameters() -> frozenset[str]:
    """Parameters of an Azure machine. Ray 2.60: ray/autoscaler/_private/_azure/azure-vm-template.json."""
    import ray.autoscaler._private

    template = Path(ray.autoscaler._private.__file__).parent / "_azure" / "azure-vm-template.json"
    return frozenset(json.loads(template.read_text())["parameters"])
