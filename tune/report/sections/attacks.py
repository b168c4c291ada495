"""The part on attacks: each arm's scores by the number of attacked rows."""

from __future__ import annotations

from macdrop.attack import Attack
from tune.analysis.results import Group, ModelResults
from tune.config.eval_spec import NO_ATTACK
from tune.evaluation.score_names import EVAL_LOSS, Column
from tune.report.sections.subject import Subject
from tune.report.tables import Part, Table
from tune.report.text import number

NOTE = "Means over seeds; none: without attack. A robust adapter keeps its score as more rows are zeroed."


def curves(subject: Subject) -> Part:
    """One table per measure: arms (attacked in base or merged weights) by kind of attack and number of rows."""
    model = subject.model
    tables = []
    for clean in measures(model):
        attacked = [column for column in model.shown if _same(column, clean) and column.attack != NO_ATTACK]
        if attacked:
            tables.append(_table(model, clean, attacked))
    return Part("Under attack", [NOTE] if tables else [], tables)


def measures(model: ModelResults) -> list[Column]:
    """Columns without attack whose attacked versions get a curve; means replace their tasks."""
    plain = [column for column in model.shown if column.attack == NO_ATTACK and column != EVAL_LOSS]
    means = {column.metric for column in plain if column.task.startswith("mean ")}
    return [
        column
        for column in plain
        if "/" not in column.task
        and (column.benchmark != "zero_shot" or column.metric not in means or column.task.startswith("mean "))
    ]


def curve(group: Group, clean: Column, kind: str, where: str) -> dict[int, float]:
    """k -> mean score of a group under an attack of one kind on base or merged rows; 0 stands for no attack."""
    points = {} if (found := group.spread(clean)) is None else {0: found.value}
    for column in dict.fromkeys(column for line in group.lines for column in line.scores):
        if _same(column, clean) and column.attack_on == where and column.attack != NO_ATTACK:
            attack = Attack.parse(column.attack)
            if attack.kind == kind and (spread := group.spread(column)) is not None:
                points[attack.k] = spread.value
    return dict(sorted(points.items()))


def _table(model: ModelResults, clean: Column, attacked: list[Column]) -> Table:
    attacks = {Attack.parse(column.attack) for column in attacked}
    kinds = [(each.kind, each.k) for each in sorted(attacks, key=lambda each: (each.kind != "zeroing", each))]
    places = [where for where in ("base", "merged") if any(column.attack_on == where for column in attacked)]
    head = ["", "none", *(f"{kind}\n{k}" for kind, k in kinds)]
    rows = []
    for group in model.groups:
        for where in places:
            found = {kind: curve(group, clean, kind, where) for kind, _ in kinds}
            cells = [number(found[kind].get(k)) for kind, k in kinds]
            if any(cells):
                label = group.label if len(places) == 1 else f"{group.label} ({where} rows)"
                rows.append([label, number(next(iter(found.values())).get(0)), *cells])
    where = "" if len(places) > 1 else f", {places[0]} rows"
    return Table(f"{clean.task} {clean.metric}{where}", head, rows)


def _same(column: Column, clean: Column) -> bool:
    names = ("benchmark", "task", "metric", "split")
    return all(getattr(column, name) == getattr(clean, name) for name in names)
