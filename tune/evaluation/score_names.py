"""Names and order of scores: the columns of a report and the cells in them.

A *column* is one metric of one task under one attack.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from tune.config.eval_entries import MEAN, NO_ATTACK
from tune.config.objectives import AVERAGED
from tune.config.parse import SECTIONS

PRIMARY = ("acc", "exact_match", "word_perplexity", "perplexity", "judge_score", "rouge_l", "chrf", "repeated_4grams")
"""Preference of metrics: tables show the first that a task has, the CSV has all of them."""
LONGBENCH = "longbench_"
HOW = ("limit", "num_fewshot", "version", "settings")
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
        """Return the column of a row of scores.jsonl, one object for equal ones; rows without a split are tests."""
        return _column(*map(row.get, cls.__dataclass_fields__))

    @property
    def is_mean(self) -> bool:
        """Return whether this is a mean over tasks; see `mean_columns`."""
        return self.task.startswith(f"{MEAN} ")

    @cached_property
    def name(self) -> str:
        """The name as a search metric: benchmark/task/metric[@attack], where a mean's task is `mean`; or eval_loss."""
        if self == EVAL_LOSS:
            return self.metric
        task = self.task.partition(" of ")[0] if self.is_mean else self.task
        return f"{self.benchmark}/{task}/{self.metric}" + ("" if self.attack == NO_ATTACK else f"@{self.attack}")


@lru_cache(maxsize=65536)
def _column(*values: Any) -> Column:
    found = zip(Column.__dataclass_fields__, values, strict=True)
    return Column(**{key: value for key, value in found if value is not None})


EVAL_LOSS = Column("validation", "", "eval_loss", higher_is_better=False)


@dataclass(frozen=True)
class Cell:
    """A score and its standard error over items (None: unknown).

    Scores are comparable only if they share `how`: limit, few-shot examples, version, settings.
    """

    value: float
    stderr: float | None = None
    n: int | None = None
    how: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Cell:
        """Return the cell of a row of scores.jsonl that has a value."""
        how = tuple((key, row[key]) for key in HOW if row.get(key) is not None)
        return cls(row["value"], row.get("stderr"), row.get("n"), how)


class KnownCells:
    """Cells of many rows of scores.jsonl: equal conditions are one object."""

    def __init__(self) -> None:
        self._how: dict[tuple[Any, ...], tuple[tuple[str, Any], ...]] = {}

    def cell(self, row: Mapping[str, Any]) -> Cell:
        """Return `Cell.of` a row."""
        values = tuple(map(row.get, HOW))
        key = (*values, *map(type, values))  # 1 is equal to True
        if key not in self._how:
            self._how[key] = Cell.of(row).how
        return Cell(row["value"], row.get("stderr"), row.get("n"), self._how[key])


def scoring_seconds(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return seconds of the benchmarks of each trial; all rows of one benchmark and attack carry the same time."""
    spent: dict[str, dict[tuple[Any, ...], float]] = {}
    for row in rows:
        seconds = row.get("seconds")
        if seconds is not None:
            entry = row.get("entry") or row["task"].partition("/")[0]
            job = (row["split"], row["benchmark"], row.get("attack"), row.get("attack_on"), entry)
            spent.setdefault(row["trial"], {})[job] = seconds
    return {trial: sum(jobs.values()) for trial, jobs in spent.items()}


def primary_columns(columns: Iterable[Column], asked: Mapping[str, str | None] | None = None) -> list[Column]:
    """Choose one metric per task and attack: the asked one, else the first of `PRIMARY`, else the task's first.

    Args:
        asked: names of the benchmarks that the run asks for, each with its metric if one is given. Where a benchmark's
            tasks are among them, the others (such as the 57 parts of mmlu) are left out, except for "name/part".
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


def mean_columns(columns: Iterable[Column]) -> dict[Column, list[Column]]:
    """Return the means over zero-shot tasks and over texts, as the paper's tables have them, with their members.

    Accuracies (acc, acc_norm) go together, and so do LongBench's sets; other metrics have a mean of their own.
    """
    groups: dict[tuple, list[Column]] = {}
    for column in columns:
        if column.benchmark in AVERAGED:
            kind = "acc" if column.metric in ACCURACIES else column.metric
            kind = "LongBench" if column.task.startswith(LONGBENCH) else kind
            key = (column.benchmark, kind, column.attack, column.attack_on, column.split)
            groups.setdefault(key, []).append(column)
    means, kinds = {}, {key[:2] for key in groups}
    for (benchmark, kind, attack, attack_on, split), members in groups.items():
        if len(members) > 1:
            several = kind == "LongBench" or sum(other[0] == benchmark for other in kinds) > 1
            title = f"{MEAN} {kind} of {len(members)}" if several else f"{MEAN} of {len(members)}"
            metric = members[0].metric if kind == "LongBench" else kind
            mean = Column(benchmark, title, metric, attack, attack_on, members[0].higher_is_better, split)
            means[mean] = members
    return means


def add_means(scores: Iterable[dict[Column, Cell]], columns: Iterable[Column]) -> list[Column]:
    """Add the `mean_columns` to the scores that have all members; the tasks' errors are assumed independent."""
    means = mean_columns(columns)
    for cells in scores:
        _add(means, cells)
    return list(means)


def _add(means: Mapping[Column, list[Column]], cells: dict[Column, Cell]) -> None:
    for mean, members in means.items():
        found = [cells[column] for column in members if column in cells]
        if len(found) == len(members):
            errors = [cell.stderr for cell in found if cell.stderr is not None]
            stderr = math.hypot(*errors) / len(found) if len(errors) == len(found) else None
            value = math.fsum(cell.value for cell in found) / len(found)
            how = tuple(dict.fromkeys(pair for cell in found for pair in cell.how))
            cells[mean] = Cell(value, stderr, sum(cell.n or 0 for cell in found) or None, how)


def named_scores(rows: Iterable[Mapping[str, Any]], asked: Mapping[str, str | None]) -> dict[str, float]:
    """Return one adapter's scores and means by `Column.name`; an attack on base rows goes before one on merged rows."""
    scores = {Column.of(row): Cell.of(row) for row in rows if row["value"] is not None}
    _add(_means(tuple(scores), tuple(asked.items())), scores)
    found: dict[str, float] = {}
    for column in sorted(scores, key=lambda column: column.attack_on or ""):
        found.setdefault(column.name, scores[column].value)
    return found


@lru_cache(maxsize=64)
def _means(columns: tuple[Column, ...], asked: tuple[tuple[str, str | None], ...]) -> dict[Column, list[Column]]:
    """Return the means of one adapter's columns: adapters of a run mostly have the same."""
    return mean_columns(primary_columns(columns, dict(asked)))


def is_part(column: Column, columns: Collection[Column]) -> bool:
    """Return whether the column belongs to a part ("spec_bench/math") of a task with its own column."""
    return "/" in column.task and any(other.task == column.task.rpartition("/")[0] for other in columns)


def place(column: Column) -> tuple:
    """Return a sort key of columns: by benchmark, scores without attack first; otherwise the order is kept."""
    section = SECTIONS.index(column.benchmark) if column.benchmark in SECTIONS else len(SECTIONS)
    attacked = column.attack != NO_ATTACK
    return column.split != "test", section, column.benchmark, attacked, column.attack, column.attack_on or ""
