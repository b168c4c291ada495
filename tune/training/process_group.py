"""What a training process sets before it imports DeepSpeed, and which device is its own."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
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
    # DeepSpeed derives a missing local rank from host names, which several workers of one host share.
    os.environ.setdefault("LOCAL_RANK", "0")
    if not torch.distributed.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if "MASTER_PORT" in os.environ:
            torch.distributed.init_process_group(backend)
        else:
            # A group of one needs no port, which another process could take first.
            os.environ.update(RANK="0", WORLD_SIZE="1")
            alone = torch.distributed.HashStore()
            torch.distributed.init_process_group(backend, store=alone, rank=0, world_size=1)
    with _hidden("mlflow"):
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


@contextlib.contextmanager
def _hidden(module: str):
    """Not importable within, unless it has been imported: DeepSpeed's autotuner would load all of MLflow, for 2 s."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]
