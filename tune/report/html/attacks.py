"""Attack curves: scores over the number of attacked rows, in base or merged weights."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from typing import Any

from macdrop.attack import ATTACKS, Attack
from tune.analysis.results import Group, ModelResults
from tune.analysis.verdict import Verdict
from tune.config.eval_spec import NO_ATTACK
from tune.evaluation.score_names import EVAL_LOSS, Column
from tune.report.html.drawing import LEGEND, colour, draw, legend, plain_log, tidy
from tune.report.html.figure import Figure, words_to_name
from tune.report.html.select import (
    DASHES,
    MARKERS,
    Cell,
    best_groups,
    better,
    cells,
    front,
    seeds_words,
    settings_words,
    short_names,
    tint,
    unit,
    values,
)
from tune.report.html.training import Logs
from tune.report.svg_canvas import Canvas
from tune.report.svg_panel import Panel

BANDS = ("plain", "macdrop")
"""Arms whose seeds are drawn as a band; bands of all arms would be indistinguishable."""
HEAD = ["setting", "arm", "attack", "k", "attacked_rows", "mean", "min", "max", "seeds", "unit"]
TITLES = {"zeroing": "Zeroing: the top k rows set to 0", "retaining": "Retaining: all but the top k rows set to 0"}


def attack_figures(logs: Logs, model: ModelResults, verdicts: list[Verdict]) -> Iterator[Figure]:
    """One figure for each task (means first) and cell."""
    tasks: dict[tuple[str, str, str], list[Column]] = {}
    for column in model.shown:
        if column != EVAL_LOSS and "/" not in column.task:
            tasks.setdefault((column.benchmark, column.task, column.metric), []).append(column)
    attacked = {key: found for key, found in tasks.items() if any(column.attack != NO_ATTACK for column in found)}
    if not attacked:
        yield Figure(
            "attacks",
            "attacks",
            "Scores under attack",
            "No score under attack: none was requested, or none is available yet.",
        )
    for key in sorted(attacked, key=lambda key: not key[1].startswith("mean ")):
        for cell in cells(model):
            yield _curves(model, cell, best_groups(model, cell), attacked[key])


def _curves(model: ModelResults, cell: Cell, groups: list[Group], columns: list[Column]) -> Figure:
    rows = [row for group in groups for row in attack_rows(group, columns)]
    kinds = [kind for kind in {**TITLES, **ATTACKS} if any(row[2] == kind for row in rows)]
    places = sorted({row[4] for row in rows if row[4]})
    first = columns[0]
    name = words_to_name("attack", first.benchmark, first.task, first.metric, cell.words)

    ks = {kind: sorted({row[3] for row in rows if row[2] == kind}) for kind in kinds}

    def paint(canvas: Canvas) -> None:
        panels = canvas.subplots(len(kinds), 1, squeeze=False, sharey=True)[:, 0]
        for axes, kind in zip(panels, kinds, strict=True):
            if len(ks[kind]) == 1 and kind != "zeroing":
                _single(axes, groups, [row for row in rows if row[2] == kind])
                tidy(axes, y=unit(first), title=_title(kind).replace("k rows", f"{ks[kind][0]} rows"))
                continue
            for name, group in short_names(groups):
                for place in places:
                    attack_curve(axes, name, group, [row for row in rows if row[0] == group.label], kind, place, places)
            axes.set_xticks(sorted({*ks[kind], *([0] if kind == "zeroing" else [])}))
            axes.margins(x=0.05)
            tidy(axes, x="rows k", y=unit(first), title=_title(kind))
        if "perplexity" in first.metric and _wide(rows):
            plain_log(panels[0])
        legend(canvas, panels[0])

    where = {"base": "the base model's rows", "merged": "rows of the merged weights"}
    attacked = " and ".join(where.get(place, place) for place in places)
    attacked += " (merged: hollow marks, thin)" if len(places) > 1 else ""
    caption = (
        f"Mean over seeds ({seeds_words(groups)}), bands from lowest to highest; {better(first)}. Attacked: {attacked}."
        + (" k = 0 is the untouched model. " if "zeroing" in kinds else " ")
        + settings_words(groups)
    )
    title = f"{first.task} under attack{cell.after}"
    extra = LEGEND * math.ceil(len(groups) / 3)
    svg = draw(f"{model.name}-{name}", 185 * len(kinds) + 30 + extra, paint, says=f"{title}. {caption}")
    return Figure(name, "attacks", title, caption, svg, HEAD, rows)


def attack_rows(group: Group, columns: list[Column]) -> Iterator[list[Any]]:
    """The numbers of a curve, under `HEAD`."""
    for column in columns:
        found = values(group, column)
        if found:
            attack = Attack.parse(column.attack)
            numbers = [statistics.fmean(found), min(found), max(found), len(found), unit(column)]
            yield [group.label, group.arm, attack.kind, attack.k, column.attack_on or "", *numbers]


def attack_curve(
    axes: Panel, name: str, group: Group, rows: list[list[Any]], kind: str, place: str, places: list[str]
) -> None:
    """Draw one setting's scores under one kind of attack on the rows of one place; `places`: all that are drawn."""
    start = [row for row in rows if row[2] == NO_ATTACK] if kind == "zeroing" else []
    found = start + sorted((row for row in rows if row[2] == kind and row[4] == place), key=lambda row: row[3])
    if len(found) == len(start):
        return
    second = len(places) > 1 and place == "merged"
    tone, x = colour(tint(group.arm)), [row[3] for row in found]
    if group.arm in BANDS and not second and any(row[8] > 1 for row in found):
        axes.fill_between(
            x,
            [row[6] for row in found],
            [row[7] for row in found],
            color=tone,
            alpha=0.18,
            linewidth=0,
            zorder=front(group.arm) - 1,
        )
    axes.plot(
        x,
        [row[5] for row in found],
        color=tone,
        linestyle=DASHES.get(group.arm, "-"),
        linewidth=1.1 if second else 1.8,
        marker=MARKERS.get(group.arm, "o"),
        markersize=5,
        markerfacecolor="none" if second else tone,
        label=None if second else name,
        zorder=front(group.arm),
    )


def _single(axes: Panel, groups: list[Group], rows: list[list[Any]]) -> None:
    """Draw settings side by side for a single k, with a line from the lowest to the highest seed."""
    for number, (name, group) in enumerate(short_names(groups)):
        tone = colour(tint(group.arm))
        for row in (row for row in rows if row[0] == group.label):
            x = number + (0.22 if row[4] == "merged" and len({other[4] for other in rows}) > 1 else 0)
            axes.plot([x, x], [row[6], row[7]], color=tone, linewidth=1.8)
            axes.plot(
                x,
                row[5],
                MARKERS.get(group.arm, "o"),
                color=tone,
                markersize=7,
                label=name,
                markerfacecolor=tone if x == number else "none",
            )
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.set_xticks([])


def _title(kind: str) -> str:
    return TITLES.get(kind, f"{kind.replace('_', ' ').capitalize()}: k rows set to 0")


def _wide(rows: list[list[Any]]) -> bool:
    found = [row[5] for row in rows if row[5] > 0]
    return bool(found) and max(found) > 8 * min(found)
