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

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "method"))  # helpers beside the tests: `import reference`, `tiny`


#: Tests so marked start processes of their own, or Ray; never two of them at once.
STARTS_PROCESSES = {"zero", "ray", "cluster"}


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two processes for the whole suite; none beside pytest's own where tests are named, so that -s and --pdb work."""
    return 2 if config.args_source == pytest.Config.ArgsSource.TESTPATHS else 0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under xdist one process runs all tests that start processes, and first; the other one the rest, file by file."""
    if not hasattr(config, "workerinput"):
        return
    alone = {item for item in items if any(mark.name in STARTS_PROCESSES for mark in item.iter_markers())}
    for item in items:
        item.add_marker(pytest.mark.xdist_group("processes" if item in alone else item.path.name))
    items.sort(key=lambda item: item not in alone)


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
