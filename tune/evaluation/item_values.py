"""Values of the items behind a score, read back from what a scorer kept of each item."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Value = float | tuple[float, float]
"""Of an item: its score; of a perplexity's window: (summed negative log-likelihood in nats, tokens or words)."""
Values = dict[str, Value]
"""By item id, which names the item and its content, so that the items of two adapters can be matched."""
#: Metrics that are exp of one ratio of sums over all items, not a mean over items.
RATIOS = ("perplexity", "word_perplexity", "byte_perplexity")
#: The part of a conversation benchmark that is not a category.
MULTI_TURN = "multi_turn"


def entry_of(row: Mapping[str, Any]) -> str:
    """Return the entry of the `eval:` block that a score came from."""
    return row.get("entry") or row["task"].partition("/")[0]


def part_of(row: Mapping[str, Any]) -> str:
    """Return the part of the entry that a score is of (a category, a member of a group); empty for all of it."""
    return row["task"].removeprefix(entry_of(row)).lstrip("/")


def same_score(mean: float, score: float) -> bool:
    """Return whether a mean over items equals the stored score, up to rounding."""
    return math.isclose(mean, score, rel_tol=1e-6, abs_tol=1e-9)
