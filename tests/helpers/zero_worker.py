"""One rank of the ZeRO-3 proof: trains tiny models in a DeepSpeed engine with MacDrop and writes losses and gradients.

Run as ``zero_worker.py RANK WORLD PORT OUT``; `test_hooks_zero.py` compares what rank 0 saves with the slow reference.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext

RANK, WORLD, PORT, OUT = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
os.environ.update(RANK=str(RANK), LOCAL_RANK=str(RANK), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1")
os.environ.update(MASTER_PORT=PORT, DS_ACCELERATOR="cpu", TOKENIZERS_PARALLELISM="false")

import deepspeed  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from deepspeed.utils import safe_get_full_grad  # noqa: E402

from helpers import tiny  # noqa: E402
from helpers.zero_cases import ACCUMULATION, CASES, SEED, build, masks, micro_batch  # noqa: E402
from macdrop.config import MacDropConfig  # noqa: E402
from macdrop.errors import ConfigError  # noqa: E402
from macdrop.hooks import MacDrop  # noqa: E402
from macdrop.masking.layout import Span  # noqa: E402
from tune.training.dora_norms import DoraNorms  # noqa: E402


def engine_of(model: torch.nn.Module):
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": ACCUMULATION,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        # By default parameters this small would stay whole on every rank.
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    trainable = [p for p in model.parameters() if p.requires_grad]
    engine = deepspeed.initialize(model=model, model_parameters=trainable, config=config)[0]
    assert engine.zero_optimization_stage() == 3
    return engine


def micro_step(engine, drop: MacDrop, case, index: int, drawn: list) -> float:
    """Loss of one micro-batch; the masks that were in force are added to `drawn`."""
    torch.manual_seed(1000 * RANK + index)
    batch = micro_batch(RANK, index)
    length = batch["input_ids"].shape[1]
    spans = [Span(row, 0, length, mask, row) for row, mask in enumerate(masks(case, index))]
    with drop.micro_step(case.p, spans if case.by_rows else index):
        loss = engine(**batch).loss
        engine.backward(loss)
        drawn.append([keep.clone() for keep in drop._keeps.values()])
    return loss.item()


def run(case) -> dict:
    model = build(case)
    drop = None
    config = MacDropConfig(k=len(tiny.ROWS), seed=SEED, scope=case.scope)
    if case.attach_first:
        drop = MacDrop(model, tiny.massive_weights(case.family), config)
        rows = drop.attach()
    engine = engine_of(model)
    if not case.attach_first:
        drop = MacDrop(engine.module, tiny.massive_weights(case.family), config)
        try:
            rows = drop.attach()
        except ConfigError as error:
            return {"refused": str(error)}
    engine.train()
    losses, drawn = [], []
    norms = DoraNorms(engine.module).for_step() if case.norms else nullcontext()
    with norms:
        for index in range(ACCUMULATION):
            losses.append(micro_step(engine, drop, case, index, drawn))
            if index < ACCUMULATION - 1:
                engine.step()
    gradients = {n: safe_get_full_grad(p).clone() for n, p in engine.module.named_parameters() if p.requires_grad}
    partitioned = all(hasattr(p, "ds_id") and p.numel() == 0 for p in engine.module.parameters() if p.dim() == 1)
    everyone: list = [None] * WORLD
    dist.all_gather_object(everyone, {"losses": losses, "masks": drawn})
    drop.detach()
    return {"rows": rows, "gradients": gradients, "ranks": everyone, "partitioned": partitioned}


def main() -> None:
    torch.set_num_threads(1)
    # Plain gloo: DeepSpeed would else compile a C++ extension for its own collectives, for minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    results = {name: run(case) for name, case in CASES.items()}
    if RANK == 0:
        torch.save(results, OUT)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
