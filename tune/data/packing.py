"""Plan of packed micro-batches: how the examples of a step are spread over rows of tokens and over ranks.

The examples of an optimizer step are slices of a few examples each (`tune.data.batching`). A plan gives every rank the
same number of micro-batches, each one row of whole examples within a budget of tokens. All functions are pure.
"""

from __future__ import annotations

import heapq
import math
from itertools import groupby

import numpy as np

from macdrop.errors import ConfigError
from tune.config.train_spec import TrainSpec

#: An example of a step: the number of its slice, and its place in the slice.
Spot = tuple[int, int]
#: The examples of a packed row, ordered by slice and place; none where a rank has nothing to do in a micro-step.
Row = tuple[Spot, ...]


def token_budget(spec: TrainSpec) -> int:
    """Return the tokens of a packed micro-batch at most."""
    return spec.max_tokens_per_micro_batch or spec.per_device_train_batch_size * spec.cutoff_len


def check_budget(longest: int, budget: int, where: str = "") -> None:
    """Refuse a budget of tokens into which the longest example, of `longest` tokens, does not fit.

    Raises:
        ConfigError: names the example, by its tokens and `where` it is, and the values that would do.
    """
    if longest > budget:
        place = f" ({where})" if where else ""
        raise ConfigError(
            f"max_tokens_per_micro_batch is {budget}, but the longest example has {longest} tokens{place}, and an "
            f"example is never split.\nSet it to {longest} or more, or cutoff_len to {budget} or less."
        )


def plan_rows(lengths: np.ndarray, world: int, budget: int, *, apart: bool = False) -> list[list[Row]]:
    """Spread the examples of a step over packed rows: `plan[micro-step][rank]`.

    Every rank has equally many rows, as few as the budget allows to this method; rows without examples are empty. The
    rows of a plan have as equal numbers of tokens as whole examples allow: the longest example first, to the row that
    has the fewest tokens.

    Args:
        lengths: tokens of each example (slices, examples per slice).
        world: number of ranks.
        budget: tokens of a row at most; no example has more.
        apart: a row holds examples of one slice only.
    """
    assert lengths.size and int(lengths.max()) <= budget, "examples that do not fit are refused before"
    spots = [(s, i) for s in range(lengths.shape[0]) for i in range(lengths.shape[1])]
    if apart:
        slices = [list(same) for _, same in groupby(spots, key=lambda spot: spot[0])]
        rows = [row for same in slices for row in _rows(same, lengths, budget, 1)]
    else:
        rows = _rows(spots, lengths, budget, world)
    return _deal(rows, lengths, world)


def _rows(spots: list[Spot], lengths: np.ndarray, budget: int, multiple: int) -> list[Row]:
    """Return as few rows as hold the examples, a multiple of `multiple`; some may be empty."""
    order = sorted(spots, key=lambda spot: (-int(lengths[spot]), spot))
    total = sum(int(lengths[spot]) for spot in spots)
    number = multiple * math.ceil(total / (budget * multiple))
    while True:
        for spread in (_evenly, _tightly):
            rows = spread(order, lengths, budget, number)
            if rows is not None:
                return [tuple(sorted(row)) for row in rows]
        number += multiple


def _evenly(order: list[Spot], lengths: np.ndarray, budget: int, number: int) -> list[list[Spot]] | None:
    """Give each example to the row with the fewest tokens; None if one does not fit."""
    rows: list[list[Spot]] = [[] for _ in range(number)]
    loads = [(0, row) for row in range(number)]
    for spot in order:
        load, row = heapq.heappop(loads)
        load += int(lengths[spot])
        if load > budget:
            return None
        rows[row].append(spot)
        heapq.heappush(loads, (load, row))
    return rows


def _tightly(order: list[Spot], lengths: np.ndarray, budget: int, number: int) -> list[list[Spot]] | None:
    """Give each example to the row that it fills best; None if one does not fit."""
    rows: list[list[Spot]] = [[] for _ in range(number)]
    loads = np.zeros(number, dtype=np.int64)
    for spot in order:
        after = loads + int(lengths[spot])
        fits = after <= budget
        if not fits.any():
            return None
        row = int(np.where(fits, after, -1).argmax())
        rows[row].append(spot)
        loads[row] = after[row]
    return rows


def _deal(rows: list[Row], lengths: np.ndarray, world: int) -> list[list[Row]]:
    """Deal rows to ranks: rows of like size share a micro-step, the largest go to the rank with the fewest tokens."""
    tokens = {row: sum(int(lengths[spot]) for spot in row) for row in rows}
    rows = sorted(rows, key=lambda row: (-tokens[row], row))
    loads = [0] * world
    plan = []
    for start in range(0, len(rows), world):
        micro: list[Row] = [()] * world
        ranks = sorted(range(world), key=lambda rank: (loads[rank], rank))
        for rank, row in zip(ranks, rows[start : start + world], strict=False):
            micro[rank] = row
            loads[rank] += tokens[row]
        plan.append(micro)
    return plan
