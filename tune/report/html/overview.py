"""Small multiples for the overview of many models: one figure for each, on axes that all of them share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tune.analysis.results import ModelResults
from tune.analysis.verdict import Verdict
from tune.report.html.attacks import attack_curve, attack_rows
from tune.report.html.drawing import draw, tidy
from tune.report.html.intervals import BELOW, STATUS, Row, interval_panel, reach, task_words
from tune.report.html.select import best_groups, cells, short_names, unit
from tune.report.svg_canvas import Canvas
from tune.storage.run_folder import BASE

CURVES = 150
"""CSS pixels of the panel of scores under attack."""
ZEROING = "zeroing"
Ends = tuple[float, float]


@dataclass(frozen=True)
class Multiple:
    """The part of a model that is drawn: its headlines, and the scores of its best settings as more rows are zeroed.

    rows: of `tune.report.html.attacks.HEAD`; place: whose rows are zeroed; measured: the unit of the scores.
    """

    model: ModelResults
    intervals: list[Row]
    rows: list[list[Any]]
    place: str
    measured: str

    @property
    def kind(self) -> tuple[str, bool | None]:
        """Unit and direction of the differences: models that have them in common share an axis."""
        first = self.intervals[0]
        return first.unit, first.comparison.column.higher_is_better


def small_multiples(models: Sequence[tuple[str, ModelResults, list[Verdict]]]) -> dict[str, str]:
    """Return the SVG of each model by its id, empty for a model without a verdict.

    models: the id, unique on the page, the results and the verdicts on MacDrop, best first.
    """
    found = {id: _multiple(model, verdicts) for id, model, verdicts in models}
    differences: dict[object, Ends] = {}
    scores: dict[str, Ends] = {}
    for one in filter(None, found.values()):
        differences[one.kind] = _wider(differences.get(one.kind), reach(one.intervals))
        if one.rows:
            ends = min(row[6] for row in one.rows), max(row[7] for row in one.rows)
            scores[one.measured] = _wider(scores.get(one.measured), ends)
    return {id: _drawn(id, one, differences, scores) if one else "" for id, one in found.items()}


def _multiple(model: ModelResults, verdicts: list[Verdict]) -> Multiple | None:
    first = verdicts[0] if verdicts else None
    main = (first.headline or first.attacked) if first else None
    if first is None or main is None:
        return None
    shown = [main] + ([first.attacked] if first.attacked and first.attacked is not main else [])
    intervals = [Row(one, *STATUS[one.verdict], heading=task_words(one.column, under=True)) for one in shown]
    intervals = [row for row in intervals if row.unit == intervals[0].unit]
    task = (main.column.benchmark, main.column.task, main.column.metric)
    columns = [column for column in model.shown if (column.benchmark, column.task, column.metric) == task]
    groups = best_groups(model, cells(model)[0])
    rows = [row for group in groups for row in attack_rows(group, columns) if row[2] in (ZEROING, "none")]
    places = sorted({row[4] for row in rows if row[2] == ZEROING})
    return Multiple(model, intervals, rows if places else [], places[0] if places else "", unit(main.column))


def _drawn(id: str, one: Multiple, differences: dict[object, Ends], scores: dict[str, Ends]) -> str:
    tall = sum(row.height for row in one.intervals)

    def paint(canvas: Canvas) -> None:
        ratios = [tall, CURVES - BELOW] if one.rows else [tall]
        panels = canvas.subplots(len(ratios), 1, squeeze=False, height_ratios=ratios)[:, 0]
        interval_panel(panels[0], one.intervals, *one.kind, differences[one.kind])
        if not one.rows:
            return
        axes, groups = panels[1], best_groups(one.model, cells(one.model)[0])
        for name, group in short_names(groups):
            mine = [row for row in one.rows if row[0] == group.label]
            attack_curve(axes, name, group, mine, ZEROING, one.place, [one.place])
        low, high = scores[one.measured]
        room = 0.05 * (high - low) or 1.0
        axes.set_ylim(low - room, high + room)
        axes.set_xticks(sorted({0, *(row[3] for row in one.rows if row[2] == ZEROING)}))
        tidy(axes, x=f"rows zeroed ({one.place})" if one.place != BASE else "rows k zeroed", y=one.measured)

    says = f"{one.model.display}: difference from the plain adapter, and scores as more rows are zeroed"
    return draw(f"{id}-small", tall + BELOW + (CURVES if one.rows else 0), paint, says=says)


def _wider(one: Ends | None, other: Ends) -> Ends:
    return other if one is None else (min(one[0], other[0]), max(one[1], other[1]))
