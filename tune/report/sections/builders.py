"""The builder of each part of a report, in order; every renderer (terminal, Markdown, LaTeX, page) walks these."""

from __future__ import annotations

from collections.abc import Callable

from tune.report.sections import attacks, cost, findings, generations, moments, paper, timeline, trials
from tune.report.sections.subject import Subject
from tune.report.tables import Part
from tune.report.text import one_line

BUILDERS: dict[str, Callable[[Subject], Part]] = {
    "verdict": findings.verdict,
    "weights": findings.weights,
    "paper": paper.tables,
    "comparisons": findings.comparisons,
    "placebos": findings.placebos,
    "search": trials.search,
    "attacks": attacks.curves,
    "pareto": trials.pareto,
    "generations": generations.generations,
    "moments": moments.second_moments,
    "timeline": timeline.timeline,
    "cost": cost.cost,
    "reproduce": cost.reproduce,
    "trials": trials.trials,
}
"""Part key -> builder, in the order of the report."""
UNREADABLE = "Omitted: a file of the run that this part needs is damaged"


def parts(subject: Subject) -> dict[str, Part]:
    """Build all parts of a model, by their keys; empty ones are false.

    A damaged file affects only the parts that need it, and they say so.
    """
    return {key: _made(key, build, subject) for key, build in BUILDERS.items()}


def _made(key: str, build: Callable[[Subject], Part], subject: Subject) -> Part:
    try:
        return build(subject)
    except Exception as error:  # a file of another shape than ours: it may raise anything
        return Part(key.capitalize(), [f"{UNREADABLE} ({type(error).__name__}: {one_line(str(error))})."])
