"""A node that is about to be taken away: its lane saves what it has at once and goes on on a node that stays."""

from __future__ import annotations

import json
import os
import time

import pytest
from lane_scene import scene_of
from small import SMALL

from tune.spec import RaySpec, TrainSpec

# Slow: test_nodes_cluster.py drains a node in every run.
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

    from tune.cluster_state import connect

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
        scene.place("a", SPEC, 1)
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
