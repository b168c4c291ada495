"""Checks of what only a cloud reads in a Ray cluster YAML: provider and machines. They stay offline."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from cluster.check.finding import Finding, error, note, place, unknown_keys
from cluster.core.launch_file import as_dict
from cluster.core.ray_file import RayFile
from cluster.errors import nearest
from cluster.remote import ray_internals
from cluster.render.targets import EFA_CARDS

#: Keys that the autoscaler reads for any provider.
_ANY = {
    "disable_launch_config_check",
    "disable_node_updaters",
    "foreground_node_launch",
    "type",
    "use_internal_ips",
    "worker_liveness_check",
    "worker_rpc_drain",
}
#: Type -> keys that Ray 2.60 reads, and keys that it requires.
PROVIDERS: dict[str, tuple[set[str], tuple[str, ...]]] = {
    "aws": (
        {
            "availability_zone",
            "aws_credentials",
            "cache_stopped_nodes",
            "cloudwatch",
            "key_pair",
            "region",
            "security_group",
        },
        ("region",),
    ),
    "gcp": (
        {"availability_zone", "cache_stopped_nodes", "gcp_credentials", "project_id", "region"},
        ("region", "availability_zone", "project_id"),
    ),
    "azure": (
        {
            "availability_zone",
            "cache_stopped_nodes",
            "location",
            "msi_name",
            "msi_resource_group",
            "resource_group",
            "subnet_mask",
            "subscription_id",
            "tags",
            "unique_id",
            "use_external_head_ip",
        },
        ("location", "resource_group"),
    ),
    "local": ({"coordinator_address", "external_head_ip", "head_ip", "worker_ips"}, ("head_ip", "worker_ips")),
}
#: Keys of Google's Instance resource that a user may set.
_GCP_INSTANCE = set(
    """
    acceleratorConfig acceleratorType advancedMachineFeatures canIpForward confidentialInstanceConfig
    deletionProtection description disks displayDevice guestAccelerators labels machineType metadata minCpuPlatform
    networkConfig networkInterfaces networkPerformanceConfig reservationAffinity resourcePolicies runtimeVersion
    scheduling schedulingConfig serviceAccounts shieldedInstanceConfig sourceMachineImage tags
    """.split()
)
_GCP_SCHEDULING = set(
    """
    automaticRestart instanceTerminationAction locationHint maxRunDuration minNodeCpus nodeAffinities
    onHostMaintenance onInstanceStopAction preemptible provisioningModel terminationTime
    """.split()
)


def cloud_findings(file: RayFile) -> Iterator[Finding]:
    """Findings about provider and machines of a Ray cluster YAML."""
    provider = as_dict(file.content.get("provider"))
    if file.provider not in PROVIDERS:
        hint = nearest(file.provider, PROVIDERS).strip()
        yield note(
            "provider.type",
            "is not a provider that is checked here",
            "only Ray's own checks apply",
            hint or "aws, gcp, azure, local",
        )
        return
    known, required = PROVIDERS[file.provider]
    yield from unknown_keys(provider, known | _ANY, "provider", f"the {file.provider} provider")
    if "coordinator_address" not in provider:
        for key in required:
            if provider.get(key) in (None, "", []):
                yield error(
                    place("provider", key), "is missing", f"the {file.provider} provider needs it", f"add {key}:"
                )
    for key in ("aws_credentials", "gcp_credentials"):
        if key in provider:
            yield error(
                place("provider", key),
                "the file contains credentials",
                "it is copied to the head and printed in logs",
                "remove it: Ray finds those of `aws configure` or `gcloud auth application-default login`",
            )
    yield from _machines(file, provider)


def _machines(file: RayFile, provider: dict[str, Any]) -> Iterator[Finding]:
    types = as_dict(file.content.get("available_node_types"))
    check = {"aws": _aws_machine, "gcp": _gcp_machine, "azure": _azure_machine}.get(file.provider)
    if check is None:
        return
    if file.provider == "aws":
        yield from _aws_region(provider)
    for name, kind in types.items():
        where, config = place("available_node_types", name, "node_config"), as_dict(as_dict(kind).get("node_config"))
        yield from check(config, where, as_dict(as_dict(kind).get("resources")))
        if not _spot(config):
            continue
        if name == file.content.get("head_node_type"):
            yield error(
                where,
                "the head is a spot machine",
                "when it is reclaimed, the whole cluster is lost",
                "use an on-demand head; workers may be spot",
            )
        elif "cluster spot-watch" not in file.shell:
            yield note(
                where,
                "spot machines without spot-watch",
                "a reclaimed machine loses what its trial did since the last checkpoint",
                f"after `ray start` of workers: setsid -f macdrop cluster spot-watch --cloud {file.provider}",
            )


def _spot(config: dict[str, Any]) -> bool:
    scheduling = config.get("scheduling")
    parts = scheduling if isinstance(scheduling, list) else [scheduling]
    return (
        as_dict(config.get("InstanceMarketOptions")).get("MarketType") == "spot"
        or any(as_dict(part).get("preemptible") or as_dict(part).get("provisioningModel") == "SPOT" for part in parts)
        or str(as_dict(config.get("azure_arm_parameters")).get("priority")).lower() in ("spot", "low")
    )


# --- AWS ---


@functools.cache
def _botocore() -> Any:
    """AWS' own description of EC2, which comes with boto3; None if boto3 is not installed."""
    try:
        import botocore.session
    except ImportError:
        return None
    return botocore.session.get_session()


def _aws_region(provider: dict[str, Any]) -> Iterator[Finding]:
    region, session = str(provider.get("region") or ""), _botocore()
    if session is None:
        yield note(
            "provider.type",
            "AWS machines are checked only in part",
            "their description comes with boto3, which is not installed (Ray needs it, too)",
            "pip install -e '.[aws]'",
        )
        return
    regions = [
        name for part in session.get_available_partitions() for name in session.get_available_regions("ec2", part)
    ]
    if region and region not in regions:
        yield error(
            "provider.region",
            f"AWS has no region {region[:40]!r}",
            "nothing could start",
            nearest(region, regions).strip(),
        )
    for zone in filter(None, map(str.strip, str(provider.get("availability_zone") or "").split(","))):
        if region in regions and not zone.startswith(region):
            yield error(
                "provider.availability_zone", f"{zone[:40]!r} is not in {region}", "Ray finds no subnet", f"{region}a"
            )


def _aws_machine(config: dict[str, Any], where: str, resources: dict[str, Any]) -> Iterator[Finding]:
    """Check a node_config against RunInstances as botocore describes it, and against what Ray does with it."""
    if not config.get("ImageId") and "LaunchTemplate" not in config:
        yield error(
            where,
            "ImageId is missing",
            "Ray would use its default, Ubuntu 18.04, which no current torch supports",
            "a Deep Learning Base AMI (Ubuntu 22.04) of your region",
        )
    if "SubnetId" in config:
        yield error(f"{where}.SubnetId", "is overwritten by Ray", "it reads a list, SubnetIds", "SubnetIds: [...]")
    cards, interfaces = EFA_CARDS.get(str(config.get("InstanceType"))), config.get("NetworkInterfaces")
    if cards and isinstance(interfaces, list):
        used = {str(as_dict(each).get("NetworkCardIndex", 0)) for each in interfaces}
        if used != set(map(str, range(cards))):
            yield note(
                where,
                f"{len(used)} of {cards} network cards have an interface",
                "the other cards stay idle",
                "one interface per card",
            )
        if "GroupName" not in as_dict(config.get("Placement")):
            yield note(where, "no placement group", "machines may be placed far apart", "Placement: {GroupName: ...}")
    session = _botocore()
    if session is None:
        return
    from botocore.validate import ParamValidator

    shape = session.get_service_model("ec2").operation_model("RunInstances").input_shape
    given = {key: value for key, value in config.items() if key not in ("SubnetIds", "SubnetId")}
    yield from unknown_keys(given, shape.members, where, "RunInstances of EC2")
    known = {key: value for key, value in given.items() if key in shape.members}
    for fault in ParamValidator().validate({"MinCount": 1, "MaxCount": 1} | known, shape)._errors:
        yield _botocore_fault(fault, where)
    machine, machines = str(config.get("InstanceType") or ""), shape.members["InstanceType"].enum
    if not machine and "LaunchTemplate" not in config:
        yield error(where, "InstanceType is missing", "EC2 has no suitable default", "InstanceType: g5.12xlarge")
    elif machine and machine not in machines:
        hint = nearest(machine, machines).strip()
        yield error(f"{where}.InstanceType", f"EC2 has no type {machine[:40]!r}", "nothing could start", hint)


def _botocore_fault(fault: tuple[str, str, dict[str, Any]], where: str) -> Finding:
    """Convert an error of botocore's validator, without the value."""
    kind, inside, facts = fault
    where = f"{where}.{inside.strip('.')}".rstrip(".")
    if kind == "unknown field":
        known = facts.get("valid_names", [])
        hint = nearest(facts["unknown_param"], known).strip() or f"one of {', '.join(known)}"
        return error(where, f"has no key {str(facts['unknown_param'])[:60]!r}", "EC2 rejects it", hint)
    if kind == "missing required field":
        return error(where, f"{facts['required_name']} is missing", "EC2 rejects it", f"add {facts['required_name']}")
    if kind == "invalid type":
        valid = " or ".join(str(each).split("'")[1] for each in facts["valid_types"])
        return error(where, "has the wrong type", "EC2 rejects it", f"must be {valid}")
    return error(where, f"is rejected: {kind}", "EC2 rejects it", "see RunInstances in the EC2 API reference")


# --- Google Cloud, Azure ---


def _gcp_machine(config: dict[str, Any], where: str, resources: dict[str, Any]) -> Iterator[Finding]:
    yield from unknown_keys(config, _GCP_INSTANCE, where, "an instance of Google Cloud")
    if "machineType" not in config and "acceleratorType" not in config and "acceleratorConfig" not in config:
        yield error(where, "machineType is missing", "nothing could start", "machineType: g2-standard-8")
    scheduling = config.get("scheduling")
    parts = [as_dict(part) for part in (scheduling if isinstance(scheduling, list) else [scheduling])]
    for part in parts:
        yield from unknown_keys(part, _GCP_SCHEDULING, f"{where}.scheduling", "the scheduling of an instance")
    family = str(config.get("machineType", "")).split("-")[0]
    gpus = family in ("g2", "g4", "a2", "a3", "a4") or bool(config.get("guestAccelerators"))
    if gpus and not resources.get("GPU"):
        yield error(
            where.removesuffix("node_config") + "resources",
            "the machine has GPUs, but resources names none",
            "Ray cannot query Google for a machine type: no task that needs a GPU would be placed there",
            "resources: {CPU: 8, GPU: 1}",
        )
    if gpus and not any(part.get("onHostMaintenance") == "TERMINATE" or part.get("preemptible") for part in parts):
        yield error(
            where,
            "scheduling.onHostMaintenance is not TERMINATE",
            "Google rejects any other value for machines with GPUs",
            "onHostMaintenance: TERMINATE",
        )


@functools.cache
def _azure_parameters() -> frozenset[str]:
    return ray_internals.azure_parameters()


def _azure_machine(config: dict[str, Any], where: str, resources: dict[str, Any]) -> Iterator[Finding]:
    yield from unknown_keys(config, {"azure_arm_parameters", "tags"}, where, "a machine of Azure")
    parameters = as_dict(config.get("azure_arm_parameters"))
    inside = f"{where}.azure_arm_parameters"
    yield from unknown_keys(
        parameters, _azure_parameters() | {"availability_zone"}, inside, "Ray's template of an Azure machine"
    )
    size = str(parameters.get("vmSize") or "")
    if not size:
        yield error(inside, "vmSize is missing", "nothing could start", "vmSize: Standard_NC24ads_A100_v4")
    if size.startswith(("Standard_NC", "Standard_ND")) and not resources.get("GPU"):
        yield error(
            where.removesuffix("node_config") + "resources",
            "the machine has GPUs, but resources names none",
            "Ray cannot query Azure for a size: no task that needs a GPU would be placed there",
            "resources: {CPU: 24, GPU: 1}",
        )
