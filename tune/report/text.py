"""Formatting of numbers, errors and column heads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from tune.config.eval_spec import NO_ATTACK
from tune.evaluation.score_names import Column

REASON_LENGTH = 300
"""Characters shown of an error; trial.json has the whole text."""


def number(value: float | str | None) -> str:
    """Format with four significant digits; text such as "inf" is kept, None and nan give an empty cell."""
    if value is None or value != value:
        return ""
    return value if isinstance(value, str) else format(value, "#.4g").removesuffix(".")


def factor_words(factor: Sequence[float | str | None]) -> str:
    """Format a factor with its interval, [value, low, high] as a proof stores it: "2.16 [1.9, 2.5]"."""
    value, low, high = (each if isinstance(each, str) or each is None else f"{each:.3g}" for each in factor)
    return f"{value}" if low is None else f"{value} [{low}, {high}]"


def probability(value: float | None) -> str:
    """Format a p-value; nan and None give an empty cell."""
    return "" if value is None or value != value else "<0.001" if value < 0.001 else f"{value:.3f}"


def setting(value: Any) -> str:
    """Format the value of a run file's key."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def hours(seconds: float | None) -> str:
    """Format seconds as hours, minutes or seconds, whichever reads best."""
    if seconds is None:
        return ""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def count(statuses: Iterable[str]) -> str:
    """Count statuses, as in "3 done, 1 failed"."""
    return ", ".join(f"{number} {status}" for status, number in Counter(statuses).items())


def one_line(text: str) -> str:
    return " ".join(text.split())


def short(text: str, length: int = REASON_LENGTH) -> str:
    """Shorten to one line of at most `length` characters."""
    line = one_line(text)
    return line if len(line) <= length else line[: length - 3] + "..."


def head(column: Column) -> str:
    """A column's head: one line each for task, metric, attack and attacked rows."""
    return "\n".join(filter(None, [column.task, column.metric])) + under(column, "\n")


def under(column: Column, separator: str) -> str:
    """The attack and the attacked rows, each after `separator`; empty without an attack."""
    if column.attack == NO_ATTACK:
        return ""
    return f"{separator}{column.attack}" + (f"{separator}{column.attack_on} rows" if column.attack_on else "")
