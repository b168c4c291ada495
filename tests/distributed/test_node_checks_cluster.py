"""A sweep on three nodes: the one that trains is lost, another comes, and the one that trains then is to be taken away.

The nodes are processes of this machine (`ray.cluster_utils.Cluster`), the sweep is the command of a user; hosts with
addresses of their own are in tests/launch. The head has no CPUs, the others have one each, so the lane has one place.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.small import SMALL

from tune.config.run_spec import RunSpec
from tune.storage.sealed_folder import newest

# Nodes of one machine take minutes to start, to be lost and to be given notice.
pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(300)]

SETTINGS = {
    **SMALL,
    **{"max_steps": 600, "save_steps": 20, "val_size": 0, "eval_steps": None},
    "sweep": {"arms": ["macdrop"], "seeds": 0},
    "eval": {"limit": 8, "zero_shot": {"qa": {"data": "zoo:qa"}}},
    "ray": {"dashboard": False},
}
TRAINER, EVALUATOR = "RayTrainWorker", "Evaluator"
SPOT_S = 100


@dataclass
class Seen:
    """What became of the sweep, and which nodes trained."""

    folder: Path
    nodes: list[str] = field(default_factory=list)
    #: The steps that were trained when a node was lost, and when one was to be taken away.
    lost_at: int = 0
    drained_at: int = 0
    evaluated_on: set[str] = field(default_factory=set)
    head: str = ""
    trial: dict[str, Any] = field(default_factory=dict)
    scores: list[dict[str, Any]] = field(default_factory=list)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without CPUs and two nodes with one each; this process is a driver of it, too."""
    import ray
    from ray.cluster_utils import Cluster

    from tune.distributed.cluster.ray_cluster import SETTINGS as RAY_SETTINGS

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**RAY_SETTINGS, "RAY_AUTH_MODE": "disabled"}.items():
            patch.setenv(name, value)
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for _ in range(2):
            nodes.add_node(num_cpus=1)
        ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
        yield nodes
        ray.shutdown()
        nodes.shutdown()


@pytest.fixture(scope="module")
def seen(cluster, tmp_path_factory) -> Iterator[Seen]:
    folder = tmp_path_factory.mktemp("nodes")
    found = Seen(folder / "run", head=cluster.head_node.node_id)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(SETTINGS))
    command = [sys.executable, "-m", "tune.cli", "sweep", str(folder / "recipe.yaml")]
    command += [f"output_dir={found.folder}", f"ray.address={cluster.address}"]
    with open(folder / "log.txt", "w") as log:
        environment = {**os.environ, "MACDROP_CACHE": str(folder / "cache")}
        sweep = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def wait(until: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + 150
        while not (value := until()):
            going_on = time.monotonic() < deadline and sweep.poll() is None
            assert going_on, (folder / "log.txt").read_text()[-3000:]
            found.evaluated_on |= places(EVALUATOR)
            time.sleep(0.05)
        return value

    try:
        (first,) = wait(lambda: saved(found.folder) and places(TRAINER))
        found.nodes.append(first)
        cluster.remove_node(node(cluster, first), allow_graceful=False)
        cluster.add_node(num_cpus=1)
        wait(lambda: places(TRAINER) - {first})
        # The first trainer is gone for long by now: it trains on once there are more steps than that one has left.
        found.lost_at = steps(found.folder)
        wait(lambda: steps(found.folder) > found.lost_at)
        (second,) = places(TRAINER) - {first}
        (third,) = {each.node_id for each in cluster.worker_nodes} - {second}
        found.drained_at = steps(found.folder)
        drain(cluster, second)
        wait(lambda: third in places(TRAINER))
        found.nodes += [second, third]
        wait(lambda: sweep.poll() is not None)
    finally:
        sweep.kill()
    assert sweep.wait() == 0, (folder / "log.txt").read_text()[-3000:]
    (file,) = found.folder.glob("trials/*/trial.json")
    found.trial = json.loads(file.read_text())
    found.scores = [json.loads(line) for line in (found.folder / "scores.jsonl").open()]
    yield found


def places(kind: str) -> set[str]:
    """Ids of the nodes on which actors of a class live, of any job."""
    from ray._private.state import actors

    alive = [row for row in actors().values() if row["State"] == "ALIVE" and row["ActorClassName"] == kind]
    return {row["Address"]["NodeID"] for row in alive}


def node(cluster: Any, node_id: str) -> Any:
    return next(each for each in cluster.worker_nodes if each.node_id == node_id)


def drain(cluster: Any, node_id: str) -> None:
    """What a spot notice does: the node will be gone in `SPOT_S` seconds."""
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    preemption = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    gone_at = int((time.time() + SPOT_S) * 1000)
    accepted, why = GcsClient(address=cluster.address).drain_node(node_id, preemption, "spot notice", gone_at)
    assert accepted, why


def saved(folder: Path) -> Path | None:
    return next(filter(None, (newest(trial / "checkpoints") for trial in folder.glob("trials/*"))), None)


def steps(folder: Path) -> int:
    (file,) = folder.glob("trials/*/metrics.jsonl")
    return max((json.loads(line)["step"] for line in file.read_text().splitlines()), default=0)


def test_the_sweep_continues_where_there_is_room(seen):
    assert len(set(seen.nodes)) == 3 and seen.head not in seen.nodes
    assert seen.trial["status"] == "done" and seen.trial["step"] == SETTINGS["max_steps"]


def test_a_spot_notice_costs_no_step(seen):
    """On the notice the lane saves its state, also between two checkpoints."""
    assert seen.trial["resumed_from"] >= seen.drained_at > seen.lost_at


def test_the_adapter_is_that_of_an_undisturbed_run(seen, tmp_path, monkeypatch):
    from tune.training.single import train_here

    monkeypatch.setenv("MACDROP_CACHE", str(tmp_path / "cache"))
    train_here(RunSpec.model_validate(SETTINGS).studies()[0], tmp_path / "alone", observe=None, threads=1)
    file = "adapter/adapter_model.safetensors"
    disturbed = seen.folder / "trials" / seen.trial["trial"] / file
    assert disturbed.read_bytes() == (tmp_path / "alone" / file).read_bytes()


def test_it_is_scored_once_and_not_on_the_head(seen):
    assert [row["task"] for row in seen.scores if row["metric"] == "acc"] == ["qa"]
    assert seen.evaluated_on and seen.head not in seen.evaluated_on
