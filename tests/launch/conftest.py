"""Fixtures of the launch tests: the laptop with recorded tools, and the network lab."""

from __future__ import annotations

from collections.abc import Iterator

import netlab
import pytest
from launching import Laptop


@pytest.fixture(scope="module")
def lab() -> Iterator[netlab.Lab]:
    """A laptop and three hosts; skips where the lab cannot run."""
    if reason := netlab.missing():
        pytest.skip(reason)
    with netlab.Lab() as lab:
        yield lab
    assert lab.leftovers() == []


@pytest.fixture
def laptop(tmp_path, monkeypatch, capsys):
    """A machine to type `macdrop cluster ...` on; see `launching`."""
    return Laptop(tmp_path, monkeypatch, capsys)
