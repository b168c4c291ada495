"""A figure of the page, with its numbers as CSV."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from tune.report.escaping import csv_text


@dataclass(frozen=True)
class Figure:
    """One figure with its numbers.

    Attributes:
        name: lower-case words with "-", unique within a model; names the CSV.
        part: key of the report's part that shows it (`Report.parts`).
        svg: from `tune.report.html.drawing.draw`; empty if there is nothing to draw; `caption` then says why.
        head, rows: the plotted numbers.
    """

    name: str
    part: str
    title: str
    caption: str
    svg: str = ""
    head: list[str] = field(default_factory=list)
    rows: list[list[Any]] = field(default_factory=list)

    def csv(self) -> str:
        return csv_text(self.head, self.rows)


def words_to_name(*words: str) -> str:
    """Join words to a name safe in files and XML ids: ("zero_shot", "mean of 5") -> "zero-shot-mean-of-5"."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-") or "figure"
