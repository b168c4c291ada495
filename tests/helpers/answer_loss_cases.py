"""What the proof of the answer tokens' loss under ZeRO computes, shared by its ranks and the reference beside them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch

from helpers import tiny
from helpers.zoo_of_families import build_family

STEPS, WORLD = 4, 2
CHUNK = 3 * tiny.VOCAB * 4
#: (rank, step) -> answer tokens; 22 at most. One rank has many chunks where the other has few, one, or none.
ANSWERS = {(0, 0): 22, (1, 0): 2, (0, 1): 0, (1, 1): 15, (0, 2): 1, (1, 2): 0, (0, 3): 8, (1, 3): 20}


@dataclass(frozen=True)
class Case:
    stage: int
    head: str
    checkpointing: bool = False


HEADS = {
    "tied": lambda: tiny.lora(build_family("llama", tie_word_embeddings=True), targets=["q_proj", "down_proj"]),
    "soft cap": lambda: tiny.lora(build_family("gemma2", final_logit_softcapping=2.0), targets=["q_proj"]),
    "adapted": lambda: tiny.lora(tiny.build(), targets=["q_proj", "lm_head"]),
    "adapted, dora": lambda: tiny.lora(tiny.build(), targets=["q_proj", "lm_head"], use_dora=True),
    "adapted alone": lambda: tiny.lora(tiny.build(), targets=["lm_head"]),
}
CASES = {f"zero{stage}, {head}": Case(stage, head) for stage, head in product(range(3), ("tied", "adapted, dora"))}
CASES.update({f"zero3, {head}": Case(3, head) for head in HEADS})
CASES.update({f"zero3, {head}, checkpointing": Case(3, head, checkpointing=True) for head in ("tied", "adapted")})


def build(case: Case) -> torch.nn.Module:
    model = HEADS[case.head]()
    if case.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def micro_batch(rank: int, step: int) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Inputs, positions and targets of a rank's micro-batch."""
    ids = tiny.batch(10 * rank + step)["input_ids"]
    rows, columns = torch.ones_like(ids[:, 1:]).nonzero(as_tuple=True)
    chosen = slice(0, ANSWERS[rank, step])
    return {"input_ids": ids}, (rows * ids.shape[1] + columns)[chosen], ids[rows, columns + 1][chosen]
