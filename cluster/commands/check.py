"""`macdrop cluster check`: every fault of a launch file at once, offline, before anything starts."""

from __future__ import annotations

from pathlib import Path

from rich.text import Text

from cluster.backends.registry import backend_of, load
from cluster.check.finding import ERROR, Finding, secret_findings
from cluster.core.launch_file import LaunchFile
from cluster.core.tables import table
from cluster.errors import BadLaunchFile


def run(path: Path, crd: Path | None = None) -> int:
    """Report what is wrong with a launch file; return 0 if it can be launched, else 2. Raises BadLaunchFile."""
    return report(load(path), crd)


def report(file: LaunchFile, crd: Path | None = None) -> int:
    """Print the findings and a summary; return the exit code."""
    found = findings(file, crd)
    if found:
        headings = ("", "where", "what and why", "remedy")
        print(table(headings, map(_row, found)))
    errors = sum(finding.severity == ERROR for finding in found)
    counts = [_counted(errors, "error"), _counted(len(found) - errors, "note")]
    least, most = file.workers
    workers = f"{least} to {most}" if least < most else f"{most}"
    summary = ", ".join(filter(None, counts)) or "no problems found"
    print(f"{file.path}: {file.provider}, a head and {workers} more; {summary}.")
    return BadLaunchFile.exit_code if errors else 0


def findings(file: LaunchFile, crd: Path | None = None) -> list[Finding]:
    """All findings, errors first, without duplicates. `crd`: folder with KubeRay's resource definitions."""
    found = [*secret_findings(file), *backend_of(file).check(file, crd)]
    return sorted(dict.fromkeys(found), key=lambda finding: finding.severity != ERROR)


def _row(finding: Finding) -> tuple[Text | str, ...]:
    severity = Text(finding.severity, "red" if finding.severity == ERROR else "yellow")
    return severity, finding.where, f"{finding.what}: {finding.why}", finding.remedy


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count > 1)}" if count else ""
