"""Gradient norms of the first steps by p, with LoRA and with DoRA: where DoRA blows up what a mask leaves of a row.

    python tests/benchmarks/dora.py MODEL [--p 0 0.5 0.8 0.95 1] [--bf16] [--steps 5] [--lr 1e-4]

Every line is a fresh adapter (rank 16 on all linear layers), trained on the proof's text with a constant p.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from peft import LoraConfig, get_peft_model

from macdrop import MacDrop, MacDropConfig, find_massive_weights
from macdrop.load import open_model
from macdrop.proof import text_blocks
from tune.training.massive_weights import proof_text
from tune.training.quiet import quiet_libraries
from tune.zoo.catalog import resolve

BATCH, LENGTH, K = 2, 64, 5


def norms(source: str, p: float, *, dora: bool, dtype: str, steps: int, lr: float) -> tuple[list[float], list[float]]:
    """Gradient norms before clipping to 1, and losses, of the first steps."""
    model, tokenizer = open_model(resolve(source), dtype=dtype)
    weights = find_massive_weights(model, tokenizer, source=source, fingerprint="")
    text = "\n".join(proof_text(None, source).values())
    blocks = text_blocks(tokenizer, text, LENGTH, weights.bos_token_id)
    torch.manual_seed(0)
    config = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", use_dora=dora, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False).train()
    drop = MacDrop(adapted, weights, MacDropConfig(k=K, p0=p or 1.0, schedule="constant"))
    drop.attach()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0)
    found, losses = [], []
    for step in range(steps):
        batch = blocks[torch.arange(step * BATCH, (step + 1) * BATCH) % len(blocks)]
        with drop.micro_step(p, step):
            loss = adapted(input_ids=batch, labels=batch).loss
            loss.backward()
        found.append(float(torch.nn.utils.clip_grad_norm_(trained, 1.0)))
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return found, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--p", type=float, nargs="+", default=[0.0, 0.5, 0.8, 0.95, 1.0])
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--lr", type=float, default=1e-4)
    given = parser.parse_args()
    quiet_libraries()
    dtype = "bfloat16" if given.bf16 else "float32"
    print(f"{given.model}, {dtype}, {given.steps} steps: gradient norm (median, largest), last loss")
    for name, dora in (("LoRA", False), ("DoRA", True)):
        for p in given.p:
            found, losses = norms(given.model, p, dora=dora, dtype=dtype, steps=given.steps, lr=given.lr)
            print(
                f"{name}  p {p:<5g}  {statistics.median(found):10.3f} {max(found):10.3f}  {losses[-1]:.3f}", flush=True
            )


if __name__ == "__main__":
    main()
