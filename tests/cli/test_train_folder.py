"""The folder of `macdrop train`: one process at a time, and a refusal changes nothing in it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.small import SMALL

from macdrop.errors import ConfigError
from tune.cli.verbs.train import train
from tune.errors import ResourceError
from tune.storage import run_lock

pytestmark = pytest.mark.zero

OPTIONS = [
    *(f"{key}={json.dumps(value)}" for key, value in SMALL.items()),
    "ray.num_workers=1",
    "zero_stage=0",
    "save_steps=1",
    "macdrop.p0=0",
    "max_steps=20000",  # more than any of these tests lets it finish
]


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """A fine-tuning of many steps whose process was killed after some."""
    folder = tmp_path_factory.mktemp("train") / "run"
    process = start(folder)
    wait_for_steps(process)
    process.kill()
    process.wait()
    return folder


def start(folder: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tune.cli", "train", *OPTIONS, f"output_dir={folder}", *more]
    environment = {**os.environ, "MACDROP_CACHE": str(folder.parent / "cache")}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )


def wait_for_steps(process: subprocess.Popen) -> None:
    printed: list[str] = []
    for text in process.stdout:
        printed.append(text)
        if sum(text.startswith("step ") for text in printed) > 3:
            return
    raise AssertionError("".join(printed))


def test_a_refused_resume_leaves_the_folder_as_it_is_byte_for_byte(killed, monkeypatch):
    monkeypatch.setenv("MACDROP_CACHE", str(killed.parent / "cache"))
    before = contents(killed)
    with pytest.raises(ConfigError, match="learning_rate: 0.002 when it was started, 1e-05 now"):
        train([*OPTIONS, "learning_rate=1e-5", f"output_dir={killed}"], resume=True)
    with pytest.raises(ConfigError, match="ray.num_workers is 2, but an optimizer step has 1 micro-batches"):
        train([*OPTIONS, "ray.num_workers=2", f"output_dir={killed}"], resume=True)
    assert contents(killed) == before


def test_a_folder_in_use_is_refused_and_one_that_was_taken_over_is_left(killed):
    process = start(killed, "--resume")
    try:
        wait_for_steps(process)
        with pytest.raises(ConfigError, match=f"is in use: a run has been there.*process {process.pid}"):
            train([*OPTIONS, f"output_dir={killed}"], resume=True)
        file = killed / run_lock.FILE
        file.write_text(json.dumps({**json.loads(file.read_text()), "token": "another"}))
        printed, _ = process.communicate(timeout=60)
        assert process.returncode == 2 and "another process has taken the folder over" in printed, printed[-2000:]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_a_folder_that_cannot_be_written_is_found_before_any_worker_starts(tmp_path, monkeypatch):
    from tune.cli.verbs import train as verb

    monkeypatch.setenv("MACDROP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(verb, "_train", lambda *args: pytest.fail("workers were started"))
    with pytest.raises(ResourceError, match="/proc/run"):
        train([*OPTIONS, "ray.num_workers=2", "output_dir=/proc/run"], resume=False)


def test_other_processes_of_torchrun_leave_the_folder_to_the_first(tmp_path, monkeypatch):
    from tune.cli.verbs import train as verb

    monkeypatch.setenv("MACDROP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RANK", "1")
    reached = []
    monkeypatch.setattr(verb, "_train", lambda *args: reached.append(args) or sys.exit(7))
    with run_lock.locked(tmp_path / "run"), pytest.raises(SystemExit):
        (tmp_path / "run" / "logs").mkdir()
        train([*OPTIONS, f"output_dir={tmp_path / 'run'}"], resume=False)
    assert reached
