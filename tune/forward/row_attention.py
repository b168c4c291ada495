"""Attention of a packed batch in rows, under a mask of the caller's; all else of the model sees each token once.

A packed batch is one sequence of N tokens, without padding. The attention of each layer copies them to the rows
(B, T) in which they see each other: a token may stand in several rows, and rows are padded, at the cost of attention
alone. The model's own function runs on the rows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from macdrop.errors import MacDropError
from tune.forward.attention_functions import SPLIT, AttentionNames, own_function

_PREFIX = "rows_of_"


@dataclass(frozen=True)
class Rows:
    """Layout in rows of the N tokens of a packed batch.

    tokens: (B, T), the token at each place of a row, from 0 to N - 1; padding repeats one that stands before it.
    mask: what is added to attention scores, (B, 1, T, T).
    """

    tokens: torch.Tensor
    mask: torch.Tensor

    @functools.cached_property
    def places(self) -> torch.Tensor:
        """The first place of each token in the flattened rows, (N,)."""
        places = torch.arange(self.tokens.numel(), device=self.tokens.device)
        found = places.new_full((int(self.tokens.max()) + 1,), len(places))
        return found.scatter_reduce(0, self.tokens.flatten(), places, "amin")


_in_force: Rows | None = None


@contextmanager
def in_rows(model: torch.nn.Module, rows: Rows) -> Iterator[None]:
    """Let the model's attention run in `rows` inside the block, for inputs (1, N) with position ids and no mask.

    Raises:
        MacDropError: the model's attention cannot be replaced.
    """
    global _in_force
    assert _in_force is None, "one packed batch at a time"
    names = AttentionNames(model, SPLIT)
    _in_force = rows
    try:
        with names.replaced(_PREFIX):
            yield
    finally:
        _in_force = None


def runs_in_rows(model: torch.nn.Module) -> bool:
    """Return whether `in_rows` can replace the attention of a model."""
    try:
        AttentionNames(model, SPLIT)
    except MacDropError:
        return False
    return True


def _no_mask(**_: Any) -> None:
    """Stand in for the function that makes the model's own mask: the rows bring theirs."""


def _attend(
    original: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """Attend in rows: query, key and value (1, heads, N, head size) give (1, N, heads, head size)."""
    assert _in_force is not None, "the model's configs name this function only while rows are in force"
    rows, width = _in_force.tokens.flatten(), _in_force.tokens.shape

    def in_rows(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[0].index_select(1, rows).unflatten(1, width).transpose(0, 1)

    function = own_function(original, module)
    output = function(module, in_rows(query), in_rows(key), in_rows(value), _in_force.mask, **arguments)[0]
    return output.flatten(0, 1).index_select(0, _in_force.places)[None], None


for _name in SPLIT:
    AttentionInterface.register(_PREFIX + _name, functools.partial(_attend, _name))
    AttentionMaskInterface.register(_PREFIX + _name, _no_mask)
