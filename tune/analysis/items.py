"""Per-item values behind a score, from the answers files and judgements of a run folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from macdrop.errors import DataError
from tune.config.eval_spec import EvalJob
from tune.config.run_spec import slug
from tune.evaluation.benchmark import BENCHMARKS
from tune.evaluation.item_values import MULTI_TURN, Value, Values, entry_of, part_of, same_score
from tune.evaluation.score_names import Column
from tune.storage.json_lines import read_jsonl
from tune.storage.run_folder import SCORE_KEY, RunFolder

JUDGE_METRICS = ("judge_score", "judge_unparsed")

Found = Values | None


def matched(first: Mapping[str, Value], second: Mapping[str, Value], what: str) -> list[str]:
    """Ids of the items of both trials, in order.

    Raises:
        DataError: the ids differ. A comparison on the shared items would not be one of the scores.
    """
    if first.keys() != second.keys():
        lone = [key for key in (*first, *second) if (key in first) != (key in second)]
        raise DataError(
            f"{what}: the two were scored on different items ({len(first)} and {len(second)}; only one has "
            f"{lone[0]}). The limit or the data differed. Score both with the same eval block."
        )
    return list(first)


class Items:
    """The items of one model's scores; each file is read once."""

    def __init__(self, run_folder: RunFolder, model: str) -> None:
        self._run_folder, self._model = run_folder, model
        self._rows: dict[str, dict[tuple, dict[str, Any]]] = {}
        self._files: dict[Path, list[dict[str, Any]]] = {}
        self._found: dict[tuple, Found] = {}

    def read(self, trial: str, column: Column, split: str = "test") -> Found:
        """Values behind one score of a trial (or of "base"), by item id; None where none were kept.

        An id names the item and its content, so that the items of two trials can be matched (`matched`). For a plain
        mean over tasks of different sizes, values are weighted so that their mean is the score. Answers that the judge
        did not score are nan.

        Raises:
            DataError: the file is damaged, or its items do not add up to the score.
        """
        key = _key({**vars(column), "trial": trial, "split": split})
        if key not in self._found:
            row = self._scored(trial).get(key)
            self._found[key] = None if row is None or row["value"] is None else self._read(row, column)
        return self._found[key]

    def _scored(self, trial: str) -> dict[tuple, dict[str, Any]]:
        """The score rows of a trial of this model, by their keys."""
        if trial not in self._rows:
            own = slug(self._model)
            rows = self._run_folder.trial_scores(trial)
            self._rows[trial] = {_key(row): row for row in rows if slug(row["model"]) == own}
        return self._rows[trial]

    def _read(self, row: Mapping[str, Any], column: Column) -> Found:
        judged = column.metric in JUDGE_METRICS
        try:
            found = self._judgements(row) if judged else self._answers(row)
        except KeyError as error:
            raise DataError(f"{self._place(row)}: an item has no {error}; the file is damaged.") from error
        if not found:
            return None
        known = [value for value in found.values() if not isinstance(value, tuple) and not math.isnan(value)]
        if any(isinstance(value, tuple) for value in found.values()):
            return found
        mean = math.fsum(known) / len(known) if known else math.nan
        if same_score(mean, row["value"]):
            return found
        if row.get("stderr") is None:  # lm-eval's aggregations other than the mean
            return None
        raise DataError(
            f"{self._place(row)}: the items of {column.name} average {mean:g}, but its score is {row['value']:g}. "
            "The file and scores.jsonl come from different evaluations."
        )

    # --- answers ---

    def _answers(self, row: Mapping[str, Any]) -> Found:
        records = self._load(self._place(row))
        benchmark = BENCHMARKS.get(row["benchmark"])  # a kind that is not registered here has no items
        return benchmark.items(records, row) if benchmark else None

    def _place(self, row: Mapping[str, Any]) -> Path:
        job = EvalJob(row["benchmark"], entry_of(row), row["attack"], row["attack_on"], row["split"])
        return self._run_folder.answers_file(self._model, row["trial"], job)

    # --- judgements ---

    def _judgements(self, row: Mapping[str, Any]) -> Found:
        """Judgements from the file named by the score, as there may be several judges. An item's last line counts."""
        if not row.get("judgements"):
            return None
        latest = {str(r["item"]): r for r in self._load(self._run_folder.run_dir / row["judgements"])}
        part = part_of(row)
        mine = {
            item: r["score"]
            for item, r in latest.items()
            if part in ("", r["category"]) or (part == MULTI_TURN and r["turns"] > 1)
        }
        if row["metric"] == "judge_unparsed":
            return {item: float(score is None) for item, score in mine.items()}
        return {item: math.nan if score is None else float(score) for item, score in mine.items()}

    def _load(self, file: Path) -> list[dict[str, Any]]:
        if file not in self._files:
            try:
                self._files[file] = read_jsonl(file)
            except ValueError as error:
                raise DataError(str(error)) from error
        return self._files[file]


def _key(row: Mapping[str, Any]) -> tuple:
    """The key that identifies a score of a model."""
    return tuple(row.get(key) for key in SCORE_KEY[1:])
