"""Parameters of a head that ZeRO-3 partitions, whole for as long as a caller reads logits, chunk after chunk.

DeepSpeed gathers and releases a module's parameters in hooks of its forward pass. Left to them, a head that is called
once per chunk would be gathered as often, and ranks with different numbers of chunks would wait for each other. So each
module of the head that has parameters is entered once, as a single call around all chunks, and the hooks rest in
between. DeepSpeed sees the same modules in the same order in every step and on every rank, as its prefetching needs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from macdrop.gather import is_partitioned

HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def any_partitioned(modules: Sequence[nn.Module]) -> bool:
    """Return whether ZeRO-3 holds parameters of these modules themselves in parts."""
    return any(is_partitioned(parameter) for module in modules for parameter in module.parameters(recurse=False))


def inside_hooks(modules: Sequence[nn.Module], function: Callable[[torch.Tensor], Any], hidden: torch.Tensor) -> Any:
    """Return ``function(hidden)``, run inside the hooks of all modules; in it, they are called without their hooks.

    Where gradients reach `hidden` or the result, DeepSpeed gathers the modules again in the backward pass.
    """
    entered = [module for module in modules if any(True for _ in module.parameters(recurse=False))]

    def enter(number: int, hidden: torch.Tensor) -> Any:
        if number == len(entered):
            with _without_hooks(modules):
                return function(hidden)
        with forward_once(entered[number], lambda hidden: enter(number + 1, hidden)):
            return entered[number](hidden)

    return enter(0, hidden)


def forget_order(model: nn.Module) -> None:
    """Let DeepSpeed record the order of modules under ZeRO-3 from the start, after a forward pass that no step repeats.

    It would release parameters by that order for good.
    """
    offload = getattr(getattr(model, "optimizer", None), "parameter_offload", None)
    coordinator = offload.get_param_coordinator() if offload is not None else None
    if coordinator is not None and not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()


@contextmanager
def forward_once(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let the next call of a module run `forward`; its own is back as soon as that has begun."""
    before = module.__dict__.get("forward")

    def restore() -> None:
        if before is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = before

    def once(*args: Any, **kwargs: Any) -> Any:
        restore()
        return forward(*args, **kwargs)

    module.__dict__["forward"] = once
    try:
        yield
    finally:
        restore()


@contextmanager
def _without_hooks(modules: Sequence[nn.Module]) -> Iterator[None]:
    kept = [(module.__dict__, name, module.__dict__[name]) for module in modules for name in HOOKS]
    for attributes, name, _ in kept:
        attributes[name] = OrderedDict()
    try:
        yield
    finally:
        for attributes, name, hooks in kept:
            attributes[name] = hooks
