"""Settings and fixtures of every test. `shell` runs the command line in the test, `alone` in a process of its own."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# A process keeps the mode that Ray first met in it, and clusters of several nodes in one process know no token.
os.environ["RAY_AUTH_MODE"] = "disabled"

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

#: Where tests start a Ray, of which there must never be two at once: a folder, and the launch tests that make clusters.
RAY_PLACES = (
    "tests/distributed/",
    "tests/launch/test_netlab.py",
    "tests/launch/test_real_head.py",
    "tests/launch/test_slurm_lab.py",
    "tests/launch/test_spot.py",
    "tests/launch/test_survival.py",
)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two processes for the whole suite; none beside pytest's own where tests are named, so that -s and --pdb work."""
    return 2 if config.args_source == pytest.Config.ArgsSource.TESTPATHS else 0


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under xdist one process runs all tests of `RAY_PLACES`, the other one the rest, file by file.

    xdist's own groups need node ids that pytest 9.2 no longer lets it change.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return "ray" if file.startswith(RAY_PLACES) else file

    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what takes longest first: tests that start a Ray, then files that start other processes."""
    for item in items:
        marked = item.get_closest_marker("ray") or item.get_closest_marker("cluster")
        if marked and not item.nodeid.startswith(RAY_PLACES):
            raise pytest.UsageError(f"{item.nodeid} starts a Ray: move it into tests/distributed/")
    spawning = {item.path for item in items if item.get_closest_marker("zero")}
    items.sort(key=lambda item: (not item.nodeid.startswith(RAY_PLACES), item.path not in spawning))


@pytest.fixture(autouse=True)
def _one_thread():
    """Small matrices are faster on one thread, and sums then have one order."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(autouse=True)
def _offline() -> Iterator[None]:
    """No test leaves the hub switched on for those after it in its process."""
    before = os.environ.get("HF_HUB_OFFLINE")
    yield
    assert os.environ.get("HF_HUB_OFFLINE") == before, "restore HF_HUB_OFFLINE: monkeypatch.setenv does"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models beside the repository (or MACDROP_SHARED); skips where there is none."""
    root = Path(os.environ.get("MACDROP_SHARED", Path(__file__).parents[2] / "shared"))
    if not root.is_dir():
        pytest.skip(f"no real data at {root}")
    return root


@dataclass(frozen=True)
class Ended:
    """How a command ended; `new` are the files that it left below its folder (which holds the cache, too).

    Remembered figures are left out: every report leaves some.
    """

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
        from tune.cli.main import main

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
        files = {str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if not path.is_dir()}
        return {name for name in files if not name.startswith("cache/figures/")}

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
def own_cache(tmp_path_factory) -> Iterator[None]:
    """A cache that all tests of a module share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MACDROP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def local_ray(tmp_path_factory) -> Iterator[None]:
    """A Ray on this machine, and a cache, that all tests of a module share."""
    import ray

    from tune.config.run_spec import RaySpec
    from tune.distributed.cluster.ray_cluster import connect

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MACDROP_CACHE", str(tmp_path_factory.mktemp("cache")))
        connect(RaySpec(dashboard=False))
        yield
        ray.shutdown()


@pytest.fixture
def shell(tmp_path, monkeypatch, capsys) -> Shell:
    return Shell(tmp_path, monkeypatch, capsys)
