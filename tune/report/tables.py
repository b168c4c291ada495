"""Tables of text, rendered as Markdown, rich, LaTeX (booktabs) and HTML, and the parts of a report.

None is written by pandas: `to_html` has no captions, no scopes for screen readers and no classes for the columns of
numbers, `to_markdown` pads cells, needs tabulate, and leaves "|" unescaped, and `to_latex`, whose text this is to the
byte (a test compares them), takes ten milliseconds a table, of which a report of many models has thousands.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tune.report.escaping import html_text, latex_text, markdown_text, rich_text

if TYPE_CHECKING:
    from rich.table import Table as RichTable

#: A number in a cell: sign and digits, a unit, then an error or an interval.
NUMBER = re.compile(r"[<+\-]?(\d|inf\b)[\d.,e+\-]*\s*(%|[a-zA-Z]{1,6})?(\s*[±\[(].*)?")


@dataclass(frozen=True)
class Table:
    """A table of text cells; column heads may have several lines. `wrap`: cells are prose, wrapped and never split."""

    title: str
    head: list[str]
    rows: list[list[str]]
    wrap: bool = False

    def widths(self) -> list[int]:
        """Width of each column in characters, including its border."""
        cells = zip(self.head, *self.rows, strict=True)
        return [max(len(line) for cell in column for line in cell.split("\n")) + 3 for column in cells]

    def numeric(self) -> list[bool]:
        """Flags of columns that hold only numbers and empty cells, and so are aligned right."""
        columns = [[row[i] for row in self.rows if row[i]] for i in range(len(self.head))]
        return [bool(cells) and all(map(NUMBER.fullmatch, cells)) for cells in columns]

    def split(self, width: int) -> list[Table]:
        """Split into tables of at most `width` characters (or one data column each), all with the first column."""
        if self.wrap:
            return [self]
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
        rows = [[markdown_text(cell).replace("|", "\\|") for cell in row] for row in (self.head, *self.rows)]
        rows.insert(1, ["---:" if number else "---" for number in self.numeric()])
        return f"**{markdown_text(self.title)}**\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows)

    def latex(self) -> str:
        """A `table` environment with booktabs; heads of several lines take several rows."""
        share = f"p{{{0.9 / len(self.head):.2f}\\linewidth}}"
        spec = "".join(share if self.wrap else "r" if number else "l" for number in self.numeric())
        heads = [cell.split("\n") for cell in self.head]
        stacked = [
            [latex_text(head[i]) if i < len(head) else "" for head in heads] for i in range(max(map(len, heads)))
        ]
        rows = (
            [" & ".join(row) + r" \\" for row in stacked],
            [" & ".join(_latex_cells(row)) + r" \\" for row in self.rows],
        )
        return "\n".join(
            [
                r"\begin{table}[htbp]",
                r"\centering",
                rf"\caption{{{latex_text(self.title)}}}",
                rf"\begin{{tabular}}{{{spec}}}",
                r"\toprule",
                *rows[0],
                r"\midrule",
                *rows[1],
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
            ]
        )

    def html(self) -> str:
        """A `table` element with a caption and scopes; cells of numbers have the class `number`."""
        classes = [' class="number"' if number else "" for number in self.numeric()]
        heads = zip(self.head, classes, strict=True)
        head = "".join(f'<th scope="col"{kind}>{html_text(cell)}</th>' for cell, kind in heads)
        body = []
        for row in self.rows:
            cells = zip(row[1:], classes[1:], strict=True)
            data = "".join(f"<td{kind}>{html_text(cell)}</td>" for cell, kind in cells)
            body.append(f'<tr><th scope="row">{html_text(row[0])}</th>{data}</tr>')
        caption = f"<caption>{html_text(self.title)}</caption>"
        rows = "\n".join(body)
        return f"<table>{caption}\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table>"

    def rich(self) -> RichTable:
        """Convert to a rich table."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table as RichTable

        drawn = RichTable(
            title=rich_text(self.title), title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_lines=self.wrap
        )
        tallest = max(head.count("\n") for head in self.head)
        for head, number in zip(self.head, self.numeric(), strict=True):
            padded = head + "\n" * (tallest - head.count("\n"))  # rich would put short heads at the bottom
            drawn.add_column(rich_text(padded), justify="right" if number else "left", overflow="fold")
        for row in self.rows:
            drawn.add_row(*map(rich_text, row))
        return drawn


@dataclass(frozen=True)
class Part:
    """One part of the report on a model: sentences, then tables. An empty part is false and omitted."""

    title: str
    lines: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.lines or self.tables)


def _latex_cells(row: list[str]) -> list[str]:
    cells = [latex_text(cell) for cell in row]
    if cells[0].startswith(("[", "*")):  # after \\ they would be its argument
        cells[0] = "{}" + cells[0]
    return cells
