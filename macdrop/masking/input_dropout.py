"""Dropout of the intermediate state: the placebo `activations`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from macdrop.errors import ConfigError
from macdrop.masking.layout import Layout
from macdrop.structure import FFN


class Draw(Protocol):
    """The mask of a number, true where kept; of an example's own under that number where `place` is given."""

    def __call__(
        self, mask: int, shape: Sequence[int], *, device: torch.device | str = "cpu", place: int | None = None
    ) -> torch.Tensor: ...


class InputDropout:
    """Inverted dropout on the intermediate state: the input of an FFN's down projection, an adapter's part included.

    Entries are zeroed with probability p and the others scaled by 1 / (1 - p). With one mask for the micro-batch that
    is every token of it alike, padding too. With spans every example has a mask of its own (length, features), which
    does not depend on what lies around it, and tokens outside of them keep their state. A routed expert has one mask
    for all tokens that it is given, whose places nobody knows.
    """

    matrices = 1
    one_mask_at_a_time = False

    def __init__(
        self, ffn: FFN, on_use: Callable[[list[tuple[int, torch.Tensor]]], None], *, routed: bool = False
    ) -> None:
        """on_use: called at the first use in a micro-step, with what was drawn as pairs of its number and the mask."""
        if ffn.down is None:
            raise ConfigError(
                f"The experts of {ffn.path} are fused: no layer takes their intermediate state, so that activations\n"
                "cannot be dropped there. Leave the placebo 'activations' out for this model."
            )
        self.module = ffn.down
        self.rows = ffn.intermediate_size
        self.used = False
        self._name = f"{ffn.path} ({type(ffn.down).__name__} down)"
        self._on_use, self._routed = on_use, routed
        self._draw: Draw | None = None
        self._layout: Layout | None = None
        self._p = 0.0
        self._handle = self.module.register_forward_pre_hook(self._drop)

    def open(self, draw: Draw, p: float, layout: Layout) -> None:
        """Drop with probability p from now on. Raises `ConfigError` when two spans are the same example."""
        seen = [(span.mask, span.place) for span in layout.spans or ()]
        if len(set(seen)) < len(seen):
            twice = next(pair for pair in seen if seen.count(pair) > 1)
            raise ConfigError(
                f"Two spans have the mask {twice[0]} and the place {twice[1]}: examples would drop alike."
            )
        self._draw, self._layout, self._p, self.used = draw, layout, p, False

    def close(self) -> None:
        self._draw = self._layout = None

    def remove(self) -> None:
        self.close()
        self._handle.remove()

    def _drop(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._draw is None or self._layout is None or not module.training:
            return None
        state = args[0]
        scale = 1 / (1 - self._p) if self._p < 1 else 0.0
        if self._routed or self._layout.spans is None:
            (number,) = self._layout.masks
            drawn = [(number, self._draw(number, state.shape, device=state.device))]
            factors = drawn[0][1].to(state.dtype) * scale
        else:
            factors, drawn = state.new_ones(state.numel() // self.rows, self.rows), []
            for start, stop, span in self._layout.placed(len(factors), self._name):
                shape = (stop - start, self.rows)
                drawn.append((span.mask, self._draw(span.mask, shape, device=state.device, place=span.place)))
                factors[start:stop] = drawn[-1][1].to(state.dtype) * scale
            factors = factors.view(state.shape)
        if not self.used:
            self.used = True
            self._on_use(drawn)
        return (state * factors, *args[1:])
