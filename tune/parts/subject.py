"""What the parts of a report are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tune.journal import Journal
from tune.results import ModelResults

if TYPE_CHECKING:
    from tune.verdict import Verdict


@dataclass(frozen=True)
class Subject:
    """One model of one run: its results and the verdicts on them."""

    journal: Journal
    model: ModelResults
    verdicts: list[Verdict]
