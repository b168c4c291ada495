"""One rank of the packing proofs; `test_packing.py` starts 2 or 4 and reads what rank 0 writes.

Run as ``packing_worker.py OUT``: every case of `SUITES` for this number of ranks, each one step.
"""

from __future__ import annotations

import os
import sys
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist

from helpers.packing_cases import TIGHT, WIDE, Case, by_product
from tune.training.process_group import prepare_process

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
OUT = Path(sys.argv[1])

SUITES = {
    2: {
        **{
            f"zero{stage} {'dora' if dora else 'lora'} {'packed' if budget else 'padded'}": Case(
                stage=stage, dora=dora, budget=budget, checkpointing=stage % 2 == 1
            )
            for stage, dora, budget in product(range(4), (False, True), (None, TIGHT))
        },
        "wide": Case(stage=2, budget=WIDE),
        "a rank without examples, zero2": Case(stage=2, apart=True),
        "a rank without examples, zero3": Case(stage=3, apart=True, checkpointing=True),
        "experts": Case("mixtral"),
    },
    4: {"lora": Case(stage=2), "dora": Case(stage=3, dora=True), "padded": Case(stage=2, budget=None)},
}

if __name__ == "__main__":
    prepare_process()
    results = {
        name: by_product(case, OUT / "models", WORLD, steps=1 if WORLD == 2 else 3)
        for name, case in SUITES[WORLD].items()
    }
    if RANK == 0:
        torch.save(results, OUT / f"results-{WORLD}.pt")
    dist.barrier()
    dist.destroy_process_group()
