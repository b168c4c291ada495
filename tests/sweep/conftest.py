"""Fixtures: `shell`, the real command line inside the test's process, and `local_ray`, a cluster for a module."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Ended:
    """How a command ended; `new` are the files that it left below its folder (which holds the cache, too)."""

    code: int
    out: str
    err: str
    new: list[str]


class Shell:
    """Runs commands in a folder of their own, with a cache in it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._patch, self._capsys = folder, monkeypatch, capsys
        monkeypatch.chdir(folder)
        monkeypatch.setenv("MACDROP_CACHE", str(folder / "cache"))

    def __call__(self, *arguments: str) -> Ended:
        from tune.cli import main

        before = self._files()
        self._capsys.readouterr()
        self._patch.setattr(sys, "argv", ["macdrop", *arguments])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        told = self._capsys.readouterr()
        return Ended(code, told.out, told.err, sorted(self._files() - before))

    def _files(self) -> set[str]:
        return {str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if not path.is_dir()}

    def refused(self, *arguments: str) -> str:
        """The message of a command that must be refused: exit code 2, a few lines, no traceback, nothing written."""
        ended = self(*arguments)
        assert ended.code == 2, (ended.code, ended.out[-2000:], ended.err[-2000:])
        assert "Traceback" not in ended.err + ended.out
        assert 1 <= len(ended.err.strip().splitlines()) <= 9, ended.err
        assert ended.new == [], f"left behind: {ended.new}"
        assert not (self.folder / "runs").exists() and not (self.folder / "out").exists()
        return ended.err


@pytest.fixture(scope="module")
def local_ray(tmp_path_factory) -> Iterator[None]:
    """A Ray on this machine, and a cache, that all tests of a module share."""
    import ray

    from tune.cluster_state import connect
    from tune.spec import RaySpec

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MACDROP_CACHE", str(tmp_path_factory.mktemp("cache")))
        connect(RaySpec(dashboard=False))
        yield
        ray.shutdown()


@pytest.fixture
def shell(tmp_path, monkeypatch, capsys) -> Shell:
    return Shell(tmp_path, monkeypatch, capsys)
