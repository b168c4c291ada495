"""`macdrop report`: the report of runs, printed and written to files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tune.cli.console import line, report_console
from tune.cli.options import Format, Runs

app = typer.Typer()


@app.command(epilog="Example: macdrop report runs/demo --format markdown")
def report(
    runs: Runs,
    format: Format = "terminal",
    output: Annotated[Path | None, typer.Option(help="Folder for the files (default: the run's own).")] = None,
) -> None:
    """Report runs, unfinished ones too: verdict, tables, figures; write report.html, .md, .csv, .tex, figures/."""
    from tune.report.files import check_format, check_output, check_runs, read, show, write

    check_format(format)
    check_runs(runs)
    check_output(runs, output)
    made = read(runs)
    show(made, format, report_console())
    # Of several runs nothing is written unless asked; the figures' numbers always go to figures/ of their run.
    folder = output or (made[0].run_dir if len(made) == 1 else None)
    written = write(made, folder) if folder else []
    if format == "terminal":
        nothing = "nothing: several runs go into files by --output FOLDER"
        line("written", ", ".join(map(str, written)) or nothing)
