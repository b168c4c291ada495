"""Printing for the verbs: one console, lines of a name and a text, tables that survive a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

from rich.console import Console
from rich.table import Table

#: Columns where the output is not a terminal: a table cut at 80 would be useless in a file.
PIPED_WIDTH = 200

#: Columns of a report that goes into a pipe.
PIPED_REPORT_WIDTH = 120

console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)


def line(name: str, text: str, width: int = 13) -> None:
    """Print a name in bold, then a text that is never wrapped, so that paths can be copied."""
    console.print(f"[bold]{name:<{width}}[/bold]", end=" ")
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def lines(pairs: Iterable[tuple[str, str]]) -> None:
    """Print several lines with their texts aligned."""
    pairs = list(pairs)
    width = max(len(name) for name, _ in pairs)
    for name, text in pairs:
        line(name, text, width + 1)


def table(*headings: str, left: Iterable[str] = ()) -> Table:
    """Return an empty table without rules; columns are right-justified, except those named in `left`."""
    made = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for heading in headings:
        made.add_column(heading, justify="left" if heading in left else "right", no_wrap=True)
    return made


def report_console() -> Console:
    """Return the console for wide tables."""
    return console if sys.stdout.isatty() else Console(width=PIPED_REPORT_WIDTH)


def asked_by() -> Callable[[str], bool] | None:
    """Return a function that asks the user a yes-or-no question; None if there is no terminal to ask at."""
    if not sys.stdin.isatty():
        return None
    return lambda question: console.input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
