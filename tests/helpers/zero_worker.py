"""One rank of the ZeRO-3 proof: trains tiny models in a DeepSpeed engine with MacDrop and writes losses and gradients.

Run as ``zero_worker.py OUT``; `test_hooks_zero.py` compares what rank 0 saves with the slow reference.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad

from helpers import tiny
from helpers.ranks import run_cases
from helpers.zero_cases import ACCUMULATION, CASES, SEED, build, masks, micro_batch
from macdrop.config import MacDropConfig
from macdrop.errors import ConfigError
from macdrop.hooks import MacDrop
from macdrop.masking.layout import Span
from tune.training.dora_norms import DoraNorms

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


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


if __name__ == "__main__":
    run_cases(run, CASES, Path(sys.argv[1]))
