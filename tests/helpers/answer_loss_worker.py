"""One rank of the proof that the loss of answer tokens is the same under every ZeRO stage.

Run as ``answer_loss_worker.py OUT``; `test_answer_loss_zero.py` compares what rank 0 saves with all logits in
one process.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad

from helpers.answer_loss_cases import CASES, CHUNK, STEPS, Case, build, micro_batch
from helpers.ranks import run_cases
from tune.forward.answer_loss import AnswerLoss

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def engine_of(case: Case, model: torch.nn.Module):
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.0, "torch_adam": True}},
        # By default parameters this small would stay whole on every rank.
        "zero_optimization": {"stage": case.stage, "stage3_param_persistence_threshold": 0},
    }
    trainable = [p for p in model.parameters() if p.requires_grad]
    engine = deepspeed.initialize(model=model, model_parameters=trainable, config=config)[0]
    assert engine.zero_optimization_stage() == case.stage
    return engine


def run(case: Case) -> dict:
    engine = engine_of(case, build(case))
    loss = AnswerLoss(engine, CHUNK)
    assert loss.split is not None
    found: dict = {"losses": [], "validation": [], "gradients": []}
    engine.train()
    for step in range(STEPS):
        inputs, positions, targets = micro_batch(RANK, step)
        nats = loss(positions, targets, **inputs)
        engine.backward(nats)
        found["losses"].append(nats.item())
        adapter = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
        found["gradients"].append({name: safe_get_full_grad(p).clone() for name, p in adapter.items()})
        engine.step()
    if case.stage == 3:
        # Numbers of chunks that differ must not change the order of modules that DeepSpeed has recorded.
        found["traced"] = engine.optimizer.parameter_offload.get_param_coordinator().is_complete_trace()
    engine.eval()
    with torch.no_grad():
        for step in range(STEPS):
            inputs, positions, targets = micro_batch(RANK, step)
            found["validation"].append(loss(positions, targets, **inputs).item())
    everyone: list = [None] * WORLD
    dist.all_gather_object(everyone, {name: found[name] for name in ("losses", "validation")})
    return {**found, "ranks": everyone}


if __name__ == "__main__":
    run_cases(run, CASES, Path(sys.argv[1]))
