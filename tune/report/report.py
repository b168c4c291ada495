"""The report of a run folder, finished or not: the verdict first, then each model part by part.

Terminal, Markdown and LaTeX are rendered here, CSV in `report.csv_rows`, the page in `report.html`. All walk
`Report.parts`, so they agree.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune.analysis.results import ModelResults, collect
from tune.analysis.verdict import Verdict
from tune.config.run_spec import slug
from tune.config.sections import Arm
from tune.report.escaping import latex_text, markdown_text, rich_text, visible
from tune.report.sections.builders import parts
from tune.report.sections.findings import no_verdict
from tune.report.sections.subject import Subject
from tune.report.spread import judged, spread
from tune.report.tables import Part
from tune.report.text import count, one_line
from tune.storage.environment import differences
from tune.storage.records import TrialRecord
from tune.storage.run_folder import BASE, RunFolder
from tune.storage.run_lock import in_use
from tune.storage.states import RunStatus, TaskState

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 116
"""Maximum width of a table in characters, for terminals of 120 columns."""
MAX_PROBLEMS = 5
"""Damaged files listed by name."""
LATEX_HEAD = r"""% {title}
% Written by macdrop. For \input into a document whose preamble has:
%   \usepackage[utf8]{{inputenc}} \usepackage{{booktabs,textcomp}}
"""


@dataclass(frozen=True)
class Report:
    """The report of one run. `facts` are sentences on the run; `verdicts` are keyed by `ModelResults.name`."""

    run_dir: Path
    name: str
    facts: list[str]
    models: list[ModelResults]
    verdicts: dict[str, list[Verdict]]
    run_folder: RunFolder
    _parts: dict[str, dict[str, Part]] = field(default_factory=dict, repr=False, compare=False)

    def keep(self, model: ModelResults, made: dict[str, Part]) -> None:
        """Take the parts on one model that were built elsewhere."""
        self._parts[model.name] = made

    def parts(self, model: ModelResults) -> dict[str, Part]:
        """The parts on one model, by the keys of `sections.builders.BUILDERS`; empty ones are false."""
        if model.name not in self._parts:
            self._parts[model.name] = parts(Subject(self.run_folder, model, self.verdicts[model.name]))
        return self._parts[model.name]

    @property
    def about(self) -> list[str]:
        """Sentences on the run, and on its first `MAX_PROBLEMS` damaged files."""
        for model in self.models:  # reads everything, so that all problems are known
            self.parts(model)
        found = [problem.replace(f"{self.run_dir}/", "") for problem in self.run_folder.problems or []]
        more = (
            [f"DAMAGED: {len(found) - MAX_PROBLEMS} more damaged files or lines."] if len(found) > MAX_PROBLEMS else []
        )
        return [*self.facts, *(f"DAMAGED, omitted: {problem}" for problem in found[:MAX_PROBLEMS]), *more]

    def headlines(self) -> list[str]:
        """The verdict sentences of each model, with the model's name."""
        lines = []
        for model in self.models:
            found = [verdict.sentence for verdict in self.verdicts[model.name] if verdict.arm == Arm.MACDROP]
            planted = " (PLANTED model: a demonstration, not evidence)" if model.planted and found else ""
            lines += [_named(model, sentence) + planted for sentence in found or no_verdict(model)[:1]]
        return lines

    def terminal(self, console: Console, keys: Collection[str] | None = None) -> None:
        """Print to a rich console, within its width; only the parts named in `keys`, if given."""
        console.print()
        console.rule(rich_text((self.title, "bold")), align="left")
        _print_lines(console, self.headlines(), style="bold")
        _print_lines(console, self.about)
        for model in self.models:
            console.print()
            console.rule(rich_text((model.display, "bold")), align="left")
            for key, part in self.parts(model).items():
                if part and (keys is None or key in keys):
                    print_part(console, part)

    def markdown(self) -> str:
        """The report as Markdown."""
        blocks = [f"# {markdown_text(self.title)}"]
        blocks += [_bullets(f"**{line}**" for line in self.headlines()), _bullets(self.about)]
        for model in self.models:
            blocks.append(f"## {markdown_text(model.display)}")
            for part in filter(None, self.parts(model).values()):
                blocks.append(markdown_part(part, "###"))
        return "\n\n".join(block for block in blocks if block) + "\n"

    def _repr_markdown_(self) -> str:
        """The report in a notebook's cell."""
        return self.markdown()

    def latex(self) -> str:
        """The report as LaTeX to be \\input: one section per model, tables with booktabs."""
        blocks = [LATEX_HEAD.format(title=visible(one_line(self.title))), _items([*self.headlines(), *self.about])]
        for model in self.models:
            blocks.append(rf"\section{{{latex_text(model.display)}}}")
            for part in filter(None, self.parts(model).values()):
                blocks.append(latex_part(part, "subsection"))
        return "\n\n".join(block for block in blocks if block) + "\n"

    @property
    def title(self) -> str:
        return f"MacDrop report: {self.name}"


def print_part(console: Console, part: Part) -> None:
    """Print to a rich console, with tables split to fit its width."""
    console.print(rich_text("\n", (part.title, "bold underline")))
    _print_lines(console, part.lines)
    for table in part.tables:
        for cut in table.split(min(WIDTH, console.width - 4)):
            console.print(cut.rich())


def markdown_part(part: Part, level: str) -> str:
    """Render a part below a heading of `level`, such as "###"."""
    tables = [cut.markdown() for table in part.tables for cut in table.split(WIDTH)]
    blocks = (f"{level} {markdown_text(part.title)}", _bullets(part.lines), *tables)
    return "\n\n".join(filter(None, blocks))


def latex_part(part: Part, command: str) -> str:
    """Render a part below a heading by `command`, such as "subsection"."""
    tables = [cut.latex() for table in part.tables for cut in table.split(WIDTH)]
    blocks = (f"\\{command}{{{latex_text(part.title)}}}", _items(part.lines), *tables)
    return "\n\n".join(filter(None, blocks))


def make_report(run_dir: str | os.PathLike, archive: Path | None = None) -> Report:
    """Read a run folder, finished or not; damaged files are skipped and listed. archive: it was unpacked from this one.

    Raises:
        ConfigError: not a run folder.
    """
    with _no_collection():
        return _read(RunFolder.open(run_dir, lenient=True, archive=archive))


def _read(run_folder: RunFolder) -> Report:
    trials = run_folder.trials()
    models = collect(run_folder, trials)
    of_model: dict[str, list[TrialRecord]] = {model.name: [] for model in models}
    for trial in trials:
        of_model[slug(trial.model)].append(trial)
    found = spread(judged, [(run_folder, model, of_model[model.name]) for model in models])
    for model, made in zip(models, found, strict=True):
        model.trouble = made.trouble
    verdicts = {model.name: made.verdicts for model, made in zip(models, found, strict=True)}
    name = str(run_folder.run().get("name") or run_folder.run_dir.resolve().name)
    return Report(run_folder.run_dir, name, _about(run_folder, models), models, verdicts, run_folder)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Leave the garbage collector out: of what is read all is kept, and each of its rounds looks at all of it."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def _status(run_folder: RunFolder, run: Mapping[str, Any]) -> str:
    status = str(run.get("status", "status unknown"))
    if status == RunStatus.RUNNING and run_folder.archive is None and not in_use(run_folder.run_dir):
        return "interrupted (its process is gone)"
    return status


def _about(run_folder: RunFolder, models: list[ModelResults]) -> list[str]:
    run, environments = run_folder.run(), run_folder.environments()
    trials = [line for model in models for line in model.lines if line.arm != BASE]
    ended = f", ended {run['finished'][:19]} UTC" if run.get("finished") else ""
    created = f"started {str(run.get('created', 'at an unknown time'))[:19]} UTC{ended}"
    about = [f"Run {run.get('name')}: {_status(run_folder, run)}, {created}."]
    counts = count(line.status for line in trials) or "none yet"
    about.append(f"{len(models)} model(s), {len(trials)} trial(s): {counts}.")
    about += [_machine(each) for each in environments if each]
    about += _changes(environments)
    about.append("All scores are measured with MacDrop's masks off.")
    begun = {file.parent.name for file in (run_folder.run_dir / "trials").glob("*/trial.json")}
    lost = [folder.name for folder in (run_folder.run_dir / "trials").glob("*/") if folder.name not in begun]
    about += [f"MISSING: trial.json of {', '.join(sorted(lost))}; not written yet, or lost."] if lost else []
    done = [line for line in trials if line.status == TaskState.DONE]
    about += ["MISSING: scores of finished trials."] if done and not run_folder.has_scores() else []
    return about


def _machine(environment: dict[str, Any]) -> str:
    gpus = ", ".join(environment.get("gpus") or []) or "no GPU"
    since = f" since {str(environment['at'])[:19]} UTC" if environment.get("at") else ""
    return f"Machine{since}: {environment.get('host')}, {environment.get('cpus')} CPUs, {gpus}."


def _changes(environments: list[dict[str, Any]]) -> list[str]:
    """Sentences on resumes in other environments: trials from before and after may not be comparable."""
    lines = []
    for then, now in pairwise(environments):
        apart = "; ".join(differences(then, now)) if then else "what the run was started under is unknown"
        lines.append(f"MIXED ENVIRONMENTS: resumed {str(now.get('at'))[:19]} UTC under others: {apart}.")
    return lines


def _named(model: ModelResults, sentence: str) -> str:
    """Prefix a sentence with the model's name unless it already has it."""
    return sentence if model.display in sentence else f"{model.display}: {sentence}"


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {markdown_text(line)}" for line in lines)


def _items(lines: list[str]) -> str:
    if not lines:
        return ""
    items = "\n".join(rf"\item{{}} {latex_text(line)}" for line in lines)  # {}: a "[" is no argument
    return f"\\begin{{itemize}}\n{items}\n\\end{{itemize}}"


def _print_lines(console: Console, lines: list[str], style: str = "") -> None:
    for line in lines:
        console.print(rich_text((line, style)))
