"""The leaderboard of the models of several runs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from macdrop.errors import ConfigError, nearest
from macdrop.sensitivity import BORDERLINE, SENSITIVE
from tune.analysis.comparison import Comparison
from tune.analysis.display_names import adapter_name
from tune.analysis.results import ModelResults
from tune.analysis.verdict import Verdict
from tune.config.eval_spec import NO_ATTACK
from tune.config.sections import Arm
from tune.evaluation.score_names import Column, mean_columns
from tune.report.escaping import csv_text
from tune.report.report import Report, latex_part, markdown_part
from tune.report.sections.cost import spent
from tune.report.sections.findings import PLANTED, no_verdict
from tune.report.tables import Part, Table
from tune.report.text import head, number, one_line

#: Column -> its title, and whether the largest value comes first. `headline` and `attacked` rank by what is better.
COLUMNS: dict[str, tuple[str, bool]] = {
    "model": ("model", False),
    "run": ("run", False),
    "measured": ("measured", False),
    "adapter": ("adapter", False),
    "setting": ("best setting", False),
    "headline": ("headline\n[95 %]", True),
    "verdict": ("verdict", False),
    "attacked": ("attacked\n[95 %]", True),
    "perplexity": ("perplexity\nratio", False),
    "seeds": ("seeds", True),
    "tried": ("tried", False),
    "sensitive": ("sensitive", True),
    "hours": ("hours", False),
}
ENDINGS = {".md": "markdown", ".csv": "csv", ".tex": "latex"}
VOLATILE = ("windows", "prompts_cut_left", "lm_eval", "data", "date", "mean_of", "contexts")
"""Words of a score's settings that do not change what is measured, or follow from the model's tokenizer."""
NAMING = ("model", "run", "adapter")
"""Columns that together name a row; tables have them in one."""
TITLE = "Leaderboard"
READING = (
    "headline: MacDrop minus plain over the final stage's seeds, on what the verdict stands on; attacked: the same "
    "under attack; perplexity: MacDrop's over plain's, below 1 is better; tried: MacDrop settings of the search; "
    "sensitive: whether the model depends on its massive weights; hours: training and scoring of all its trials."
)


@dataclass(frozen=True)
class Row:
    """One model (and kind of adapter) of one run; `values` are sortable, `cells` what is shown, by column."""

    values: dict[str, Any]
    cells: dict[str, str]
    measure: tuple = ()
    numbers: dict[str, Any] = field(default_factory=dict)


def check_column(column: str | None) -> None:
    """Raise a ConfigError for a column that the leaderboard does not have."""
    if column is not None and column not in COLUMNS:
        raise ConfigError(
            f"--sort: unknown column {column!r}.{nearest(column, COLUMNS)} Columns: {', '.join(COLUMNS)}."
        )


def output_format(output: Path) -> str:
    """Return the format that a file's name asks for; raise a ConfigError for a folder or another ending."""
    if output.suffix not in ENDINGS or output.is_dir():
        raise ConfigError(f"--output {str(output)!r} must be a file that ends in {', '.join(ENDINGS)}.")
    return ENDINGS[output.suffix]


def rows_of(report: Report) -> list[Row]:
    """Return the rows of one run: each model, and each of its kinds of adapter, with the best finalist."""
    rows = []
    for model in report.models:
        best: dict[str, Verdict] = {}
        for verdict in report.verdicts[model.name]:
            if verdict.arm == Arm.MACDROP:
                best.setdefault(str(sorted(verdict.cell.items())), verdict)
        rows += [_row(report, model, verdict) for verdict in best.values()] or [_row(report, model, None)]
    return rows


def ordered(rows: list[Row], column: str) -> list[Row]:
    """Sort rows by a column, missing values last; rows measured differently are ranked apart, as A, B ..."""
    measures = list(dict.fromkeys(row.measure for row in rows if row.measure))
    names = {measure: _letter(number) for number, measure in enumerate(measures)} if len(measures) > 1 else {}
    marked = []
    for row in rows:
        letter = names.get(row.measure, "")
        values, cells = ({**shown, "measured": letter} for shown in (row.values, row.cells))
        marked.append(replace(row, values=values, cells=cells))
    descending = COLUMNS[column][1]

    def place(row: Row) -> tuple:
        value = row.values.get(column)
        value = 0.5 if value == BORDERLINE else value  # between no and yes
        if value is None or value == "":
            return row.values["measured"] or "~", True, 0
        return row.values["measured"] or "~", False, -value if descending else value

    return sorted(marked, key=place)


def board(rows: list[Row]) -> Part:
    """Return the leaderboard as a part of a report: how to read it, what was measured how, the table."""
    lines = [READING]
    for letter, measure in dict.fromkeys((row.values["measured"], row.measure) for row in rows if row.measure):
        how = "; ".join(measure)
        lines.append(f"{letter}: {how}." if letter else f"Measured: {how}.")
    if any(row.values["measured"] for row in rows):
        lines.append("Runs with different letters were measured differently: they are ranked apart.")
    lines += dict.fromkeys(row.numbers["note"] for row in rows if row.numbers.get("note"))
    return Part(TITLE, lines, [_table(rows)])


def text(rows: list[Row], format: str) -> str:
    """Return the leaderboard as Markdown, LaTeX, or CSV with plain numbers."""
    if format == "csv":
        return _csv(rows)
    part = board(rows)
    return (markdown_part(part, "#") if format == "markdown" else latex_part(part, "section")) + "\n"


def _row(report: Report, model: ModelResults, verdict: Verdict | None) -> Row:
    main, attacked = (verdict.headline, verdict.attacked) if verdict else (None, None)
    group = next((g for g in model.groups if verdict and (g.id, g.arm) == (verdict.setting, Arm.MACDROP)), None)
    settings = group.lines[0].settings if group else model.best.settings if model.best else {}
    adapter = adapter_name(settings) if settings else ""
    ratio = _perplexity_ratio(verdict)
    hours = sum(spent(model)) / 3600
    proof = (model.proof or {}).get("verdict")
    values = {
        "model": model.display,
        "run": report.name,
        "adapter": adapter,
        "setting": " ".join(w for w in verdict.label.split() if w not in ("MacDrop", adapter)) if verdict else "",
        "headline": _gain(main),
        "verdict": verdict.status if verdict else "none",
        "attacked": _gain(attacked),
        "perplexity": ratio,
        "seeds": len(verdict.seeds) if verdict else None,
        "tried": verdict.tried if verdict else model.tried or None,
        "sensitive": None if proof is None else BORDERLINE if proof == BORDERLINE else proof == SENSITIVE,
        "hours": hours or None,
    }
    cells = {key: "" if value is None else str(value) for key, value in values.items()}
    cells |= {"headline": main.amount if main else "", "attacked": attacked.amount if attacked else ""}
    cells |= {"perplexity": "" if ratio is None else f"{ratio:.3f}", "hours": number(hours) if hours else ""}
    cells["sensitive"] = {None: "?", SENSITIVE: "yes", BORDERLINE: BORDERLINE}.get(proof, "no")
    cells["model"] = " ".join(filter(None, [model.display, adapter, f"({report.name})"]))
    note = "" if verdict else f"{report.name}, {model.display}: {no_verdict(model)[0]}"
    note = note or (f"{model.display}: {PLANTED}" if model.planted else "")
    return Row(values, cells, _measure(model, verdict), {"note": note, "headline": main, "attacked": attacked})


def _measure(model: ModelResults, verdict: Verdict | None) -> tuple:
    """Describe what a row's numbers were measured on; equal for rows that may be ranked together."""
    if verdict is None:
        return ()
    shown = [row.column for row in (verdict.headline, verdict.attacked) if row]
    shown += [row.column for row in verdict.rows if _clean_perplexity(row.column)]
    return tuple(_measured(model, column) for column in dict.fromkeys(shown))


def _measured(model: ModelResults, column: Column) -> str:
    members = mean_columns(c for c in model.shown if not c.is_mean).get(column, [])
    tasks = f" ({', '.join(member.task for member in members)})" if members else ""
    cells = [line.scores[column] for line in model.lines if column in line.scores]
    words = [word for cell in cells for pair in cell.how for word in _words(*pair)]
    return one_line(head(column)) + tasks + "".join(f", {word}" for word in sorted(set(words)))


def _words(key: str, value: Any) -> list[str]:
    if key != "settings":
        return [f"{key} {value}"]
    return [word for word in str(value).split() if word.partition("=")[0] not in VOLATILE]


def _clean_perplexity(column: Column) -> bool:
    return column.benchmark == "perplexity" and column.attack == NO_ATTACK and not column.is_mean


def _perplexity_ratio(verdict: Verdict | None) -> float | None:
    """Return the geometric mean over texts of MacDrop's perplexity over plain's."""
    rows = [row for row in verdict.rows if _clean_perplexity(row.column)] if verdict else []
    ratios = [row.value / row.plain for row in rows if row.plain > 0 and row.value > 0]
    return geometric_mean(ratios) if ratios else None


def _gain(found: Comparison | None) -> float | None:
    """Return the difference, with its sign turned where lower is better."""
    if found is None or found.delta != found.delta:
        return None
    return -found.delta if found.column.higher_is_better is False else found.delta


def _table(rows: list[Row]) -> Table:
    shown = [key for key in COLUMNS if key not in NAMING[1:] and any(row.cells[key] for row in rows)]
    head = ["model, adapter (run)", *(COLUMNS[key][0] for key in shown[1:])]
    return Table(TITLE, head, [[row.cells[key] for key in shown] for row in rows])


def _csv(rows: list[Row]) -> str:
    numbers = ("delta", "low", "high", "p", "mde")
    extra = [f"{which}_{key}" for which in ("headline", "attacked") for key in ("column", *numbers)]
    names = [key for key in COLUMNS if key not in ("headline", "attacked")]
    contents = []
    for row in rows:
        content = {key: row.values[key] for key in names} | {"measure": "; ".join(row.measure)}
        for which in ("headline", "attacked"):
            if found := row.numbers[which]:
                content |= {f"{which}_{key}": getattr(found, key) for key in numbers}
                content[f"{which}_column"] = one_line(head(found.column))
        contents.append(content)
    columns = [*names, *extra, "measure"]
    return csv_text(columns, ([content.get(column) for column in columns] for content in contents))


def _letter(number: int) -> str:
    """Return A to Z, then A1 ..."""
    return chr(ord("A") + number % 26) + (str(number // 26) if number >= 26 else "")
