"""Nodes that leave: a lane with a timely notice saves at once and continues elsewhere, and the last node that is left
trains and scores in turn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import yaml
from helpers.lane_scene import scene_of
from helpers.small import SMALL

from tune.config.run_spec import RaySpec, TrainSpec

# Slow: test_nodes_cluster.py drains a node, and loses one, in every run.
pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.cluster, pytest.mark.timeout(300)]

RAY = RaySpec(dashboard=False, num_workers=1, cpus_per_worker=1.0)
#: No checkpoints but the one that a notice asks for.
SETTINGS = {**SMALL, "val_size": 0, "eval_steps": None, "zero_stage": 0, "max_steps": 4000, "save_steps": 0}
SPEC = TrainSpec(**SETTINGS, macdrop={"p0": 0.0}).canonical()


@pytest.fixture
def cluster(tmp_path_factory):
    """A head without CPUs and two nodes with one each, of processes on this machine."""
    import ray
    from ray.cluster_utils import Cluster

    from tune.distributed.cluster.ray_cluster import connect

    os.environ["MACDROP_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        connect(RaySpec(dashboard=False, address=cluster.address))
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        del os.environ["MACDROP_CACHE"]


def notice(address: str, node: str) -> None:
    """What `ray drain-node` says to the control store."""
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int((time.time() + 120) * 1000)
    assert GcsClient(address=address).drain_node(node, reason, "a spot notice", deadline_ms)[0]


def test_a_notice_costs_no_step_and_no_attempt(cluster, tmp_path):
    with scene_of(tmp_path, RAY) as scene:
        scene.place("a", SPEC)
        scene.lanes.open()
        reached = scene.reach("a", "running", 50)
        (lane,) = scene.call("snapshot")["lanes"].values()
        (left,) = lane["nodes"]
        notice(cluster.address, left)
        scene.wait(lambda snapshot: not snapshot["lanes"])
        (checkpoint,) = (tmp_path / "trials" / "a" / "checkpoints").glob("step-*")
        step = int(checkpoint.name.removeprefix("step-"))
        assert step >= reached
        scene.reach("a", "running", step + 1)
        (lane,) = scene.call("snapshot")["lanes"].values()
        assert left not in lane["nodes"]
        (entry,) = scene.call("changes", 0)[1]
        assert entry.attempts == 1 and entry.reason is None
    rows = [json.loads(line)["step"] for line in (tmp_path / "trials" / "a" / "metrics.jsonl").open()]
    assert rows == list(range(1, len(rows) + 1)), "no step was done twice"


LAST = {
    **{**SMALL, "model_name_or_path": "", "max_steps": 100, "save_steps": 20, "lora_target": "all"},
    "sweep": {
        "models": ["zoo:planted-llama", "zoo:planted-phi3"],
        **{"arms": ["plain", "macdrop"], "parameters": {"macdrop.p0": [0.4, 0.8]}, "seeds": 0},
    },
    "eval": {"limit": 8, "zero_shot": {"qa": {"data": "zoo:qa"}}},
    "ray": {"dashboard": False, "cpus_per_evaluator": 1.0, "resource_timeout_s": 40.0},
}


def test_lane_and_evaluator_take_turns_on_the_last_node(cluster, tmp_path):
    """Each of them wants a whole node, and the one that trains is lost for good."""
    from ray._private.state import actors

    folder, log = tmp_path / "run", tmp_path / "log.txt"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(LAST))
    command = [sys.executable, "-m", "tune.cli", "sweep", str(tmp_path / "recipe.yaml"), f"output_dir={folder}"]
    with log.open("w") as out:
        sweep = subprocess.Popen([*command, f"ray.address={cluster.address}"], stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + 120
        while not list(folder.glob("trials/*/checkpoints/step-*")):
            assert sweep.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.05)
        alive = [row for row in actors().values() if row["State"] == "ALIVE"]
        (trains,) = {row["Address"]["NodeID"] for row in alive if row["ActorClassName"] == "RayTrainWorker"}
        (lost,) = [node for node in cluster.worker_nodes if node.node_id == trains]
        cluster.remove_node(lost, allow_graceful=False)
        assert sweep.wait(timeout=240) == 0, log.read_text()[-3000:]
    finally:
        sweep.kill()
    assert "1 idle evaluation actor(s) released to make room for a lane" in log.read_text()
    trials = {file.parent.name: json.loads(file.read_text()) for file in folder.glob("trials/*/trial.json")}
    assert len(trials) == 6 and {trial["status"] for trial in trials.values()} == {"done"}
    scored = [json.loads(line) for line in (folder / "scores.jsonl").open()]
    # Of the two that were searched for a model the better one is scored.
    assert sorted(row["arm"] for row in scored if row["metric"] == "acc") == ["macdrop", "macdrop", "plain", "plain"]
