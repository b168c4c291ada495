"""One sweep at a time in a folder, and the keys that may change on resume."""

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
from tune.storage import run_lock
from tune.storage.run_folder import check_new
from tune.storage.run_lock import alive, locked, process

WORK = (
    "import sys, time; from pathlib import Path; from tune.storage.run_lock import locked\n"
    "with locked(Path(sys.argv[1])): print('here', flush=True); time.sleep(60)"
)


# --- the lock ---


def test_a_second_process_is_kept_out_until_the_first_is_gone(tmp_path):
    first = subprocess.Popen([sys.executable, "-c", WORK, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "here\n"
    with pytest.raises(ConfigError, match=rf"(?s)in use.*process {first.pid} .*alive.*kill {first.pid}.*delete"):
        with locked(tmp_path):
            pass
    first.kill()
    first.wait()
    with locked(tmp_path) as mine:
        assert json.loads((tmp_path / run_lock.FILE).read_text())["pid"] == os.getpid() and mine.lost is None
        with pytest.raises(ConfigError, match="in use"), locked(tmp_path):
            pass
    assert not (tmp_path / run_lock.FILE).exists()


def test_who_is_alive():
    me = {"pid": os.getpid(), **process(os.getpid())}
    assert "is alive" in alive(me, age_s=9e9), "it may be stopped, or its storage gone for a while"
    assert alive({**me, "begun": "1"}, age_s=0) is None, "another process has its number now"
    assert alive({**me, "where": "host/before the reboot/x"}, age_s=run_lock.DEAD_S + 1) is None
    assert "last sign of life came 3 s ago" in alive({**me, "where": "elsewhere"}, age_s=3)
    assert alive({}, age_s=run_lock.DEAD_S + 1) is None, "a damaged lock"


def test_who_lost_the_folder_leaves_what_another_has_written(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "TOUCH_S", 0.01)
    ends = []
    before = signal.signal(signal.SIGTERM, lambda *_: ends.append("told"))
    try:
        with locked(tmp_path) as mine:
            taken = {"token": "another's"}
            (tmp_path / run_lock.FILE).write_text(json.dumps(taken))
            deadline = time.monotonic() + 20
            while not ends and time.monotonic() < deadline:
                time.sleep(0.01)
        assert "another process" in mine.lost and json.loads((tmp_path / run_lock.FILE).read_text()) == taken
    finally:
        signal.signal(signal.SIGTERM, before)


# --- what may change, and how to resume ---


def run_file(*overrides: str) -> dict:
    return dump(load(None, ["model=m", *overrides]))


def test_machinery_may_change_and_nothing_else(tmp_path):
    started = run_file("output_dir=a")
    free = [
        "ray.address=auto",
        "ray.lanes=3",
        "ray.num_workers=2",
        "ray.evaluators=2",
        "ray.gpus_per_worker=1",
        "ray.dashboard=false",
    ]
    check_same(tmp_path, started, run_file("output_dir=b", "sweep.max_concurrent_trials=9", *free))
    with pytest.raises(ConfigError) as caught:
        check_same(tmp_path, started, run_file("ray.threads_per_worker=2", "learning_rate=1e-3", *free))
    told = str(caught.value)
    assert "ray.threads_per_worker: 1 when it was started, 2 now" in told and "learning_rate: " in told
    assert "ray.lanes: " not in told and "ray.num_workers: " not in told and f"output_dir={tmp_path}" in told


def test_the_workers_of_a_model_may_change_and_what_its_results_depend_on_may_not(tmp_path):
    def models(*entries: object) -> dict:
        return dump(load({"sweep.models": list(entries)}))

    started = models("a", {"model_name_or_path": "b", "ray.num_workers": 8, "ray.lanes": 2})
    for now in ({"model_name_or_path": "b", "ray.num_workers": 2}, {"model_name_or_path": "b"}, "b"):
        check_same(tmp_path, started, models("a", now))
    for other in (
        "c",
        {"model_name_or_path": "b", "ray.threads_per_worker": 4},
        {"model_name_or_path": "b", "seed": 7},
    ):
        with pytest.raises(ConfigError, match=r"sweep\.models: "):
            check_same(tmp_path, started, models("a", other))
    with pytest.raises(ConfigError, match=r"sweep\.models: "):
        check_same(tmp_path, started, models("a"))


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
    (tmp_path / "other" / run_lock.FILE).write_text("{}")
    check_new(tmp_path / "other")
    (tmp_path / "other" / "notes.txt").write_text("")
    with pytest.raises(ConfigError, match="choose another"):
        check_new(tmp_path / "other")
