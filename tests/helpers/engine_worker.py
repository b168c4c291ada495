"""One rank of the engine proofs; `test_engine.py` starts two and reads what rank 0 writes.

Run as ``engine_worker.py OUT CASE...``. For each case: engine 1 trains A, then B (engine reused), then B
interrupted and resumed; engine 2, fresh, trains B. Losses and the digest of the final state are written for each.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from helpers.engine_cases import INTERRUPTED_AFTER, spec
from tune.data import dataset as data
from tune.training.engine import Engine
from tune.training.finetune import finetune
from tune.training.massive_weights import scanned
from tune.training.process_group import prepare_process

OUT, CASES = Path(sys.argv[1]), sys.argv[2:]


def digest(engine: Engine) -> str:
    """Weights, the optimizer's state and its steps, to the bit."""
    state = engine.read_state(0, {})
    whole = hashlib.sha256()
    for part in (state.weights, *(state.optimizer[part] for part in sorted(state.optimizer))):
        for name in sorted(part):
            whole.update(part[name].numpy().tobytes())
    steps = sorted(float(entry["step"]) for entry in engine.live.inner.state.values() if "step" in entry)
    return whole.hexdigest() + str(steps)


def train(engine: Engine, wanted, folder: Path, *, stop_after: int | None = None) -> dict:
    losses = []

    def observe(metrics: dict) -> str:
        losses.append((metrics["step"], metrics["loss"], metrics["grad_norm"], metrics["entries_dropped"]))
        return "stop" if stop_after is not None and metrics["step"] >= stop_after else "go_on"

    prepared = data.load(data.prepare(wanted, engine.tokenizer, OUT / "data"))
    outcome = finetune(engine, wanted, prepared, folder, weights=scanned(wanted), observe=observe)
    return {"losses": losses, "digest": digest(engine), "outcome": asdict(outcome)}


def run(case: str) -> dict:
    first, second = spec(case, seed=1, p0=0.8), spec(case, seed=2, p0=0.5)
    engine = Engine(first)
    found = {
        "stage": engine.engine.zero_optimization_stage(),
        "a": train(engine, first, OUT / case / "a"),
        "b reused": train(engine, second, OUT / case / "b-reused"),
        "b interrupted": train(engine, second, OUT / case / "b-cut", stop_after=INTERRUPTED_AFTER),
    }
    # Another fine-tuning comes between, as in a lane.
    found["a again"] = train(engine, first, OUT / case / "a-again")
    found["b resumed"] = train(engine, second, OUT / case / "b-cut")
    found["b fresh"] = train(Engine(second), second, OUT / case / "b-fresh")
    return found


if __name__ == "__main__":
    prepare_process()
    results = {case: run(case) for case in CASES}
    if dist.get_rank() == 0:
        (OUT / "results.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
