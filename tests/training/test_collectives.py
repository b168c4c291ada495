"""What fails on one rank is raised on all of them, on real processes: none is left waiting in a collective."""

from __future__ import annotations

import json
import multiprocessing
import socket

import pytest
from helpers.collectives_worker import WORLD, work

pytestmark = pytest.mark.zero


def test_every_rank_gets_the_same_result_or_error(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(rank, port, tmp_path)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(WORLD))
    value, full, io, odd, own, here, both = first["results"]
    assert value == {"value": 0} and (full, odd) == ("ResourceError: the disk is full", "MacDropError: Odd: odd")
    assert io.startswith("OSError") and here == "ResourceError: only here" and both == "MacDropError: Odd: odd"
    assert own == 0 and second["results"] == [value, full, io, odd, 1, here, both]
    assert (first["ran"], second["ran"]) == (5, 2), "rank 0's own actions do not run elsewhere"
