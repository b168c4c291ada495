"""Worker modules of this package, started once per rank of a gloo process group on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
#: Characters of each rank's output that a failure shows.
SHOWN = 3000


def run_ranks(worker: str, world: int, logs: Path, *arguments: object, timeout: float, **environment: str) -> None:
    """Run ``python -m helpers.WORKER ARGUMENTS`` as every rank of a group of `world` processes, to its end.

    A worker finds its rank in the environment, as under torchrun. Raises AssertionError, with what each rank printed,
    if one fails or takes more than `timeout` seconds; no process outlives the call.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "DS_ACCELERATOR": "cpu",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", f"helpers.{worker}", *map(str, arguments)]
    printed = [logs / f"{worker}-{rank}-of-{world}.log" for rank in range(world)]
    processes = []
    try:
        for rank, log in enumerate(printed):
            own = {**os.environ, **common, **environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with log.open("w") as file:
                processes.append(subprocess.Popen(command, env=own, stdout=file, stderr=subprocess.STDOUT))
        codes = [process.wait(timeout) for process in processes]
    except subprocess.TimeoutExpired:
        codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    said = "\n".join(f"rank {rank}: {log.read_text()[-SHOWN:]}" for rank, log in enumerate(printed))
    assert codes == [0] * world, f"exit statuses {codes}\n{said}"


def run_cases(run: Callable[[Any], dict], cases: Mapping[str, Any], out: Path) -> None:
    """Be one rank: run every case under DeepSpeed in the group of the environment; rank 0 saves what `run` returned."""
    import deepspeed
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # Plain gloo: DeepSpeed would else compile a C++ extension for its own collectives, for minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    results = {name: run(case) for name, case in cases.items()}
    if dist.get_rank() == 0:
        torch.save(results, out)
    dist.barrier()
    dist.destroy_process_group()
