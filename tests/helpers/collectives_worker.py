"""One rank of the test of collectives; a process that is spawned must be able to import it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from tune.errors import ResourceError
from tune.training.collectives import all_do, rank0_does

WORLD = 2


def work(rank: int, port: int, out: Path) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    ran = []

    class Odd(Exception):
        """Cannot be pickled, as its class is local to a function."""

    def fail(error: Exception, *ranks: int) -> Callable[[], None]:
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
