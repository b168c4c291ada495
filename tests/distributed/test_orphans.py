"""Resources orphaned by dead runs, on this machine and on a cluster, are found and removed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
import ray
from ray.cluster_utils import Cluster

from tune.cli.verbs import doctor
from tune.distributed.cluster import orphans


def test_sessions_of_dead_sweeps_are_found_and_ended(tmp_path, monkeypatch):
    monkeypatch.setenv("MACDROP_CACHE", str(tmp_path))
    orphans.remember_session(tmp_path / "session_mine")
    assert orphans.on_machine() == [], "this process is alive"
    (note,) = (tmp_path / "sessions").glob("*.json")
    kept = json.loads(note.read_text())
    session = str(tmp_path / "session_orphan")
    dead = {"session": session, "process": {**kept["process"], "begun": "1"}}
    elsewhere = {"session": session, "process": {"where": "another host", "begun": "1"}}
    for name, content in (("9999999", dead), ("8888888", elsewhere), ("x", {})):
        (note.parent / f"{name}.json").write_text(json.dumps(content))
    orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", session])
    notes: list[str] = []
    deadline = time.monotonic() + 20
    while not (found := orphans.on_machine()) and time.monotonic() < deadline:
        (note.parent / "9999999.json").write_text(json.dumps(dead))  # until the process has its command line
    assert orphans.offer(found, clear=False, ask=None, tell=notes.append) == 0 and orphan.poll() is None
    assert session in notes[0] and "--clear-orphans" in notes[1]
    check = doctor.orphaned()
    assert not check.ok and not check.needed and session in check.found and "--clear-orphans" in check.fix
    assert orphans.offer(found, clear=False, ask=lambda question: True, tell=notes.append) == 1
    assert orphan.wait(timeout=20) == -signal.SIGKILL
    assert orphans.on_machine() == [] and doctor.orphaned().ok and not (note.parent / "9999999.json").exists()
    assert (note.parent / "8888888.json").exists()


DEAD_DRIVER = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False)
@ray.remote(num_cpus=0)
class PlacementGroupCleaner:
    def here(self): return True
one = PlacementGroupCleaner.options(lifetime="detached", name="one", namespace="n").remote()
ray.get(one.here.remote())
"""


@pytest.mark.ray
@pytest.mark.timeout(180)
def test_orphans_of_a_dead_driver_on_a_cluster_are_found_and_removed(tmp_path):
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        driver = subprocess.run([sys.executable, "-c", DEAD_DRIVER, cluster.address], timeout=120)
        assert driver.returncode == 0
        ray.init(address=cluster.address, log_to_driver=False)
        mine = ray.util.placement_group([{"CPU": 1}])
        ray.get(mine.ready(), timeout=60)
        notes: list[str] = []
        assert orphans.look(local=False, clear=True, tell=notes.append) == 1
        assert "an actor PlacementGroupCleaner, of job" in notes[0] and "is dead" in notes[0]
        deadline = time.monotonic() + 30
        while orphans.on_cluster() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert orphans.on_cluster() == [] and mine.wait(1)
    finally:
        ray.shutdown()
        cluster.shutdown()
