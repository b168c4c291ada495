"""Columns of a report and the cells in them: which metrics are shown, and in what order.

A *column* is one metric of one task under one attack.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tune.benchmarks.spec import SECTIONS

PRIMARY = ("acc", "exact_match", "word_perplexity", "perplexity", "judge_score", "rouge_l", "chrf", "repeated_4grams")
"""Which metric of a task stands in the tables, best first; all of them are in the CSV."""
ACCURACIES = ("acc", "acc_norm")


@dataclass(frozen=True)
class Column:
    """One metric of one task under one attack ("none" without), on test or validation items."""

    benchmark: str
    task: str
    metric: str
    attack: str = "none"
    attack_on: str | None = None
    higher_is_better: bool | None = field(default=None, compare=False)
    split: str = "test"

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Column:
        """The column of a line of scores.jsonl; lines without a split are of test benchmarks."""
        found = {key: row[key] for key in cls.__dataclass_fields__ if row.get(key) is not None}
        return cls(**found)

    @property
    def name(self) -> str:
        """As a search metric is written: benchmark/task/metric[@attack]; the validation loss is eval_loss."""
        if self == EVAL_LOSS:
            return self.metric
        return f"{self.benchmark}/{self.task}/{self.metric}" + ("" if self.attack == "none" else f"@{self.attack}")


EVAL_LOSS = Column("validation", "", "eval_loss", higher_is_better=False)


@dataclass(frozen=True)
class Cell:
    """A score and its standard error over items (None: not known)."""

    value: float
    stderr: float | None = None
    n: int | None = None


def primary_columns(columns: Iterable[Column], asked: Mapping[str, str | None] | None = None) -> list[Column]:
    """One metric for each task under each attack: the asked one, else the first of `PRIMARY` that it has, else its first.

    Args:
        asked: names of the benchmarks that the run asks for, each with its metric if that is said. Where a benchmark's
            tasks are among them, the others (the 57 parts of mmlu, say) are left out, but for their own "name/part".
    """
    columns, asked = list(columns), asked or {}
    heads = {column: column.task if column.task in asked else column.task.partition("/")[0] for column in columns}
    filtered = {column.benchmark for column, head in heads.items() if head in asked}
    by_task: dict[tuple, list[Column]] = {}
    for column in columns:
        if column.benchmark in filtered and heads[column] not in asked:
            continue
        key = (column.split, column.benchmark, column.attack, column.attack_on, column.task)
        by_task.setdefault(key, []).append(column)

    def preferred(column: Column) -> tuple:
        named = column.metric.partition(",")[0]
        return named != asked.get(heads[column]), PRIMARY.index(named) if named in PRIMARY else len(PRIMARY)

    return [min(found, key=lambda c: (*preferred(c), found.index(c))) for found in by_task.values()]


def add_means(scores: Iterable[dict[Column, Cell]], columns: Iterable[Column]) -> list[Column]:
    """Mean over zero-shot tasks (as the paper's tables have it), added to the scores that have all of them.

    Accuracies (acc, acc_norm) go together; other metrics have a mean of their own. The error takes tasks as independent.
    """
    scores, groups = list(scores), {}
    for column in columns:
        if column.benchmark == "zero_shot":
            metric = "acc" if column.metric in ACCURACIES else column.metric
            groups.setdefault((metric, column.attack, column.attack_on, column.split), []).append(column)
    means, several = [], len({metric for metric, *_ in groups}) > 1
    for (metric, attack, attack_on, split), members in groups.items():
        if len(members) < 2:
            continue
        better = members[0].higher_is_better
        title = f"mean {metric} of {len(members)}" if several else f"mean of {len(members)}"
        means.append(mean := Column("zero_shot", title, metric, attack, attack_on, better, split))
        for cells in scores:
            found = [cells[column] for column in members if column in cells]
            if len(found) == len(members):
                known = all(cell.stderr is not None for cell in found)
                stderr = math.hypot(*(cell.stderr for cell in found)) / len(found) if known else None
                value = math.fsum(cell.value for cell in found) / len(found)
                cells[mean] = Cell(value, stderr, sum(cell.n or 0 for cell in found) or None)
    return means


def place(column: Column) -> tuple:
    """Sort key of columns: by benchmark, the scores without attack first; within these as they came."""
    section = SECTIONS.index(column.benchmark) if column.benchmark in SECTIONS else len(SECTIONS)
    attacked = column.attack != "none"
    return column.split != "test", section, column.benchmark, attacked, column.attack, column.attack_on or ""
