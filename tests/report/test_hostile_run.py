"""A run folder whose names, reasons and answers try to be markup, formulas or commands, in every format."""

from __future__ import annotations

import ast
import csv
import html
import io
import json
import re
import shlex
from pathlib import Path

import pytest
from helpers.run_folders import make_run
from rich.console import Console

from tune.config.run_spec import TrainSpec
from tune.evaluation.merging import LogitCheck
from tune.report.files import text, write
from tune.report.model_card import Exported, model_card
from tune.report.report import Report, make_report

HOSTILE = "=1+1|x[/bold]y<script>z(1)</script>\x1b[2J\x1b]52;c;aGk=\x07\u202e$\\input{q} ![a](http://h)"
#: What a run file lets pass as the name of a model.
MODEL = "".join(filter(str.isprintable, HOSTILE))
FOLDER = "a b'é $(touch pwned)[v2]"


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Report:
    """A run whose task, reason, version, category and answers are `HOSTILE`, and whose model is nearly so."""
    folder = tmp_path_factory.mktemp("runs") / FOLDER
    made = make_run(folder, model=MODEL, seeds=(1,), tried=1, items=6, attacks=("none", "zeroing@3"), judge=True)
    for file in [made.scores_file, *folder.rglob("answers/*.jsonl"), *folder.rglob("judgements/*.jsonl")]:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows:
            row |= {key: HOSTILE for key in ("version", "category") if key in row}
            row |= {"task": HOSTILE, "entry": HOSTILE} if row.get("task") == "qa" else {}
            lists = [key for key in ("answers", "turns", "feedback") if isinstance(row.get(key), list)]
            row |= {key: [HOSTILE] * len(row[key]) for key in lists if "doc_id" not in row}
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for record in folder.glob("trials/*/trial.json"):
        record.write_text(json.dumps(json.loads(record.read_text()) | {"reason": HOSTILE}))
    (folder / "run.json").write_text(json.dumps(made.run() | {"name": HOSTILE, "command": HOSTILE}))
    return make_report(folder)


@pytest.fixture(scope="module")
def files(report, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("out")
    write([report], folder)
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_no_format_lets_control_characters_through(files):
    assert len(files) > 8
    for name, content in files.items():
        assert not set("\x1b\x07\u202e") & set(content), name
    assert all("\\x1b[2J" in files[f"report.{kind}"] for kind in ("md", "csv", "html"))


def test_the_terminal_shows_it_as_it_is(report):
    out = io.StringIO()
    report.terminal(Console(file=out, width=4000, color_system=None))
    shown = out.getvalue()
    assert "\x1b" not in shown and "=1+1|x[/bold]y<script>" in shown
    assert text([report], "markdown").startswith("# MacDrop report: =1+1|x[/bold]y\\<script>")


def test_no_cell_of_a_csv_is_a_formula(files):
    for name, content in files.items():
        if name.endswith(".csv"):
            cells = [cell for row in csv.reader(io.StringIO(content)) for cell in row]
            assert not [cell for cell in cells if re.match(r"[=@]|[+-](?![\d.]|inf)", cell)], name
    assert "'=1+1|x" in files["report.csv"]


def test_the_page_has_no_script_and_the_markdown_no_html_or_link(files):
    assert "<script" not in files["report.html"] and "&lt;script&gt;" in files["report.html"]
    assert not re.search(r"(?<!\\)<script|\](?<!\\)\(http", files["report.md"])


def test_latex_takes_it_for_text(files):
    tex = files["report.tex"]
    assert "\\input{q}" not in tex.split("\n", 4)[4] and r"\textbackslash{}input\{q\}" in tex
    depth = 0
    for sign in re.sub(r"\\[{}\\]", "", tex):
        depth += {"{": 1, "}": -1}.get(sign, 0)
        assert depth >= 0
    assert depth == 0


def test_commands_can_be_pasted_into_a_shell(report, files):
    folder = str(report.run_dir)
    for line in re.findall(r"Rerun: (macdrop .*) output_dir=FOLDER", text([report], "csv") + files["report.md"]):
        assert shlex.split(line.replace("\\]", "]")) == ["macdrop", "sweep", f"{folder}/config.yaml"]
    assert f"macdrop report {shlex.quote(folder)}" in html.unescape(files["report.html"])
    assert not Path("pwned").exists()


@pytest.mark.parametrize("merged", [None, LogitCheck(0.0, 1.0, 1.0, 8, "float32")])
def test_names_are_no_code_in_a_model_card(merged, tmp_path):
    name = 'x", trust_remote_code=True); import os; os.abort()\n```\n<script>`'
    spec = TrainSpec(model_name_or_path="x").model_copy(update={"model_name_or_path": name, "model_revision": name})
    card = model_card(Exported(tmp_path, name, spec, {"status": "done"}, 1), merged=merged, place=name)
    code = card.partition("```python\n")[2].partition("```")[0]
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert len(calls) == (2 if merged else 3)
    assert {keyword.arg for call in calls for keyword in call.keywords} <= {"dtype", "revision"}
    assert "\n<script>" not in card.partition("```python")[0]
