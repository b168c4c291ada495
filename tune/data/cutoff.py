"""Rows that `cutoff_len` removes from the training data, in whole or in part: the words and the limit for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from macdrop.errors import DataError

#: Counts that the record of a trial keeps, so that a report can name them.
COUNTS = ("rows", "dropped", "truncated", "skipped", "cutoff_len")


def describe_cutoff(counts: Mapping[str, Any]) -> str:
    """Return the number of rows, and of those dropped, truncated and skipped (`bad_rows`) with their shares.

    counts: `COUNTS`, of a prepared data set or of a trial's record.
    """
    rows, dropped, truncated, skipped, cutoff = (counts[key] for key in COUNTS)
    bad = f", {skipped} of them bad and skipped ({skipped / rows:.1%})" if skipped else ""
    if not dropped and not truncated:
        return f"{rows} rows{bad}, none dropped or truncated by cutoff_len {cutoff}"
    return (
        f"{rows} rows{bad}; at cutoff_len {cutoff} {dropped} dropped ({dropped / rows:.1%}), as no answer token fits, "
        f"and {truncated} truncated ({truncated / rows:.1%})"
    )


def check_dropped(info: Mapping[str, Any], limit: float | None) -> None:
    """Refuse data of which a larger share than `limit` is dropped; None never refuses.

    Raises:
        DataError: names the share and the cutoff_len that would keep every row.
    """
    rows, dropped, cutoff = info["rows"], info["dropped"], info["cutoff_len"]
    if limit is None or dropped <= limit * rows:
        return
    longest = info["longest_prompt"]
    remedy = f"Raise cutoff_len above {longest}, the tokens of the longest prompt, to keep all of them"
    if longest < cutoff:
        remedy = "Their texts are empty: remove these rows"
    raise DataError(
        f"{dropped} of {rows} rows ({dropped / rows:.1%}) have no answer token within cutoff_len {cutoff} and would be "
        f"dropped; max_dropped_share is {limit:g}.\n{remedy}, or set max_dropped_share (null never refuses)."
    )
