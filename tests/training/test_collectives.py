"""What fails on one rank is raised on all of them, on real processes: none is left waiting in a collective."""

from __future__ import annotations

import json
import multiprocessing
import socket
from pathlib import Path

import pytest

from tune.errors import ResourceError

pytestmark = pytest.mark.zero
WORLD = 2


def work(rank: int, port: int, out: Path) -> None:
    import torch.distributed as dist

    from tune.training.collectives import all_do, rank0_does

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    ran = []

    class Odd(Exception):
        """Cannot be pickled, as its class is local to a function."""

    def fail(error: Exception, *ranks: int):
        def action() -> None:
            ran.append(rank)
            if rank in ranks:
                raise error

        return action

    results = []
    for call in (
        lambda: rank0_does(lambda: {"value": rank}),
        lambda: rank0_does(fail(ResourceError("the disk is full"), 0)),
        lambda: rank0_does(fail(OSError(5, "Input/output error"), 0)),
        lambda: rank0_does(fail(Odd("odd"), 0)),
        lambda: all_do(lambda: rank),
        lambda: all_do(fail(ResourceError("only here"), 1)),
        lambda: all_do(fail(Odd("odd"), 0, 1)),
    ):
        try:
            results.append(call())
        except Exception as error:
            results.append(f"{type(error).__name__}: {error}")
    (out / f"{rank}.json").write_text(json.dumps({"results": results, "ran": len(ran)}))
    dist.destroy_process_group()


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
