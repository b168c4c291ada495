"""Scores in the layout of the paper's tables, with the paper's own figures where the setting matches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from tune.analysis.published import (
    base_figures,
    cited,
    figure,
    paper,
    row_name,
    score_differences,
    setting_differences,
)
from tune.analysis.results import ARM_ORDER, BASE, Group, ModelResults, Spread
from tune.config.eval_spec import NO_ATTACK
from tune.config.sections import Arm
from tune.evaluation.score_names import ACCURACIES, EVAL_LOSS, LONGBENCH, Column
from tune.report.sections.subject import Subject
from tune.report.tables import Part, Table
from tune.report.text import number, under

READING = (
    "Means over the seeds of the final stage ± SD between seeds (in parentheses: SE over the items of one seed). "
    "Neither is the standard error of a difference: see the comparisons."
)
ATTACK = "zeroing@3"
"""The attack of the paper's table of fine-tuned models."""


@dataclass(frozen=True)
class Section:
    """One of the paper's tables: its columns, unit, key in `paper.yaml`, and our suite."""

    title: str
    holds: Callable[[Column], bool]
    percent: bool = False
    table: str | None = None
    suite: str = ""


SECTIONS = (
    Section("Zero-shot accuracy, %", lambda c: _accuracy(c), True, "zero_shot", "zero-shot"),
    Section("Zero-shot, other metrics", lambda c: _zero_shot(c) and not _accuracy(c)),
    Section("Perplexity", lambda c: c.benchmark == "perplexity", suite="perplexity"),
    Section("LongBench, %", lambda c: _longbench(c), True, "longbench", "longbench"),
    Section("Judge score, 1 to 5", lambda c: c.metric == "judge_score", False, "spec_bench", "spec-bench"),
    Section("Generation", lambda c: c.benchmark == "generation" and c.metric not in ("judge_score", "judge_unparsed")),
)


def tables(subject: Subject) -> Part:
    """Base, plain and MacDrop on every benchmark, without attack and under the paper's attack."""
    model = subject.model
    groups = in_paper_order(model)
    workers = subject.run_folder.workers_at_start(model.display)
    made: list[Table] = []
    reasons: dict[str, list[str]] = {}
    for section in SECTIONS:
        held = [column for column in _columns(model, section) if section.holds(column)]
        clean = {(column.task, column.metric) for column in held if column.attack == NO_ATTACK}
        columns = [column for column in held if (column.task, column.metric) in clean]
        for attack in _attacks(model, columns):
            shown = [column for column in columns if (column.attack, column.attack_on) == attack]
            rows = []
            for group in groups:
                row = [_cell(group.spread(column), section.percent) for column in shown]
                if any(row):
                    rows += [[_label(group, model), *row], *_published(section, model, group, shown, workers, reasons)]
            title = section.title + under(shown[0], ", ")
            if rows:
                made.append(Table(title, ["", *(_head(column) for column in shown)], rows))
    return Part("Scores as in the paper's tables", [READING, *_sources(model, reasons)] if made else [], made)


def in_paper_order(model: ModelResults) -> list[Group]:
    """Base, then plain and MacDrop of each type of adapter."""
    cells: list[dict] = []
    for group in model.groups:
        cells += [group.cell] if group.arm != BASE and group.cell not in cells else []
    cells.sort(key=lambda cell: [str(value) for value in cell.values()])
    wanted = [group for group in model.groups if group.arm in ARM_ORDER]

    def place(group: Group) -> tuple:
        return group.arm != BASE, 0 if group.arm == BASE else cells.index(group.cell), ARM_ORDER.index(group.arm)

    return sorted(wanted, key=place)


def _columns(model: ModelResults, section: Section) -> list[Column]:
    """The columns to show: for LongBench only the mean where there is one, for judge scores all parts."""
    shown = [column for column in model.shown if column != EVAL_LOSS]
    if section.table == "spec_bench":
        wanted = {column.attack for column in shown}
        return [c for c in model.columns if c.metric == "judge_score" and c.split == "test" and c.attack in wanted]
    if section.table == "longbench" and any(_longbench(column) and column.is_mean for column in shown):
        return [column for column in shown if _longbench(column) and column.is_mean]
    return [column for column in shown if "/" not in column.task or column.benchmark != "generation"]


def _attacks(model: ModelResults, columns: list[Column]) -> list[tuple[str, str | None]]:
    """No attack, the paper's (or the first, if that was not run), and those it reports for this base model."""
    found = list(dict.fromkeys((column.attack, column.attack_on) for column in columns))
    kinds = [attack for attack, _ in found if attack != NO_ATTACK]
    chosen = ATTACK if ATTACK in kinds else next(iter(kinds), None)
    return [attack for attack in found if attack[0] in (NO_ATTACK, chosen) or base_figures(model.display, attack[0])]


def _published(
    section: Section,
    model: ModelResults,
    group: Group,
    shown: list[Column],
    workers: int,
    reasons: dict[str, list[str]],
) -> list[list[str]]:
    """The paper's row to put below one of ours; none, with the reasons noted, if the setting differs."""
    figures = _figures(section, model, group, shown)
    if not any(figures):
        return []
    asked = [column for column, found in zip(shown, figures, strict=True) if found]
    cells = [line.scores[column] for line in group.lines for column in asked if column in line.scores]
    why = score_differences(cells, section.suite)
    if group.arm != BASE:
        why += setting_differences(group.lines[0].settings, group.arm, workers)
    for reason in why:
        labels = reasons.setdefault(reason, [])
        labels += [group.label] if group.label not in labels else []
    source = cited("attacks" if group.arm == BASE else section.table or "")
    return [] if why else [[f"  paper ({source})", *("" if f is None else f"{f:g}" for f in figures)]]


def _figures(section: Section, model: ModelResults, group: Group, shown: list[Column]) -> list[float | None]:
    """The paper's figure for each column, or None."""
    attack = shown[0].attack
    if group.arm == BASE:
        known = base_figures(model.display, attack) if section.suite in ("zero-shot", "perplexity") else {}
        mean = "mean accuracy" if section.percent else "mean perplexity"
        return [known.get(mean if column.is_mean else _head(column).partition("\n")[0]) for column in shown]
    table = "zero_shot_attacked" if section.table == "zero_shot" and attack == ATTACK else section.table
    if table is None or (attack != NO_ATTACK and table != "zero_shot_attacked"):
        return [None] * len(shown)
    found = figure(table, model.display, group.lines[0].settings, group.arm)
    whole = [column.is_mean or (table == "spec_bench" and "/" not in column.task) for column in shown]
    return [found.value if found and each else None for each in whole]


def _sources(model: ModelResults, reasons: dict[str, list[str]]) -> list[str]:
    name = row_name(model.display)
    if name is None:
        return []
    source = f"{paper()['title']} (arXiv {paper()['arxiv']})"
    if not reasons:
        return [f"Paper: {source}, {name}; its figures are shown where model, adapter, training and benchmark match."]
    why = "; ".join(f"{reason} [{', '.join(labels)}]" for reason, labels in reasons.items())
    return [
        f"The paper ({source}) reports this model, {name}, in a different setting, so its figures are omitted: {why}."
    ]


def _label(group: Group, model: ModelResults) -> str:
    return f"+ {group.label}" if group.arm == Arm.MACDROP else group.label


def _cell(found: Spread | None, percent: bool) -> str:
    if found is None:
        return ""
    scale = 100 if percent else 1
    found = replace(found, **{key: v * scale for key, v in vars(found).items() if key != "seeds" and v is not None})
    text = f"{found.value:.1f}" if percent else number(found.value)
    text += "" if found.sd is None else f" ±{found.sd:.1f}" if percent else f" ±{found.sd:.2g}"
    return text + ("" if found.stderr is None else f" ({found.stderr:.1f})" if percent else f" ({found.stderr:.2g})")


def _head(column: Column) -> str:
    """The paper's short name of a task, with the metric unless it is accuracy or perplexity."""
    names = {task: name for name, task in (paper()["tasks"] | paper()["texts"]).items()}
    task = "mean" if column.is_mean else names.get(column.task, column.task)
    shown = "" if column.metric in ("acc", "perplexity", "word_perplexity", "judge_score") else column.metric
    return f"{task}\n{shown}" if shown and not column.is_mean else task


def _longbench(column: Column) -> bool:
    return column.benchmark == "zero_shot" and column.task.startswith((LONGBENCH, "mean LongBench"))


def _accuracy(column: Column) -> bool:
    return _zero_shot(column) and column.metric in ACCURACIES


def _zero_shot(column: Column) -> bool:
    return column.benchmark == "zero_shot" and not _longbench(column)
