"""What a report says of one model, part by part. Every renderer (terminal, Markdown, LaTeX, the page) walks these."""

from __future__ import annotations

from collections.abc import Callable

from tune.parts import attacks, cost, findings, generations, paper, trials
from tune.parts.subject import Subject
from tune.tables import Part

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
    "cost": cost.cost,
    "reproduce": cost.reproduce,
    "trials": trials.trials,
}
"""In the order of the report."""


def parts(subject: Subject) -> dict[str, Part]:
    """All parts of a model, by their keys; those that have nothing to say are empty (false)."""
    return {key: build(subject) for key, build in BUILDERS.items()}
