"""A run folder -> one report that compares its models: terminal, Markdown, CSV. Works while the run is going.

Every difference is shown with its standard error and in words that do not claim more than it carries.
"""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune.columns import EVAL_LOSS, Cell, Column
from tune.files import atomic_write_text
from tune.journal import BASE, Journal
from tune.results import MACDROP_KEYS, Line, ModelResults, collect
from tune.tables import Table

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 116
"""Characters that a table may take, so that it is readable in a terminal of 120."""
REASON_LENGTH = 300
PLANTED = "PLANTED: the massive weights of this built-in model were put there on purpose. A demonstration, no evidence."
#: Tables that compare a MacDrop trial with its plain adapter; the CSV compares all trials.
MAX_COMPARED = 4
ONE_SEED = "One seed per setting: differences hold for this seed only; they are no claim about the method."


@dataclass(frozen=True)
class Section:
    """The part of one model (or the head of the report): sentences, then tables, then sentences."""

    title: str
    before: list[str]
    tables: list[Table]
    after: list[str]

    def split(self, width: int) -> list[Table]:
        """The tables, each cut to `width` characters."""
        return [part for table in self.tables for part in table.split(width)]


@dataclass(frozen=True)
class Report:
    """See `make_report`."""

    run_dir: Path
    sections: list[Section]
    models: list[ModelResults]

    def terminal(self, console: Console) -> None:
        """Print to a rich console, within its width."""
        from rich.markup import escape

        for section in self.sections:
            console.print()
            console.rule(f"[bold]{escape(section.title)}", align="left")
            _print_lines(console, section.before)
            for table in section.split(min(WIDTH, console.width - 4)):
                console.print(table.rich())
            _print_lines(console, section.after)

    def markdown(self) -> str:
        """The same report as Markdown."""
        parts = []
        for number, section in enumerate(self.sections):
            parts.append(f"{'##' if number else '#'} {section.title}")
            parts.append("\n".join(f"- {_one_line(line)}" for line in section.before))
            parts += [table.markdown() for table in section.split(WIDTH)]
            parts.append("\n".join(f"- {_one_line(line)}" for line in section.after))
        return "\n\n".join(part for part in parts if part) + "\n"

    def csv(self) -> str:
        """Long form: a line for each score of each trial; trials without scores have one line, with their reason."""
        keys = dict.fromkeys(key for model in self.models for key in model.keys)
        out = io.StringIO()
        names = ["model", "label", "trial", "arm", "status", "reason", "seed", "best", *keys]
        names += ["benchmark", "task", "metric", "attack", "attack_on", "higher_is_better", "value", "stderr", "n"]
        names += ["plain_value", "delta_to_plain", "delta_stderr", "words"]
        writer = csv.DictWriter(out, names, lineterminator="\n")
        writer.writeheader()
        for model in self.models:
            for line in model.lines:
                writer.writerows(_csv_rows(model, line))
        return out.getvalue()

    def write(self) -> tuple[Path, Path]:
        """Write report.md and report.csv into the run folder; return their paths.

        Raises:
            ResourceError: the folder cannot be written.
        """
        markdown = atomic_write_text(self.run_dir / "report.md", self.markdown())
        return markdown, atomic_write_text(self.run_dir / "report.csv", self.csv())


def make_report(run_dir: str | os.PathLike) -> Report:
    """Read a run folder, finished or not.

    Raises:
        ConfigError: it is no run folder.
    """
    journal = Journal.open(run_dir)
    models = collect(journal)
    return Report(journal.run_dir, [_head(journal, models), *(_section(model) for model in models)], models)


# --- content ---


def _head(journal: Journal, models: list[ModelResults]) -> Section:
    run, environment = journal.run(), journal.environment()
    trials = [line for model in models for line in model.lines if line.arm != BASE]
    about = [f"Run {run['name']}: {run['status']}, started {run['created'][:19]} UTC with `{run['command']}`."]
    counts = _count(line.status for line in trials) or "none yet"
    about.append(f"{len(models)} model(s), {len(trials)} trial(s): {counts}.")
    if environment:
        versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
        gpus = ", ".join(environment["gpus"]) or "no GPU"
        about.append(f"{environment['host']}: {environment['cpus']} CPUs, {gpus}. {versions}.")
    about.append("± is the standard error over items; MacDrop's masks are off in every score.")
    if any(model.best for model in models):
        about.append('"within noise": less than 2 standard errors of the difference (both errors combined).')
    return Section(f"MacDrop report: {run['name']}", about, [], [])


def _section(model: ModelResults) -> Section:
    before = [PLANTED] if model.planted else []
    before += _about_weights(model)
    tables = [_trials_table(model)] if any(line.arm != BASE for line in model.lines) else []
    # Parts of a task, such as Spec-Bench's categories, are in the CSV.
    primary = [column for column in model.shown if column != EVAL_LOSS and not _is_part(column, model.shown)]
    for benchmark in dict.fromkeys(column.benchmark for column in primary):
        tables += _scores_tables(model, benchmark, [column for column in primary if column.benchmark == benchmark])
    after: list[str] = []
    if model.best:
        differences = [_differences_table(model, line) for line in model.rivals()[:MAX_COMPARED]]
        tables += [table for table in differences if table.rows]
        after += _verdict(model, model.best, bool(differences[0].rows))
    elif model.macdrop():
        after.append(f"No MacDrop trial is done and has {model.objective}: none is marked as the best.")
    failed = [line for line in model.lines if line.reason]
    after += [f"{line.label} ({line.trial}) {line.status}: {_short(line.reason)}" for line in failed]
    if not model.lines:
        after.append("Nothing is trained or scored yet.")
    return Section(model.display, before, tables, after)


def _about_weights(model: ModelResults) -> list[str]:
    found = model.weights
    if not found:
        return ["Massive weights: not scanned."]
    ratio = (found.get("confidence") or {}).get("top_over_median")
    expert = "" if found.get("expert") is None else f", expert {found['expert']}"
    rows = " ".join(str(index) for index in found["indices"][:5])
    size = f"; the largest intermediate entry at bos is {ratio:.4g} times the median." if ratio else "."
    lines = [f"Massive weights: layer {found['layer']} (from 0){expert}, top rows {rows}{size}"]
    proof = model.proof
    if proof:
        others = ", ".join(_number(value) for value in proof.get("random") or [])
        lines.append(
            f"Verdict: {proof['verdict']}. Perplexity {_number(proof['untouched'])}; top-{proof['k']} zeroed "
            f"{_number(proof['zeroed'])}, retained {_number(proof['retained'])}"
            + (f", {proof['k']} random rows zeroed {others}." if others else ".")
        )
    else:
        lines.append("Verdict: none; whether the model is sensitive to these rows was not measured.")
    return lines


def _trials_table(model: ModelResults) -> Table:
    keys = [key for key in model.keys if any(line.setting(key) is not None for line in model.lines)]
    titles = [key.removeprefix("macdrop.") for key in keys]
    head = ["", *(title.replace("_", "_\n") if len(title) > 14 else title for title in titles)]
    head += ["seed"] if any(line.seed for line in model.lines) and "seed" not in keys else []
    rows = []
    for line in (line for line in model.lines if line.arm != BASE):
        row = [_label(model, line), *(_setting(line.setting(key)) for key in keys)]
        row += [str(line.seed)] if "seed" in head[1 + len(keys) :] else []
        seconds = line.info.get("seconds")
        row += [line.status, _setting(line.info.get("step", line.info.get("steps")))]
        row += [_cell(line.scores.get(EVAL_LOSS)), "" if seconds is None else f"{seconds:.1f}"]
        rows.append(row)
    return Table("Trials", [*head, "status", "steps", "eval_loss", "seconds"], rows)


def _scores_tables(model: ModelResults, benchmark: str, columns: list[Column]) -> list[Table]:
    """One table with all attacks side by side where that fits, else one for each attack."""
    whole = _scores_table(model, benchmark, columns)
    attacks = dict.fromkeys((column.attack, column.attack_on) for column in columns)
    if sum(whole.widths()) <= WIDTH or len(attacks) == 1:
        return [whole]
    parts = {attack: [c for c in columns if (c.attack, c.attack_on) == attack] for attack in attacks}
    return [_scores_table(model, f"{benchmark}{_under(found[0], ', ')}", found) for found in parts.values()]


def _scores_table(model: ModelResults, title: str, columns: list[Column]) -> Table:
    rows = []
    for line in model.lines:
        cells = [_cell(line.scores.get(column)) for column in columns]
        if any(cells):
            rows.append([_label(model, line), *cells])
    return Table(title, ["", *(_head_of(column) for column in columns)], rows)


def _differences_table(model: ModelResults, line: Line) -> Table:
    rows = [
        [
            _one_line(_head_of(d.column)),
            _number(d.plain.value),
            _number(d.macdrop.value),
            _digits(d.delta, "+#.3g") + _error(d.stderr),
            d.words,
        ]
        for d in model.differences(line, model.shown)
        if d.column.higher_is_better is not None and not _is_part(d.column, model.shown)
    ]
    plain = model.plain_for(line)
    label = plain.label if plain else "plain"
    title = f"{line.label} (best MacDrop{_apart(model, line)}) against {label}"
    return Table(title, ["", label, line.label, "difference", "says"], rows)


def _apart(model: ModelResults, line: Line) -> str:
    """The settings that tell several comparisons apart, such as " with use_dora true"; nothing for a single one."""
    if len(model.rivals()) < 2:
        return ""
    others = [key for key in model.keys if not key.startswith("macdrop.")]
    differing = [key for key in others if len({str(rival.setting(key)) for rival in model.rivals()}) > 1]
    return " with " + ", ".join(f"{key} {_setting(line.setting(key))}" for key in differing) if differing else ""


def _verdict(model: ModelResults, best: Line, compared: bool) -> list[str]:
    tried = len(model.macdrop())
    own = {key: best.setting(f"macdrop.{key}") for key in MACDROP_KEYS}
    settings = ", ".join(f"{key} {_setting(value)}" for key, value in own.items() if value is not None)
    lines = [f"Best MacDrop trial by {model.objective}: {best.label} ({settings}), of {tried} setting(s) tried "
             f"({_count(line.status for line in model.macdrop())})."]  # fmt: skip
    if tried > 1:
        lines.append(f"The best of {tried} is picked after the fact, which favours it over the plain adapter.")
    if not compared:
        lines.append("No plain adapter with the same other settings is scored yet: nothing to compare with.")
    lines += [ONE_SEED] if model.seeds() < 2 else []
    return lines


def _is_part(column: Column, columns: list[Column]) -> bool:
    """Whether the column is of a part ("spec_bench/math") of a task that has a column of its own."""
    return "/" in column.task and any(other.task == column.task.rpartition("/")[0] for other in columns)


def _csv_rows(model: ModelResults, line: Line) -> Iterable[dict[str, Any]]:
    about = {"model": model.display, "label": line.label, "trial": line.trial, "arm": line.arm, "status": line.status}
    about |= {"reason": line.reason, "seed": line.seed, "best": line is model.best}
    about |= {key: line.setting(key) for key in model.keys}
    if not line.scores:
        yield about
    differences = {d.column: d for d in model.differences(line, model.columns)} if line.arm == "macdrop" else {}
    for column in model.columns:
        if column not in line.scores:
            continue
        cell, d = line.scores[column], differences.get(column)
        row = {**about, **vars(column), "value": cell.value, "stderr": cell.stderr, "n": cell.n}
        if d:
            row |= {"plain_value": d.plain.value, "delta_to_plain": d.delta, "delta_stderr": d.stderr, "words": d.words}
        yield row


# --- small text ---


def _head_of(column: Column) -> str:
    return "\n".join(filter(None, [column.task, column.metric])) + _under(column, "\n")


def _under(column: Column, separator: str) -> str:
    """The attack and the rows that it hits, in two parts that `separator` introduces; empty without an attack."""
    if column.attack == "none":
        return ""
    return f"{separator}{column.attack}" + (f"{separator}{column.attack_on} rows" if column.attack_on else "")


def _label(model: ModelResults, line: Line) -> str:
    return f"{line.label} *" if line is model.best else line.label


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return ""
    return _number(cell.value) + _error(cell.stderr)


def _error(stderr: float | None) -> str:
    return "" if stderr is None else f" ±{_digits(stderr, '#.2g')}"


def _number(value: float | str) -> str:
    """Four significant digits; `value` may be the text "inf"."""
    return value if isinstance(value, str) else _digits(value, "#.4g")


def _digits(value: float, form: str) -> str:
    return format(value, form).removesuffix(".")


def _setting(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _count(statuses: Iterable[str]) -> str:
    return ", ".join(f"{number} {status}" for status, number in Counter(statuses).items())


def _short(text: str) -> str:
    line = _one_line(text)
    return line if len(line) <= REASON_LENGTH else line[: REASON_LENGTH - 3] + "..."


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _print_lines(console: Console, lines: list[str]) -> None:
    for line in lines:
        console.print(line, markup=False, highlight=False)
