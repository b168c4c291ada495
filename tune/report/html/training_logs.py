"""The logged steps of the trials that a page shows."""

from __future__ import annotations

from typing import Any

from tune.analysis.results import Line, ModelResults
from tune.report.html.select import best_groups, cells
from tune.storage.run_folder import BASE, RunFolder

Logged = dict[str, list[dict[str, Any]]]
"""Trial -> its logged steps."""
Logs = Logged | str
"""The logged steps, or why they cannot be read."""


def read_logs(run_folder: RunFolder, model: ModelResults) -> Logs:
    """Read the steps of each trial whose training is drawn (`select.best_groups` of each cell)."""
    groups = [group for cell in cells(model) for group in best_groups(model, cell) if group.arm != BASE]
    try:
        return {line.trial: _logged(run_folder, line) for group in groups for line in group.lines}
    except Exception as error:  # a damaged or half-written file may raise anything
        return f"{type(error).__name__}: {error}"


def _logged(run_folder: RunFolder, line: Line) -> list[dict[str, Any]]:
    """A trial's logged steps, with `dropped` as a percentage of the entries that the step's masks cover."""
    rows = [row for row in run_folder.trial(line.trial).metrics() if isinstance(row.get("step"), int)]
    total, steps = line.info.get("entries_masked"), line.info.get("step")
    for row in rows:
        masked = row.get("entries_masked") or (total / steps if total and steps else None)
        if masked and row.get("entries_dropped") is not None:
            row["dropped"] = 100 * row["entries_dropped"] / masked
    return rows
