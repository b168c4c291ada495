"""Settings of every test, and builders of tiny random models. torch is imported by those who need it."""

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

import functools
import re
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "method"))  # helpers beside the tests: `import reference`, `tiny`


#: Files with tests so marked start a Ray, never two of them at once; and those that start processes of any kind.
STARTS_RAY = re.compile(r"pytest\.mark\.(ray|cluster)\b")
STARTS_PROCESSES = re.compile(r"pytest\.mark\.(zero|ray|cluster)\b")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two processes for the whole suite; none beside pytest's own where tests are named, so that -s and --pdb work."""
    return 2 if config.args_source == pytest.Config.ArgsSource.TESTPATHS else 0


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under xdist one process runs all files whose tests start a Ray, the other one the rest, file by file.

    By the files' text: xdist's own groups need node ids that pytest 9.2 no longer lets it change.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return "ray" if _has(STARTS_RAY, config.rootpath / file) else file

    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first: a Ray, then other processes."""
    items.sort(key=lambda item: (not _has(STARTS_RAY, item.path), not _has(STARTS_PROCESSES, item.path)))


@functools.cache
def _has(mark: re.Pattern[str], file: Path) -> bool:
    return bool(mark.search(file.read_text(encoding="utf-8")))


@pytest.fixture(autouse=True)
def _one_thread():
    """Small matrices are faster on one thread, and sums then have one order."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models beside the repository (or MACDROP_SHARED); skips where there is none."""
    root = Path(os.environ.get("MACDROP_SHARED", Path(__file__).parents[2] / "shared"))
    if not root.is_dir():
        pytest.skip(f"no real data at {root}")
    return root
