"""A table of text: cut to a width, as Markdown, as a rich table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table as RichTable


@dataclass(frozen=True)
class Table:
    """Cells are text; a column head may have several lines."""

    title: str
    head: list[str]
    rows: list[list[str]]

    def widths(self) -> list[int]:
        """Characters that each column takes, its border included."""
        cells = zip(self.head, *self.rows, strict=True)
        return [max(len(line) for cell in column for line in cell.split("\n")) + 3 for column in cells]

    def split(self, width: int) -> list[Table]:
        """Cut into tables of at most `width` characters (or one data column each), all with the first column."""
        widths = self.widths()
        groups: list[list[int]] = [[]]
        for column in range(1, len(self.head)):
            if groups[-1] and widths[0] + sum(widths[i] for i in groups[-1]) + widths[column] > width:
                groups.append([])
            groups[-1].append(column)
        tables = []
        for number, group in enumerate(groups, 1):
            title = self.title if len(groups) == 1 else f"{self.title} ({number} of {len(groups)})"
            picked = [0, *group]
            rows = [[row[i] for i in picked] for row in self.rows]
            tables.append(Table(title, [self.head[i] for i in picked], rows))
        return tables

    def markdown(self) -> str:
        rows = [[cell.replace("\n", " ").replace("|", "\\|") for cell in row] for row in (self.head, *self.rows)]
        rows.insert(1, ["---"] * len(self.head))
        return f"**{self.title}**\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows)

    def rich(self) -> RichTable:
        """As a table of rich's."""
        from rich.markup import escape
        from rich.table import Table as RichTable

        drawn = RichTable(title=escape(self.title), title_justify="left", title_style="bold")
        tallest = max(head.count("\n") for head in self.head)
        for number, head in enumerate(self.head):
            padded = head + "\n" * (tallest - head.count("\n"))  # rich would put short heads at the bottom
            drawn.add_column(escape(padded), justify="right" if number else "left", overflow="fold")
        for row in self.rows:
            drawn.add_row(*map(escape, row))
        return drawn
