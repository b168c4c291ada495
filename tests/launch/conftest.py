"""Launch files, the launcher, and a network of hosts to launch on."""

from __future__ import annotations

from collections.abc import Iterator

import netlab
import pytest


@pytest.fixture(scope="module")
def lab() -> Iterator[netlab.Lab]:
    """A laptop and three hosts; skips where there can be none."""
    if reason := netlab.missing():
        pytest.skip(reason)
    with netlab.Lab() as lab:
        yield lab
    assert lab.leftovers() == []


@pytest.fixture
def laptop(tmp_path, monkeypatch, capsys):
    """A machine to type `macdrop cluster ...` on; see `launching`."""
    from launching import Laptop

    return Laptop(tmp_path, monkeypatch, capsys)
