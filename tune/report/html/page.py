"""The self-contained HTML page of one or several reports, or pages with an overview, and their numbers as CSV."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from tune.analysis.results import ModelResults
from tune.analysis.verdict import Verdict
from tune.config.resume import shell_command
from tune.config.sections import Arm
from tune.report.escaping import visible
from tune.report.figure_cache import tidy_up
from tune.report.html.figure import Figure
from tune.report.html.generations import QUESTIONS, Question
from tune.report.html.overview import small_multiples
from tune.report.html.palette import stylesheet
from tune.report.html.prepare import Prepared, prepare
from tune.report.html.select import attack_words, cells
from tune.report.leaderboard import board, ordered, rows_of
from tune.report.report import Report
from tune.report.sections.cost import unpacking
from tune.report.sections.findings import PLANTED
from tune.report.spread import MANY
from tune.report.tables import Part
from tune.storage.atomic import atomic_write_text

if TYPE_CHECKING:
    from jinja2 import Environment

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
    "timeline",
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

    Of more than MANY models the page is an overview, with a page for each model in pages/ beside it. The page of a
    damaged run says what is missing. The output is deterministic.

    Raises:
        ResourceError: a file cannot be written.
    """
    path = Path(path)
    material = prepare(reports)
    tidy_up()
    several = len([model for report in reports for model in report.models]) > MANY
    views, pages, written = [], [], []
    for number, report in enumerate(reports, 1):
        for model, made in zip(report.models, material[number - 1], strict=True):
            name = f"{f'r{number}-' if len(reports) > 1 else ''}{model.name}"
            page = path.parent / "pages" / f"{name}.html" if several else path
            shown = []
            for figure in made.figures:
                file = path.parent / "figures" / f"{name}-{figure.name}.csv"
                if figure.svg:
                    written.append(_write(file, figure.csv()))
                shown.append(Shown(figure, _apart(figure.svg, number), _address(file, page)))
            views.append(_view(report, number, model, made, shown))
            if several:
                home = _address(path, page)
                pages.append(_write(page, _render([report], views[-1:], f"{model.display}: {report.title}", home)))
    title = reports[0].title if len(reports) == 1 else f"MacDrop report: {len(reports)} runs"
    if not several:
        return [_write(path, _render(reports, views, title)), *written]
    links = {view.id: _address(page, path) for view, page in zip(views, pages, strict=True)}
    return [_write(path, overview(reports, views, links, title)), *pages, *written]


def _write(file: Path, text: str) -> Path:
    """Write a file of the report, unless it is there: `sync_to` copies what has changed."""
    with suppress(OSError):
        if file.read_bytes() == text.encode("utf-8"):
            return file
    return atomic_write_text(file, text, durable=False)


def _view(report: Report, number: int, model: ModelResults, made: Prepared, shown: list[Shown]) -> ModelView:
    parts, questions = dict(made.parts), made.questions
    if made.trouble:
        parts = {"damaged": Part("Not readable", [f"The rest of this run could not be read ({made.trouble})."])}
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


def overview(reports: list[Report], views: list[ModelView], links: dict[str, str], title: str) -> str:
    """Return the page over the pages of many models. links: the address of each view's page, by its id."""
    rows = ordered([row for report in reports for row in rows_of(report)], "headline")
    part = board(rows)
    own = {(view.run, view.model.display): view for view in views}
    ranked = [own[row.values["run"], row.values["model"]] for row in rows]
    cards = list({view.id: view for view in ranked}.values())
    drawn = small_multiples([(view.id, view.model, view.verdicts) for view in cards])
    return _filled(
        "overview.html.jinja",
        reports=reports,
        part=part,
        ranked=list(zip(ranked, part.tables[0].rows, strict=True)),
        numeric=part.tables[0].numeric(),
        cards=cards,
        drawn=drawn,
        links=links,
        title=title,
    )


def _render(reports: list[Report], views: list[ModelView], title: str, home: str = "") -> str:
    """Return a page of models. home: the address of the overview, of a page of one model of many."""
    return _filled(
        "page.html.jinja",
        reports=reports,
        views=views,
        folded=FOLDED,
        rows_shown=ROWS,
        long=LONG,
        pictured=PICTURED,
        asked=QUESTIONS,
        title=title,
        home=home,
    )


def _filled(template: str, **content: Any) -> str:
    from markupsafe import Markup

    style = stylesheet() + (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    shared = {"safe": Markup, "words": WORDS, "planted": PLANTED, "attack_words": attack_words}
    return _environment().get_template(template).render(style=Markup(style), **shared, **content)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=_visible,
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
