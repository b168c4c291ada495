"""Packed rows of tiny models beside the same examples one at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy

from tune.forward.packed_attention import PackedAttention

LENGTHS = (12, 7, 9)
WINDOW = 5


def examples(lengths: Sequence[int] = LENGTHS, *, seed: int = 0, vocabulary: int = 64) -> list[torch.Tensor]:
    """Token ids without special ones, one tensor (n,) per length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocabulary, (length,), generator=generator) for length in lengths]


def row(each: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The examples as one packed row, as a model takes it."""
    positions = torch.cat([torch.arange(len(ids)) for ids in each])
    return {"input_ids": torch.cat(list(each))[None], "position_ids": positions[None]}


def loss(model: torch.nn.Module, each: Sequence[torch.Tensor], *, packed: bool) -> float:
    """Summed -log p of all tokens but the first of each example; gradients are added to the model's."""
    if packed:
        attention = PackedAttention(model)
        with attention.segments([len(ids) for ids in each]) as arguments:
            logits = model(**row(each), **arguments).logits[0]
            parts = zip(logits.split([len(ids) for ids in each]), each, strict=True)
            total = sum(cross_entropy(part[:-1], ids[1:], reduction="sum") for part, ids in parts)
            total.backward()
        return total.item()
    found = 0.0
    for ids in each:
        one = cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="sum")
        one.backward()
        found += one.item()
    return found
