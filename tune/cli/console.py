"""Printing for the verbs: one console, lines of a name and a text, tables that survive a pipe.

Strings are never markup: a style is given by `style=`, or by `tune.report.escaping.rich_text`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

from tune.cli.streams import is_terminal
from tune.report.escaping import rich_text, visible

#: Columns where the output is not a terminal: a table cut at 80 would be useless in a file.
PIPED_WIDTH = 200

#: Columns of a report that goes into a pipe.
PIPED_REPORT_WIDTH = 120


class PlainConsole(Console):
    """A rich console that takes no string for markup or emoji, and shows control characters."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**settings, "markup": False, "emoji": False, "highlight": False})

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **{**options, "markup": False, "emoji": False})

    def status(self, status: Any, **options: Any) -> Status:
        return super().status(rich_text(status) if isinstance(status, str) else status, **options)


console = PlainConsole(width=None if is_terminal(sys.stdout) else PIPED_WIDTH)


def line(name: str, text: str, width: int = 13) -> None:
    """Print a name in bold, then a text that is never wrapped, so that paths can be copied."""
    console.print(rich_text((f"{name:<{width}}", "bold"), " ", text), soft_wrap=True)


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


def warn(text: str) -> None:
    """Print a message to standard error."""
    print(visible(text), file=sys.stderr)


def report_console() -> Console:
    """Return the console for wide tables."""
    return console if is_terminal(sys.stdout) else PlainConsole(width=PIPED_REPORT_WIDTH)


def asked_by() -> Callable[[str], bool] | None:
    """Return a function that asks the user a yes-or-no question; None if there is no terminal to ask at."""
    return _agrees if is_terminal(sys.stdin) else None


def _agrees(question: str) -> bool:
    console.print(f"{question} [y/N] ", end="")
    try:
        return input().strip().lower() in ("y", "yes")
    except (EOFError, OSError, UnicodeError):  # the terminal has gone, or sends what is not text
        return False
