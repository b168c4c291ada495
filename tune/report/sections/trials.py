"""The parts on trials: the search, its Pareto front, and the final trials."""

from __future__ import annotations

from tune.analysis.results import Line, ModelResults, value_of
from tune.config.sections import Arm
from tune.evaluation.score_names import EVAL_LOSS
from tune.report.sections.subject import Subject
from tune.report.tables import Part, Table
from tune.report.text import count, hours, number, setting, short
from tune.storage.run_folder import BASE
from tune.storage.states import Stage


def search(subject: Subject) -> Part:
    """Every searched trial, with its objectives."""
    model = subject.model
    searched = model.trials(stage=Stage.SEARCH)
    if not searched:
        return Part("Search")
    goals = " and ".join(f"{name} ({goal})" for name, goal in model.objectives)
    statuses = count(line.status for line in searched)
    lines = [f"{model.tried} MacDrop setting(s) tried in {len(searched)} trials ({statuses}), selected by {goals}."]
    others = model.trials(stage=Stage.FINAL)
    lines += ["Selection used validation data; test scores come from fresh seeds in the final stage."] if others else []
    return Part("Search", lines, [_table(model, "Searched trials", searched, objectives=True)])


def pareto(subject: Subject) -> Part:
    """The Pareto-optimal trials of each cell."""
    model = subject.model
    front = model.finalists.get("pareto") or []
    chosen = [line for line in model.lines if line.trial in front]
    if len(model.objectives) < 2 or not chosen:
        return Part("Pareto front")
    goals = ", ".join(f"{name} ({goal})" for name, goal in model.objectives)
    of = [line for line in model.searched if line.arm == Arm.MACDROP]
    lines = [f"Pareto-optimal for their type of adapter: {len(chosen)} of {len(of)} MacDrop trials, by {goals}."]
    return Part("Pareto front", lines, [_table(model, "Pareto front", chosen, objectives=True)])


def trials(subject: Subject) -> Part:
    """The compared trials with their seeds, and why others ended early."""
    model = subject.model
    staged = bool(model.trials(stage=Stage.SEARCH))
    final = [line for line in model.lines if line.arm != BASE and line.stage != Stage.SEARCH]
    table = _finals(model) if staged else _table(model, "Trials", final, objectives=True)
    tables = [table] if table.rows else []
    lines = [f"{one.label} ({one.trial}) {one.status}: {short(one.reason)}" for one in model.lines if one.reason]
    return Part("Trials", lines, tables)


def _finals(model: ModelResults) -> Table:
    """The final stage: each setting with its seeds."""
    rows = []
    for group in (group for group in model.groups if group.arm != BASE):
        for line in (line for line in group.lines if line.stage != Stage.SEARCH):
            loss = line.scores.get(EVAL_LOSS)
            row = [group.label, setting(line.seed), line.status, _steps(line), number(loss.value if loss else None)]
            rows.append([*row, hours(line.info.get("seconds")), line.trial.rpartition("-")[2]])
    return Table("Final trials", ["", "seed", "status", "steps", "eval_loss", "training", "trial"], rows)


def _table(model: ModelResults, title: str, lines: list[Line], *, objectives: bool) -> Table:
    """Settings, status and measures of trials, without settings that none of them has."""
    keys = [key for key in model.keys if any(line.setting(key) is not None for line in lines)]
    names = [name for name, _ in model.objectives if name != EVAL_LOSS.metric] if objectives else []
    head = ["", *(_folded(key.removeprefix("macdrop.")) for key in keys)]
    seeds = len({line.seed for line in lines}) > 1
    head += ["seed"] if seeds else []
    head += ["status", "steps", "eval_loss", *(name.replace("/", "\n") for name in names), "training"]
    rows = []
    for line in lines:
        loss = line.scores.get(EVAL_LOSS)
        row = [f"{line.label} *" if line is model.best else line.label, *(setting(line.setting(key)) for key in keys)]
        row += [setting(line.seed)] if seeds else []
        row += [line.status, _steps(line), number(loss.value if loss else None)]
        row += [*(number(value_of(line, name)) for name in names), hours(line.info.get("seconds"))]
        rows.append(row)
    return Table(title, head, rows)


def _steps(line: Line) -> str:
    step, total = line.info.get("step", line.info.get("steps")), line.info.get("total_steps")
    return setting(step) if step is None or total in (None, step) else f"{step} of {total}"


def _folded(name: str) -> str:
    """Break a long key into several lines."""
    return name.replace("_", "_\n") if len(name) > 14 else name
