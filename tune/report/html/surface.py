"""The search over k and p0: each trial at its coordinates, coloured by the objective."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from tune.analysis.results import Line, ModelResults, value_of
from tune.analysis.verdict import Verdict
from tune.config.sections import Arm
from tune.report.html.drawing import colour, draw, tidy
from tune.report.html.figure import Figure, words_to_name
from tune.report.html.palette import STEPS
from tune.report.html.select import Cell, cells, is_share
from tune.report.html.training import Logs
from tune.report.svg_canvas import Canvas
from tune.report.svg_panel import Panel
from tune.storage.states import TaskState

GRID = 8
"""The number of distinct p0 up to which they are columns of tiles; beyond it, points on an axis."""
HEAD = ["trial", "schedule", "k", "p0", "status", "finalist", "objective", "value"]


@dataclass(frozen=True)
class Point:
    """A searched MacDrop trial; `value` is the objective (percent for shares), None without one."""

    line: Line
    schedule: str
    k: int
    p0: float
    value: float | None
    finalist: bool

    @property
    def ended(self) -> bool:
        return self.value is not None and self.line.status in (TaskState.DONE, TaskState.RUNNING)


@dataclass(frozen=True)
class Scale:
    """The range of the objective over all cells and schedules, which share one colour scale."""

    low: float
    high: float
    maximize: bool

    @classmethod
    def of(cls, points: list[Point], goal: str) -> Scale:
        known = [point.value for point in points if point.value is not None and math.isfinite(point.value)] or [0.0]
        return cls(min(known), max(known), goal == "maximize")

    def step(self, value: float | None) -> int:
        """0 (worst) to STEPS - 1 (best); -1 without a finite value."""
        if value is None or not math.isfinite(value):
            return -1
        if self.high == self.low:
            return STEPS - 1
        share = (value - self.low) / (self.high - self.low)
        return min(int((share if self.maximize else 1 - share) * STEPS), STEPS - 1)

    def text(self, value: float) -> str:
        """Format with just enough digits to distinguish the ends of the scale."""
        spread = self.high - self.low
        return f"{value:.{max(0, min(3, 1 - math.floor(math.log10(spread)))) if spread > 0 else 2}f}"


def surface_figures(logs: Logs, model: ModelResults, verdicts: list[Verdict]) -> Iterator[Figure]:
    """Draw one figure per objective and cell, with a map for each schedule (and alpha)."""
    for objective, goal in model.objectives:
        by_cell = [(cell, _points(model, cell, objective)) for cell in cells(model)]
        scale = Scale.of([point for _, points in by_cell for point in points], goal)
        for cell, points in by_cell:
            name = words_to_name("search", objective, cell.words)
            title = f"Search over k and p0{cell.after}"
            if len(model.objectives) > 1:
                title += f": {objective}"
            if points:
                yield _figure(model, name, title, objective, scale, points)
            else:
                yield Figure(name, "search", title, "No MacDrop setting was searched.")


def _points(model: ModelResults, cell: Cell, objective: str) -> list[Point]:
    chosen = {name for one in model.finalists.get("cells") or [] for name in one.get("macdrop") or []}
    found = []
    for line in model.searched:
        k, p0 = line.settings.get("macdrop.k"), line.settings.get("macdrop.p0")
        if line.arm != Arm.MACDROP or not cell.holds(line) or k is None or p0 is None:
            continue
        alpha = line.settings.get("macdrop.alpha")
        schedule = str(line.settings.get("macdrop.schedule")) + ("" if alpha is None else f" {alpha:g}")
        value = value_of(line, objective)
        scale = 100 if is_share(objective.partition("@")[0].rpartition("/")[2]) else 1
        value = None if value is None else scale * value
        found.append(Point(line, schedule, k, p0, value, line.group in chosen or line is model.best and not chosen))
    return found


def _figure(model: ModelResults, name: str, title: str, objective: str, scale: Scale, points: list[Point]) -> Figure:
    schedules = sorted({point.schedule for point in points})
    places, levels = sorted({point.p0 for point in points}), sorted({point.k for point in points})
    tiles = len(places) <= GRID and len(points) > len(places)

    def paint(canvas: Canvas) -> None:
        panels = canvas.subplots(len(schedules), 1, squeeze=False, sharex=True, sharey=True)[:, 0]
        for axes, schedule in zip(panels, schedules, strict=True):
            here = [point for point in points if point.schedule == schedule]
            if tiles:
                _tiles(axes, here, places, levels, scale)
            else:
                _dots(axes, here, places, levels, scale)
            tidy(axes, y="rows k", title=f"schedule {schedule}", grid="" if tiles else "both")
            axes.set_yticks(range(len(levels)), [str(level) for level in levels])
            if tiles:
                axes.spines[["left", "bottom"]].set_visible(False)
                axes.tick_params(length=0)
        panels[-1].set_xlabel("initial drop probability p0")
        _strip(canvas, scale)

    caption = (
        f"Colour: {objective}, {'higher' if scale.maximize else 'lower'} is better. Outlined: selected for the final "
        f"stage. {len(points)} trials, one seed each."
    )
    if not all(point.ended for point in points):
        caption += " Crosses: stopped early, diverged or failed."
    rows = [[p.line.trial, p.schedule, p.k, p.p0, p.line.status, p.finalist, objective, p.value] for p in points]
    height = 78 + len(schedules) * (30 + max(46, 34 * len(levels)))
    svg = draw(f"{model.name}-{name}", height, paint, says=f"{title}. {caption}")
    return Figure(name, "search", title, caption, svg, HEAD, rows)


def _tiles(axes: Panel, points: list[Point], places: list[float], levels: list[int], scale: Scale) -> None:
    """Draw one tile per (k, p0), divided into vertical strips if several trials share it (other keys vary)."""
    for x, p0 in enumerate(places):
        for y, k in enumerate(levels):
            here = [point for point in points if point.p0 == p0 and point.k == k]
            for number, point in enumerate(sorted(here, key=lambda point: scale.step(point.value), reverse=True)):
                width, step = 0.92 / len(here), scale.step(point.value)
                left = x - 0.46 + number * width
                fill = colour(f"seq-{step}") if step >= 0 else "none"
                axes.rectangle(left, y - 0.44, width, 0.88, fill=fill, edge=colour("line"), linewidth=0.8)
                if point.finalist:
                    edge = colour("macdrop")
                    axes.rectangle(left, y - 0.44, width, 0.88, fill="none", edge=edge, linewidth=2.6, zorder=3)
                ink = colour(f"seq-ink-{step}" if step >= 0 else "soft")
                if not point.ended:
                    axes.plot(left + width / 2, y, "x", color=ink, markersize=7, markeredgewidth=1.4)
                elif point.value is not None and len(here) == 1 and len(places) <= 6:
                    axes.text(x, y, scale.text(point.value), ha="center", va="center", fontsize=10, color=ink)
    axes.set_xlim(-0.5, len(places) - 0.5)
    axes.set_ylim(-0.55, len(levels) - 0.45)
    axes.set_xticks(range(len(places)), [f"{p0:.3g}" for p0 in places])


def _dots(axes: Panel, points: list[Point], places: list[float], levels: list[int], scale: Scale) -> None:
    """Draw a point per trial at its p0; overlapping points are moved apart along k."""
    near = 0.06 * max(places[-1] - places[0], 0.1)
    placed: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda point: point.p0):
        y, taken = float(levels.index(point.k)), [at for x, at in placed if abs(point.p0 - x) < near]
        free = [offset for offset in (0.0, 0.27, -0.27) if all(abs(y + offset - at) > 0.2 for at in taken)]
        y += free[0] if free else 0.0
        placed.append((point.p0, y))
        step = scale.step(point.value)
        fill = colour(f"seq-{step}") if step >= 0 else "none"
        edge = (colour("macdrop"), 2.6) if point.finalist else (colour("soft"), 0.8)
        axes.plot(
            point.p0,
            y,
            "o",
            markersize=14,
            markerfacecolor=fill,
            markeredgecolor=edge[0],
            markeredgewidth=edge[1],
            zorder=3 if point.finalist else 2,
        )
        if not point.ended:
            ink = colour(f"seq-ink-{step}" if step >= 0 else "soft")
            axes.plot(point.p0, y, "x", color=ink, markersize=6, markeredgewidth=1.4, zorder=4)
    margin = 0.08 * max(places[-1] - places[0], 0.1)
    axes.set_xlim(places[0] - margin, places[-1] + margin)
    axes.set_ylim(-0.6, len(levels) - 0.4)
    axes.locator_params(axis="x", nbins=6)


def _strip(canvas: Canvas, scale: Scale) -> None:
    """Draw the colour scale below the figure, worst at the left, with both ends labelled."""
    worst, best = (scale.low, scale.high) if scale.maximize else (scale.high, scale.low)
    canvas.strip([colour(f"seq-{step}") for step in range(STEPS)], (f"worst {worst:.4g}", f"best {best:.4g}"))
