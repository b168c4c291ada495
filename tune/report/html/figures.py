"""All figures of a model, in the order of the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict

from tune.analysis.results import ModelResults
from tune.analysis.verdict import Verdict
from tune.report.figure_cache import key_of, recall, remember
from tune.report.html.attacks import attack_figures
from tune.report.html.figure import Figure
from tune.report.html.intervals import comparison_figures, verdict_figures
from tune.report.html.pareto import pareto_figures
from tune.report.html.scan import scan_figures
from tune.report.html.surface import surface_figures
from tune.report.html.training import Logs, read_logs, training_figures
from tune.storage.run_folder import RunFolder

Family = Callable[[Logs, ModelResults, "list[Verdict]"], Iterator[Figure]]
"""No figure reads a file: what it is drawn from is what the cache knows it by."""
FAMILIES: dict[str, tuple[str, Family]] = {
    "by-task": ("verdict", verdict_figures),
    "scan": ("weights", scan_figures),
    "comparisons": ("comparisons", comparison_figures),
    "search": ("search", surface_figures),
    "training": ("training", training_figures),
    "attacks": ("attacks", attack_figures),
    "pareto": ("pareto", pareto_figures),
}
"""Family -> the report's part that shows it, and the function that draws it."""


def figures(run_folder: RunFolder, model: ModelResults, verdicts: list[Verdict]) -> list[Figure]:
    """Every figure of one model of a run, finished or not; drawn, unless they were before from the same numbers.

    A damaged file affects only the figures that need it: one figure without an SVG replaces them, and its caption says
    what is wrong.
    """
    logs = read_logs(run_folder, model)
    key = key_of(logs, model, verdicts)
    try:
        return [Figure(**each) for each in recall(key)]
    except TypeError:  # there are none
        made = [asdict(figure) for figure in _drawn(logs, model, verdicts)]
        return [Figure(**each) for each in remember(key, made)]


def _drawn(logs: Logs, model: ModelResults, verdicts: list[Verdict]) -> list[Figure]:
    found: list[Figure] = []
    for name, (part, family) in FAMILIES.items():
        try:
            found += family(logs, model, verdicts)
        except Exception as error:  # a damaged or half-written file may raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            found.append(Figure(name, part, name.replace("-", " ").capitalize(), f"Could not be drawn ({reason})."))
    return found
