"""What a launch file can be rendered for: each target is data, its template beside it in `templates/`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cluster.render.fields import Answer, Like

#: Network cards by instance type; EFA wants one interface on each.
EFA_CARDS = {"p4d.24xlarge": 4, "p4de.24xlarge": 4, "p5.48xlarge": 32, "p5e.48xlarge": 32, "p5en.48xlarge": 16}

#: A rule over several answers: what is wrong, or None.
Rule = Callable[[Mapping[str, Any]], "str | None"]


@dataclass(frozen=True)
class Target:
    """A kind of cluster. `example`: answers of the shipped example, as they are typed."""

    name: str
    help: str
    answers: tuple[Answer, ...]
    example: str
    rules: tuple[Rule, ...] = ()

    @property
    def template(self) -> str:
        return f"{self.file}.j2"

    @property
    def file(self) -> str:
        """Name of the shipped example."""
        return f"{self.name}.sbatch" if self.name == "slurm" else f"{self.name}.yaml"


# --- rules ---


def _least_most(values: Mapping[str, Any]) -> str | None:
    least, most = values["workers"], values["max_workers"]
    return f"max_workers={most} is below workers={least}" if most < least else None


def _somewhere_to_run(values: Mapping[str, Any]) -> str | None:
    return None if values["max_workers"] else "max_workers=0: the head takes no tasks, so nothing would run"


def _one_source(values: Mapping[str, Any]) -> str | None:
    if values["image"] and values["install"] != "none":
        return f"image={values['image']} has macdrop in it already: add install=none"
    if values["install"] != "none" and not values["source"]:
        return "source= is missing: name your clone of the repository, which hosts install macdrop from"
    return None


def _zones_of_region(values: Mapping[str, Any]) -> str | None:
    strange = [zone for zone in values["zones"] if zone[:-1] != values["region"]]
    return f"zones={strange[0]} is not in region={values['region']}" if strange else None


def _one_role_a_host(values: Mapping[str, Any]) -> str | None:
    if not values["worker_ips"]:
        return "worker_ips is empty: the head takes no tasks, so nothing would run"
    twice = values["head_ip"] in values["worker_ips"]
    return f"worker_ips names the head, {values['head_ip']}, too: a host has one role" if twice else None


# --- answers that several targets share ---

NAME = Answer("name", "name", "Name of the cluster; a second cluster needs a second name", "macdrop", "sweep")
STORAGE = Answer("storage", "folder", "Folder that all hosts share, for runs and the cache", "/shared", "/shared")
SECRETS = Answer(
    "secrets", "variable", "Names of variables that `up` takes from your environment", (), "HF_TOKEN", many=True
)
SOFTWARE = (
    Answer(
        "source", "local path", "Your clone of the repository (default: where macdrop runs from)", None, "~/macdrop"
    ),
    Answer(
        "install",
        "choice",
        "How a host gets macdrop: uv (own Python 3.11 in ~/macdrop-venv), pip (into the host's Python), none (has it)",
        "uv",
        "none",
        allowed=("uv", "pip", "none"),
    ),
    Answer("image", "image", "Container image with macdrop in it; goes with install=none", None, "me/macdrop:1"),
    Answer("shm_gb", "positive", "Shared memory of that container in GB", 32, "64"),
)
WORKERS = (
    Answer("workers", "count", "Workers that `up` starts, and that are replaced when they die", 2, "4"),
    Answer("max_workers", "count", "Most workers; those beyond `workers` come and go", Like("workers"), "8"),
    Answer("idle_minutes", "positive", "Minutes without work until such a one goes", 10, "10"),
)
SPOT = Answer(
    "spot", "choice", "Workers at the spot price, taken away at short notice", "yes", "no", allowed=("yes", "no")
)
DISK = Answer("disk_gb", "positive", "Disk of a worker in GB; base models are kept on it", 300, "500")
CLOUD = (SPOT, *WORKERS, DISK, STORAGE, SECRETS, *SOFTWARE, NAME)
CLOUD_RULES = (_least_most, _somewhere_to_run, _one_source)
SIZES = (
    Answer("gpus", "count", "GPUs of a worker; Ray cannot tell from the machine type here", 1, "8"),
    Answer("cpus", "positive", "CPUs of a worker, likewise", 8, "96"),
)

AWS = (
    Answer("region", "aws region", "Region", example="us-west-2"),
    Answer("ami", "ami", "Deep Learning Base AMI (Ubuntu 22.04) of the region", example="ami-0123456789abcdef0"),
    Answer("efs", "efs", "EFS file system for results", example="fs-0123456789abcdef0"),
    Answer(
        "security_group",
        "security group",
        "Group that admits itself, and ssh from you; hosts and EFS are in it",
        example="sg-0123456789abcdef0",
    ),
    Answer(
        "head_machine", "aws machine", "Instance type of the head, which runs no tasks", "m6i.2xlarge", "m6i.xlarge"
    ),
)
AWS_EXAMPLE = "region=us-west-2 ami=ami-0123456789abcdef0 efs=fs-0123456789abcdef0 security_group=sg-0123456789abcdef0"

KUBERNETES = (
    Answer("image", "image", "Container image with macdrop in it", example="me/macdrop:1"),
    Answer("namespace", "k8s name", "Namespace", "default", "sweeps"),
    Answer("claim", "k8s name", "PersistentVolumeClaim (ReadWriteMany) for results", "macdrop-storage", "nfs"),
    Answer("token_secret", "k8s name", "Secret with the key auth_token; `up` makes it", "macdrop-token", "ray-token"),
    Answer("secret", "k8s name", "Secret with the variables of `secrets`; `up` makes it", "macdrop-secrets", "hub"),
    Answer("gpus", "count", "GPUs of a worker", 1, "8"),
    Answer("cpus", "positive", "CPUs of a worker", 8, "32"),
    Answer("memory", "quantity", "Memory of a worker", "64Gi", "256Gi"),
    Answer("shm", "quantity", "Shared memory of a worker, a part of its memory", "16Gi", "64Gi"),
    Answer("disk", "quantity", "Scratch disk of a worker; base models are kept on it", "200Gi", "500Gi"),
    Answer("ray_version", "version", "Ray in the image", "2.60.0", "2.60.0"),
    *WORKERS,
    STORAGE,
    SECRETS,
    NAME,
)
KUBERNETES_RULES = (_least_most, _somewhere_to_run)

TARGETS = {
    target.name: target
    for target in (
        Target(
            "aws",
            "AWS: on-demand head, spot workers with GPUs, results on EFS",
            (
                *AWS,
                Answer("machine", "aws machine", "Instance type of the workers", "g5.12xlarge", "p4d.24xlarge"),
                Answer("zones", "aws zone", "Zones to try, in this order (default: any)", (), "us-west-2a", many=True),
                *CLOUD,
            ),
            f"{AWS_EXAMPLE} secrets=HF_TOKEN,WANDB_API_KEY source=~/macdrop",
            (*CLOUD_RULES, _zones_of_region),
        ),
        Target(
            "aws-efa",
            "AWS: p4d or p5 workers side by side on EFA, for models that span machines",
            (
                *AWS,
                Answer(
                    "subnet",
                    "subnet",
                    "Workers' private subnet, with a NAT gateway",
                    example="subnet-0123456789abcdef0",
                ),
                Answer("head_subnet", "subnet", "Head's public subnet, same zone", example="subnet-0fedcba9876543210"),
                Answer("placement_group", "word", "Placement group of strategy cluster", example="macdrop"),
                Answer(
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
                Answer("project", "gcp project", "Project", example="my-project"),
                Answer("zone", "gcp zone", "Zone", example="us-central1-a"),
                Answer("filestore", "export", "Filestore share for results", example="10.0.0.2:/results"),
                Answer(
                    "family",
                    "word",
                    "Image family of deeplearning-platform-release",
                    example="common-cu128-ubuntu-2204-nvidia-570",
                ),
                Answer("machine", "word", "Machine type of the workers", "g2-standard-8", "a2-highgpu-8g"),
                Answer("accelerator", "word", "GPUs to attach, for n1 machines only", None, "nvidia-tesla-t4"),
                Answer("head_machine", "word", "Machine type of the head", "n2-standard-8", "e2-standard-8"),
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
                Answer("location", "azure location", "Location", example="westus2"),
                Answer("resource_group", "resource group", "Resource group", example="macdrop"),
                Answer("account", "azure account", "Storage account of the NFS share", example="macdropresults"),
                Answer("share", "k8s name", "The NFS share", "results", "results"),
                Answer("machine", "word", "Size of the workers", "Standard_NC24ads_A100_v4", "Standard_ND96asr_v4"),
                Answer("head_machine", "word", "Size of the head", "Standard_D8s_v5", "Standard_D4s_v5"),
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
            "Hosts of your own, by ssh",
            (
                Answer("head_ip", "host", "Host of the head, which runs no tasks", example="10.0.0.1"),
                Answer("worker_ips", "host", "Hosts that do the work", example="10.0.0.2,10.0.0.3", many=True),
                Answer("user", "user", "Login on the hosts", example="ubuntu"),
                Answer(
                    "key", "local path", "Private ssh key that opens all of them", "~/.ssh/id_ed25519", "~/.ssh/id_rsa"
                ),
                Answer(
                    "nfs",
                    "export",
                    "NFS share to mount there (needs sudo); else it is mounted already",
                    None,
                    "10.0.0.9:/results",
                ),
                Answer("gpus", "count", "GPUs of a worker (default: Ray counts them)", None, "8"),
                Answer("cpus", "positive", "CPUs of a worker (default: Ray counts them)", None, "32"),
                Answer(
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
            (_one_role_a_host, _one_source),
        ),
        Target(
            "kuberay",
            "Kubernetes: a RayCluster that stays, for sweep after sweep",
            KUBERNETES,
            "image=me/macdrop:1 namespace=sweeps gpus=8 cpus=32 memory=256Gi shm=64Gi workers=2 max_workers=8 "
            "secrets=HF_TOKEN,WANDB_API_KEY",
            KUBERNETES_RULES,
        ),
        Target(
            "kuberay-job",
            "Kubernetes: a RayJob, one sweep with a cluster of its own that goes with it",
            (
                Answer(
                    "recipe",
                    "recipe",
                    "Recipe by name, or a file in the image or on the storage",
                    example="llama-3.2-1b",
                ),
                Answer("run", "word", "Name of the run: its folder below STORAGE/runs", example="llama"),
                Answer("set", "override", "Keys of the recipe, such as sweep.num_samples=40", (), "seed=1", many=True),
                *KUBERNETES,
            ),
            "recipe=llama-3.2-1b run=llama set=sweep.num_samples=40 image=me/macdrop:1 "
            "namespace=sweeps secrets=HF_TOKEN",
            KUBERNETES_RULES,
        ),
        Target(
            "slurm",
            "Slurm: whole nodes for one sweep, which is resumed by submitting again",
            (
                Answer("nodes", "positive", "Nodes; the first is the head and works too", 2, "4"),
                Answer("gpus", "count", "GPUs of a node", 8, "4"),
                Answer("cpus", "positive", "CPUs of a node", 32, "64"),
                Answer(
                    "time", "slurm time", "Time limit; submitted again, the sweep goes on", "24:00:00", "2-00:00:00"
                ),
                Answer("partition", "word", "Partition (default: the cluster's)", None, "gpu"),
                Answer("account", "word", "Account (default: yours)", None, "project1"),
                Answer(
                    "venv",
                    "local path",
                    "Virtual environment with macdrop, on the shared file system",
                    example="~/macdrop-venv",
                ),
                Answer(
                    "storage", "folder", "Folder on the shared file system, for runs and the cache", example="/shared"
                ),
                SECRETS,
                NAME,
            ),
            "nodes=2 gpus=4 cpus=32 partition=gpu venv=~/macdrop-venv storage=/shared secrets=HF_TOKEN,WANDB_API_KEY",
        ),
    )
}
