"""Archives of runs: the report of one is that of its folder, and nothing but a run's records comes out of one."""

from __future__ import annotations

import errno
import io
import os
import tarfile
import tempfile
from pathlib import Path

import pytest
from helpers.run_folders import make_run

from macdrop.errors import ConfigError
from tune.storage.run_archive import unpacked, write_archive


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with answers, and an adapter's weights."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    make_run(folder, tried=2, items=20, attacks=("none", "zeroing@3"))
    trial = next((folder / "trials").iterdir())
    (trial / "adapter").mkdir(exist_ok=True)
    (trial / "adapter" / "adapter_model.safetensors").write_bytes(bytes(1000))
    return folder


def test_the_report_of_an_archive_is_that_of_its_folder(run, shell):
    ended = shell("report", str(run), "--format", "csv", "--archive", "shared/run.tar.xz")
    assert ended.code == 0 and ended.new == ["shared/run.tar.xz"], ended.err
    again = shell("report", "shared/run.tar.xz", "--format", "csv", "--output", "read")
    assert again.code == 0 and again.out == ended.out
    for name in ("report.md", "report.csv", "report.tex"):
        left, right = ((folder / name).read_text() for folder in (shell.folder / "read", run))
        own = {"RUN": left.splitlines(), str(run): right.splitlines()}
        kept = [[line for line in lines if word not in line] for word, lines in own.items()]
        assert kept[0] == kept[1] and len(kept[0]) > 10
    page = (shell.folder / "read" / "report.html").read_text()
    commands = ["python -m tarfile -e shared/run.tar.xz RUN", "macdrop sweep RUN/config.yaml", "macdrop report RUN"]
    assert all(command in page for command in commands) and tempfile.gettempdir() not in page
    shown = shell("report", "shared/run.tar.xz")
    assert shown.new == [] and "the report of an archive goes into files by --output FOLDER" in shown.out
    assert (
        shell("compare", "shared/run.tar.xz", "--format", "csv").out
        == shell("compare", str(run), "--format", "csv").out
    )


def test_an_archive_has_the_records_alone_and_always_the_same_bytes(run, tmp_path):
    first, second = (write_archive(run, tmp_path / name).read_bytes() for name in ("a.tar.xz", "b.tar.xz"))
    assert first == second and len(first) < 200_000
    with tarfile.open(tmp_path / "a.tar.xz") as archive:
        names = archive.getnames()
    assert {"run.json", "config.yaml", "scores.jsonl"} <= set(names) and any("answers" in name for name in names)
    assert not any("adapter/" in name or name.startswith(("report", "figures")) for name in names)
    with unpacked([tmp_path / "a.tar.xz", run]) as (folder, kept):
        assert kept == run and sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.*")) == sorted(names)
    assert not folder.exists()


@pytest.mark.parametrize(
    "name",
    [
        "../scores.jsonl",
        "/run.json",
        "trials/../run.json",
        "trials/a/adapter/x.json",
        "models/a/b/c.json",
        "x.py",
        "trials/a/trial.json",
    ],
)
def test_what_no_archive_has_is_refused_before_anything_is_written(name, tmp_path):
    with tarfile.open(tmp_path / "other.tar.xz", "w:xz") as archive:
        for each in ("run.json", name):
            entry = tarfile.TarInfo(each)
            entry.type, entry.linkname = (
                (tarfile.SYMTYPE, "run.json") if each == "trials/a/trial.json" else (entry.type, "")
            )
            archive.addfile(entry, io.BytesIO())
    with pytest.raises(ConfigError, match="it holds"), unpacked([tmp_path / "other.tar.xz"]):
        raise AssertionError("it was unpacked")


def test_damaged_archives_are_refused(run, shell, monkeypatch):
    whole = write_archive(run, shell.folder / "run.tar.xz").read_bytes()
    for content in (b"", b"not an archive", whole[:2000], whole[:300] + bytes(200) + whole[500:]):
        (shell.folder / "bad.tar.xz").write_bytes(content)
        assert "is not an archive of a run, or is damaged" in shell.refused("report", "bad.tar.xz")
    monkeypatch.setattr("tune.storage.run_archive.LARGEST", 10)
    assert "an archive of a run may hold 10" in shell.refused("report", "run.tar.xz")


def test_no_room_to_unpack_is_said_and_nothing_is_left(run, shell, monkeypatch):
    write_archive(run, shell.folder / "...tar.xz")  # no name of a file leads out of the temporary folder
    monkeypatch.setattr(tempfile, "tempdir", str(shell.folder))
    with unpacked([shell.folder / "...tar.xz"]) as (folder,):
        assert folder.parents[1] == shell.folder and (folder / "run.json").is_file()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tarfile.TarFile, "extractall", full)
    ended = shell("report", "...tar.xz")
    assert ended.code == 3 and "Cannot write a temporary folder: No space left on device" in ended.err
    assert ended.new == [] and "Traceback" not in ended.err


def test_a_record_that_cannot_be_read_is_named(run, tmp_path, monkeypatch):
    def closed(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("pathlib.Path.read_bytes", closed)
    with pytest.raises(ConfigError, match="cannot be read: Permission denied"):
        write_archive(run, tmp_path / "run.tar.xz")
    assert not (tmp_path / "run.tar.xz").exists()


def test_wrong_orders_are_refused(run, shell):
    other = str(make_run(shell.folder / "other", tried=2, items=4, attacks=("none",)).run_dir)
    assert "does not end in .tar.xz" in shell.refused("report", str(run), "--archive", "run.tar")
    assert "holds one run, and 2 are given" in shell.refused("report", str(run), other, "--archive", "run.tar.xz")
    assert "is a folder" in shell.refused("report", str(run), "--archive", ".")
