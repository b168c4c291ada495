"""A report as CSV in long form: one line per score of a trial, with the comparison of its setting."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from tune.analysis.results import Line, ModelResults
from tune.analysis.verdict import Comparison, Verdict
from tune.report.escaping import csv_text
from tune.report.report import Report
from tune.storage.states import Stage

COMPARED = ("plain", "delta", "low", "high", "p", "p_holm", "mde")
"""Numbers of a `Comparison`: means over the seeds shared with plain, hence equal for all seeds of a setting."""


def text(reports: Iterable[Report]) -> str:
    """Render CSV with a header; trials without scores have one line, with the reason."""
    names, rows = score_rows(reports)
    return csv_text(names, ([row.get(name) for name in names] for row in rows))


def score_rows(reports: Iterable[Report]) -> tuple[list[str], Iterable[dict[str, Any]]]:
    """Return the names of the columns, and the lines, in which a column may be missing."""
    reports = list(reports)
    keys = dict.fromkeys(key for report in reports for model in report.models for key in model.keys)
    names = ["run", "model", "label", "trial", "arm", "stage", "setting", "cell", "seed", "status", "reason", "best"]
    names += [*keys, "benchmark", "task", "metric", "split", "attack", "attack_on", "higher_is_better"]
    names += ["value", "stderr", "n", *(f"compared_{key}" for key in COMPARED), "compared_verdict"]
    rows = (
        {"run": report.name, **row}
        for report in reports
        for model in report.models
        for line in model.lines
        for row in _rows(model, line, report.verdicts[model.name])
    )
    return names, rows


def _rows(model: ModelResults, line: Line, verdicts: list[Verdict]) -> Iterable[dict[str, Any]]:
    about: dict[str, Any] = {
        "model": model.display,
        "label": line.label,
        "trial": line.trial,
        "arm": line.arm,
        "stage": line.stage,
    }
    about |= {"setting": line.info.get("setting"), "cell": json.dumps(line.cell) if line.cell else None}
    about |= {"seed": line.seed, "status": line.status, "reason": line.reason, "best": line is model.best}
    about |= {key: line.setting(key) for key in model.keys}
    if not line.scores:
        yield about
    found: dict[Any, Comparison] = {}
    for verdict in verdicts:
        if (verdict.setting, verdict.arm) == (line.group, line.arm) and line.stage != Stage.SEARCH:
            found = {row.column: row for row in verdict.rows}
    for column in model.columns:
        if column not in line.scores:
            continue
        cell, compared = line.scores[column], found.get(column)
        row = {**about, **vars(column), "value": cell.value, "stderr": cell.stderr, "n": cell.n}
        if compared:
            row |= {f"compared_{key}": getattr(compared, key) for key in COMPARED}
            row["compared_verdict"] = compared.verdict
        yield row
