"""Targets of `render`: each is data here, and a template in `templates/`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cluster.render.fields import Field, Like
from cluster.render.rules import (
    least_most,
    one_recipe,
    one_role_per_host,
    one_source,
    shared_by_nodes,
    somewhere_to_run,
    zones_of_region,
)

#: Network cards by instance type; EFA needs one interface on each.
EFA_CARDS = {"p4d.24xlarge": 4, "p4de.24xlarge": 4, "p5.48xlarge": 32, "p5e.48xlarge": 32, "p5en.48xlarge": 16}

#: A rule over several fields: returns what is wrong, or None.
Rule = Callable[[Mapping[str, Any]], "str | None"]


@dataclass(frozen=True)
class Target:
    """A kind of cluster. `example`: fields of the shipped example, as typed."""

    name: str
    help: str
    fields: tuple[Field, ...]
    example: str
    rules: tuple[Rule, ...] = ()

    @property
    def template(self) -> str:
        return f"{self.file}.j2"

    @property
    def file(self) -> str:
        """Name of the shipped example."""
        return f"{self.name}.sbatch" if self.name == "slurm" else f"{self.name}.yaml"


# --- fields that several targets share ---

NAME = Field("name", "name", "Name of the cluster; must be unique", "macdrop", "sweep")
STORAGE = Field("storage", "folder", "Folder that all hosts share, for runs and the cache", "/shared", "/shared")
SECRETS = Field(
    "secrets", "variable", "Names of variables that `up` takes from your environment", (), "HF_TOKEN", many=True
)
SOFTWARE = (
    Field("source", "local path", "Your clone of the repository (default: where macdrop runs from)", None, "~/macdrop"),
    Field(
        "install",
        "choice",
        "How a host gets macdrop: uv (its own Python 3.11 in ~/macdrop-venv), pip (the host's Python), none (present)",
        "uv",
        "none",
        allowed=("uv", "pip", "none"),
    ),
    Field("image", "image", "Container image that contains macdrop; needs install=none", None, "me/macdrop:1"),
    Field("shm_gb", "positive", "Shared memory of that container in GB", 32, "64"),
)
WORKERS = (
    Field("workers", "count", "Workers that `up` starts; dead ones are replaced", 2, "4"),
    Field(
        "max_workers",
        "count",
        "Most workers; those beyond `workers` start on demand",
        Like("workers"),
        "8",
    ),
    Field("idle_minutes", "positive", "Minutes without work until such a worker is removed", 10, "10"),
)
SPOT = Field(
    "spot", "choice", "Workers at the spot price, reclaimed at short notice", "yes", "no", allowed=("yes", "no")
)
DISK = Field("disk_gb", "positive", "Disk of a worker in GB; base models are cached on it", 300, "500")
CLOUD = (SPOT, *WORKERS, DISK, STORAGE, SECRETS, *SOFTWARE, NAME)
CLOUD_RULES = (least_most, somewhere_to_run, one_source)
SIZES = (
    Field("gpus", "count", "GPUs of a worker; Ray cannot derive them from the machine type here", 1, "8"),
    Field("cpus", "positive", "CPUs of a worker, likewise", 8, "96"),
)

AWS = (
    Field("region", "aws region", "Region", example="us-west-2"),
    Field("ami", "ami", "Deep Learning Base AMI (Ubuntu 22.04) of the region", example="ami-0123456789abcdef0"),
    Field("efs", "efs", "EFS file system for results", example="fs-0123456789abcdef0"),
    Field(
        "security_group",
        "security group",
        "Security group of hosts and EFS; admits itself, and ssh from you",
        example="sg-0123456789abcdef0",
    ),
    Field("head_machine", "aws machine", "Instance type of the head, which runs no tasks", "m6i.2xlarge", "m6i.xlarge"),
)
AWS_EXAMPLE = "region=us-west-2 ami=ami-0123456789abcdef0 efs=fs-0123456789abcdef0 security_group=sg-0123456789abcdef0"

KUBERNETES = (
    Field("image", "image", "Container image that contains macdrop", example="me/macdrop:1"),
    Field("namespace", "k8s name", "Namespace", "default", "sweeps"),
    Field("claim", "k8s name", "PersistentVolumeClaim (ReadWriteMany) for results", "macdrop-storage", "nfs"),
    Field("token_secret", "k8s name", "Secret with the key auth_token; created by `up`", "macdrop-token", "ray-token"),
    Field("secret", "k8s name", "Secret with the variables of `secrets`; created by `up`", "macdrop-secrets", "hub"),
    Field("gpus", "count", "GPUs of a worker", 1, "8"),
    Field("cpus", "positive", "CPUs of a worker", 8, "32"),
    Field("memory", "quantity", "Memory of a worker", "64Gi", "256Gi"),
    Field("shm", "quantity", "Shared memory of a worker, part of its memory", "16Gi", "64Gi"),
    Field("disk", "quantity", "Scratch disk of a worker; base models are cached on it", "200Gi", "500Gi"),
    Field("ray_version", "version", "Ray in the image", "2.60.0", "2.60.0"),
    *WORKERS,
    STORAGE,
    SECRETS,
    NAME,
)
KUBERNETES_RULES = (least_most, somewhere_to_run)

TARGETS = {
    target.name: target
    for target in (
        Target(
            "aws",
            "AWS: on-demand head, spot workers with GPUs, results on EFS",
            (
                *AWS,
                Field("machine", "aws machine", "Instance type of the workers", "g5.12xlarge", "p4d.24xlarge"),
                Field("zones", "aws zone", "Zones to try, in this order (default: any)", (), "us-west-2a", many=True),
                *CLOUD,
            ),
            f"{AWS_EXAMPLE} secrets=HF_TOKEN,WANDB_API_KEY source=~/macdrop",
            (*CLOUD_RULES, zones_of_region),
        ),
        Target(
            "aws-efa",
            "AWS: p4d or p5 workers connected by EFA, for models that span machines",
            (
                *AWS,
                Field(
                    "subnet",
                    "subnet",
                    "Private subnet of the workers, with a NAT gateway",
                    example="subnet-0123456789abcdef0",
                ),
                Field(
                    "head_subnet", "subnet", "Public subnet of the head, same zone", example="subnet-0fedcba9876543210"
                ),
                Field("placement_group", "word", "Placement group of strategy cluster", example="macdrop"),
                Field(
                    "machine",
                    "choice",
                    "Instance type of the workers",
                    "p4d.24xlarge",
                    "p5.48xlarge",
                    allowed=tuple(EFA_CARDS),
                ),
                replace(SPOT, default="no", example="yes"),
                *CLOUD[1:],
            ),
            f"{AWS_EXAMPLE} subnet=subnet-0123456789abcdef0 head_subnet=subnet-0fedcba9876543210 "
            "placement_group=macdrop machine=p5.48xlarge disk_gb=1000 secrets=HF_TOKEN,WANDB_API_KEY source=~/macdrop",
            CLOUD_RULES,
        ),
        Target(
            "gcp",
            "Google Cloud: on-demand head, spot workers with GPUs, results on Filestore",
            (
                Field("project", "gcp project", "Project", example="my-project"),
                Field("zone", "gcp zone", "Zone", example="us-central1-a"),
                Field("filestore", "export", "Filestore share for results", example="10.0.0.2:/results"),
                Field(
                    "family",
                    "word",
                    "Image family of deeplearning-platform-release",
                    example="common-cu128-ubuntu-2204-nvidia-570",
                ),
                Field("machine", "word", "Machine type of the workers", "g2-standard-8", "a2-highgpu-8g"),
                Field("accelerator", "word", "GPUs to attach, for n1 machines only", None, "nvidia-tesla-t4"),
                Field("head_machine", "word", "Machine type of the head", "n2-standard-8", "e2-standard-8"),
                *SIZES,
                *CLOUD,
            ),
            "project=my-project zone=us-central1-a filestore=10.0.0.2:/results "
            "family=common-cu128-ubuntu-2204-nvidia-570 secrets=HF_TOKEN,WANDB_API_KEY source=~/macdrop",
            CLOUD_RULES,
        ),
        Target(
            "azure",
            "Azure: on-demand head, spot workers with GPUs, results on Azure Files",
            (
                Field("location", "azure location", "Location", example="westus2"),
                Field("resource_group", "resource group", "Resource group", example="macdrop"),
                Field("account", "azure account", "Storage account of the NFS share", example="macdropresults"),
                Field("share", "k8s name", "The NFS share", "results", "results"),
                Field("machine", "word", "Size of the workers", "Standard_NC24ads_A100_v4", "Standard_ND96asr_v4"),
                Field("head_machine", "word", "Size of the head", "Standard_D8s_v5", "Standard_D4s_v5"),
                SIZES[0],
                replace(SIZES[1], default=24),
                *CLOUD,
            ),
            "location=westus2 resource_group=macdrop account=macdropresults "
            "secrets=HF_TOKEN,WANDB_API_KEY source=~/macdrop",
            CLOUD_RULES,
        ),
        Target(
            "local",
            "On-premise hosts, over ssh",
            (
                Field("head_ip", "host", "Host of the head, which runs no tasks", example="10.0.0.1"),
                Field("worker_ips", "host", "Hosts of the workers", example="10.0.0.2,10.0.0.3", many=True),
                Field("user", "user", "Login on the hosts", example="ubuntu"),
                Field("key", "local path", "Private ssh key for all of them", "~/.ssh/id_ed25519", "~/.ssh/id_rsa"),
                Field(
                    "nfs",
                    "export",
                    "NFS share to mount there (needs sudo; default: already mounted)",
                    None,
                    "10.0.0.9:/results",
                ),
                Field("gpus", "count", "GPUs of a worker (default: Ray counts them)", None, "8"),
                Field("cpus", "positive", "CPUs of a worker (default: Ray counts them)", None, "32"),
                Field(
                    "object_store_mb",
                    "positive",
                    "Ray's object store on each host (default: 30 % of memory)",
                    None,
                    "2000",
                ),
                STORAGE,
                SECRETS,
                *SOFTWARE,
                NAME,
            ),
            "head_ip=10.0.0.1 worker_ips=10.0.0.2,10.0.0.3 user=ubuntu gpus=8 "
            "secrets=HF_TOKEN,WANDB_API_KEY source=~/macdrop",
            (one_role_per_host, one_source),
        ),
        Target(
            "kuberay",
            "Kubernetes: a permanent RayCluster, for any number of sweeps",
            KUBERNETES,
            "image=me/macdrop:1 namespace=sweeps gpus=8 cpus=32 memory=256Gi shm=64Gi workers=2 max_workers=8 "
            "secrets=HF_TOKEN,WANDB_API_KEY",
            KUBERNETES_RULES,
        ),
        Target(
            "kuberay-job",
            "Kubernetes: a RayJob, one sweep with its own cluster, removed afterwards",
            (
                Field(
                    "recipe",
                    "recipe",
                    "Name of a recipe, or a file in the image or on the storage",
                    example="llama-3.2-1b",
                ),
                Field("run", "word", "Name of the run: its folder below STORAGE/runs", example="llama"),
                Field("set", "override", "Keys of the recipe, such as sweep.num_samples=40", (), "seed=1", many=True),
                *KUBERNETES,
            ),
            "recipe=llama-3.2-1b run=llama set=sweep.num_samples=40 image=me/macdrop:1 "
            "namespace=sweeps secrets=HF_TOKEN",
            KUBERNETES_RULES,
        ),
        Target(
            "slurm",
            "Slurm: whole nodes for one sweep, which resumes when submitted again",
            (
                Field("nodes", "positive", "Nodes; the first is the head, and works, too", 2, "4"),
                Field("gpus", "count", "GPUs of a node", 8, "4"),
                Field("cpus", "positive", "CPUs of a node", 32, "64"),
                Field("time", "slurm time", "Time limit; submit again to resume the sweep", "24:00:00", "2-00:00:00"),
                Field("partition", "word", "Partition (default: the cluster's)", None, "gpu"),
                Field("account", "word", "Account (default: yours)", None, "project1"),
                Field(
                    "venv",
                    "local path",
                    "Virtual environment with macdrop, on the shared file system",
                    example="~/macdrop-venv",
                ),
                Field(
                    "storage", "folder", "Folder on the shared file system, for runs and the cache", example="/shared"
                ),
                SECRETS,
                NAME,
            ),
            "nodes=2 gpus=4 cpus=32 partition=gpu venv=~/macdrop-venv storage=/shared secrets=HF_TOKEN,WANDB_API_KEY",
        ),
        Target(
            "skypilot",
            "SkyPilot: a managed job, one sweep on spot machines of any cloud, copied to a bucket",
            (
                Field(
                    "sync_to",
                    "bucket",
                    "Where the run is copied, and resumed from",
                    example="s3://my-bucket/runs/llama",
                ),
                Field("run", "word", "Name of the run: its folder below STORAGE/runs", example="llama"),
                Field("recipe", "recipe", "Name of a shipped recipe", None, "llama-3.2-1b"),
                Field("config", "local path", "A run file of this machine, in place of recipe=", None, "~/my.yaml"),
                Field("set", "override", "Keys of the recipe, such as sweep.num_samples=40", (), "seed=1", many=True),
                Field("accelerators", "accelerators", "GPUs of a node, by SkyPilot's name", "A100:8", "H100:8"),
                Field("infra", "infra", "Cloud, region and zone (default: the cheapest)", None, "aws/us-west-2"),
                Field("nodes", "positive", "Nodes; the first is the head, and works, too", 1, "2"),
                Field("nfs", "export", "NFS share for runs; for nodes > 1, on VMs", None, "10.0.0.2:/results"),
                Field("volume", "k8s name", "SkyPilot's volume for runs; for nodes > 1, on Kubernetes", None, "runs"),
                replace(SPOT, help="Machines at the spot price; SkyPilot finds others when they are reclaimed"),
                DISK,
                replace(STORAGE, help="Folder of runs and the cache on the nodes"),
                SECRETS,
                *(field for field in SOFTWARE if field.name != "shm_gb"),
                NAME,
            ),
            "sync_to=s3://my-bucket/runs/llama run=llama recipe=llama-3.2-1b set=sweep.num_samples=40 "
            "accelerators=H100:8 nodes=2 nfs=10.0.0.2:/results infra=aws/us-west-2 secrets=HF_TOKEN,WANDB_API_KEY "
            "source=~/macdrop",
            (one_recipe, shared_by_nodes, one_source),
        ),
    )
}
