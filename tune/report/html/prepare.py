"""The material of pages: parts, figures and questions of each model, made once, for many models in processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tune.analysis.results import ModelResults
from tune.analysis.verdict import Verdict
from tune.report.html.figure import Figure
from tune.report.html.figures import figures
from tune.report.html.generations import Question, generations
from tune.report.report import Report
from tune.report.sections.builders import parts
from tune.report.sections.subject import Subject
from tune.report.spread import spread
from tune.report.tables import Part
from tune.storage.run_folder import RunFolder


@dataclass(frozen=True)
class Prepared:
    """The material of the page and the texts on a model; `trouble` says why there are no questions."""

    parts: dict[str, Part]
    figures: list[Figure]
    questions: dict[str, list[Question]]
    trouble: str | None
    problems: list[str]


def prepared(run_folder: RunFolder, model: ModelResults, found: list[Verdict]) -> Prepared:
    """Make parts, figures and questions of one model of a run."""
    drawn, made = figures(run_folder, model, found), parts(Subject(run_folder, model, found))
    try:
        return Prepared(made, drawn, generations(run_folder, model), None, run_folder.problems or [])
    except Exception as error:  # a damaged or half-written file may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return Prepared(made, drawn, {}, reason, run_folder.problems or [])


def prepare(reports: Sequence[Report]) -> list[list[Prepared]]:
    """Return the material of each model of each report; the reports keep the parts."""
    asked = [(number, report, model) for number, report in enumerate(reports) for model in report.models]
    tasks = [(report.run_folder, model, report.verdicts.get(model.name, [])) for _, report, model in asked]
    found: list[list[Prepared]] = [[] for _ in reports]
    for (number, report, model), made in zip(asked, spread(prepared, tasks), strict=True):
        found[number].append(made)
        report.keep(model, made.parts)
    return found
