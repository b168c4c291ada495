"""The self-contained HTML page of one or several reports, and the numbers of its figures as CSV."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tune.analysis.results import ModelResults
from tune.analysis.verdict import Verdict
from tune.config.resume import shell_command
from tune.config.sections import Arm
from tune.report.escaping import visible
from tune.report.html.figure import Figure
from tune.report.html.figures import figures
from tune.report.html.generations import QUESTIONS, Question, generations
from tune.report.html.palette import stylesheet
from tune.report.html.select import attack_words, cells
from tune.report.report import Report
from tune.report.sections.cost import unpacking
from tune.report.sections.findings import PLANTED
from tune.report.tables import Part
from tune.storage.atomic import atomic_write_text

ORDER = (
    "weights",
    "paper",
    "comparisons",
    "placebos",
    "attacks",
    "search",
    "training",
    "pareto",
    "generations",
    "moments",
    "cost",
    "reproduce",
    "trials",
)
"""Order of parts on the page, below the verdict; parts not named here come last."""
TITLES = {
    "training": "Training",
    "comparisons": "MacDrop against plain",
    "attacks": "Under attack",
    "search": "Search",
    "weights": "Massive weights",
    "pareto": "Pareto front",
}
"""Titles of parts that have only figures."""
LIMITED = ("comparisons", "attacks")
"""Parts with many figures: OPEN of them (or two per cell) are visible, the others collapsed."""
OPEN = 3
PICTURED = 2
"""Findings of a model shown next to their intervals; further intervals follow below."""
FOLDED = ("trials", "attacks")
LONG = 14
"""Tables with more rows are collapsed, as are those of FOLDED parts."""
ROWS = 40
"""Rows shown of a figure's numbers; the CSV has all."""
WORDS = {
    "helps": ("Helps", "helps", "▲"),
    "hurts": ("Hurts", "hurts", "▼"),
    "cannot tell": ("Cannot tell", "unsure", "●"),
}
"""Verdict -> word, colour, sign."""


@dataclass(frozen=True)
class Shown:
    """A figure on the page, with the address of its CSV."""

    figure: Figure
    svg: str
    link: str

    @property
    def rows(self) -> list[list[str]]:
        return [[_cell(value) for value in row] for row in self.figure.rows[:ROWS]]


@dataclass(frozen=True)
class Section:
    """A part of a model: text and tables in `part`, visible figures in `shown`, collapsed ones in `more`."""

    key: str
    part: Part
    shown: list[Shown]
    more: list[Shown]
    missing: list[Figure]


@dataclass(frozen=True)
class ModelView:
    """Everything the page shows of one model of one run."""

    id: str
    run: str
    model: ModelResults
    verdicts: list[Verdict]
    notes: list[str]
    intervals: list[Shown]
    sections: list[Section]
    questions: dict[str, list[Question]]
    commands: list[str]


def write_page(reports: list[Report], path: str | os.PathLike) -> list[Path]:
    """Write the page to `path` and the numbers of its figures to figures/ beside it; return all paths, page first.

    The page of a damaged run says what is missing. The output is deterministic.

    Raises:
        ResourceError: a file cannot be written.
    """
    path = Path(path)
    views, written = [], []
    for number, report in enumerate(reports, 1):
        for model in report.models:
            drawn = figures(report.run_folder, model, report.verdicts.get(model.name, []))
            shown = []
            for figure in drawn:
                run = f"r{number}-" if len(reports) > 1 else ""
                file = path.parent / "figures" / f"{run}{model.name}-{figure.name}.csv"
                if figure.svg:
                    written.append(atomic_write_text(file, figure.csv()))
                shown.append(Shown(figure, _apart(figure.svg, number), _address(file, path)))
            views.append(_view(report, number, model, shown))
    return [atomic_write_text(path, _render(reports, views)), *written]


def _view(report: Report, number: int, model: ModelResults, shown: list[Shown]) -> ModelView:
    try:
        parts = dict(report.parts(model))
        questions = generations(report.run_folder, model)
    except Exception as error:  # a damaged or half-written file may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        parts, questions = (
            {"damaged": Part("Not readable", [f"The rest of this run could not be read ({reason})."])},
            {},
        )
    top = parts.pop("verdict", Part("Verdict"))
    keys = [key for key in ORDER if key in parts or any(one.figure.part == key for one in shown)]
    keys += [key for key in parts if key not in ORDER]
    folder, kinds = report.run_folder.shown, len(cells(model))
    elsewhere = [PLANTED, *(line for one in report.verdicts.get(model.name, []) for line in (one.sentence, *one.more))]
    return ModelView(
        id=f"r{number}-{model.name}",
        run=report.name,
        model=model,
        verdicts=[one for one in report.verdicts.get(model.name, []) if one.arm == Arm.MACDROP],
        notes=[line for line in top.lines if line not in elsewhere],
        intervals=[one for one in shown if one.figure.part == "verdict" and one.svg],
        sections=list(filter(None, (_section(key, parts.get(key), shown, questions, kinds) for key in keys))),
        questions=questions,
        commands=[
            *unpacking(report.run_folder),
            shell_command("macdrop", "sweep", folder / "config.yaml", "output_dir=NEW_FOLDER"),
            shell_command("macdrop", "report", folder),
        ],
    )


def _section(key: str, part: Part | None, shown: list[Shown], questions: dict[str, Any], kinds: int) -> Section | None:
    """Build a section; None if there is nothing to show."""
    part = part or Part(TITLES.get(key, key.capitalize()))
    own = [one for one in shown if one.figure.part == key]
    drawn, missing = [one for one in own if one.svg], [one.figure for one in own if not one.svg]
    if not (part or own or key == "generations" and questions):
        return None
    seen = (OPEN if kinds == 1 else 2 * kinds) if key in LIMITED else len(drawn)
    return Section(key, part, drawn[:seen], drawn[seen:], missing)


def _render(reports: list[Report], views: list[ModelView]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=_visible,
    )
    style = stylesheet() + (folder / "style.css").read_text(encoding="utf-8")
    return environment.get_template("page.html.jinja").render(
        reports=reports,
        views=views,
        style=Markup(style),
        safe=Markup,
        words=WORDS,
        folded=FOLDED,
        rows_shown=ROWS,
        long=LONG,
        planted=PLANTED,
        pictured=PICTURED,
        asked=QUESTIONS,
        attack_words=attack_words,
        title=reports[0].title if len(reports) == 1 else f"MacDrop report: {len(reports)} runs",
    )


def _visible(value: Any) -> Any:
    """Show control characters of what goes into the page; markup stays markup."""
    return type(value)(visible(value)) if isinstance(value, str) else value


def _apart(svg: str, number: int) -> str:
    """Make ids unique on a page of several runs."""
    return re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>r{number}-", svg)


def _address(file: Path, page: Path) -> str:
    return quote(Path(os.path.relpath(file.resolve(), page.resolve().parent)).as_posix())


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
