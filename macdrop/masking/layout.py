"""The layout of a micro-batch: which of its tokens have which mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from macdrop.errors import ConfigError


@dataclass(frozen=True, order=True)
class Span:
    """Tokens `start` to `stop` (excluded) of row `row` of a micro-batch have the mask with the number `mask`.

    place: the number of the example in what shares the mask, by which the placebo `activations` tells examples apart.
        A span is one example then; elsewhere it may be any stretch of tokens.
    """

    row: int
    start: int
    stop: int
    mask: int
    place: int = 0


class Layout:
    """The masks of one micro-batch: one for all tokens (an int), or by spans.

    Tokens outside all spans, which are padding, have the mask of the span before them (the first ones, that of the
    first span), so that masked rows are computed in as few pieces as there can be. No result depends on them.

    Raises `ConfigError` for a mask below 0 and for spans that are empty, overlap, or hold an example twice.
    """

    def __init__(self, masks: int | Sequence[Span]) -> None:
        self.spans: tuple[Span, ...] | None = None
        self.masks: tuple[int, ...]
        #: Rows and tokens a row of the batch that runs now; the hidden states inside it may be flattened.
        self._shape: tuple[int, int] | None = None
        if isinstance(masks, int):
            if isinstance(masks, bool) or masks < 0:
                raise ConfigError(f"The number of the mask is {masks}; it must be a whole number from 0.")
            self.masks = (masks,)
            return
        self.spans = _checked(masks)
        self.masks = tuple(dict.fromkeys(span.mask for span in self.spans))

    @property
    def whole(self) -> bool:
        """True where all tokens have one mask."""
        return len(self.masks) == 1

    def set_shape(self, shape: torch.Size, layer: str) -> None:
        """Take the shape (B, T, d) of the hidden states that enter `layer`; `ConfigError` when a span ends beyond."""
        if self.spans is None:
            return
        if len(shape) != 3:
            raise ConfigError(
                f"The hidden states that enter {layer} have the shape {tuple(shape)}; spans need (batch, tokens, "
                "hidden size).\nGive one mask for the whole micro-batch: an int."
            )
        rows, tokens = int(shape[0]), int(shape[1])
        for span in self.spans:
            if span.row >= rows or span.stop > tokens:
                raise ConfigError(f"{span} is not in the micro-batch, which has {rows} rows of {tokens} tokens.")
        self._shape = rows, tokens

    def ranges(self, tokens: int, layer: str) -> list[tuple[int, int, int]]:
        """Return (start, stop, mask) of all `tokens` of the flattened batch in order, neighbours with different masks.

        Raises `ConfigError` when `layer` sees other tokens than the batch has.
        """
        if self.whole:
            return [(0, tokens, self.masks[0])]
        found: list[tuple[int, int, int]] = []
        for start, _, span in self.placed(tokens, layer):
            if not found:
                found.append((0, tokens, span.mask))
            elif found[-1][2] != span.mask:
                found[-1] = (found[-1][0], start, found[-1][2])
                found.append((start, tokens, span.mask))
        return found

    def placed(self, tokens: int, layer: str) -> list[tuple[int, int, Span]]:
        """Return every span with its start and stop in the flattened batch of so many `tokens`, in order.

        Raises `ConfigError` when `layer` sees other tokens than the batch has.
        """
        assert self.spans is not None, "an int has no spans"
        if self._shape is None or tokens != self._shape[0] * self._shape[1]:
            batch = "of unknown shape" if self._shape is None else f"of {self._shape[0]} rows of {self._shape[1]}"
            raise ConfigError(
                f"{layer} sees {tokens} tokens of a micro-batch {batch}, so that masks by spans cannot be laid on "
                "them.\nGive one mask for the whole micro-batch: an int."
            )
        length = self._shape[1]
        return [(span.row * length + span.start, span.row * length + span.stop, span) for span in self.spans]


def _checked(spans: Sequence[Span]) -> tuple[Span, ...]:
    """The spans in the order of the flattened batch."""
    if not isinstance(spans, Sequence) or not all(isinstance(span, Span) for span in spans):
        raise ConfigError(f"masks are {spans!r}; give the number of one mask (an int) or a list of `Span`.")
    for span in spans:
        values = [getattr(span, field.name) for field in fields(Span)]
        if not all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values):
            raise ConfigError(f"{span}: every number of a span must be a whole number from 0.")
        if span.start >= span.stop:
            raise ConfigError(f"{span} holds no token: start must be below stop.")
    ordered = tuple(sorted(spans))
    for before, after in zip(ordered, ordered[1:], strict=False):
        if before.row == after.row and after.start < before.stop:
            raise ConfigError(f"{before} and {after} overlap: a token has one mask.")
    return ordered
