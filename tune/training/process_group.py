"""Set-up of a training process before DeepSpeed is imported: environment, process group, device."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator

import torch

from tune.training.quiet import no_output


def prepare_process(threads: int = 1) -> None:
    """Prepare the environment for DeepSpeed, import it, and start a process group of one if there is none."""
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
    with no_output():
        deepspeed.init_distributed(dist_init_required=False)


def device() -> torch.device:
    """Return this rank's device."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")


@contextlib.contextmanager
def _hidden(module: str) -> Iterator[None]:
    """Hide a module that is not loaded yet: DeepSpeed's autotuner would import all of MLflow, which takes 2 s."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]
