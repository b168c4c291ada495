"""`macdrop report`: what runs say, printed and written to files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tune.report.files import check_format, check_output, check_runs, read, show, write

if TYPE_CHECKING:

    pass


def report(runs: Sequence[Path], *, format: str, output: Path | None) -> None:
    """Print the report of runs and write it: of one run into its own folder, of several into `output` if it is given.

    The numbers of the page's figures always go to figures/ of their run.

    Raises:
        ConfigError: an unknown format, a folder that is no run, a run given twice, an `output` that cannot be used.
        ResourceError: the files cannot be written; what is printed has been.
    """
    from tune.cli.console import line, report_console

    check_format(format)
    check_runs(runs)
    check_output(runs, output)
    made = read(runs)
    show(made, format, report_console())
    folder = output or (made[0].run_dir if len(made) == 1 else None)
    written = write(made, folder) if folder else []
    if format == "terminal":
        told = ", ".join(map(str, written)) if written else "nothing: several runs go into files by --output FOLDER"
        line("written", told)
