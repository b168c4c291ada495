"""Resources orphaned by dead runs, on this machine and on a cluster, are found and removed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from tune.cli.verbs import doctor
from tune.distributed.cluster import orphans
from tune.storage.places import ray_root
from tune.storage.run_lock import process

#: As Ray's own processes do, it has its session in an argument and a script of Ray's package as its program.
PROGRAM = "import time; time.sleep(120)"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Starts processes that stand for Ray's, in sessions of a folder of this test; they end with it."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    script = tmp_path / "site-packages" / "ray" / "_private" / "log_monitor.py"
    script.parent.mkdir(parents=True)
    script.write_text(PROGRAM)
    started = []

    class Machine:
        root = ray_root()

        def session(self, pid: int, *, begun: str | None = "1") -> Path:
            folder = self.root / f"session_2026-01-01_00-00-00_000000_{pid}"
            folder.mkdir(parents=True)
            if begun is not None:
                (folder / orphans.DRIVER).write_text(json.dumps({**process(pid), "begun": begun}))
            return folder

        def start(self, *command: str) -> subprocess.Popen:
            started.append(subprocess.Popen(command))
            deadline = time.monotonic() + 20
            while command[-1].encode() not in Path(f"/proc/{started[-1].pid}/cmdline").read_bytes():
                assert time.monotonic() < deadline
            return started[-1]

        def ray(self, session: Path | str) -> subprocess.Popen:
            return self.start(sys.executable, "-u", str(script), f"--session-dir={session}")

    yield Machine()
    for each in started:
        each.kill()
        each.wait()


def test_sessions_of_dead_sweeps_are_found_and_ended(machine):
    dead, unnoted = machine.session(9999999), machine.session(9999998, begun=None)
    alive = machine.session(os.getpid())
    orphans.remember_driver(alive)
    left, early, kept = machine.ray(dead), machine.ray(f"{unnoted}/logs"), machine.ray(alive)
    notes: list[str] = []
    found = orphans.on_machine()
    assert orphans.offer(found, clear=False, ask=None, tell=notes.append) == 0 and left.poll() is None
    assert len(notes) == 3 and str(dead) in notes[1] and "--clear-orphans" in notes[2]
    check = doctor.orphaned()
    assert not check.ok and not check.needed and str(dead) in check.found and "--clear-orphans" in check.fix
    assert orphans.offer(found, clear=False, ask=lambda question: True, tell=notes.append) == 2
    assert left.wait(timeout=20) == early.wait(timeout=20) == -signal.SIGKILL and kept.poll() is None
    assert orphans.on_machine() == [] and doctor.orphaned().ok


def test_processes_that_only_name_a_session_are_left_alone(machine, tmp_path):
    dead = machine.session(9999999)
    log = dead / "gcs_server.out"
    log.write_text("")
    mine = [
        machine.start("tail", "-f", str(log)),
        machine.start(sys.executable, "-c", PROGRAM, f"--session-dir={dead}"),
        machine.ray(""),
        machine.ray(tmp_path),
        machine.ray(machine.root / "session_2026-01-01_00-00-00_000000_7777777"),  # no such folder
    ]
    elsewhere = tmp_path / "other" / "ray" / "session_2026-01-01_00-00-00_000000_9999999"
    elsewhere.mkdir(parents=True)
    mine.append(machine.ray(elsewhere))  # a Ray that no sweep has started
    assert orphans.on_machine() == []
    orphans._end(dead)
    assert [each.poll() for each in mine] == [None] * 6


def test_processes_of_another_user_are_left_alone(machine, monkeypatch):
    dead = machine.session(9999999)
    left = machine.ray(dead)
    assert len(orphans.on_machine()) == 1

    def refused(pid: int, number: int) -> None:
        raise PermissionError

    with monkeypatch.context() as patch:
        patch.setattr(orphans.os, "kill", refused)
        orphans._end(dead)
        patch.setattr(orphans.os, "getuid", lambda: 12345)
        assert orphans._ray_processes() == [] and left.poll() is None


def test_folders_of_ended_sessions_do_not_pile_up(machine):
    ended = [machine.session(9999990 + number) for number in range(6)]
    alive, used = machine.session(os.getpid()), machine.session(9999980)
    orphans.remember_driver(alive)
    machine.ray(used)
    damaged = machine.session(9999970)
    (damaged / orphans.DRIVER).write_text("{")
    (machine.root / "session_latest").symlink_to(alive)
    orphans.remove_old_sessions(machine.root)
    kept = [folder for folder in ended if folder.exists()]
    assert kept == ended[-orphans.KEPT_SESSIONS :] and alive.exists() and used.exists()
    assert damaged.exists(), "what cannot be read is kept"
    month = time.time() - (orphans.KEPT_DAYS + 1) * 86400
    os.utime(damaged, (month, month))
    orphans.remove_old_sessions(machine.root)
    assert not damaged.exists()


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
