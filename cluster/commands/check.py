"""What `macdrop cluster check` does before anything starts: every fault of a launch file, told at once, offline."""

from __future__ import annotations

from pathlib import Path

from cluster.check import kuberay, ray_yaml, slurm
from cluster.check.finding import ERROR, Finding, secret_findings
from cluster.core.launch_file import KUBERAY, RAY, ClusterFile, load

#: Exit code where there is an error.
BAD = 2


def run(path: Path, crd: Path | None = None) -> int:
    """Print what is wrong with a launch file; 0 where a launch may go on, else 2. Raises BadLaunchFile."""
    file = load(path)
    found = check(file, crd)
    table(found)
    errors = sum(finding.severity == ERROR for finding in found)
    counts = [
        f"{count} {word}{'s' * (count > 1)}"
        for count, word in ((errors, "error"), (len(found) - errors, "note"))
        if count
    ]
    least, most = file.workers
    workers = f"{least} to {most}" if least < most else f"{most}"
    print(f"{path}: {file.provider}, a head and {workers} more; {', '.join(counts) or 'nothing wrong found'}.")
    return BAD if errors else 0


def check(file: ClusterFile, crd: Path | None = None) -> list[Finding]:
    """All findings, errors first, each once. `crd`: folder with KubeRay's resource definitions."""
    found = list(secret_findings(file))
    if file.kind == RAY:
        found += ray_yaml.findings(file)
    elif file.kind == KUBERAY:
        found += kuberay.findings(file, crd)
    else:
        found += slurm.findings(file)
    return sorted(dict.fromkeys(found), key=lambda finding: finding.severity != ERROR)


def table(found: list[Finding]) -> None:
    """One row a finding: how bad, where, what and why, what to do."""
    if not found:
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in ("", "where", "what and why", "remedy"):
        rows.add_column(column, overflow="fold")
    for finding in found:
        color = "red" if finding.severity == ERROR else "yellow"
        what = Text(f"{finding.what}: {finding.why}")  # Text: nothing of the file is taken for markup
        rows.add_row(Text(finding.severity, color), Text(finding.where), what, Text(finding.remedy))
    console = Console()
    # A pipe or file gets wide rows, a terminal rows of its own width.
    (console if console.is_terminal else Console(width=160)).print(rows)
