"""The AWS files on moto's AWS: bootstrap, resources of the machine types, create and terminate, by Ray's own code."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.backends import registry
from cluster.render import render
from cluster.render.targets import EFA_CARDS, TARGETS

boto3 = pytest.importorskip("boto3")
moto = pytest.importorskip("moto")


@pytest.fixture(scope="module", autouse=True)
def aws(tmp_path_factory) -> Iterator[None]:
    """Isolate from account and home, and skip the two sleeps of 15 s after Ray creates a role."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch, moto.mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "none")
        patch.setenv("AWS_DEFAULT_REGION", "us-west-2")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("HOME", str(home))
        from ray.autoscaler._private.aws import config, utils

        patch.setattr(config.time, "sleep", lambda _: None)
        # moto spells out a thousand machine types for each question.
        from moto.ec2.models import instance_types

        machines = instance_types.InstanceTypeBackend
        few = [each for each in machines.instance_types if each.name in ("m6i.2xlarge", "g5.12xlarge", "p5.48xlarge")]
        patch.setattr(machines, "instance_types", few)
        yield
        for cached in (utils.resource_cache, utils.client_cache):
            cached.cache_clear()


def prepared(target: str) -> dict[str, Any]:
    """The launch file with ids of moto's account, as `ray up` reads it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    ec2 = boto3.client("ec2", region_name="us-west-2")
    subnets = ec2.describe_subnets()["Subnets"]
    ids = {
        "ami": ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"],
        "security_group": ec2.describe_security_groups()["SecurityGroups"][0]["GroupId"],
        "subnet": subnets[0]["SubnetId"],
        "head_subnet": subnets[0]["SubnetId"],
    }
    given = dict(word.partition("=")[::2] for word in TARGETS[target].example.split())
    words = [f"{key}={ids.get(key, value)}" for key, value in given.items()]
    content = copy.deepcopy(registry.parse(render.render(TARGETS[target], words), render.EXAMPLES / "aws.yaml").content)
    content = prepare_config(content)
    validate_config(content)
    return content


@pytest.mark.parametrize(
    ("target", "resources", "interfaces", "market"),
    [("aws", {"GPU": 4, "CPU": 48}, 1, "spot"), ("aws-efa", {"GPU": 8, "CPU": 192}, 2, None)],
)
def test_bootstrap_create_terminate(target, resources, interfaces, market):
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler.tags import TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

    ec2 = boto3.client("ec2", region_name="us-west-2")
    content = AWSNodeProvider.fillout_available_node_types_resources(prepared(target))
    types = content["available_node_types"]
    assert resources.items() <= types["gpu"]["resources"].items()
    assert types["head"]["resources"]["CPU"] == 0
    content = bootstrap_aws(content)
    provider = AWSNodeProvider(content["provider"], content["cluster_name"])
    assert provider.cache_stopped_nodes is False
    try:
        for kind, name in (("head", "head"), ("worker", "gpu")):
            config = copy.deepcopy(content["available_node_types"][name]["node_config"])
            provider.create_node(config, {TAG_RAY_NODE_KIND: kind, TAG_RAY_USER_NODE_TYPE: name}, 1)
        found = {
            next(tag["Value"] for tag in machine["Tags"] if tag["Key"] == TAG_RAY_USER_NODE_TYPE): machine
            for each in ec2.describe_instances()["Reservations"]
            for machine in each["Instances"]
            if machine["State"]["Name"] == "running"
        }
        assert found.keys() == {"head", "gpu"}
        assert "InstanceLifecycle" not in found["head"]
        assert found["gpu"].get("InstanceLifecycle") == market
        assert len(found["gpu"]["NetworkInterfaces"]) == interfaces  # moto keeps one for each device index
        group = found["gpu"]["NetworkInterfaces"][0]["Groups"][0]["GroupId"]
        assert group == found["head"]["SecurityGroups"][0]["GroupId"]
    finally:
        provider.terminate_nodes(provider.non_terminated_nodes({}))
    assert provider.non_terminated_nodes({}) == []


def test_every_efa_machine_type_exists_in_ec2():
    shape = boto3.client("ec2").meta.service_model.operation_model("RunInstances").input_shape
    assert set(EFA_CARDS) <= set(shape.members["InstanceType"].enum)
