"""Find a feed-forward network whose layers have unknown names, by shapes and by what its forward pass does.

A module is run on random tokens while single output features of its input projections are set to chosen values. It is
an FFN when tokens do not see each other and each such feature moves exactly one entry of the down projection's input.
Which half of a fused projection is called gate is then by order alone; nothing depends on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from macdrop.quantised import is_quantised
from macdrop.structure import FFN, Slot, build_ffn, linear_slot, peel

_TOKENS = 16  # so that a feature which ReLU silences at some tokens is alive at others


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside the block; every module's own mode comes back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def probe_ffn(module: nn.Module, layer: int, path: str) -> FFN | None:
    """The FFN that `module` is, or None where it is none or cannot be run on hidden states alone.

    Its direct children must be one down projection and either one or two input projections of its size, or one of
    twice its size. Weights must be present (not on the meta device, nor partitioned by ZeRO-3).
    """
    inner = peel(module)
    slots = {name: slot for name, child in inner.named_children() if (slot := linear_slot(child))}
    weights: list[torch.Tensor] = [getattr(slot.module, slot.parameter) for slot in slots.values()]
    if any(weight.is_meta or hasattr(weight, "ds_id") for weight in weights):
        return None
    if not all(weight.is_floating_point() or is_quantised(weight) for weight in weights):
        return None
    for down in (name for name in slots if _is_down(name, slots)):
        with evaluating(inner):
            try:
                order = _inputs_by_trial(inner, slots, down)
            except Exception:  # a module of unknown code may need any other argument, or refuse in any way
                order = None
        if order is not None:
            names, interleaved = order
            chosen = [slots[name] for name in (*names, down)]
            return build_ffn(inner, layer, path, chosen, down, interleaved=interleaved)
    return None


def _inputs_by_trial(module: nn.Module, slots: dict[str, Slot], down: str) -> tuple[list[str], bool] | None:
    """Input projections, gate first, and whether a fused one alternates; None when the flow is not that of an FFN."""
    inputs, size = [name for name in slots if name != down], slots[down].inputs
    flow = _Flow(module, down, slots[down].outputs, size, getattr(slots[down].module, slots[down].parameter))
    if not flow.tokens_are_apart():
        return None
    interleaved = False
    expected = [(name, entry, entry) for name in inputs for entry in (0, size // 2, size - 1)]
    if slots[inputs[0]].outputs == 2 * size:
        interleaved = flow.moved(inputs[0], 1) == {0}
        entry_of = {0: 0, 1: 0} if interleaved else {0: 0, 1: 1, size: 0}
        expected = [(inputs[0], feature, entry) for feature, entry in {**entry_of, 2 * size - 1: size - 1}.items()]
    if any(flow.moved(name, feature) != {entry} for name, feature, entry in expected):
        return None
    return (sorted(inputs, key=flow.enters_linearly) if len(inputs) == 2 else inputs), interleaved


def _is_down(name: str, slots: dict[str, Slot]) -> bool:
    hidden, size = slots[name].outputs, slots[name].inputs
    others = [slot for other, slot in slots.items() if other != name]
    widths = {1: (size, 2 * size), 2: (size,)}.get(len(others), ())
    return size != hidden and all(slot.inputs == hidden and slot.outputs in widths for slot in others)


class _Flow:
    """Forward passes of one module, with one output feature of one of its linear layers set by hand."""

    def __init__(self, module: nn.Module, down: str, hidden: int, size: int, like: torch.Tensor) -> None:
        generator = torch.Generator().manual_seed(0)
        self.module, self.down, self.size = module, down, size
        precision = like.device if is_quantised(like) else like  # quantised layers take any type of input
        self.tokens = torch.randn(1, _TOKENS, hidden, generator=generator).to(precision)
        self.others = torch.randn(1, _TOKENS, hidden, generator=generator).to(precision)

    def run(self, tokens: torch.Tensor, name: str | None = None, feature: int = 0, value: float = 0.0) -> torch.Tensor:
        """The down projection's input, (tokens, size)."""
        seen: list[torch.Tensor] = []

        def set_feature(_module: nn.Module, _args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            output = output.clone()
            output[..., feature] = value
            return output

        handles = [getattr(self.module, self.down).register_forward_pre_hook(lambda _m, args: seen.append(args[0]))]
        if name is not None:
            handles.append(getattr(self.module, name).register_forward_hook(set_feature))
        try:
            self.module(tokens)
        finally:
            for handle in handles:
                handle.remove()
        return seen[0].reshape(_TOKENS, self.size).float()

    def tokens_are_apart(self) -> bool:
        """Return whether a token's state stays the same when all tokens before it, or all after it, are replaced."""
        half = _TOKENS // 2
        first, last = self.tokens.clone(), self.tokens.clone()
        first[:, :half], last[:, half:] = self.others[:, :half], self.others[:, half:]
        state = self.run(self.tokens)
        return torch.allclose(self.run(first)[half:], state[half:], atol=1e-5) and torch.allclose(
            self.run(last)[:half], state[:half], atol=1e-5
        )

    def moved(self, name: str, feature: int) -> set[int]:
        """Entries of the state that differ between two values of an output feature."""
        change = self.run(self.tokens, name, feature, 2.0) - self.run(self.tokens, name, feature, 4.0)
        return set(change.abs().amax(0).nonzero().flatten().tolist())

    def enters_linearly(self, name: str) -> bool:
        """Return whether flipping the sign of a feature flips the sign of its entry, as for the up projection."""
        plus, minus = self.run(self.tokens, name, 0, 3.0)[:, 0], self.run(self.tokens, name, 0, -3.0)[:, 0]
        return torch.allclose(plus, -minus, rtol=1e-3)
