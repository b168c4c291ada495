"""One rank of the proof that the loss of answer tokens is the same under every ZeRO stage.

Run as ``answer_loss_worker.py RANK WORLD PORT OUT``; `test_answer_loss_zero.py` compares what rank 0 saves with all
logits in one process.
"""

from __future__ import annotations

import os
import sys

RANK, WORLD, PORT, OUT = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
os.environ.update(RANK=str(RANK), LOCAL_RANK=str(RANK), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1")
os.environ.update(MASTER_PORT=PORT, DS_ACCELERATOR="cpu", TOKENIZERS_PARALLELISM="false")

import deepspeed  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from deepspeed.utils import safe_get_full_grad  # noqa: E402

from helpers.answer_loss_cases import CASES, CHUNK, STEPS, Case, build, micro_batch  # noqa: E402
from tune.forward.answer_loss import AnswerLoss  # noqa: E402


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
