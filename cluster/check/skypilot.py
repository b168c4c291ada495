"""Checks of SkyPilot's task YAMLs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from cluster.check.finding import Finding, environment_findings, error, note, place
from cluster.core.launch_file import as_dict
from cluster.core.skypilot_file import SkyPilotFile
from cluster.errors import nearest

#: Keys of a task, and of its resources (SkyPilot 0.14; `tests/launch/test_skypilot.py` compares them with its schema).
TASK = set(
    """
    name workdir event_callback num_nodes resources file_mounts service pool setup run envs secrets managed_secrets
    inputs outputs config volumes volume_mounts api_server_access file_mounts_mapping _metadata
    """.split()
)
RESOURCES = set(
    """
    cloud region zone infra cpus memory accelerators instance_type use_spot job_recovery volumes disk_size disk_tier
    local_disk ephemeral_storage network_tier ports labels autostop priority priority_class accelerator_args image_id
    any_of ordered max_hourly_cost
    """.split()
)
SYNCED = re.compile(r"\bsync_to=['\"]?(s3|gs)://")


def findings(file: SkyPilotFile) -> Iterator[Finding]:
    """All findings of one task."""
    yield from _keys(file.content, TASK, "")
    yield from _keys(file.resources, RESOURCES, "resources.")
    yield from _types(file)
    if not re.search(r"\bmacdrop sweep\b", file.shell):
        yield error("run", "nothing starts a sweep", "the machines would start and end again", "macdrop sweep RECIPE")
    if re.search(r"\bray stop\b", file.shell):
        yield error(
            "run",
            "contains `ray stop`",
            "it ends every Ray process of the user, and with them SkyPilot's own",
            "leave it out: SkyPilot removes the machines of a managed job",
        )
    yield from _survival(file)
    if file.workers[0]:
        yield from _nodes(file)


def _keys(given: Mapping[str, Any], known: set[str], where: str) -> Iterator[Finding]:
    """Keys that SkyPilot 0.14 does not have: slips, or those of another version."""
    for key in given:
        if key not in known:
            hint = nearest(str(key), sorted(known)).strip()
            yield (error if hint else note)(
                f"{where}{place(str(key))}",
                f"SkyPilot's task has no key {str(key)[:60]!r}",
                "SkyPilot refuses keys that it does not know",
                hint or "look it up in its YAML reference, if your version is newer than 0.14",
            )


def _types(file: SkyPilotFile) -> Iterator[Finding]:
    nodes = file.content.get("num_nodes", 1)
    if isinstance(nodes, bool) or not isinstance(nodes, int) or nodes < 1:
        yield error("num_nodes", "is not a whole number from 1", "SkyPilot refuses the task", "num_nodes: 1")
    if not isinstance(file.resources.get("use_spot", False), bool):
        yield error("resources.use_spot", "is neither true nor false", "SkyPilot refuses the task", "use_spot: true")
    for key in ("setup", "run"):
        if not isinstance(file.content.get(key, ""), str):
            yield error(key, "is not text", "SkyPilot refuses the task", f"{key}: | and the commands, indented")
    for name, value in as_dict(file.content.get("secrets")).items():
        if value is not None:
            yield error(
                f"secrets.{str(name)[:60]}",
                "has its value in plain text",
                "the file is not a place for secrets",
                "null: `up` takes the value from your environment",
            )


def _survival(file: SkyPilotFile) -> Iterator[Finding]:
    if not SYNCED.search(file.shell):
        kind = error if file.resources.get("use_spot") is True else note
        yield kind(
            "run",
            "the sweep is not copied to a bucket",
            "the disks of a managed job are deleted with its machines, results included",
            "macdrop sweep ... sync_to=s3://BUCKET/PREFIX (or gs://)",
        )
    if "--resume-if-exists" not in file.shell:
        yield note(
            "run",
            "nothing resumes a run",
            "a job that was preempted would be refused, as its run exists",
            "macdrop sweep ... --resume-if-exists",
        )


def _nodes(file: SkyPilotFile) -> Iterator[Finding]:
    if not re.search(r"\bray start\b", file.shell):
        yield error(
            "run",
            "nothing starts Ray on the nodes",
            "each of them would run a sweep of its own into the same folder",
            "ray start --head on SKYPILOT_NODE_RANK 0, ray start --address on the others",
        )
    if not file.token:
        yield error(
            "run",
            "RAY_AUTH_MODE=token is not set",
            "anyone who reaches a node could run code as you",
            "export RAY_AUTH_MODE=token, and mount ~/.ray/auth_token",
        )
    yield from environment_findings(file.environment, "run", "nodes")
    if not file.content.get("volumes") and "mount -t nfs" not in file.shell:
        yield note(
            "setup",
            "nothing mounts a file system that the nodes share",
            "all of them write the run folder; buckets that SkyPilot mounts neither append nor rename",
            "volumes: (Kubernetes, ReadWriteMany), or an NFS share",
        )
