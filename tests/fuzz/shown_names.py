"""Names with markup, formulas and control characters, through the progress, every format of a report, and commands."""

from __future__ import annotations

import ast
import csv
import io
import re
import shlex
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hypothesis import strategies as st

#: Whole reports are slow: one run folder in so many names gets them.
REPORT_EVERY = 400
PIECES = ["[/]", "[/bold]", "[bold]", "[link=http://h]", "[@click=x]", ":smile:", "\\[", "=1+1", "+", "-", "@SUM(1)",
          "\t=", "<script>", "</td>", "&lt;", "![a](http://h)", "[a]: b", "`", "```", "|", "$x$", "\\input{q}", "{",
          "}", "%", "#", "_", "^", "~", "--", "'", '"', "$(touch x)", ";", "\n", "\r", "\x1b[2J",
          "\x1b]52;c;aGk=\x07", "\x9b31m", "\u202e", "\u2066", "\u2028", "\ufeff", "\ud83d", "\x7f", "a", "é", "漢",
          " ", "👩‍👩‍👧"]  # fmt: skip
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
#: What is left of LaTeX's special characters where text was escaped.
TEX = re.compile(
    r"\\(?:textbackslash|textasciitilde|textasciicircum|textless|textgreater|textbar)\{\}|\\[&%$#_{}]|-\{\}"
)


def names() -> st.SearchStrategy[list[str]]:
    pieces = st.one_of(st.sampled_from(PIECES), st.sampled_from(PIECES), st.characters(exclude_characters="\0"))
    name = st.lists(pieces, min_size=1, max_size=6).map("".join)
    return st.lists(name, min_size=1, max_size=3)


def setup(folder: Path) -> Callable[[list[str]], str]:
    turn = 0

    def read(drawn: list[str]) -> str:
        nonlocal turn
        turn += 1
        for name in drawn:
            _progress(name, terminal=turn % 2 == 0)
        _table(drawn)
        _csv(drawn)
        _card(drawn[0])
        _command(drawn, bash=turn % 20 == 0)
        if turn % REPORT_EVERY == 0:
            _report(folder / f"run{turn}", drawn[0])
        return "shown as it is"

    return read


def _check(wrong: bool, what: str) -> None:
    assert not wrong, what


def _progress(name: str, *, terminal: bool) -> None:
    from tune.cli.console import PlainConsole
    from tune.cli.progress import Progress
    from tune.config.eval_spec import EvalJob
    from tune.distributed.actors.eval_task import EvalTask, Result
    from tune.report.escaping import visible
    from tune.scheduling.queue import TaskQueue
    from tune.scheduling.tasks import TrainTask

    out = io.StringIO()
    progress = Progress(PlainConsole(file=out, width=4000, color_system=None, force_terminal=terminal))
    queue = TaskQueue()
    queue.lane_up("lane", "p", "host")
    queue.place(TrainTask(name, name, {}, "folder", "data", None, "engine", "p"), "trial")
    queue.take("lane", None)
    progress.stage(SimpleNamespace(name=name), name, 1)
    progress.show(queue.snapshot(), {"model": 1})
    task = EvalTask({"name": name}, EvalJob("zero_shot", name, name), None, "answers")
    progress.scored(name, Result(task, [{"task": name, "attack": name, "value": 0.5}]), "model")
    progress.scored(name, Result(task, [], error=name), "model")
    queue.failed(name, "failed", name)
    progress.ended(queue.entries[name])
    progress.console.print(progress._table())
    shown = out.getvalue()
    _check(bool(HIDDEN.search(shown)), "the terminal gets control characters")
    lines = [line.strip() for line in visible(name).split("\n") if "\t" not in line]
    _check(any(line not in shown for line in lines), "the terminal does not show the name as it is")


class _Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.add(tag)


def _table(drawn: list[str]) -> None:
    from tune.report.report import latex_part, markdown_part
    from tune.report.tables import Part, Table

    table = Table(drawn[0], ["", drawn[-1]], [[name, name] for name in drawn])
    part = Part(drawn[0], drawn, [table])
    markdown, tex, page = markdown_part(part, "##"), latex_part(part, "section"), table.html()
    for kind, text in {"Markdown": markdown, "LaTeX": tex, "HTML": page}.items():
        _check(bool(HIDDEN.search(text)), f"{kind} has control characters")
    allowed = {"table", "caption", "thead", "tbody", "tr", "th", "td", "br"}
    _check(not _Tags(page).tags <= allowed, "HTML has a tag of the name")
    _check(bool(re.search(r"(?<!\\)<[A-Za-z/!?]|\](?:\(|\[|:)", markdown)), "Markdown has HTML or a link of the name")
    bare = TEX.sub("", tex)
    _check(bare.count("{") != bare.count("}") or "\\input" in bare or "^" in bare, "LaTeX has a command of the name")


def _csv(drawn: list[str]) -> None:
    from tune.report.escaping import csv_text, visible

    cells = list(csv.reader(io.StringIO(csv_text(drawn, [drawn]), newline="")))
    _check(len(cells) != 2 or cells[0] != cells[1] or len(cells[0]) != len(drawn), "CSV has other cells")
    for name, cell in zip(drawn, cells[0], strict=True):
        _check(bool(HIDDEN.search(cell)), "CSV has control characters")
        _check(cell not in (visible(name), f"'{visible(name)}"), "CSV has another name")
        _check(bool(re.match(r"[=@\t\n]|[+-](?![\d.]|inf|nan)", cell)), "CSV has a formula")


def _card(name: str) -> None:
    from tune.report.model_card import _literal

    code = f"f({_literal(name)})"
    _check("`" in code or not code.isprintable(), "the code of a card has a name's own marks")
    call = ast.parse(code).body[0].value
    _check(call.args[0].value != name, "the code of a card has another name")


def _command(drawn: list[str], *, bash: bool) -> None:
    from tune.config.resume import shell_command

    command = shell_command("printf", "%s|", *drawn)
    _check(not command.isprintable(), "a command has control characters")
    if all(name.isprintable() for name in drawn):
        _check(shlex.split(command) != ["printf", "%s|", *drawn], "a command has other words")
    elif bash and not any(0xD800 <= ord(sign) < 0xDC80 or 0xDCFF < ord(sign) < 0xE000 for sign in "".join(drawn)):
        done = subprocess.run(["bash", "-c", command], capture_output=True, check=True)
        wanted = "".join(f"{name}|" for name in drawn).encode("utf-8", "surrogateescape")
        _check(done.stdout != wanted, "a command says something else in bash")


def _report(folder: Path, name: str) -> None:
    from helpers.run_folders import make_run

    from tune.report.files import write
    from tune.report.report import make_report

    run = make_run(folder, model=f"m{name}", seeds=(1,), tried=1, items=4, attacks=("none",))
    for path in write([make_report(run.run_dir)], folder / "out"):
        _check(bool(HIDDEN.search(path.read_text(encoding="utf-8"))), f"{path.name} has control characters")
