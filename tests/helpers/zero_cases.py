"""What the ZeRO-3 proof trains, shared by its ranks and by the reference beside them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from helpers import tiny

P, SEED, ACCUMULATION, WORLD = 0.7, 3, 2, 2


@dataclass(frozen=True)
class Case:
    family: str = "llama"
    dora: bool = False
    dropout: float = 0.0
    checkpointing: bool | None = None  # None: off; else use_reentrant
    attach_first: bool = False  # before deepspeed.initialize
    scope: str = "massive"
    p: float = P
    untrained: bool = False  # B of the adapter is 0
    norms: bool = False  # of DoRA, kept for the step
    by_rows: bool = False  # every row of a micro-batch has a mask of its own


CASES = {
    "lora": Case(),
    "lora, re-entrant checkpointing": Case(checkpointing=True),
    "dora": Case(dora=True),
    "dora, checkpointing": Case(dora=True, checkpointing=False),
    "dora, dropout, attached first": Case(dora=True, dropout=0.3, attach_first=True),
    "fused": Case("phi3"),
    "conv1d, dora, dropout": Case("gpt2", dora=True, dropout=0.3),
    "dora, whole rows dropped": Case(dora=True, p=0.97, untrained=True),
    "random rows, dora": Case(dora=True, scope="random"),
    "activations, checkpointing": Case(checkpointing=False, scope="activations"),
    "dora, kept norms": Case(dora=True, norms=True),
    "dora, kept norms, dropout": Case(dora=True, norms=True, dropout=0.3),
    "conv1d, dora, kept norms, checkpointing": Case("gpt2", dora=True, norms=True, checkpointing=False),
    "a mask a row": Case("phi3", by_rows=True),
    "a mask a row, dora, checkpointing": Case(dora=True, checkpointing=False, by_rows=True),
    "a mask a row, conv1d, dora, dropout": Case("gpt2", dora=True, dropout=1e-9, by_rows=True),
    "experts": Case("mixtral"),
}


def build(case: Case) -> torch.nn.Module:
    model = tiny.lora(tiny.build(case.family), use_dora=case.dora, lora_dropout=case.dropout)
    if case.untrained:
        tiny.zero_b(model)
    if case.checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": case.checkpointing})
        model.enable_input_require_grads()
    return model


def masks(case: Case, index: int) -> list[int]:
    """The number of the mask of each row of a micro-batch."""
    return [index, index + ACCUMULATION] if case.by_rows else [index, index]


def micro_batch(rank: int, index: int) -> dict[str, torch.Tensor]:
    return tiny.batch(10 * rank + index)
