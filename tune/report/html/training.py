"""Training curves: loss, validation loss and dropped entries, by arm and seed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from tune.analysis.results import Group, Line, ModelResults
from tune.analysis.verdict import Verdict
from tune.report.html.drawing import LEGEND, colour, draw, legend, plain_log, tidy
from tune.report.html.figure import Figure, words_to_name
from tune.report.html.select import (
    DASHES,
    MARKERS,
    Cell,
    best_groups,
    cells,
    front,
    seeds_words,
    settings_words,
    short_names,
    tint,
)
from tune.report.svg_canvas import Canvas
from tune.report.svg_panel import Panel
from tune.storage.run_folder import BASE, RunFolder

Logged = dict[str, list[dict[str, Any]]]
"""Trial -> its logged steps."""
Logs = Logged | str
"""The logged steps, or why they cannot be read."""
LOSSES = {
    "loss": ("Training loss", "Loss at each logged step, masks on."),
    "eval_loss": ("Validation loss", "Loss on held-out examples, masks off."),
}
HEIGHT = 240


def training_figures(logs: Logs, model: ModelResults, verdicts: list[Verdict]) -> Iterator[Figure]:
    """Draw training loss, validation loss and dropped entries for each cell."""
    if isinstance(logs, str):
        raise ValueError(logs)
    for cell in cells(model):
        groups = [group for group in best_groups(model, cell) if group.arm != BASE]
        logged = {line.trial: logs[line.trial] for group in groups for line in group.lines}
        for key in LOSSES:
            yield _loss(model, cell, groups, logged, key)
        yield _dropped(model, cell, groups, logged)


def _loss(model: ModelResults, cell: Cell, groups: list[Group], logged: Logged, key: str) -> Figure:
    name, title = words_to_name("training", key, cell.words), f"{LOSSES[key][0]}{cell.after}"
    shown = [group for group in groups if any(_points(group, logged, key).values())]
    if not shown:
        return Figure(name, "training", title, "No trial has logged any yet.")
    rows: list[list[Any]] = [
        [group.label, group.arm, line.trial, line.seed, step, value]
        for group in shown
        for line in group.lines
        for step, value in _points(group, logged, key)[line.trial]
    ]

    def paint(canvas: Canvas) -> None:
        axes = canvas.subplots()
        for words, group in short_names(shown):
            _seeds(axes, words, group, _points(group, logged, key))
        found = [row[-1] for row in rows if row[-1] > 0]
        if found and max(found) > 3 * min(found):
            plain_log(axes)
        legend(canvas, axes)
        tidy(axes, x="optimizer step", y="nats per token")

    caption = f"{LOSSES[key][1]} {_spread(shown)} {settings_words(shown)}"
    svg = draw(f"{model.name}-{name}", _height(shown), paint, says=f"{title}. {caption}")
    head = ["setting", "arm", "trial", "seed", "step", key]
    return Figure(name, "training", title, caption, svg, head, rows)


def _dropped(model: ModelResults, cell: Cell, groups: list[Group], logged: Logged) -> Figure:
    name, title = words_to_name("training", "dropped", cell.words), f"Entries dropped{cell.after}"
    shown = [group for group in groups if any(row.get("p") for line in group.lines for row in logged[line.trial])]
    if not shown:
        return Figure(name, "training", title, "No trial has dropped anything yet.")

    def paint(canvas: Canvas) -> None:
        axes = canvas.subplots()
        for words, group in short_names(shown):
            tone = colour(tint(group.arm))
            axes.plot([], [], color=tone, marker=MARKERS.get(group.arm, "o"), markersize=4, label=words)
            for line in group.lines:
                rows = logged[line.trial]
                drawn = [(row["step"], 100 * row["p"]) for row in rows if row.get("p") is not None]
                counted = [(row["step"], row["dropped"]) for row in rows if row.get("dropped") is not None]
                axes.plot(*zip(*drawn, strict=True), color=tone, linewidth=1.1, zorder=front(group.arm))
                if counted:
                    axes.plot(
                        *zip(*counted, strict=True),
                        MARKERS.get(group.arm, "o"),
                        color=tone,
                        markersize=3.5,
                        alpha=0.75,
                        zorder=front(group.arm),
                    )
        legend(canvas, axes)
        axes.set_ylim(bottom=0)
        tidy(axes, x="optimizer step", y="% of the masked entries")

    caption = (
        f"Lines: the scheduled drop probability p(t). Marks: the counted share of entries zeroed in a step; "
        f"{seeds_words(shown)}. {settings_words(shown)}"
    )
    rows = [
        [group.label, group.arm, line.trial, line.seed, row["step"], row["p"], row.get("dropped")]
        for group in shown
        for line in group.lines
        for row in logged[line.trial]
        if row.get("p") is not None
    ]
    svg = draw(f"{model.name}-{name}", _height(shown), paint, says=f"{title}. {caption}")
    head = ["setting", "arm", "trial", "seed", "step", "p", "dropped_percent"]
    return Figure(name, "training", title, caption, svg, head, rows)


def _seeds(axes: Panel, words: str, group: Group, points: dict[str, list[tuple[int, float]]]) -> None:
    """Draw a thin line per seed and a thick one for the mean over the steps that all seeds logged."""
    tone = colour(tint(group.arm))
    by_step: dict[int, list[float]] = {}
    for seed in points.values():
        for step, value in seed:
            by_step.setdefault(step, []).append(value)
        if len(points) > 1 and seed:
            steps, losses = zip(*seed, strict=True)
            axes.plot(steps, losses, color=tone, linewidth=0.7, alpha=0.55, zorder=front(group.arm) - 1)
    running = sum(map(bool, points.values()))
    whole = {step: found for step, found in sorted(by_step.items()) if len(found) == running}
    means = [math.fsum(found) / len(found) for found in whole.values()]
    axes.plot(
        list(whole),
        means,
        color=tone,
        linestyle=DASHES.get(group.arm, "-"),
        markersize=4.5,
        label=words,
        marker=MARKERS.get(group.arm, "o") if len(whole) < 8 else None,
        zorder=front(group.arm),
    )


def _points(group: Group, logged: Logged, key: str) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each trial's steps that have the key."""
    return {
        line.trial: [(row["step"], row[key]) for row in logged[line.trial] if row.get(key) is not None]
        for line in group.lines
    }


def _spread(groups: list[Group]) -> str:
    several = any(len(group.lines) > 1 for group in groups)
    thin = "Thin lines are seeds, thick lines their means" if several else "One line per setting"
    return f"{thin}; {seeds_words(groups)}."


def _height(groups: list[Group]) -> float:
    return HEIGHT + LEGEND * math.ceil(len(groups) / 3)


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
