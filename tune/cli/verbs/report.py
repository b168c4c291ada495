"""`macdrop report`: the report of runs, printed and written to files."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from macdrop.errors import ConfigError
from tune.cli.console import line, report_console, warn
from tune.cli.options import Format, Runs
from tune.cli.options import check_output as check_file
from tune.errors import ResourceError

if TYPE_CHECKING:
    from tune.report.report import Report

#: Longest pause of `--watch`, in seconds: a day.
LONGEST_S = 86_400.0

app = typer.Typer()


@app.command(epilog="Example: macdrop report runs/demo --format markdown")
def report(
    runs: Runs,
    format: Format = "terminal",
    output: Annotated[Path | None, typer.Option(help="Folder for the files (default: the run's own).")] = None,
    archive: Annotated[
        Path | None,
        typer.Option(help="Also write the run's records, without adapters, to this .tar.xz: a run to report."),
    ] = None,
    watch: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Rewrite the files so often until the runs have ended.")
    ] = None,
) -> None:
    """Report runs, unfinished ones too: verdict, tables, figures; write report.html, .md, .csv, .tex, figures/."""
    from tune.report.files import check_format, check_output, check_runs, read, show
    from tune.storage.run_archive import check_archive, write_archive

    check_format(format)
    check_runs(runs)
    check_output(runs, output)
    check_file(archive, name="--archive")
    if archive:
        check_archive(archive, runs)
    if watch is not None:
        _check_watch(watch, runs, output, format)
        _watch(watch, runs, output)
    with read(runs) as made:
        written = _write(made, output)
        if archive:
            written += f", {write_archive(made[0].run_dir, archive)}"
        show(made, format, report_console())
    if format == "terminal":
        line("written", written)


def _check_watch(seconds: float, runs: list[Path], output: Path | None, format: str) -> None:
    """Refuse what cannot be watched with a ConfigError."""
    if not 0 < seconds <= LONGEST_S:
        raise ConfigError(f"--watch {seconds:g}: give seconds above 0 and up to {LONGEST_S:.0f}, for example 60.")
    if format != "terminal":
        raise ConfigError(
            f"--watch rewrites files of every format, and --format {format} prints one. Give one of the options."
        )
    if archives := [run for run in runs if not run.is_dir()]:
        raise ConfigError(f"--watch follows run folders, and {str(archives[0])!r} is not a folder. Leave --watch out.")
    if len(runs) > 1 and output is None:
        raise ConfigError("--watch writes the page of several runs into --output FOLDER. Name one.")


def _watch(seconds: float, runs: list[Path], output: Path | None) -> None:
    """Rewrite the files of a report while a process works in one of the runs.

    Raises:
        ResourceError: they cannot be written.
    """
    from tune.report.files import read, write
    from tune.storage.atomic import now

    while waiting := [run for run in runs if _is_running(run)]:
        with read(runs) as made:
            files = write(made, output or made[0].run_dir)
        line("written", f"{files[-1]} at {now()}; running: {', '.join(map(str, waiting))}")
        time.sleep(seconds)


def _is_running(run: Path) -> bool:
    from tune.storage.run_folder import RunFolder
    from tune.storage.run_lock import in_use
    from tune.storage.states import RunStatus

    return RunFolder.open(run, lenient=True).run().get("status") == RunStatus.RUNNING and in_use(run)


def _write(made: list[Report], output: Path | None) -> str:
    """Write reports where they belong; return the paths, or why there are none."""
    from tune.report.files import write

    if output:
        return ", ".join(map(str, write(made, output)))
    if len(made) > 1:
        return "nothing: several runs go into files by --output FOLDER"
    if made[0].run_folder.archive:
        return "nothing: the report of an archive goes into files by --output FOLDER"
    return write_report(made, made[0].run_dir)


def write_report(made: list[Report], folder: Path) -> str:
    """Write reports into a folder that nobody named; return the paths, or that it cannot be written."""
    from tune.report.files import write

    try:
        return ", ".join(map(str, write(made, folder)))
    except ResourceError as error:  # a run may be read-only; the report can be shown all the same
        reason = str(error).partition("\n")[0]
        warn(f"macdrop: {reason} The report goes elsewhere by --output FOLDER.")
        return f"nothing: {reason}"
