"""Every check of a launch file finds its mistake: the shipped examples, each with one thing broken."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cluster.backends import registry
from cluster.check.finding import ERROR, NOTE
from cluster.cli import app
from cluster.commands import check
from cluster.errors import BadLaunchFile
from cluster.render import render

#: target: (old text, new text, severity, words of the finding)
BROKEN = [
    # Ray's schema
    ("aws", "cluster_name:", "cluster_nam:", ERROR, "no key 'cluster_nam' Did you mean 'cluster_name'?"),
    ("aws", "max_workers: 2\n# Workers", 'max_workers: "2"\n# Workers', ERROR, "max_workers must be a whole number"),
    ("aws", "    min_workers: 2", "    min_worker: 2", ERROR, "no key 'min_worker' Did you mean"),
    ("aws", "head_node_type: head", "head_node_type: hed", ERROR, "Ray rejects it: `head_node_type` must be one of"),
    ("aws", "setup_commands:\n", "setup_commands: pip\nfile_mount:\n", ERROR, "setup_commands must be a list"),
    # provider
    ("aws", "  region: ", "  regoin: ", ERROR, "no key 'regoin' Did you mean 'region'?"),
    ("aws", '  region: "us-west-2"\n', "", ERROR, "provider.region is missing"),
    ("aws", "us-west-2", "us-wset-2", ERROR, "no region 'us-wset-2' Did you mean 'us-west-2'?"),
    ("aws", "provider:\n", "provider:\n  availability_zone: eu-west-1a\n", ERROR, "'eu-west-1a' is not in us-west-2"),
    (
        "aws",
        "provider:\n",
        "provider:\n  aws_credentials: {aws_access_key_id: x}\n",
        ERROR,
        "the file contains credentials",
    ),
    ("aws", "  cache_stopped_nodes: false\n", "", NOTE, "`down` stops machines instead of terminating them"),
    ("aws", "type: aws", "type: awss", NOTE, "not a provider that is checked here Did you mean 'aws'?"),
    ("gcp", "  project_id:", "  project:", ERROR, "provider.project_id is missing"),
    ("azure", "  location:", "  lokation:", ERROR, "no key 'lokation' Did you mean 'location'?"),
    # machines
    ("aws", "InstanceType: ", "InstanceTyp: ", ERROR, "no key 'InstanceTyp' Did you mean 'InstanceType'?"),
    ("aws", "MarketType: spot", "MarketTyp: spot", ERROR, "no key 'MarketTyp' Did you mean 'MarketType'?"),
    ("aws", "g5.12xlarge", "g5.12xlrge", ERROR, "no type 'g5.12xlrge' Did you mean 'g5.12xlarge'?"),
    ("aws", "VolumeSize: 300", 'VolumeSize: "300"', ERROR, "has the wrong type EC2 rejects it must be int"),
    ("aws", "ImageId", "imageId", ERROR, "ImageId is missing"),
    ("aws-efa", "SubnetIds:", "SubnetId:", ERROR, "SubnetId is overwritten by Ray"),
    ("aws-efa", "NetworkCardIndex: 31", "NetworkCardIndex: 30", NOTE, "31 of 32 network cards"),
    ("aws-efa", 'GroupName: "macdrop"', "Tenancy: default", NOTE, "no placement group"),
    ("gcp", "machineType:", "machineTyp:", ERROR, "machineType is missing"),
    ("gcp", "onHostMaintenance:", "onHostMaintenence:", ERROR, "no key 'onHostMaintenence'"),
    ("gcp", "onHostMaintenance: TERMINATE", "onHostMaintenance: MIGRATE", ERROR, "is not TERMINATE"),
    ("gcp", ", GPU: 1}", "}", ERROR, "the machine has GPUs, but resources names none"),
    ("azure", ", GPU: 1}", "}", ERROR, "the machine has GPUs, but resources names none"),
    ("azure", "vmSize:", "vmsize:", ERROR, "no key 'vmsize' Did you mean 'vmSize'?"),
    ("aws", "  head:\n", "  head:\n    labels: {a: b}\n#", ERROR, "Ray requires it"),
    ("azure", "osDiskSize: 150", "priority: Spot", ERROR, "the head is a spot machine"),
    ("gcp", '"n2-standard-8"\n', "n2\n      scheduling: [{preemptible: true}]\n", ERROR, "the head is a spot machine"),
    ("aws", "cluster spot-watch", "cluster watch", NOTE, "spot machines without spot-watch"),
    # counts
    ("aws", "    min_workers: 2", "    min_workers: 3", ERROR, "min_workers 3 is above max_workers 2"),
    ("aws", "max_workers: 2", "max_workers: 0", ERROR, "no worker can ever start"),
    ("local", "worker_ips: [", "worker_ips: []\n  # [", ERROR, "worker_ips is missing"),
    ("aws", "idle_timeout_minutes: 10", "idle_timeout_minutes: 0", None, "workers are removed after 0 idle minutes"),
    # Ray's start
    ("local", "RAY_enable_autoscaler_v2=0", "RAY_enable_autoscaler_v2=1", ERROR, "the newer autoscaler is on"),
    ("aws", "RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled", ERROR, "RAY_AUTH_MODE=token is not set on the workers"),
    ("aws", "RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled", ERROR, "RAY_AUTH_MODE=token is not set on the head"),
    (
        "aws",
        "keepalive_time_ms=15000",
        "keepalive_time_ms=300000",
        ERROR,
        "keepalive_time_ms is not set low on the head",
    ),
    ("aws", "dashboard-host=127.0.0.1", "dashboard-host=0.0.0.0", ERROR, "the dashboard listens on all addresses"),
    (
        "aws",
        "head_start_ray_commands:",
        "worker_setup_commands:",
        ERROR,
        "(Ray's default) the dashboard listens on all",
    ),
    ("aws", "--autoscaling-config=~/ray_bootstrap_config.yaml", "--temp-dir=/x", ERROR, "has no --autoscaling-config"),
    ("local", "--num-cpus=0", "--num-cpus=4", NOTE, "the head takes tasks"),
    (
        "local",
        "--address=$RAY_HEAD_IP:6379",
        "--address=10.0.0.9:6379",
        ERROR,
        "do not look for the head at $RAY_HEAD_IP",
    ),
    ("local", "ray start --address", "ray stop --address", ERROR, "nothing starts Ray on the workers"),
    ("local", " --num-gpus=8", "", NOTE, "--num-gpus is not given"),
    ("aws", "ulimit -n 65536 || true", "ulimit -n 65536 && true", ERROR, "`ulimit ... &&` precedes a command"),
    # what is copied to hosts
    ("aws", "  ~/.ray/auth_token: ~", "  ~/.ray/token: ~", ERROR, "~/.ray/auth_token is not copied to the hosts"),
    ("aws", "  ~/.macdrop/secrets.env: ~", "  ~/secrets: ~", ERROR, "~/.macdrop/secrets.env is not copied"),
    ("aws", ". ~/.macdrop/secrets.env", "true", ERROR, "secrets.env is not sourced before `ray start` on the head"),
    ("aws", "source: ", "sourze: ", NOTE, "file_mounts.~/macdrop-sourze is not on this machine"),
    ("aws", "'export MACDROP_STORAGE=/shared' \\\n", "", ERROR, "MACDROP_STORAGE is not set on the workers"),
    ("aws", "MACDROP_STORAGE=/shared", "MACDROP_STORAGE=/tmp/x", ERROR, "is not a folder that hosts share"),
    (
        "aws",
        "    ray start --address",
        "    MACDROP_STORAGE=/b ray start --address",
        ERROR,
        "MACDROP_STORAGE has two values",
    ),
    (
        "aws",
        "cluster_name:",
        "docker: {image: a, container_name: b}\ncluster_name:",
        ERROR,
        "the storage is not in the container",
    ),
    ("aws", "cluster_name:", "docker: {image: a, container_name: b}\ncluster_name:", NOTE, "--shm-size is not given"),
    # hosts
    ("local", '"10.0.0.2"', '"10.0.0.1"', ERROR, "10.0.0.1 has two roles"),
    ("local", "  ssh_user:", "  #", ERROR, "auth.ssh_user is missing"),
    ("local", "  ssh_private_key:", "  #", NOTE, "auth.ssh_private_key is missing"),
    ("local", "auth:\n", "max_workers: 1\nauth:\n", NOTE, "is below the number of worker_ips"),
    # KubeRay
    ("kuberay", "kind: RayCluster", "kind: RayService", ERROR, "neither RayCluster nor RayJob"),
    ("kuberay", '  name: "macdrop"\n', "  name: Mac_drop\n", ERROR, "is not a valid name for pods"),
    ("kuberay", "mode: token", "mode: disabled", ERROR, "token authentication is off"),
    ("kuberay", "ClusterIP", "LoadBalancer", ERROR, "exposes the head to the outside"),
    ("kuberay", "enableInTreeAutoscaling: true", "enableInTreeAutoscaling: false", ERROR, "no worker beyond replicas"),
    ("kuberay", "workerGroupSpecs", "workerGroups", ERROR, "workerGroupSpecs has no group"),
    ("kuberay", "minReplicas: 2", "minReplicas: 9", ERROR, "are out of order"),
    ("kuberay", "maxReplicas: 8", 'maxReplicas: "8"', ERROR, "replicas are not whole numbers"),
    ("kuberay", 'num-cpus: "0"', "num-cpus: 0", ERROR, "num-cpus is not text"),
    ("kuberay", 'num-cpus: "0"', 'num-cpus: "4"', NOTE, "the head takes tasks"),
    ("kuberay", "name: ray-worker", "command: []", ERROR, "no container with name and image"),
    ("kuberay", "me/macdrop:1", "me/macdrop:latest", NOTE, "has no fixed version"),
    ("kuberay", "time_ms, value", "tim_ms, value", ERROR, "keepalive_time_ms is not set low on the workers"),
    ("kuberay", "- {name: MACDROP_STORAGE", "- {name: STORAGE", ERROR, "MACDROP_STORAGE is not set on the head"),
    ("kuberay", 'persistentVolumeClaim: {claimName: "macdrop-storage"}', "emptyDir: {}", ERROR, "no persistent volume"),
    ("kuberay", "- name: storage\n", "- name: storag\n", ERROR, "/shared mounts no volume of the pod"),
    ("kuberay", "mountPath: /dev/shm", "mountPath: /dev/sh", NOTE, "no memory volume at /dev/shm"),
    ("kuberay", "envFrom", "envForm", ERROR, "the variables of MACDROP_SECRETS are missing on the workers"),
    ("kuberay", "- groupName: gpu", "- groupName: gpu\n    - groupName: gpu", ERROR, "two groups are named gpu"),
    ("kuberay-job", "entrypoint: bash /macdrop/sweep.sh", "entrypoint:", ERROR, "entrypoint is missing"),
    ("kuberay-job", "bash /macdrop", "cd x; bash /macdrop", NOTE, "contains shell syntax"),
    ("kuberay-job", "shutdownAfterJobFinishes: true", "suspend: false", NOTE, "machines stay"),
    # Slurm
    ("slurm", "--partition=", "--partitoin=", ERROR, "no option --partitoin sbatch rejects the job Did you mean"),
    ("slurm", "--ntasks-per-node=1", "--ntasks-per-node=4", ERROR, "more than one task on a node"),
    ("slurm", "--gpus-per-node=4", "--gpus-per-node=2", ERROR, "--num-gpus differs"),
    ("slurm", "--cpus-per-task=32", "-c 16", ERROR, "--num-cpus differs"),
    ("slurm", '--min-nodes "$SLURM_JOB_NUM_NODES"', "--min-nodes 3", ERROR, "--min-nodes differs"),
    ("slurm", "#SBATCH --exclusive\n", "", ERROR, "--exclusive is missing"),
    ("slurm", "#SBATCH --time=24:00:00\n", "set -e\n#SBATCH --time=1\n", ERROR, "comes after the first command"),
    ("slurm", "#SBATCH --time", "# SBATCH --time", NOTE, "is a comment to sbatch"),
    ("slurm", "#SBATCH --time", "# SBATCH --time", NOTE, "--time is missing"),
    ("slurm", "#SBATCH --no-kill\n", "", NOTE, "--no-kill is missing"),
    ("slurm", "sweep --resume", "sweep", NOTE, "nothing resumes a run"),
    ("slurm", "ENDED", "OVER", NOTE, "nothing stops the nodes other than the first"),
    ("slurm", "export RAY_AUTH_MODE=token", "", ERROR, "RAY_AUTH_MODE=token is not set"),
    ("slurm", "ray symmetric-run", "echo", ERROR, "nothing starts Ray"),
    ("slurm", "export MACDROP_STORAGE=/shared", "", ERROR, "MACDROP_STORAGE is not set"),
    ("skypilot", "use_spot: true", "use_spott: true", ERROR, "has no key 'use_spott' Did you mean 'use_spot'"),
    ("skypilot", "use_spot: true", "use_spot: yes please", ERROR, "is neither true nor false"),
    ("skypilot", "num_nodes: 2", "num_nodes: two", ERROR, "is not a whole number from 1"),
    ("skypilot", "secrets:", "secretz:", ERROR, "has no key 'secretz' Did you mean 'secrets'"),
    ("skypilot", "sync_to=s3://", "from=s3://", ERROR, "is not copied to a bucket"),
    ("skypilot", " --resume-if-exists", "", NOTE, "nothing resumes a run"),
    ("skypilot", "macdrop sweep", "echo", ERROR, "nothing starts a sweep"),
    ("skypilot", "code=0", "ray stop", ERROR, "contains `ray stop`"),
    ("skypilot", "ray start", "echo", ERROR, "nothing starts Ray on the nodes"),
    ("skypilot", "export RAY_AUTH_MODE=token", "", ERROR, "RAY_AUTH_MODE=token is not set"),
    ("skypilot", "sudo mount -t nfs", "echo", NOTE, "nothing mounts a file system"),
]
SUFFIX = {name: Path(target.file).suffix for name, target in render.TARGETS.items()}


def example(name: str) -> str:
    return (render.EXAMPLES / f"{name}{SUFFIX[name]}").read_text(encoding="utf-8")


def found(text: str) -> list[tuple[str, str]]:
    return [
        (each.severity, f"{each.where} {each.what} {each.why} {each.remedy}")
        for each in check.findings(registry.parse(text, Path("cluster.yaml")))
    ]


@pytest.mark.parametrize(("name", "old", "new", "severity", "words"), BROKEN)
def test_each_mistake_is_found(name, old, new, severity, words):
    text = example(name)
    assert old in text
    reported = found(text.replace(old, new))
    if severity is None:  # only if the number of workers varies
        assert not any(words in each for _, each in reported)
        reported = found(text.replace(old, new).replace("max_workers: 2", "max_workers: 4"))
        severity = NOTE
    assert any(kind == severity and all(word in each for word in words.split()) for kind, each in reported), reported
    assert any(
        words.partition(" Did you")[0].split(" sbatch rejects")[0].split(" EC2")[0] in each for _, each in reported
    ), reported


SECRET = "hf_" + "Zq" * 16


@pytest.mark.parametrize("name", ["aws", "local", "kuberay", "slurm"])
@pytest.mark.parametrize(
    "line",
    [
        f"# a comment: {SECRET}",
        f"export HF_TOKEN={SECRET}",
        "export WANDB_API_KEY=0123456789abcdef0123456789abcdef01234567",
        "export RAY_AUTH_TOKEN=my-own-words",
        "export DB_PASSWORD='pass word'",
        "AKIA" + "Z" * 16,
    ],
)
def test_plain_text_secrets_are_rejected_and_never_printed(name, line, tmp_path):
    text = example(name)
    if name.startswith("kuberay") and line.startswith("export"):
        variable, _, value = line.removeprefix("export ").partition("=")
        entry = f"- {{name: {variable}, value: {value}}}\n              - {{name: MACDROP_STORAGE"
        text = text.replace("- {name: MACDROP_STORAGE", entry, 1)
    elif name in ("aws", "local"):
        text = text.replace("    ulimit", f"    {line}\n    ulimit")
    else:
        text += f"\n{line if name == 'slurm' else '# ' + line}\n"
    (tmp_path / "cluster.yaml").write_text(text)
    result = CliRunner().invoke(app, ["check", str(tmp_path / "cluster.yaml")])
    assert result.exit_code == 2, result.output
    assert "revoke it" in " ".join(result.output.split())
    for value in (SECRET, "0123456789abcdef", "my-own-words", "pass word", "AKIA"):
        assert value not in result.output


def test_table_and_exit_code(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text(example("aws").replace("type: aws", "type: aws\n  regoin: x"))
    result = CliRunner().invoke(app, ["check", str(path)])
    assert result.exit_code == 2
    shown = result.output.split("\n")
    assert shown[0].split() == ["where", "what", "and", "why", "remedy"]
    assert shown[2].split()[:2] == ["error", "provider.regoin"]
    assert shown[-2].endswith("aws, a head and 2 more; 1 error, 1 note.")
    path.write_text(example("aws"))
    assert CliRunner().invoke(app, ["check", str(path)]).exit_code == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe", "it is not text"),
        (b"a: [", "line [12]: not valid YAML"),
        (b"a: 1", "is not a launch file"),
        (b"#!/bin/bash\necho", "without #SBATCH lines"),
        (b"", "is not a launch file"),
        (b"- a\n- b", "is not a launch file"),
        (None, "cannot be read: No such file"),
    ],
)
def test_files_of_other_formats_are_rejected(tmp_path, content, words):
    path = tmp_path / "cluster.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadLaunchFile, match=words):
        check.run(path)


KEYS = st.sampled_from(
    "cluster_name provider type local aws available_node_types head_node_type file_mounts setup_commands docker image "
    "auth head_ip worker_ips min_workers max_workers node_config resources kind RayCluster apiVersion metadata "
    "spec headGroupSpec workerGroupSpecs template containers env volumes rayStartParams head_start_ray_commands".split()
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 99) | KEYS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=6),
    max_leaves=25,
)


@given(st.dictionaries(KEYS, VALUES, max_size=8), st.sampled_from(["aws", "gcp", "azure", "local", "kuberay"]))
@settings(max_examples=40, deadline=None)
def test_any_yaml_ends_in_findings(content, kind):
    """Well-formed nonsense, such as wrong indentation, never ends in a traceback."""
    import yaml

    if kind == "kuberay":
        content = {**content, "apiVersion": "ray.io/v1", "kind": "RayCluster"}
    else:
        provider = content.get("provider")
        content = {**content, "provider": {**(provider if isinstance(provider, dict) else {}), "type": kind}}
    file = registry.parse(yaml.safe_dump(content), Path("cluster.yaml"))
    assert all(each.severity in (ERROR, NOTE) for each in check.findings(file))
    assert isinstance(file.workers, tuple) and isinstance(file.secrets, tuple) and isinstance(file.environment, dict)
