"""Terminal tables by rich, for what is checked and what is listed."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

#: Columns of a table that goes to a pipe or a file.
PIPED_WIDTH = 160


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table as text: as wide as the terminal, and colored only there. Cells are plain text, never markup."""
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in headings:
        made.add_column(heading, overflow="fold")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    terminal = sys.stdout.isatty()
    width = Console().width if terminal else PIPED_WIDTH
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal)
    with console.capture() as capture:
        console.print(made)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
