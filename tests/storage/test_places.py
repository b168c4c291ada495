"""Folders, token and proxies of this machine: where they are, and who may see them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tune.errors import ResourceError
from tune.storage import places
from tune.storage.atomic import writing


def rights(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(autouse=True)
def blank(monkeypatch, tmp_path):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_TMPDIR", "MACDROP_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_user_without_a_home_folder_is_told_to_set_one(monkeypatch):
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(places.Path, "home", unknown)
    with pytest.raises(ResourceError, match=r"no home folder.*\nSet HOME to a folder"):
        places.cache_dir()


def test_cache_that_cannot_be_written_names_its_own_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("MACDROP_CACHE", str(tmp_path / "cache"))
    for file, remedy in ((tmp_path / "cache/scans/x.json", "MACDROP_CACHE"), (tmp_path / "run/x.json", "output_dir")):
        with pytest.raises(ResourceError, match=remedy), writing(file):
            raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize(
    ("temporary", "chosen", "root"),
    [
        ("/tmp", None, "/tmp/macdrop-{uid}/ray"),
        ("/fast/me", None, "/fast/me/macdrop-{uid}/ray"),
        ("/" + "x" * 60, None, "/tmp/macdrop-{uid}/ray"),
        ("/tmp/é", None, "/tmp/macdrop-{uid}/ray"),
        ("/tmp", "/fast", "/fast/macdrop-{uid}/ray"),
        ("/tmp", "/" + "y" * 60, "/" + "y" * 60 + "/macdrop-{uid}/ray"),  # a choice is kept; the start refuses it
    ],
)
def test_sessions_lie_where_sockets_fit(monkeypatch, temporary, chosen, root):
    monkeypatch.setattr(places.tempfile, "gettempdir", lambda: temporary)
    if chosen:
        monkeypatch.setenv("RAY_TMPDIR", chosen)
    assert str(places.ray_root()) == root.format(uid=os.getuid())


def test_private_folder_is_closed_to_others_and_never_somebody_elses(tmp_path):
    folder = tmp_path / "new" / "private"
    places.private_folder(folder)
    assert rights(folder) == 0o700
    folder.chmod(0o777)
    places.private_folder(folder)
    assert rights(folder) == 0o700
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(PermissionError, match="not a folder of this user"):
        places.private_folder(tmp_path / "link")
    if os.getuid() == 0:
        os.chown(folder, 65534, 65534)
        with pytest.raises(PermissionError, match="not a folder of this user"):
            places.private_folder(folder)


def test_run_gets_a_token_of_its_own_that_is_in_no_file(tmp_path):
    first, second = places.own_token(), places.own_token()
    assert first["RAY_AUTH_MODE"] == "token" and len(first["RAY_AUTH_TOKEN"]) == 64 and first != second
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "gets"),
    [
        ({"RAY_AUTH_MODE": "disabled"}, set()),
        ({"RAY_AUTH_TOKEN": "mine"}, {"RAY_AUTH_MODE"}),
        ({"RAY_AUTH_MODE": "token"}, {"RAY_AUTH_MODE"}),
        ({"RAY_AUTH_TOKEN_PATH": "{home}/.ray/auth_token"}, {"RAY_AUTH_MODE"}),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "{home}/missing"}, {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}),
        ({}, {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}),  # what lies in Ray's own file may have been read by others
    ],
)
def test_chosen_token_is_kept_and_its_file_closed(tmp_path, monkeypatch, settings, gets):
    file = tmp_path / ".ray" / "auth_token"
    file.parent.mkdir()
    file.write_text("secret")
    file.chmod(0o644)
    for name, value in settings.items():
        monkeypatch.setenv(name, value.format(home=tmp_path))
    assert set(places.own_token()) == gets
    used = "RAY_AUTH_MODE" in gets and "RAY_AUTH_TOKEN" not in gets and "RAY_AUTH_TOKEN" not in settings
    assert rights(file) == (0o600 if used else 0o644) and file.read_text() == "secret"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, "127.0.0.1,localhost,::1"),
        ({"NO_PROXY": ".site.org"}, ".site.org,127.0.0.1,localhost,::1"),
        ({"no_proxy": "localhost, 10.0.0.0/8"}, "localhost, 10.0.0.0/8,127.0.0.1,::1"),
    ],
)
def test_no_proxy_stands_between_this_machine_and_itself(monkeypatch, before, after):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    for _ in range(2):
        places.direct_loopback()
        assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == after


def test_an_address_is_shown_without_its_password():
    assert places.without_password("http://me:secret@proxy:3128/x") == "http://proxy:3128/x"
