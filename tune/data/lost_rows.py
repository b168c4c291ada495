"""Rows that training data lose: bad ones, and those that `cutoff_len` removes; their counts, words and limits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

from macdrop.errors import DataError

#: Counts that the record of a trial keeps, so that a report can name them.
COUNTS = ("rows", "dropped", "truncated", "skipped", "cutoff_len")
#: The key of info.json, and of a trial's record, with the skipped rows by reason.
SKIPPED = "skipped_rows"
#: Places that are kept of each reason.
PLACES = 3


class BadRow(DataError):
    """A row that cannot be trained on as it is written; `reason` is the kind of problem, by which they are counted."""

    reason = "another problem"

    @classmethod
    def because(cls, reason: str, message: str) -> BadRow:
        """Return the error of a row."""
        error = cls(message)
        error.reason = reason  # pickled with the error, as any attribute
        return error


class BadRows:
    """Rows that cannot be trained on as they are written: skipped and counted by reason, or the first one raised."""

    def __init__(self, skip: bool) -> None:
        self._skip = skip
        self.count = 0
        self.first: str | None = None
        """What is wrong with the first of them, with its place."""
        self._reasons: dict[str, dict[str, Any]] = {}

    def add(self, error: DataError, place: str) -> None:
        """Count a row that is refused with `error`; raise it unless rows are skipped."""
        if not self._skip:
            raise error
        self.count += 1
        self.first = self.first or str(error)
        reason = error.reason if isinstance(error, BadRow) else BadRow.reason
        found = self._reasons.setdefault(reason, {"reason": reason, "count": 0, "places": []})
        found["count"] += 1
        if len(found["places"]) < PLACES:
            found["places"].append(place)

    def by_reason(self) -> list[dict[str, Any]]:
        """List reason, count and first places, the most frequent reason first."""
        return sorted(self._reasons.values(), key=lambda found: -found["count"])


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


def describe_skipped(counts: Mapping[str, Any], *, folders: bool = True) -> list[str]:
    """Return a sentence for each reason for which rows were skipped: count, reason, and the first places.

    counts: a prepared data set's info or a trial's record; none of older versions say why. folders: name the folders
        of the files, which are those of a machine.
    """
    sentences = []
    for found in _listed(counts.get(SKIPPED)):
        places = [place if folders else PurePath(place).name for place in map(str, found["places"])]
        more = " and more" if found["count"] > len(places) else ""
        rows = "row" if found["count"] == 1 else "rows"
        sentences.append(f"{found['count']} {rows} skipped: {found['reason']} ({'; '.join(places)}{more})")
    return sentences


def _listed(found: Any) -> Iterable[Mapping[str, Any]]:
    """Return what a record says of skipped rows; nothing where it is damaged."""
    entries = found if isinstance(found, list) else []
    return [
        each
        for each in entries
        if isinstance(each, Mapping) and isinstance(each.get("count"), int) and isinstance(each.get("places"), list)
        if isinstance(each.get("reason"), str)
    ]


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


def check_skipped(info: Mapping[str, Any], limit: float | None) -> None:
    """Refuse data of which a larger share than `limit` is bad and skipped; None never refuses.

    Raises:
        DataError: names the share, and each reason with the first places.
    """
    rows, skipped = info["rows"], info["skipped"]
    if limit is None or skipped <= limit * rows:
        return
    reasons = "".join(f"\n  {sentence}" for sentence in describe_skipped(info)[:5])
    raise DataError(
        f"{skipped} of {rows} rows ({skipped / rows:.1%}) are bad and would be skipped; max_skipped_share is "
        f"{limit:g}.{reasons}\nMend these rows, or set max_skipped_share (null never refuses)."
    )
