"""Paired samples of two arms on the same seeds and items, read from a run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from macdrop.errors import DataError
from tune.analysis.comparison import Sample
from tune.analysis.items import Items, matched
from tune.analysis.stats import linearised
from tune.config.eval_spec import TEST
from tune.config.recorded import asked_for
from tune.evaluation.item_values import RATIOS
from tune.evaluation.score_names import Column, is_part, primary_columns
from tune.storage.run_folder import RunFolder

DESCRIPTIVE = ("repeated_4grams", "empty_share", "judge_unparsed")
"""Metrics that describe answers without measuring quality; no verdict is based on them."""

Trials = Mapping[Any, str]
"""Trials of one setting by their seeds."""


class Samples:
    """The test scores of one model's trials, with their items."""

    def __init__(self, run_folder: RunFolder, model: str) -> None:
        self._items = Items(run_folder, model)
        self._asked = asked_for(run_folder.config())
        self._scores: dict[tuple[str, Column], float | None] = {}
        self._columns: dict[Column, None] = {}
        for row in run_folder.model_scores(model):
            if row["split"] == TEST:
                column = Column.of(row)
                self._columns[column] = None
                self._scores[row["trial"], column] = row["value"]

    def columns(self, plain: Trials, other: Trials) -> list[Column]:
        """Primary columns of quality that both arms have for a shared seed, without parts of tasks."""
        primary = primary_columns(
            [column for column in self._columns if self._pairs(column, plain, other)], self._asked
        )
        usable = [c for c in primary if c.higher_is_better is not None and c.metric not in DESCRIPTIVE]
        return [column for column in usable if not is_part(column, primary)]

    def read(self, column: Column, plain: Trials, other: Trials) -> Sample:
        """The sample on the seeds that both have.

        Raises:
            DataError: a score is not finite, or the items differ.
        """
        pairs = self._pairs(column, plain, other)
        seeds, trials = tuple(pairs), list(pairs.values())
        recorded = [[self._scores[pair[side], column] for pair in trials] for side in (0, 1)]
        lost = [str(seed) for seed, *pair in zip(seeds, *recorded, strict=True) if None in pair]
        if lost:
            raise DataError(f"the score of seed {', '.join(lost)} is not finite")
        first, second = (tuple(score for score in scores if score is not None) for scores in recorded)
        sides = self._measured(column, trials)
        if sides is None:
            return Sample(column, seeds, first, second, None)
        if column.metric.partition(",")[0] in RATIOS:
            (losses, tokens), (other_losses, _) = (np.moveaxis(side, -1, 0) for side in sides)
            differences = linearised(other_losses - losses, tokens[0])
            return Sample(column, seeds, first, second, differences)
        known = ~np.isnan(sides).any(axis=(0, 1))
        if known.all():
            return Sample(column, seeds, first, second, sides[1] - sides[0])
        if not known.any():
            raise DataError("the judge scored no answer in all trials")
        sides = sides[:, :, known]
        first, second = (tuple(side.mean(axis=1).tolist()) for side in sides)
        note = f"on the {known.sum()} of {known.size} answers that the judge scored in all trials"
        return Sample(column, seeds, first, second, sides[1] - sides[0], note)

    def _pairs(self, column: Column, plain: Trials, other: Trials) -> dict[Any, tuple[str, str]]:
        """seed -> (plain's trial, the other's), for seeds where both trials have the column."""
        shared = {seed: (plain[seed], other[seed]) for seed in sorted(plain.keys() & other.keys())}
        return {seed: pair for seed, pair in shared.items() if all((trial, column) in self._scores for trial in pair)}

    def _measured(self, column: Column, pairs: Sequence[tuple[str, str]]) -> np.ndarray | None:
        """(plain and other, seeds, items), for perplexities (..., 2); None where a trial's items were not kept."""
        read = [[self._items.read(pair[side], column) for pair in pairs] for side in (0, 1)]
        sides = [[items for items in side if items is not None] for side in read]
        if any(len(side) < len(pairs) for side in sides):
            return None
        first = sides[0][0]
        for side, arm in enumerate(sides):
            for pair, items in zip(pairs, arm, strict=True):
                matched(first, items, f"{column.name}, {pairs[0][0]} and {pair[side]}")
        return np.array([[[items[key] for key in first] for items in arm] for arm in sides], dtype=float)
