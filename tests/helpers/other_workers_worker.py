"""One rank of the second leg: ``other_workers_worker.py ROOT`` continues every case up to step 4."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist

from helpers.other_workers_cases import CASES, leg, spec
from tune.training.engine import Engine
from tune.training.process_group import prepare_process

if __name__ == "__main__":
    root = Path(sys.argv[1])
    prepare_process()
    results = {case: leg(Engine(spec(case)), case, root, "changed", stop_after=4) for case in CASES}
    if dist.get_rank() == 0:
        (root / "results.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
