"""Checks of Ray cluster YAMLs: Ray's own validation, and what it lets through."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.check.cloud import cloud_findings
from cluster.check.finding import Finding, environment_findings, error, masked, note, place, unknown_keys
from cluster.core.launch_file import as_dict, assignments
from cluster.core.ray_file import COMMANDS, RayFile
from cluster.errors import nearest
from cluster.remote import ray_internals

HEAD, WORKER = "head_start_ray_commands", "worker_start_ray_commands"
_ROLE = {HEAD: "head", WORKER: "workers"}
TOKEN, SECRETS = "~/.ray/auth_token", "~/.macdrop/secrets.env"
#: The types of JSON schema, for messages.
_TYPES = {"integer": "a whole number", "number": "a number", "string": "text", "array": "a list", "object": "a mapping"}


def findings(file: RayFile) -> Iterator[Finding]:
    """All findings of a file; if its types are wrong, only those and the findings of the provider."""
    refused = list(_schema(file.content))
    yield from refused
    yield from cloud_findings(file)
    if refused:
        return
    merged = file
    try:
        merged = replace(file, documents=(ray_internals.prepared(file.content),))  # with Ray's defaults
    except ray_internals.RefusedByRay as rejected:
        message, name = rejected.args
        why = f"{name} in Ray's own validation"
        yield error("the file", f"Ray rejects it: {masked(message)[:200]}", why, "fix what Ray names")
    yield from _workers(file)
    for role in (HEAD, WORKER):
        yield from _start(file, merged, role)
    yield from _mounts(file, merged)
    yield from _storage(file, merged)
    yield from _docker(file)
    yield from _costs(file)
    if file.provider == "local":
        yield from _local(file, merged)


# --- Ray's own validation ---


def _schema(content: dict[str, Any]) -> Iterator[Finding]:
    """All violations of Ray's schema, in messages that repeat no value of the file."""
    import jsonschema  # type: ignore[import-untyped]  # its stubs are a package of their own

    schema = ray_internals.cluster_schema()
    if as_dict(content.get("provider")).get("type") == "local":
        content = {
            key: value for key, value in content.items() if key != "min_workers"
        }  # removed by Ray before validation
    for fault in jsonschema.Draft7Validator(schema).iter_errors(content):
        where = place(*fault.absolute_path)
        if fault.validator == "additionalProperties":
            known = as_dict(fault.schema).get("properties", {})
            yield from unknown_keys(fault.instance, known, where if fault.absolute_path else "", "Ray's schema")
        elif fault.validator == "required":
            missing = [key for key in fault.validator_value if key not in fault.instance]
            yield error(where, f"{', '.join(missing)} is missing", "Ray requires it", f"add {missing[0]}:")
        elif fault.validator == "type":
            wanted = fault.validator_value
            kinds = [_TYPES.get(kind, str(kind)) for kind in ([wanted] if isinstance(wanted, str) else wanted)]
            yield error(where, f"must be {' or '.join(kinds)}", "Ray rejects any other type", "fix the value")
        else:
            yield error(
                where,
                f"breaks the rule {fault.validator!r} of Ray's schema",
                "Ray rejects it",
                "see Ray's cluster YAML docs",
            )


# --- what Ray lets through ---


def _workers(file: RayFile) -> Iterator[Finding]:
    types = as_dict(file.content.get("available_node_types"))
    for name, kind in types.items():
        low, high = as_dict(kind).get("min_workers", 0), as_dict(kind).get("max_workers")
        if high is not None and low > high:
            where = place("available_node_types", name)
            yield error(where, f"min_workers {low} is above max_workers {high}", "Ray would never settle", "swap them")
    least, most = file.workers
    if most == 0:
        yield error(
            "max_workers",
            "no worker can ever start",
            "the head runs no tasks, so a sweep would wait forever",
            "raise max_workers" if file.provider != "local" else "name hosts in provider.worker_ips",
        )
    idle = file.content.get("idle_timeout_minutes", 5)
    if least < most and idle < 2:
        yield note(
            "idle_timeout_minutes",
            f"workers are removed after {idle} idle minutes",
            "between two trials a worker may be idle for a minute, and a new one takes several to start",
            "idle_timeout_minutes: 10",
        )


def start_environment(merged: RayFile, role: str) -> dict[str, str]:
    """Variables that `ray start` of a role sees: from ~/.bashrc, which setup commands write, and its own command."""
    setup = merged.commands("setup_commands") + merged.commands(f"{role.split('_')[0]}_setup_commands")
    return assignments("\n".join(setup)) | assignments("\n".join(merged.commands(role)))


def _start(file: RayFile, merged: RayFile, role: str) -> Iterator[Finding]:
    commands, who = merged.commands(role), _ROLE[role]
    where = role if role in file.content else f"{role} (Ray's default)"
    starts = [text for text in commands if re.search(r"\bray start\b", text)]
    if not starts:
        yield error(where, f"nothing starts Ray on the {who}", "hosts would boot and never join", "add `ray start ...`")
        return
    env = start_environment(merged, role)
    if env.get("RAY_AUTH_MODE") != "token":
        yield error(
            where,
            f"RAY_AUTH_MODE=token is not set on the {who}",
            "anyone who reaches a port of Ray could run code there; hosts with and without a token cannot connect",
            "export RAY_AUTH_MODE=token, in ~/.bashrc by setup_commands",
        )
    yield from environment_findings(env, where, who)
    if file.secrets and SECRETS.rpartition("/")[2] not in "\n".join(commands):
        yield error(
            where,
            f"{SECRETS} is not sourced before `ray start` on the {who}",
            "the variables of MACDROP_SECRETS would be missing in every task",
            f"set -a; . {SECRETS}; set +a",
        )
    if re.search(r"ulimit[^;&|\n]*&&", "\n".join(commands)):
        yield error(
            where,
            "`ulimit ... &&` precedes a command",
            "on a host with a lower hard limit ulimit fails, and then Ray does not start",
            "`ulimit -n 65536 || true` on its own line",
        )
    yield from (_head_start if role == HEAD else _worker_start)(file, starts[0], where)


def option(command: str, name: str) -> str | None:
    """Value of --name=value or --name value; "" for a bare switch, None if it is missing."""
    try:
        words = shlex.split(command, comments=True)
    except ValueError:
        words = command.split()
    for word, after in zip(words, [*words[1:], ""], strict=True):
        if word == f"--{name}":
            return "" if after.startswith("-") else after
        if word.startswith(f"--{name}="):
            return word.partition("=")[2]
    return None


def _head_start(file: RayFile, command: str, where: str) -> Iterator[Finding]:
    if option(command, "dashboard-host") not in (None, "127.0.0.1", "localhost", "::1"):
        yield error(
            where,
            "the dashboard listens on all addresses",
            "it starts jobs: a port opened by mistake lets anyone in",
            "--dashboard-host=127.0.0.1; the verbs of `macdrop cluster` connect by ssh",
        )
    if option(command, "autoscaling-config") is None:
        yield error(
            where,
            "`ray start --head` has no --autoscaling-config",
            "the head would never start a worker",
            "--autoscaling-config=~/ray_bootstrap_config.yaml",
        )
    types = as_dict(file.content.get("available_node_types"))
    resources = as_dict(as_dict(types.get(str(file.content.get("head_node_type")))).get("resources"))
    if resources.get("CPU") != 0 and option(command, "num-cpus") != "0":
        yield note(
            where,
            "the head takes tasks",
            "a head that runs out of memory takes the whole cluster down",
            "--num-cpus=0, or resources: {CPU: 0} in the head's node type",
        )


def _worker_start(file: RayFile, command: str, where: str) -> Iterator[Finding]:
    if "RAY_HEAD_IP" not in (option(command, "address") or ""):
        yield error(
            where,
            "workers do not look for the head at $RAY_HEAD_IP",
            "they would not find it",
            "--address=$RAY_HEAD_IP:6379",
        )
    if file.provider == "local" and option(command, "num-gpus") is None:
        yield note(
            where,
            "--num-gpus is not given",
            "Ray counts the GPUs itself, and finds none if it cannot query the driver",
            "--num-gpus=N, if the hosts have GPUs",
        )


def _mounts(file: RayFile, merged: RayFile) -> Iterator[Finding]:
    mounts = as_dict(file.content.get("file_mounts"))
    if TOKEN not in mounts:
        yield error(
            "file_mounts",
            f"{TOKEN} is not copied to the hosts",
            "without it no host of a cluster with authentication joins",
            f"{TOKEN}: {TOKEN}",
        )
    if file.secrets and SECRETS not in mounts:
        yield error(
            "file_mounts",
            f"{SECRETS} is not copied to the hosts",
            "the variables of MACDROP_SECRETS would be missing in every task",
            f"{SECRETS}: {SECRETS}",
        )
    for remote, local in mounts.items():
        if remote not in (TOKEN, SECRETS) and not Path(str(local)).expanduser().exists():
            yield note(place("file_mounts", remote), "is not on this machine", "`ray up` would fail", "fix the path")


def _storage(file: RayFile, merged: RayFile) -> Iterator[Finding]:
    values = {
        value
        for key in COMMANDS
        for text in merged.commands(key)
        for value in [assignments(text).get("MACDROP_STORAGE")]
        if value
    }
    if len(values) > 1:
        yield error(
            "setup_commands",
            "MACDROP_STORAGE has two values",
            "hosts would write to different folders, and none could resume a run of another",
            "one folder, the same on all hosts",
        )
    docker = as_dict(file.content.get("docker"))
    given = [docker.get(key) for key in ("run_options", "head_run_options")]
    options = " ".join(str(word) for words in given if isinstance(words, list) for word in words)
    if file.container and file.storage and f":{file.storage}" not in options:
        yield error(
            "docker.run_options",
            "the storage is not in the container",
            "results would be written to the disk of the container, and be lost with it",
            f"-v {file.storage}:{file.storage}"[:120],
        )


def _docker(file: RayFile) -> Iterator[Finding]:
    docker = as_dict(file.content.get("docker"))
    if file.container and "--shm-size" not in str(docker.get("run_options")):
        severity = error if docker.get("disable_shm_size_detection") else note
        yield severity(
            "docker.run_options",
            "--shm-size is not given",
            "NCCL and Ray's object store share it; Docker provides 64 MB, and Ray's estimate leaves NCCL little",
            "--shm-size=32g",
        )


def _costs(file: RayFile) -> Iterator[Finding]:
    if file.provider in ("aws", "azure") and as_dict(file.content["provider"]).get("cache_stopped_nodes") is not False:
        yield note(
            "provider.cache_stopped_nodes",
            "`down` stops machines instead of terminating them",
            "their disks stay, and cost money",
            "cache_stopped_nodes: false",
        )


def _local(file: RayFile, merged: RayFile) -> Iterator[Finding]:
    if start_environment(merged, HEAD).get("RAY_enable_autoscaler_v2") not in ("0", "false", "False"):
        yield error(
            HEAD,
            "the newer autoscaler is on, with on-premise hosts",
            "it starts only some of the workers of a local provider",
            "export RAY_enable_autoscaler_v2=0 before `ray start --head`",
        )
    hosts = [str(file.head_host), *file.worker_hosts]
    for host in sorted({host for host in hosts if hosts.count(host) > 1}):
        yield error(
            "provider",
            f"{host[:60]} has two roles",
            "a second Ray on a host ends the first",
            "name each host once",
        )
    if file.workers[1] < len(file.worker_hosts):
        yield note("max_workers", "is below the number of worker_ips", "some hosts stay idle", "remove max_workers")
    if not file.ssh_user:
        hint = nearest("ssh_user", as_dict(file.content.get("auth")))
        yield error("auth.ssh_user", "is missing", "Ray cannot log in on the hosts", f"ssh_user: YOU{hint}")
    if not file.ssh_key:
        yield note(
            "auth.ssh_private_key",
            "is missing",
            "the head starts the workers by ssh, and cannot use your ssh agent",
            "ssh_private_key: ~/.ssh/id_ed25519",
        )
    elif not file.ssh_key.is_file():
        yield note("auth.ssh_private_key", "is not on this machine", "`ray up` logs in with it", "fix the path")
