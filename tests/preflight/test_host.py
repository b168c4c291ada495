"""tune.preflight.host: what Ray lacks on a machine is one sentence with its remedy, before Ray is started."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from tune.errors import ResourceError
from tune.preflight import host
from tune.preflight.host import check_start, start_checks, start_failure


@pytest.fixture
def short(tmp_path_factory, monkeypatch):
    """A temporary folder with a short path, as the machine's."""
    import tempfile

    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.delenv("RAY_TMPDIR", raising=False)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def missing() -> str:
    with pytest.raises(ResourceError) as refused:
        check_start()
    assert refused.value.exit_code == 3
    return str(refused.value)


def test_a_machine_that_runs_tests_may_start_ray(short):
    assert {check.name: check.found for check in start_checks() if check.needed and not check.ok} == {}
    assert [path.name for path in short.iterdir()] == [f"macdrop-{os.getuid()}"]


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("RAY_TMPDIR", "/tmp/" + "r" * 83, "RAY_TMPDIR={} has 88 characters, and Ray's sockets below it allow 2"),
        ("RAY_TMPDIR", "/tmp/é x", "RAY_TMPDIR={} is not ASCII"),
        ("RAY_TMPDIR", "/proc/1", "/proc/1/macdrop-"),
        ("TMPDIR", "/tmp/" + "t" * 83, "TMPDIR={} has 88 bytes, and sockets below it allow 75"),
    ],
)
def test_temporary_folder_that_cannot_hold_sockets_is_refused(short, monkeypatch, variable, value, sentence):
    if variable == "TMPDIR":
        monkeypatch.setattr(host.tempfile, "tempdir", value)
    else:
        monkeypatch.setenv(variable, value)
    text = missing()
    assert sentence.format(value) in text and f"Set {variable} to " in text and not Path(value).is_relative_to(short)


def test_folder_of_another_user_and_full_disk_are_refused(short, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(host.shutil, "disk_usage", lambda path: Usage(2**40, 2**40 - 2**21, 2**21))
    assert "has 2 MiB free, and 100 are needed.\nFree some space, or set RAY_TMPDIR" in missing()
    monkeypatch.undo()
    (short / "away").mkdir()
    (short / f"macdrop-{os.getuid()}").rmdir()
    (short / f"macdrop-{os.getuid()}").symlink_to(short / "away")
    monkeypatch.setenv("RAY_TMPDIR", str(short))
    assert "is not a folder of this user" in missing()


def test_limits_are_refused_with_the_command_that_raises_them(short, monkeypatch):
    infinite = (resource.RLIM_INFINITY,) * 2
    limits = {resource.RLIMIT_NOFILE: (64, 64), resource.RLIMIT_NPROC: infinite}
    monkeypatch.setattr(host.resource, "getrlimit", limits.__getitem__)
    assert "64 open files are allowed" in missing() and "ulimit -n 1024" in missing()
    limits.update({resource.RLIMIT_NOFILE: infinite, resource.RLIMIT_NPROC: (60, 60)})
    user = os.getuid() or 1000  # root has no such limit
    monkeypatch.setattr(host.os, "getuid", lambda: user)
    monkeypatch.setattr(host.places, "private_folder", lambda folder: folder.mkdir(exist_ok=True))
    assert "60 processes and threads are allowed to this user" in missing() and "ulimit -u " in missing()


def test_loopback_that_is_down_is_refused_at_once():
    alone = ["unshare", "-n", "--map-root-user"] if os.getuid() else ["unshare", "-n"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("no network namespaces here")
    code = "from tune.preflight.host import check_start; check_start()"
    done = subprocess.run([*alone, sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "cannot reach itself at 127.0.0.1" in done.stderr and "ip link set lo up" in done.stderr


def test_small_shared_memory_is_a_note_and_no_refusal(short, monkeypatch):
    real = host.shutil.disk_usage
    small = real("/")._replace(total=64 * 2**20)
    monkeypatch.setattr(host.shutil, "disk_usage", lambda path: small if str(path) == "/dev/shm" else real(path))
    assert any("/dev/shm has 64 MiB" in note and "--shm-size" in note for note in check_start())


def test_token_that_others_may_read_is_a_note(short, tmp_path, monkeypatch):
    file = tmp_path / "token"
    file.write_text("secret")
    file.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    monkeypatch.delenv("RAY_AUTH_MODE")
    (note,) = (check for check in start_checks() if check.name == "Ray's token")
    assert not note.ok and not note.needed and f"chmod 600 {file}" in note.fix and "secret" not in note.found


def test_proxies_are_shown_without_their_passwords(short, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://me:secret@proxy:3128")
    (found,) = (check.found for check in start_checks() if check.name == "proxies")
    assert "http://proxy:3128" in found and "secret" not in found


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (PermissionError(13, "Permission denied", "/h/.ray"), "RAY_TMPDIR"),
        (OSError("AF_UNIX path length cannot exceed 107 bytes: /x"), "short paths"),
        (Exception("The current node timed out during startup"), "disk full"),
        (OSError(28, "No space left on device"), "Free some space"),
        (RuntimeError("Could not determine home directory."), "Set HOME"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (RuntimeError(""), "macdrop doctor --ray"),
        (KeyError("what nobody has seen yet"), "macdrop doctor --ray"),
    ],
)
def test_whatever_the_start_of_ray_raises_is_a_sentence_and_a_remedy(error, remedy):
    first, second = str(start_failure(error)).splitlines()
    assert first.startswith("Ray could not start on this machine: ") and remedy in second
