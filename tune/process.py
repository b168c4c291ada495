"""What a training process sets before it imports DeepSpeed, and which device is its own."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def prepare_process(threads: int = 1) -> None:
    """Set what must be set before DeepSpeed is imported, and start a process group of one if there is none."""
    import torch

    torch.set_num_threads(threads)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if torch.distributed.is_initialized():
        # DeepSpeed derives a missing local rank from host names, which several workers of one host share.
        os.environ.setdefault("LOCAL_RANK", "0")
    else:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        for name, value in alone.items():
            os.environ.setdefault(name, value)
        if os.environ["MASTER_PORT"] == "0":
            os.environ["MASTER_PORT"] = str(_free_port())
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    import deepspeed

    # On a CPU DeepSpeed would compile a shared-memory all-reduce first (over a minute); gradients here go over gloo.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with quiet():
        deepspeed.init_distributed(dist_init_required=False)


def device() -> torch.device:
    """This rank's device."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")


@contextlib.contextmanager
def quiet():
    """No standard output: DeepSpeed prints whatever the log level."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
