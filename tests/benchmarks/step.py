"""A MacDrop step over a plain LoRA step, beside the paper's way of editing the rows and restoring them.

    python tests/benchmarks/step.py [--sizes small medium] [--rounds 40 30]

One step is forward, backward, AdamW and zeroing the gradients of a Llama-like model with random weights: 4 sequences of
128 tokens, LoRA r = 8 on all linear layers, fp32, one thread, k = 5 rows of layer 1, p = 0.8, a new mask each step. All
variants use the same model and optimizer and run once a round in random order; ratios are of pairs from the same round.

    plain             no MacDrop
    plain, again      the same once more: how far its ratio is from 1 is what the machine's noise can do
    macdrop           attached, masks drawn
    macdrop, p = 0    attached, the schedule at its end
    edit and restore  the paper's listing: mask the rows of W_up and W_gate in place, step, write the old rows back
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from measure import CPU, WALL, Timings, Variant, interleave, machine, table, verdict
from random_llama import LAYER, stand_in

if TYPE_CHECKING:
    import torch

    from macdrop import MacDrop

TARGET = 1.02
K, P, RANK = 5, 0.8, 8


@dataclass(frozen=True)
class Size:
    """A model and a batch: `batch` sequences of `tokens` tokens."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int = 4096
    batch: int = 4
    tokens: int = 128


SIZES = {"small": Size(256, 704, 6), "medium": Size(512, 1408, 8)}
ROUNDS = {"small": 40, "medium": 30}


class Bench:
    """A model with a LoRA adapter, its optimizer, a batch, and the step that all variants share."""

    def __init__(self, size: Size) -> None:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.size = size
        config = LlamaConfig(
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_hidden_layers=size.layers,
            num_attention_heads=size.hidden // 64,
            vocab_size=size.vocabulary,
            max_position_embeddings=size.tokens,
        )
        lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = get_peft_model(LlamaForCausalLM(config), lora).train()
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)
        self.tokens = torch.randint(0, size.vocabulary, (size.batch, size.tokens))
        self.masks = count()
        self.weights = stand_in(config, "random")
        self.rows = torch.tensor(self.weights.top(K))
        ffn = self.model.get_base_model().model.layers[LAYER].mlp
        self.edited = [ffn.up_proj.base_layer.weight, ffn.gate_proj.base_layer.weight]

    def step(self) -> torch.Tensor:
        loss = self.model(input_ids=self.tokens, labels=self.tokens).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def macdrop_step(self, drop: MacDrop, p: float) -> torch.Tensor:
        with drop.micro_step(p, next(self.masks)):
            return self.step()

    def edited_step(self) -> torch.Tensor:
        """The paper's listing: one mask for both matrices, the rows themselves edited and rolled back."""
        import torch

        rows = self.rows
        keep = torch.rand(K, self.size.hidden) >= P
        kept = []
        with torch.no_grad():
            for weight in self.edited:
                kept.append(weight[rows].clone())
                weight[rows] *= keep
        loss = self.step()
        with torch.no_grad():
            for weight, old in zip(self.edited, kept, strict=True):
                weight[rows] = old
        return loss

    def variants(self) -> dict[str, Variant]:
        from macdrop import MacDrop, MacDropConfig

        drop = MacDrop(self.model, self.weights, MacDropConfig(k=K, p0=P))

        @contextmanager
        def attached() -> Iterator[None]:
            drop.attach()
            try:
                yield
            finally:
                drop.detach()

        def dropping(p: float) -> Callable[[], torch.Tensor]:
            return lambda: self.macdrop_step(drop, p)

        return {
            "plain": Variant(self.step),
            "plain, again": Variant(self.step),
            "macdrop": Variant(dropping(P), attached),
            "macdrop, p = 0": Variant(dropping(0.0), attached),
            "edit and restore": Variant(self.edited_step),
        }


def measure(size: Size, rounds: int) -> Timings:
    return interleave(Bench(size).variants(), rounds, warm_up=2)


def report(name: str, timings: Timings) -> str:
    rounds = len(timings.seconds["plain"])
    rows = [
        (
            variant,
            f"{1000 * timings.median(variant, WALL):.1f}",
            f"{1000 * timings.median(variant, CPU):.1f}",
            timings.ratio(variant, "plain", CPU).show(),
            timings.ratio(variant, "plain", WALL).show(),
            f"{timings.best(variant, 'plain'):.3f}",
        )
        for variant in timings.seconds
    ]
    headings = (f"{name}, {rounds} rounds", "wall ms", "CPU ms", "CPU / plain", "wall / plain", "fastest / fastest")
    ratio = timings.ratio("macdrop", "plain", CPU).median
    return f"{table(headings, rows)}\n{verdict(f'{name}: macdrop / plain, CPU time,', ratio, TARGET)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", nargs="+", type=int, help="for each size; by default 40 for small, 30 for medium")
    given = parser.parse_args()
    rounds = given.rounds or [ROUNDS[name] for name in given.sizes]
    if len(rounds) != len(given.sizes):
        parser.error("--rounds needs one number for each size")
    from tune.training.quiet import quiet_libraries

    quiet_libraries()
    print(machine(), flush=True)
    for name, number in zip(given.sizes, rounds, strict=True):
        print(f"\n{report(name, measure(SIZES[name], number))}", flush=True)
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
