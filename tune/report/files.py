"""Reports printed in one of several formats, or written to files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from macdrop.errors import ConfigError, nearest
from tune.report.csv_rows import text as csv_text
from tune.report.html.page import write_page
from tune.report.report import Report, make_report
from tune.storage.atomic import atomic_write_text
from tune.storage.run_archive import unpacked

if TYPE_CHECKING:
    from rich.console import Console


FORMATS = ("terminal", "markdown", "csv", "latex")
BRIEF = ("verdict", "weights", "paper", "comparisons")
"""Parts of a report that are printed at the end of a sweep."""


@contextmanager
def read(runs: Sequence[Path]) -> Iterator[list[Report]]:
    """Yield the reports of runs; those that share a name are named by their folders or archives.

    Archives lie unpacked in temporary folders meanwhile: a report reads some files only when they are shown.

    Raises:
        ConfigError: neither a run folder nor the archive of one.
    """
    with unpacked(runs) as folders:
        pairs = list(zip(folders, runs, strict=True))
        made = [make_report(folder, archive=run if run != folder else None) for folder, run in pairs]
        names = [each.name for each in made]
        yield [
            replace(each, name=str(run)) if names.count(each.name) > 1 else each
            for each, run in zip(made, runs, strict=True)
        ]


def show(reports: Sequence[Report], format: str, console: Console, keys: Sequence[str] | None = None) -> None:
    """Print reports in a format; "terminal" prints to `console`, only the parts named in `keys` if given."""
    if format == "terminal":
        for made in reports:
            made.terminal(console, keys)
    else:
        print(text(reports, format), end="")


def text(reports: Sequence[Report], format: str) -> str:
    """Render reports one after another; as CSV in one table."""
    if format == "csv":
        return csv_text(reports)
    return "\n".join(made.markdown() if format == "markdown" else made.latex() for made in reports)


def write(reports: Sequence[Report], folder: Path) -> list[Path]:
    """Write report.md, .csv, .tex, .html and figures/ into a folder, and nothing elsewhere; return the reports' paths.

    Raises:
        ResourceError: the folder is not writable.
    """
    endings = {"markdown": "md", "csv": "csv", "latex": "tex"}
    page = write_page(list(reports), folder / "report.html")[0]  # first: it builds parts in several processes
    return [*(atomic_write_text(folder / f"report.{end}", text(reports, name)) for name, end in endings.items()), page]


def check_format(format: str, formats: Sequence[str] = FORMATS) -> None:
    """Refuse an unknown format with a ConfigError."""
    if format not in formats:
        raise ConfigError(f"unknown --format {format!r}.{nearest(format, formats)} Formats: {', '.join(formats)}.")


def check_runs(runs: Sequence[Path]) -> None:
    """Refuse a run that is given twice with a ConfigError."""
    seen: dict[Path, Path] = {}
    for run in runs:
        if (first := seen.setdefault(run.resolve(), run)) is not run:
            raise ConfigError(f"The run {str(run)!r} is given twice (first as {str(first)!r}). Give each run once.")


def check_output(runs: Sequence[Path], output: Path | None) -> None:
    """Refuse an output folder that is a file or another run's folder with a ConfigError."""
    if output is None:
        return
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output {str(output)!r} is a file. Give a folder.")
    if (output / "run.json").exists() and [run.resolve() for run in runs] != [output.resolve()]:
        raise ConfigError(
            f"--output {str(output)!r} is another run's folder, whose report would be overwritten. Give another folder."
        )
