"""`macdrop compare`: one leaderboard of the models of several runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tune.cli.console import line, report_console
from tune.cli.options import Format, Runs, check_output

app = typer.Typer()


@app.command(epilog="Example: macdrop compare runs/llama runs/qwen runs/mistral")
def compare(
    runs: Runs,
    sort: Annotated[str | None, typer.Option(help="Column to sort by (default: the headline difference).")] = None,
    format: Format = "terminal",
    output: Annotated[Path | None, typer.Option(help="Also write it to this file (.md, .csv or .tex).")] = None,
) -> None:
    """Rank the models of several runs on one leaderboard: verdict, differences and scores side by side."""
    from tune.report.files import check_format, check_runs, read
    from tune.report.leaderboard import board, check_column, ordered, output_format, rows_of, text
    from tune.report.report import print_part
    from tune.storage.atomic import atomic_write_text

    check_format(format)
    check_output(output)
    check_runs(runs)
    check_column(sort)
    written = output_format(output) if output else None
    with read(runs) as made:
        rows = ordered([row for report in made for row in rows_of(report)], sort or "headline")
    if format == "terminal":
        print_part(report_console(), board(rows))
    else:
        print(text(rows, format), end="")
    if output and written:
        atomic_write_text(output, text(rows, written))
        if format == "terminal":
            line("written", str(output))
