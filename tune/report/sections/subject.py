"""The input of a report's parts."""

from __future__ import annotations

from dataclasses import dataclass

from tune.analysis.results import ModelResults
from tune.analysis.verdict import Verdict
from tune.storage.run_folder import RunFolder


@dataclass(frozen=True)
class Subject:
    """One model of one run: its results and the verdicts on them."""

    run_folder: RunFolder
    model: ModelResults
    verdicts: list[Verdict]
