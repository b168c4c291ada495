"""One sweep at a time in a folder, what a signal does, which keys may change on resume, what dead runs left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from macdrop.errors import ConfigError
from tune.config.resume import check_same, resume_command
from tune.config.run_spec import dump, load
from tune.storage import run_lock as claim
from tune.storage.run_folder import check_new
from tune.storage.run_lock import alive, locked, process

WORK = (
    "import sys, time; from pathlib import Path; from tune.storage.run_lock import locked\n"
    "with locked(Path(sys.argv[1])): print('here', flush=True); time.sleep(60)"
)


# --- the claim ---


def test_a_second_process_is_kept_out_until_the_first_is_gone(tmp_path):
    first = subprocess.Popen([sys.executable, "-c", WORK, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "here\n"
    with pytest.raises(ConfigError, match=rf"(?s)in use.*process {first.pid} .*alive.*kill {first.pid}.*delete"):
        with locked(tmp_path):
            pass
    first.kill()
    first.wait()
    with locked(tmp_path) as mine:
        assert json.loads((tmp_path / claim.FILE).read_text())["pid"] == os.getpid() and mine.lost is None
        with pytest.raises(ConfigError, match="in use"), locked(tmp_path):
            pass
    assert not (tmp_path / claim.FILE).exists()


def test_who_is_alive():
    me = {"pid": os.getpid(), **process(os.getpid())}
    assert "is alive" in alive(me, age_s=9e9), "it may be stopped, or its storage gone for a while"
    assert alive({**me, "begun": "1"}, age_s=0) is None, "another process has its number now"
    assert alive({**me, "where": "host/before the reboot/x"}, age_s=claim.DEAD_S + 1) is None
    assert "last sign of life came 3 s ago" in alive({**me, "where": "elsewhere"}, age_s=3)
    assert alive({}, age_s=claim.DEAD_S + 1) is None, "a claim that is damaged"


def test_who_lost_the_folder_leaves_what_another_has_written(tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "TOUCH_S", 0.01)
    ends = []
    before = signal.signal(signal.SIGTERM, lambda *_: ends.append("told"))
    try:
        with locked(tmp_path) as mine:
            taken = {"token": "another's"}
            (tmp_path / claim.FILE).write_text(json.dumps(taken))
            deadline = time.monotonic() + 20
            while not ends and time.monotonic() < deadline:
                time.sleep(0.01)
        assert "another sweep" in mine.lost and json.loads((tmp_path / claim.FILE).read_text()) == taken
    finally:
        signal.signal(signal.SIGTERM, before)


# --- stopping ---

STOPPED = """
import sys, time
from tune.distributed.sweep.stop import stoppable
with stoppable(lambda text: print(text, flush=True)) as stop:
    try:
        print("here", flush=True)
        time.sleep(60)
    except BaseException as error:
        print(type(error).__name__, flush=True)
        {then}
        stop.leave()
"""


@pytest.mark.parametrize("then", ["pass", "time.sleep(60)"])
@pytest.mark.parametrize(("number", "kind", "code"), [(2, "KeyboardInterrupt", 130), (15, "SystemExit", 143)])
def test_the_first_signal_stops_and_the_second_ends_at_once(number, kind, code, then):
    process = subprocess.Popen([sys.executable, "-c", STOPPED.format(then=then)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "here\n"
    process.send_signal(number)
    assert "once more" in process.stdout.readline() and process.stdout.readline().strip() == kind
    if then != "pass":
        process.send_signal(number)
    assert process.wait(timeout=50) == code


# --- what may change, and how to go on ---


def run_file(*overrides: str) -> dict:
    return dump(load(None, ["model=m", *overrides]))


def test_machinery_may_change_and_nothing_else(tmp_path):
    started = run_file("output_dir=a")
    free = ["ray.address=auto", "ray.lanes=3", "ray.evaluators=2", "ray.gpus_per_worker=1", "ray.dashboard=false"]
    check_same(tmp_path, started, run_file("output_dir=b", "sweep.max_concurrent_trials=9", *free))
    with pytest.raises(ConfigError) as caught:
        check_same(tmp_path, started, run_file("ray.num_workers=2", "learning_rate=1e-3", *free))
    told = str(caught.value)
    assert "ray.num_workers: 1 when it was started, 2 now" in told and "learning_rate: " in told
    assert "ray.lanes: " not in told and "another batch" in told and f"output_dir={tmp_path}" in told


def test_the_command_that_goes_on_can_be_typed_as_it_is(tmp_path):
    words = ["ray.address=auto", "learning_rate=1", "output_dir=x", "report_to=[wandb]"]
    folder = "runs/my run"
    assert resume_command(folder, words) == (
        "macdrop sweep --resume 'output_dir=runs/my run' ray.address=auto 'report_to=[wandb]'"
    )
    (tmp_path / "trials").mkdir()
    with pytest.raises(ConfigError, match="(?s)holds a run.*\n  macdrop sweep --resume output_dir="):
        check_new(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / claim.FILE).write_text("{}")
    check_new(tmp_path / "other")
    (tmp_path / "other" / "notes.txt").write_text("")
    with pytest.raises(ConfigError, match="choose another"):
        check_new(tmp_path / "other")


# --- orphans ---


@pytest.mark.ray
def test_sessions_of_dead_sweeps_are_found_and_ended(tmp_path, monkeypatch):
    from tune.cli.verbs import doctor
    from tune.distributed.cluster import orphans

    monkeypatch.setenv("MACDROP_CACHE", str(tmp_path))
    orphans.remember_session(tmp_path / "session_mine")
    assert orphans.on_machine() == [], "this process lives"
    (note,) = (tmp_path / "sessions").glob("*.json")
    kept = json.loads(note.read_text())
    session = str(tmp_path / "session_orphan")
    dead = {"session": session, "process": {**kept["process"], "begun": "1"}}
    elsewhere = {"session": session, "process": {"where": "another host", "begun": "1"}}
    for name, content in (("9999999", dead), ("8888888", elsewhere), ("x", {})):
        (note.parent / f"{name}.json").write_text(json.dumps(content))
    orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", session])
    told: list[str] = []
    deadline = time.monotonic() + 20
    while not (found := orphans.on_machine()) and time.monotonic() < deadline:
        (note.parent / "9999999.json").write_text(json.dumps(dead))  # until the process has its command line
    assert orphans.offer(found, clear=False, ask=None, tell=told.append) == 0 and orphan.poll() is None
    assert session in told[0] and "--clear-orphans" in told[1]
    check = doctor.orphaned()
    assert not check.ok and not check.needed and session in check.found and "--clear-orphans" in check.fix
    assert orphans.offer(found, clear=False, ask=lambda question: True, tell=told.append) == 1
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
def test_what_a_dead_driver_left_on_a_cluster_is_found_and_cleared(tmp_path):
    import ray
    from ray.cluster_utils import Cluster

    from tune.distributed.cluster import orphans

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        driver = subprocess.run([sys.executable, "-c", DEAD_DRIVER, cluster.address], timeout=120)
        assert driver.returncode == 0
        ray.init(address=cluster.address, log_to_driver=False)
        mine = ray.util.placement_group([{"CPU": 1}])
        ray.get(mine.ready(), timeout=60)
        told: list[str] = []
        assert orphans.look(local=False, clear=True, tell=told.append) == 1
        assert "an actor PlacementGroupCleaner, of job" in told[0] and "is dead" in told[0]
        deadline = time.monotonic() + 30
        while orphans.on_cluster() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert orphans.on_cluster() == [] and mine.wait(1)
    finally:
        ray.shutdown()
        cluster.shutdown()
