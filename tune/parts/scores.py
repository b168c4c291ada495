"""Scores as tables: each benchmark with its attacks."""

from __future__ import annotations

from tune.columns import EVAL_LOSS, Column
from tune.parts.subject import Subject
from tune.results import Group, ModelResults
from tune.tables import Part, Table
from tune.wording import error, head, number


def paper(subject: Subject) -> Part:
    """Scores of base, plain and MacDrop."""
    model = subject.model
    primary = [column for column in model.shown if column != EVAL_LOSS and not is_part(column, model.shown)]
    tables = []
    for benchmark in dict.fromkeys(column.benchmark for column in primary):
        tables.append(_table(model, benchmark, [column for column in primary if column.benchmark == benchmark]))
    return Part("Scores", [], tables)


def generations(subject: Subject) -> Part:
    """Answers side by side."""
    return Part("Generations")


def is_part(column: Column, columns: list[Column]) -> bool:
    """Whether the column is of a part ("spec_bench/math") of a task that has a column of its own."""
    return "/" in column.task and any(other.task == column.task.rpartition("/")[0] for other in columns)


def _table(model: ModelResults, title: str, columns: list[Column]) -> Table:
    rows = [[group.label, *(_cell(group, column) for column in columns)] for group in model.groups]
    return Table(title, ["", *(head(column) for column in columns)], [row for row in rows if any(row[1:])])


def _cell(group: Group, column: Column) -> str:
    found = group.spread(column)
    return "" if found is None else number(found.value) + error(found.sd)
