"""Forest plots: differences from the plain adapter with their intervals, improvements to the right."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tune.analysis.display_names import arm_name
from tune.analysis.results import ModelResults
from tune.analysis.verdict import Comparison, Verdict
from tune.config.eval_spec import NO_ATTACK
from tune.config.sections import Arm
from tune.evaluation.item_values import RATIOS
from tune.evaluation.score_names import Column
from tune.report.html.drawing import colour, draw, signed
from tune.report.html.figure import Figure, words_to_name
from tune.report.html.select import MARKERS, attack_words, cell_words, difference_unit, is_share, tint
from tune.report.html.training import Logs
from tune.report.svg_canvas import Canvas
from tune.report.svg_panel import Panel

STATUS = {"helps": ("helps", ">"), "hurts": ("hurts", "<"), "cannot tell": ("unsure", "o")}
"""Verdict -> colour and mark."""
HEAD = [
    "setting",
    "arm",
    "task",
    "metric",
    "attack",
    "attacked_rows",
    "unit",
    "difference",
    "low",
    "high",
    "p",
    "p_holm",
    "detectable",
    "verdict",
    "seeds",
    "items",
    "per_seed",
]
ATTACKS = 3
"""Number of forest plots by attack: none, the headline's, one more; tables and curves show all."""
TALL, SHORT, HEADING, BELOW = 33, 19, 22, 48
"""CSS pixels: a row below its label, a row next to its label, a task's heading, an axis."""


@dataclass(frozen=True)
class Row:
    """One interval, labelled by a `heading` above it or by `words` next to it."""

    comparison: Comparison
    tone: str
    mark: str
    heading: str = ""
    words: str = ""

    @property
    def height(self) -> int:
        if not self.words:
            return TALL
        return SHORT + HEADING * bool(self.heading)

    @property
    def scale(self) -> float:
        """Factor of differences: 100 for proportions, to give points; perplexities are in percent of plain's."""
        if self.relative:
            return 100 / self.comparison.plain
        return 100 if is_share(self.comparison.column.metric) else 1

    @property
    def relative(self) -> bool:
        return self.comparison.column.metric.partition(",")[0] in RATIOS and self.comparison.plain > 0

    @property
    def unit(self) -> str:
        return "perplexity, % of plain" if self.relative else difference_unit(self.comparison.column)


def verdict_figures(logs: Logs, model: ModelResults, verdicts: list[Verdict]) -> Iterator[Figure]:
    """Draw for each finalist the headline, also under attack, and each task without attack."""
    for number, verdict in enumerate((one for one in verdicts if one.arm == Arm.MACDROP), 1):
        first = [one for one in (verdict.headline, verdict.attacked) if one]
        shown = {one.column: one for one in first}
        shown |= {one.column: one for one in verdict.rows if one.column.attack == NO_ATTACK and one.column not in shown}
        rows = [Row(one, *STATUS[one.verdict], heading=task_words(one.column, under=True)) for one in shown.values()]
        caption = (
            "Difference from the plain adapter: mean over seeds and 95 % interval; small dots are individual seeds."
        )
        name = words_to_name("verdict", str(number))
        yield forest_plot(model, name, "verdict", f"{verdict.label}, by task", caption, rows)


def comparison_figures(logs: Logs, model: ModelResults, verdicts: list[Verdict]) -> Iterator[Figure]:
    """Draw for each attack and cell every task, with finalists and placebos one below another."""
    by_cell: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        by_cell.setdefault(cell_words(verdict.cell), []).append(verdict)
    if not by_cell:
        missing = "No setting shares a seed with a trained plain adapter yet."
        yield Figure("comparisons", "comparisons", "All comparisons", missing)
    headline = [one.attacked.column for one in verdicts if one.attacked]
    first = [(NO_ATTACK, None), *((column.attack, column.attack_on) for column in headline)]
    attacks = dict.fromkeys((row.column.attack, row.column.attack_on) for one in verdicts for row in one.rows)
    for attack in sorted(attacks, key=lambda attack: first.index(attack) if attack in first else len(first))[:ATTACKS]:
        for cell, members in by_cell.items():
            columns = dict.fromkeys(row.column for one in members for row in one.rows)
            under = [column for column in columns if (column.attack, column.attack_on) == attack]
            if under:
                yield _compared(model, cell if len(by_cell) > 1 else "", members, under)


def _compared(model: ModelResults, cell: str, members: list[Verdict], columns: list[Column]) -> Figure:
    names, arms = _short_names(members), [one.arm for one in members]
    rows: list[Row] = []
    for column in sorted(columns, key=lambda column: not column.task.startswith("mean ")):
        named = [(name, row) for name, one in zip(names, members, strict=True) for row in one.rows]
        found = [(name, row) for name, row in named if row.column == column]
        for number, (name, row) in enumerate(found):
            heading = "" if number else task_words(column)
            rows.append(Row(row, tint(row.arm), MARKERS.get(row.arm, "o"), heading, name))
    first = columns[0]
    under = attack_words(first) or "no attack"
    title = f"All arms, {under}" + (f", {cell}" if cell else "")
    settings = "; ".join(
        f"{name}: {one.label.removeprefix('MacDrop').strip()}"
        for name, one in zip(names, members, strict=True)
        if one.arm == Arm.MACDROP
    )
    caption = (
        "Difference from the plain adapter of the same seeds and 95 % interval; small dots are individual seeds. "
        f"{settings}" + ("; placebos use the same values." if set(arms) - {"macdrop"} else ".")
    )
    name = words_to_name("comparisons", first.attack, first.attack_on or "", cell)
    return forest_plot(model, name, "comparisons", title, caption, rows)


def forest_plot(model: ModelResults, name: str, part: str, title: str, caption: str, rows: list[Row]) -> Figure:
    if not rows:
        return Figure(name, part, title, "Nothing to compare yet.")
    panels: dict[tuple, list[Row]] = {}
    for row in rows:
        panels.setdefault((row.unit, row.comparison.column.higher_is_better), []).append(row)
    heights = [sum(row.height for row in found) for found in panels.values()]

    def paint(canvas: Canvas) -> None:
        drawn = canvas.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, ((unit, higher), found) in zip(drawn, panels.items(), strict=True):
            interval_panel(axes, found, unit, higher)

    seeds = sorted({len(row.comparison.seeds) for row in rows})
    if any(math.isfinite(row.comparison.mde) for row in rows):
        caption += " Differences within the grey band are missed by such a run more than one time in five."
    caption += f" Seeds: {' to '.join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))}."
    table = [_numbers(row) for row in rows]
    svg = draw(f"{model.name}-{name}", sum(heights) + BELOW * len(panels), paint, says=f"{title}. {caption}")
    return Figure(name, part, title, caption, svg, HEAD, table)


def interval_panel(
    axes: Panel, rows: list[Row], unit: str, higher: bool | None, ends: tuple[float, float] | None = None
) -> None:
    """Draw the rows of one unit from the top down; the y axis is in CSS pixels. ends: of the x axis, if not theirs."""
    low, high, top = *(ends or reach(rows)), 0.0
    known = [abs(row.scale * row.comparison.delta) for row in rows if math.isfinite(row.comparison.delta)]
    widest = max(known, default=1.0)
    margin = 0.04 * (high - low)
    axes.set_xlim(low - margin, high + margin)
    for row in rows:
        y = top + row.height - (SHORT / 2 if row.words else 11)
        _interval(axes, row, y)
        at, delta = ("axes fraction", "data"), row.scale * row.comparison.delta
        text = signed(delta, widest) if math.isfinite(delta) else "?"
        tone, heading = colour(row.tone), y - (SHORT + HEADING) / 2 + 1 if row.words else y - 16
        if row.heading:
            axes.annotate(
                row.heading,
                (0, heading),
                xycoords=at,
                va="center",
                weight="bold" if row.words else "normal",
                fontsize=10.5,
            )
        if row.words:
            axes.annotate(row.words, (-0.02, y), xycoords=at, va="center", ha="right", color=tone, fontsize=10)
            axes.annotate(text, (1.02, y), xycoords=at, va="center", color=tone, fontsize=10)
        else:
            axes.annotate(text, (1, heading), xycoords=at, va="center", ha="right", color=tone, weight="bold")
        top += row.height
    axes.set_ylim(top, 0)
    axes.set_yticks([])
    if higher is False:
        axes.invert_xaxis()
    axes.locator_params(axis="x", nbins=6)
    side = "" if higher is None else ", better →" if higher else ", axis reversed: better →"
    axes.set_xlabel(f"difference in {unit}{side}")
    axes.spines[["top", "left", "right"]].set_visible(False)


def _interval(axes: Panel, row: Row, y: float) -> None:
    """Draw one interval; unknown numbers are skipped, and an interval beyond the axis ends in an arrow."""
    one, scale, tone = row.comparison, row.scale, colour(row.tone)
    left, right = axes.get_xlim()
    axes.plot([0, 0], [y - 9, y + 9], color=colour("soft"), linewidth=1, zorder=1)
    if not math.isfinite(one.delta):
        return
    if math.isfinite(one.mde):
        axes.barh(y, 2 * scale * one.mde, left=-scale * one.mde, height=12, color=colour("band"), zorder=0)
    if math.isfinite(one.low) and math.isfinite(one.high):
        low, high = max(scale * one.low, left), min(scale * one.high, right)
        axes.plot([low, high], [y, y], color=tone, linewidth=2.2, zorder=2)
        marks = "><" if one.column.higher_is_better is False else "<>"  # such an axis is reversed
        for edge, cut, mark in zip((left, right), (low > scale * one.low, high < scale * one.high), marks, strict=True):
            if cut:
                axes.plot(edge, y, mark, color=tone, markersize=6, clip_on=False, zorder=2)
    axes.plot(
        [scale * seed for seed in one.per_seed],
        [y] * len(one.per_seed),
        "o",
        color=colour("card"),
        markeredgecolor=colour("ink"),
        markeredgewidth=0.7,
        markersize=3,
        zorder=4,
    )
    axes.plot(scale * one.delta, y, row.mark, color=tone, markersize=7, zorder=3)


def reach(rows: list[Row]) -> tuple[float, float]:
    """Limits of the axis, around 0: those of the intervals, unless they dwarf all measurements."""
    ends, seen = [0.0], [0.0]
    for row in rows:
        one = row.comparison
        ends += [row.scale * x for x in (one.low, one.high) if math.isfinite(x)]
        seen += [row.scale * x for x in (one.delta, *one.per_seed) if math.isfinite(x)]
    most = 25 * max(map(abs, seen))
    low, high = (max(min(ends), -most), min(max(ends), most)) if most else (min(ends), max(ends))
    low, high = min(low, *seen), max(high, *seen)
    return (low, high) if high > low else (-1.0, 1.0)


def task_words(column: Column, *, under: bool = False) -> str:
    """Label a task, such as "arc_easy": with the metric unless it is the usual one, with the attack if `under`."""
    metric = column.metric.partition(",")[0].replace("_", " ")
    words = column.task or "validation loss"
    if column.task and metric not in ("acc", "perplexity", "word perplexity"):
        words += f" {metric}"
    attack = attack_words(column) if under else ""
    return words + (f", {attack}" if attack else "")


def _short_names(members: list[Verdict]) -> list[str]:
    arms = [one.arm for one in members]
    return [
        arm_name(arm) + (f" {arms[: place + 1].count(arm)}" if arms.count(arm) > 1 else "")
        for place, arm in enumerate(arms)
    ]


def _numbers(row: Row) -> list[Any]:
    """Numbers as drawn: proportions in points, perplexities in percent of the plain adapter's."""
    one, scale = row.comparison, row.scale
    column = one.column
    about: list[Any] = [one.label, one.arm, column.task, column.metric, column.attack, column.attack_on or ""]
    sizes = [scale * value for value in (one.delta, one.low, one.high)]
    about += [row.unit, *sizes, one.p, one.p_holm, scale * one.mde]
    return [*about, one.verdict, len(one.seeds), one.items, " ".join(str(scale * seed) for seed in one.per_seed)]
