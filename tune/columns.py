"""Columns of a report and the cells in them: which metrics are shown, in what order, and how two cells differ.

A *column* is one metric of one task under one attack.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from tune.benchmarks.spec import SECTIONS

PRIMARY = ("acc", "exact_match", "word_perplexity", "perplexity", "rouge_l", "chrf", "repeated_4grams")
"""Which metric of a task stands in the tables, best first; all of them are in the CSV."""


@dataclass(frozen=True)
class Column:
    """One metric of one task under one attack ("none" without)."""

    benchmark: str
    task: str
    metric: str
    attack: str = "none"
    attack_on: str | None = None
    higher_is_better: bool | None = field(default=None, compare=False)

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


@dataclass(frozen=True)
class Difference:
    """A MacDrop adapter minus the plain adapter that differs in nothing else. `stderr` combines both."""

    column: Column
    plain: Cell
    macdrop: Cell
    delta: float
    stderr: float | None
    words: str


def difference(column: Column, plain: Cell, macdrop: Cell) -> Difference:
    """Delta with combined standard error sqrt(a^2 + b^2), and honest words for it.

    Both adapters answered the same items, so their errors are positively correlated as a rule, and the combined
    standard error is rather too large than too small.
    """
    delta = macdrop.value - plain.value
    known = plain.stderr is not None and macdrop.stderr is not None
    stderr = math.hypot(plain.stderr, macdrop.stderr) if known else None
    if delta == 0:
        words = "equal"
    elif stderr is None:
        words = "no standard error: cannot tell"
    elif abs(delta) < 2 * stderr:
        words = "within noise"
    elif column.higher_is_better is None:
        words = "differs by more than 2 SE"
    else:
        words = ("better" if (delta > 0) == column.higher_is_better else "worse") + " by more than 2 SE"
    return Difference(column, plain, macdrop, delta, stderr, words)


def primary_columns(columns: Iterable[Column], asked: Iterable[str] = ()) -> list[Column]:
    """One metric for each task under each attack: the first of `PRIMARY` that it has, else the first it came with.

    Args:
        asked: names of the benchmarks that the run asks for. Where a benchmark's tasks are among them, the others (the
            57 parts of mmlu, say) are left out, but for their own "name/part".
    """
    columns, asked = list(columns), set(asked)
    heads = {column: column.task if column.task in asked else column.task.partition("/")[0] for column in columns}
    filtered = {column.benchmark for column, head in heads.items() if head in asked}
    by_task: dict[tuple, list[Column]] = {}
    for column in columns:
        if column.benchmark in filtered and heads[column] not in asked:
            continue
        by_task.setdefault((column.benchmark, column.attack, column.attack_on, column.task), []).append(column)
    return [min(found, key=lambda c: (_rank(c.metric), found.index(c))) for found in by_task.values()]


def place(column: Column) -> tuple:
    """Sort key of columns: by benchmark, the scores without attack first; within these as they came."""
    section = SECTIONS.index(column.benchmark) if column.benchmark in SECTIONS else len(SECTIONS)
    return section, column.benchmark, column.attack != "none", column.attack, column.attack_on or ""


def _rank(metric: str) -> int:
    name = metric.partition(",")[0]
    return PRIMARY.index(name) if name in PRIMARY else len(PRIMARY)
