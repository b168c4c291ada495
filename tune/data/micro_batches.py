"""Micro-batches of examples: padded to a rectangle, or one after the other in a packed row without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tune.data.dataset import Examples
from tune.data.packing import Row
from tune.data.templates import IGNORE

#: Tokens that a rank without examples runs: the fewest of which one predicts another.
FILLER = 2


@dataclass(frozen=True)
class Placed:
    """Tokens `start` to `stop` of row `row` of a micro-batch: the example number `place` of slice `slice` of a step."""

    row: int
    start: int
    stop: int
    slice: int
    place: int


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward pass of one rank, and the places of its loss.

    input_ids: int64 (B, T).
    attention_mask: int64 (B, T), 0 on padding; None for a packed row (B = 1), which has position_ids.
    position_ids: int64 (1, T), which restart at 0 with every example of a packed row.
    positions, targets: int64 (P,): places of the flattened batch whose next token carries loss, and these tokens. The
        first token of an example is never a target.
    counts: whether the loss counts; false where no place carries any, as in the row of a rank that has no examples.
    """

    examples: tuple[Placed, ...]
    input_ids: np.ndarray
    attention_mask: np.ndarray | None
    position_ids: np.ndarray | None
    positions: np.ndarray
    targets: np.ndarray
    counts: bool = True

    @property
    def segments(self) -> tuple[int, ...] | None:
        """Tokens of each example of a packed row; None for a padded micro-batch."""
        return None if self.attention_mask is not None else tuple(each.stop - each.start for each in self.examples)


def padded_batch(examples: Examples, picked: Sequence[int] | np.ndarray, number: int, pad: int) -> MicroBatch:
    """Pad the examples of slice `number` on the right, with the token `pad`, to the longest of them.

    Without any, a few tokens whose loss does not count make every layer run.
    """
    rows = [examples[int(index)] for index in picked] or [_nothing(examples)]
    shape = (len(rows), max(len(ids) for ids, _ in rows))  # (B, T)
    input_ids, attention_mask = np.full(shape, pad, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    targets = np.full(shape, IGNORE, dtype=np.int64)
    for row, (ids, labels) in enumerate(rows):
        input_ids[row, : len(ids)], attention_mask[row, : len(ids)] = ids, 1
        targets[row, : len(ids) - 1] = labels[1:]
    placed = tuple(Placed(row, 0, len(ids), number, row) for row, (ids, _) in enumerate(rows))
    return _labelled(placed, input_ids, targets, attention_mask=attention_mask)


def packed_row(examples: Examples, picked: np.ndarray, row: Row) -> MicroBatch:
    """Lay the examples of a row one after the other.

    picked: example numbers of the step (slices, examples per slice).
    row: its examples; without any, a few tokens whose loss does not count make every layer run.
    """
    found = [(*spot, examples[int(picked[spot])]) for spot in row] or [(0, 0, _nothing(examples))]
    ids, labels, places, placed, start = [], [], [], [], 0
    for number, place, (tokens, own) in found:
        placed.append(Placed(0, start, start + len(tokens), number, place))
        ids.append(tokens)
        labels.append(np.append(own[1:], IGNORE))
        places.append(np.arange(len(tokens)))
        start += len(tokens)
    return _labelled(
        tuple(placed), np.concatenate(ids)[None], np.concatenate(labels), position_ids=np.concatenate(places)[None]
    )


def _nothing(examples: Examples) -> tuple[np.ndarray, np.ndarray]:
    """Return the start of some example, without labels."""
    ids = examples[0][0][:FILLER]
    return ids, np.full(len(ids), IGNORE)


def _labelled(
    placed: tuple[Placed, ...],
    input_ids: np.ndarray,
    targets: np.ndarray,
    *,
    attention_mask: np.ndarray | None = None,
    position_ids: np.ndarray | None = None,
) -> MicroBatch:
    """Take the places with a target; where there is none, one place whose loss does not count makes the head run."""
    targets = targets.ravel()
    at = np.flatnonzero(targets != IGNORE)
    counts = bool(len(at))
    if not counts:
        at, targets = np.zeros(1, dtype=np.int64), input_ids.ravel()
    return MicroBatch(placed, input_ids, attention_mask, position_ids, at, targets[at], counts)
