"""`macdrop report`: the report of runs, printed and written to files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tune.cli.console import line, report_console, warn
from tune.cli.options import Format, Runs
from tune.errors import ResourceError

if TYPE_CHECKING:
    from tune.report.report import Report

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
    written = "nothing: several runs go into files by --output FOLDER"
    if output:
        written = ", ".join(map(str, write(made, output)))
    elif len(made) == 1:
        written = write_report(made, made[0].run_dir)
    show(made, format, report_console())
    if format == "terminal":
        line("written", written)


def write_report(made: list[Report], folder: Path) -> str:
    """Write reports into a folder that nobody named; return the paths, or that it cannot be written."""
    from tune.report.files import write

    try:
        return ", ".join(map(str, write(made, folder)))
    except ResourceError as error:  # a run may be read-only; the report can be shown all the same
        reason = str(error).partition("\n")[0]
        warn(f"macdrop: {reason} The report goes elsewhere by --output FOLDER.")
        return f"nothing: {reason}"
