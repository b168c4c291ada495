"""Pareto plots of several objectives: every searched trial, the front in colour."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Literal

from tune.analysis.results import Line, ModelResults, value_of
from tune.analysis.verdict import Verdict
from tune.config.sections import Arm
from tune.report.html.drawing import colour, draw, tidy
from tune.report.html.figure import Figure, words_to_name
from tune.report.html.select import is_share
from tune.report.html.training import Logs
from tune.report.svg_canvas import Canvas
from tune.report.svg_panel import Panel
from tune.storage.states import TaskState

MARKS = {"plain": "D", "macdrop": "o"}


def pareto_figures(logs: Logs, model: ModelResults, verdicts: list[Verdict]) -> Iterator[Figure]:
    """Draw one figure per pair of objectives; nothing for a single objective."""
    if len(model.objectives) < 2:
        return
    names = [name for name, _ in model.objectives]
    whole = [line for line in model.searched if all(value_of(line, name) is not None for name in names)]
    front = pareto_front(model, whole)
    for one, other in itertools.combinations(model.objectives, 2):
        yield _figure(model, whole, front, one, other)


def pareto_front(model: ModelResults, lines: list[Line]) -> set[str]:
    """Trials of the Pareto front as recorded by the search, else computed over finished MacDrop trials."""
    recorded = set(model.finalists.get("pareto") or [])
    if recorded & {line.trial for line in lines}:
        return recorded
    costs = {
        line.trial: [_measured(line, name) * (1 if goal == "minimize" else -1) for name, goal in model.objectives]
        for line in lines
        if line.arm == Arm.MACDROP and line.status == TaskState.DONE
    }
    return {trial for trial, own in costs.items() if not any(_dominates(other, own) for other in costs.values())}


def _dominates(one: list[float], other: list[float]) -> bool:
    """Return whether `one` is nowhere costlier and somewhere cheaper."""
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def _figure(
    model: ModelResults, lines: list[Line], front: set[str], one: tuple[str, str], other: tuple[str, str]
) -> Figure:
    (x_name, x_goal), (y_name, y_goal) = one, other
    name, title = words_to_name("pareto", x_name, y_name), f"{_short(x_name)} against {_short(y_name)}"
    if not lines:
        return Figure(name, "pareto", title, "No searched trial has all objectives yet.")
    points = [(line, _value(line, x_name), _value(line, y_name)) for line in lines]
    joined = len(model.objectives) == 2

    def paint(canvas: Canvas) -> None:
        axes = canvas.subplots()
        chosen = sorted((x, y) for line, x, y in points if line.trial in front)
        if joined and len(chosen) > 1:
            where: Literal["post", "pre"] = (
                "post" if x_goal == "minimize" else "pre"
            )  # the line bounds the dominated region
            axes.step(*zip(*chosen, strict=True), where=where, color=colour("macdrop"), linewidth=1.2, zorder=1)
        for line, x, y in points:
            best = line.trial in front
            tone = colour("macdrop" if best else "plain" if line.arm == Arm.PLAIN else "soft")
            axes.plot(
                x,
                y,
                MARKS.get(line.arm, "o"),
                color=tone,
                markersize=8 if best else 6,
                zorder=3 if best else 2,
                markerfacecolor=tone if best or line.arm == Arm.PLAIN else "none",
            )
        _labels(axes, [(line.label, x, y) for line, x, y in points if line.trial in front])
        axes.margins(0.12)
        tidy(axes, x=_axis(x_name, x_goal), y=_axis(y_name, y_goal), grid="both")

    caption = (
        "Filled: Pareto-optimal settings"
        + (", joined" if joined else "")
        + "; hollow: other MacDrop settings; diamonds: plain adapters. One seed each."
    )
    rows = [[line.trial, line.label, line.arm, line.status, line.trial in front, x, y] for line, x, y in points]
    head = ["trial", "label", "arm", "status", "on_front", _axis(x_name, ""), _axis(y_name, "")]
    return Figure(
        name, "pareto", title, caption, draw(f"{model.name}-{name}", 300, paint, says=f"{title}. {caption}"), head, rows
    )


def _labels(axes: Panel, points: list[tuple[str, float, float]]) -> None:
    """Label the points, alternating above and below to avoid collisions."""
    for number, (label, x, y) in enumerate(sorted(points, key=lambda point: point[1])):
        up = number % 2 == 0
        axes.annotate(
            label,
            (x, y),
            (0, 8 if up else -8),
            textcoords="offset points",
            fontsize=10,
            ha="center",
            va="bottom" if up else "top",
        )


def _measured(line: Line, name: str) -> float:
    """The objective of a line that is known to have it."""
    value = value_of(line, name)
    assert value is not None
    return value


def _value(line: Line, name: str) -> float:
    return _measured(line, name) * (100 if is_share(_metric(name)) else 1)


def _metric(name: str) -> str:
    return name.partition("@")[0].rpartition("/")[2]


def _short(name: str) -> str:
    """Shorten a metric's name: "zero_shot/qa/acc@zeroing@3" -> "qa acc, zeroing@3"."""
    score, _, attack = name.partition("@")
    return " ".join(score.split("/")[-2:]) + (f", {attack}" if attack else "")


def _axis(name: str, goal: str) -> str:
    percent = " (%)" if is_share(_metric(name)) else ""
    arrow = {"maximize": ", higher is better", "minimize": ", lower is better"}.get(goal, "")
    return f"{_short(name)}{percent}{arrow}"
