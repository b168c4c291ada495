"""What was searched and what was trained in the end."""

from __future__ import annotations

from tune.columns import EVAL_LOSS
from tune.journal import BASE
from tune.parts.subject import Subject
from tune.results import Line, ModelResults, value_of
from tune.tables import Part, Table
from tune.wording import count, number, setting, short


def search(subject: Subject) -> Part:
    """Every searched trial, with what it was judged by."""
    model = subject.model
    searched = model.trials(stage="search")
    if not searched:
        return Part("Search")
    goals = " and ".join(f"{name} ({goal})" for name, goal in model.objectives)
    statuses = count(line.status for line in searched)
    lines = [f"{model.tried} MacDrop setting(s) tried in {len(searched)} trials ({statuses}), chosen by {goals}."]
    lines += ["Selected on validation data; the test scores above are of other seeds."] if _finals(model) else []
    return Part("Search", lines, [_table(model, "Searched trials", searched, objectives=True)])


def pareto(subject: Subject) -> Part:
    """The trials that no other beats in every objective."""
    model = subject.model
    front = model.finalists.get("pareto") or []
    chosen = [line for line in model.lines if line.trial in front]
    if len(model.objectives) < 2 or not chosen:
        return Part("Pareto front")
    goals = ", ".join(f"{name} ({goal})" for name, goal in model.objectives)
    lines = [f"{len(chosen)} of {len(model.searched)} trials are beaten by no other in all of: {goals}."]
    return Part("Pareto front", lines, [_table(model, "Pareto front", chosen, objectives=True)])


def trials(subject: Subject) -> Part:
    """All trials that were compared, with their seeds, and why others ended."""
    model = subject.model
    final = [line for line in model.lines if line.arm != BASE and line.stage != "search"]
    tables = [_table(model, "Final trials", final, objectives=False)] if final else []
    failed = [line for line in model.lines if line.reason]
    lines = [f"{line.label} ({line.trial}) {line.status}: {short(line.reason)}" for line in failed]
    return Part("Trials", lines, tables)


def _finals(model: ModelResults) -> bool:
    return bool(model.trials(stage="final"))


def _table(model: ModelResults, title: str, lines: list[Line], *, objectives: bool) -> Table:
    """Settings, status and measures of trials; settings that none of them has are left out."""
    keys = [key for key in model.keys if any(line.setting(key) is not None for line in lines)]
    names = [name for name, _ in model.objectives if name != EVAL_LOSS.metric] if objectives else []
    head = ["", *(_folded(key.removeprefix("macdrop.")) for key in keys)]
    head += ["seed", "status", "steps", "eval_loss", *(name.replace("/", "\n") for name in names), "seconds"]
    rows = []
    for line in lines:
        seconds, loss = line.info.get("seconds"), line.scores.get(EVAL_LOSS)
        row = [f"{line.label} *" if line is model.best else line.label, *(setting(line.setting(key)) for key in keys)]
        row += [setting(line.seed), line.status, _steps(line), number(loss.value if loss else None)]
        row += [*(number(value_of(line, name)) for name in names), "" if seconds is None else f"{seconds:.1f}"]
        rows.append(row)
    return Table(title, head, rows)


def _steps(line: Line) -> str:
    step, total = line.info.get("step", line.info.get("steps")), line.info.get("total_steps")
    return setting(step) if step is None or total in (None, step) else f"{step} of {total}"


def _folded(name: str) -> str:
    """A long key on several lines."""
    return name.replace("_", "_\n") if len(name) > 14 else name
