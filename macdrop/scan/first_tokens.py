"""The rows that another first token than bos calls: text need not begin with the token that was scanned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from macdrop.errors import ConfigError
from macdrop.families import bare_model
from macdrop.scan.find import first_write, largest_state, ranked
from macdrop.scan.states import bos_states
from macdrop.weights import MassiveWeights


@dataclass(frozen=True)
class FirstToken:
    """The scan's layer with one token alone as the input."""

    token: int
    layer: int  # that the scan's rule chooses for this token
    rows: tuple[int, ...]  # the k largest of the massive layer, by descending |intermediate state|
    sizes: tuple[float, ...]
    hidden: float  # largest |hidden state| entry after the massive layer

    def shared(self, weights: MassiveWeights, k: int) -> int:
        """Return how many of its top k rows are among the top k of the scan, if the layer is the same; else 0."""
        return len({*self.rows[:k]} & {*weights.top(k)}) if self.layer == weights.layer else 0


def first_token_rows(model: nn.Module, weights: MassiveWeights, tokens: Sequence[int], *, k: int) -> list[FirstToken]:
    """Measure the rows that each of the tokens calls at position 0, in the massive layer of `weights`.

    One forward pass of one token each. The expert is the one that the token is routed to.

    Raises `ConfigError` for a token outside the vocabulary or an impossible k.
    """
    weights.top(k)
    size = getattr(getattr(bare_model(model), "config", None), "vocab_size", None)
    found = []
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0 or (size and token >= size):
            raise ConfigError(f"The first token {token!r} is outside the model's vocabulary of {size} tokens.")
        states = bos_states(model, token)
        parts = [largest_state(each) for each in states.intermediates]
        layer, _, _ = first_write(states.hidden, [part is not None for part in parts])
        part = parts[weights.layer]
        assert part is not None, "the massive layer has an FFN"
        sizes, order = ranked(part)
        hidden = float(states.hidden[weights.layer + 1].abs().max())
        found.append(FirstToken(token, layer, tuple(order[:k].tolist()), tuple(sizes[:k].tolist()), hidden))
    return found


def common_rows(weights: MassiveWeights, found: Sequence[FirstToken], k: int) -> int:
    """Return the largest m <= k for which every token calls the scan's top m rows first, in any order; 0 for none."""
    same = [all(each.shared(weights, m) == m for each in found) for m in range(1, k + 1)]
    return max((m for m, agreed in enumerate(same, 1) if agreed), default=0)
