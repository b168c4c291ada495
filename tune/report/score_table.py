"""The score table of one model, with attacks as columns, for `macdrop eval`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tune.config.recorded import asked_for
from tune.evaluation.score_names import Cell, Column, add_means, place, primary_columns
from tune.report.tables import Table


def score_table(title: str, rows: Iterable[Mapping[str, Any]], config: Mapping[str, Any]) -> Table:
    """Scores of one model: one row per metric and mean, one column per attack; value ± standard error."""
    scores = {Column.of(row): Cell.of(row) for row in rows if row["value"] is not None}
    add_means([scores], primary_columns(scores, asked_for(config)))
    names = dict.fromkeys((c.benchmark, c.task, c.metric) for c in sorted(scores, key=lambda c: place(c)[1]))
    attacks = dict.fromkeys((c.attack, c.attack_on) for c in scores)
    heads = ["no attack" if on is None else f"{attack}\non {on}" for attack, on in attacks]
    lines = []
    for benchmark, task, metric in names:
        cells = [scores.get(Column(benchmark, task, metric, *attack)) for attack in attacks]
        size = max((cell.n or 0 for cell in cells if cell), default=0)
        lines.append([f"{benchmark}/{task}/{metric}", str(size or ""), *map(_cell, cells)])
    return Table(title, ["score", "n", *heads], lines)


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return ""
    return f"{cell.value:.4g}" + ("" if cell.stderr is None else f" ± {cell.stderr:.2g}")
