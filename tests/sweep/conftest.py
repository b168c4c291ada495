"""Fixtures: `shell`, the command line inside the test, `alone`, a process outside of it, `local_ray`, a cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
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


#: What a process group, or Accelerate, leaves in the environment of the process that made one.
PROCESS_GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def alone() -> Callable[..., str]:
    """Runs a command that trains, as no member of a process group that this process may be in; its standard output."""

    def run(*command: str, cwd: Path | None = None) -> str:
        outside = {key: value for key, value in os.environ.items() if key not in PROCESS_GROUP}
        done = subprocess.run(
            [sys.executable, *command], cwd=cwd, env=outside, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return run


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
