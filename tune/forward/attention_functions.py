"""The attention functions that the configs of a transformers model name, replaced for a block by some of ours."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from macdrop.errors import MacDropError

#: Implementations that ours can call for a part of the tokens.
SPLIT = ("sdpa", "eager")


class AttentionNames:
    """The implementations that a model's configs name; `replaced` names others for a block.

    Args:
        model: a causal language model, with an adapter or without; under DeepSpeed the engine's ``module``.
        known: implementations that the caller can take the place of.

    Raises:
        MacDropError: the model names another implementation, or calls its attention in a way of its own; the message
            is the end of a sentence.
    """

    def __init__(self, model: torch.nn.Module, known: tuple[str, ...]) -> None:
        configs = {id(config): config for config in _configs(model)}
        self._named = [(config, config._attn_implementation) for config in configs.values()]
        self.names = {name for _, name in self._named}
        unknown = self.names - {*known}
        if unknown or not self._named:
            raise MacDropError(f"its attention is {', '.join(sorted(map(str, unknown))) or 'of its own'}")
        if not all(_takes_functions(module) for module in model.modules()):
            raise MacDropError("its attention cannot be replaced")

    @contextmanager
    def replaced(self, prefix: str) -> Iterator[None]:
        """Name ``prefix + name`` in place of each of `SPLIT` inside the block; both must be registered."""
        try:
            for config, name in self._named:
                if name in SPLIT:
                    config._attn_implementation_internal = prefix + name
            yield
        finally:
            for config, name in self._named:
                config._attn_implementation_internal = name


def own_function(original: str, module: torch.nn.Module) -> Callable[..., Any]:
    """Return the function that the model would have called; eager attention stands beside the layer's class."""
    if original in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[original]
    for kind in type(module).__mro__:
        function = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise MacDropError(f"its attention {type(module).__name__} is of its own")


def _configs(model: torch.nn.Module) -> Iterator[Any]:
    """Yield the configs that modules of the model choose their attention by."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation_internal", None) is not None:
            yield config


def _takes_functions(module: torch.nn.Module) -> bool:
    """Return whether a transformers model takes its attention from the table of functions."""
    ask = getattr(type(module), "_can_set_attn_implementation", None)
    return ask is None or bool(ask())
