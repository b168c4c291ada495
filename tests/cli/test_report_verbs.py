"""`macdrop report` and `macdrop compare` through the command line: formats, files, refusals, damaged and odd runs."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas
import pytest
from helpers.run_folders import make_run

from tune.storage.run_folder import RunFolder
from tune.storage.run_lock import locked
from tune.storage.states import RunStatus

FILES = ("report.csv", "report.html", "report.md", "report.tex")
ATTACKS = ("none", "zeroing@3")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Three runs: `one` of a planted model, `two` of another one that is scored on fewer tasks, `new` with nothing."""
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "one", tried=2, items=20, attacks=ATTACKS)
    two = make_run(folder / "two", model="org/other", tried=2, items=20, attacks=ATTACKS)
    scores = [json.loads(line) for line in two.scores_file.read_text().splitlines()]
    two.scores_file.write_text("".join(json.dumps(r) + "\n" for r in scores if r["task"] != "arith"))
    RunFolder.create(folder / "new", {"model_name_or_path": "org/m"}, command="macdrop sweep x")
    return folder


@pytest.fixture
def runs(made, shell) -> Path:
    """Copies of these runs in the folder of the shell."""
    for run in made.iterdir():
        shutil.copytree(run, shell.folder / run.name)
    return shell.folder


# --- report ---


def test_a_report_is_printed_and_written(shell, runs):
    ended = shell("report", "one")
    assert ended.code == 0 and ended.err == ""
    assert {f"one/{name}" for name in FILES} <= set(ended.new) and "one/report.md" in ended.out.split("written")[1]
    assert "PLANTED" in ended.out and "MacDrop against plain" in ended.out
    before = {name: (runs / "one" / name).read_text() for name in FILES}
    assert shell("report", "one").new == []
    assert {name: (runs / "one" / name).read_text() for name in FILES} == before  # deterministic


def test_stdout_and_files_are_equal(shell, runs):
    files = {"markdown": "report.md", "csv": "report.csv", "latex": "report.tex"}
    shell("report", "one", "two", "--output", "both")
    for format, file in files.items():
        ended = shell("report", "one", "two", "--format", format)
        assert ended.code == 0 and ended.new == [] and ended.out == (runs / "both" / file).read_text()


def test_several_runs_are_printed_and_written_where_asked(shell, runs):
    ended = shell("report", "one", "two")
    assert ended.code == 0 and ended.new == [] and "nothing: several runs go into files by --output" in ended.out
    assert "zoo:planted-llama" in ended.out and "org/other" in ended.out
    ended = shell("report", "one", "two", "new", "--output", "both")
    assert ended.code == 0 and {f"both/{name}" for name in FILES} <= set(ended.new)
    assert all(name.startswith("both/") for name in ended.new)
    assert {name.split("/")[2][:3] for name in ended.new if name.startswith("both/figures/")} == {"r1-", "r2-"}
    assert set(pandas.read_csv(runs / "both/report.csv").run) == {"one", "two"}
    assert "MacDrop report: new" in (runs / "both/report.md").read_text()


def test_a_run_that_cannot_be_written_is_shown(shell, runs):
    (runs / "one" / "figures").write_text("not a folder")
    ended = shell("report", "one")
    assert ended.code == 0 and "MacDrop against plain" in ended.out and "nothing: Cannot write one/figures" in ended.out
    assert "goes elsewhere by --output FOLDER" in ended.err
    ended = shell("report", "one", "--output", "elsewhere")
    assert ended.code == 0 and all(name.startswith("elsewhere/") for name in ended.new)
    assert any(name.startswith("elsewhere/figures/") for name in ended.new)
    assert shell("report", "one", "--output", "one/figures/x").code == 3  # asked for: refused


REFUSED = {
    "no such folder": (["report", "nowhere"], "no such folder"),
    "a folder without a run": (["report", "."], "it has no run.json"),
    "one of several is missing": (["report", "one", "nowhere"], "no such folder"),
    "the same run twice": (["report", "one", "./one"], "is given twice"),
    "a misspelt format": (["report", "one", "--format", "markdwon"], "Did you mean 'markdown'?"),
    "output is a file": (["report", "one", "--output", "one/run.json"], "is a file"),
    "output is another run": (["report", "one", "--output", "two"], "whose report would be overwritten"),
    "compare: missing": (["compare", "one", "nowhere"], "no such folder"),
    "compare: twice": (["compare", "one", "one"], "is given twice"),
    "compare: a misspelt column": (["compare", "one", "--sort", "hedline"], "Did you mean 'headline'?"),
    "compare: a misspelt format": (["compare", "one", "--format", "tex"], "Formats: terminal, markdown, csv, latex"),
    "compare: output of no known kind": (["compare", "one", "--output", "table.xlsx"], "ends in .md, .csv, .tex"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, shell, runs):
    arguments, expected = REFUSED[case]
    assert expected in " ".join(shell.refused(*arguments).split())


# --- damaged runs ---


def cut(pattern: str, length: int) -> Callable[[Path], None]:
    """Return damage that cuts the first matching file after `length` characters."""

    def do(run: Path) -> None:
        file = sorted(run.glob(pattern))[0]
        file.write_text(file.read_text()[:length])

    return do


def put(pattern: str, text: str) -> Callable[[Path], None]:
    def do(run: Path) -> None:
        for file in run.glob(pattern):
            file.write_text(text)

    return do


def torn(run: Path) -> None:
    text = (run / "scores.jsonl").read_text()
    (run / "scores.jsonl").write_text(text[:-30])


def garbage(run: Path) -> None:
    lines = (run / "scores.jsonl").read_text().splitlines()
    lines[3:6] = [lines[3][:50], "[1]", '{"model": "m"}']
    (run / "scores.jsonl").write_text("\n".join(lines) + "\n")


def answers_lost(run: Path) -> None:
    for folder in run.glob("trials/*-macdrop-*/answers"):
        shutil.rmtree(folder)


DAMAGED = {
    "half a trial.json": (cut("trials/*-macdrop-*/trial.json", 40), "trial.json is damaged"),
    "no trial.json": (lambda run: next(run.glob("trials/*-plain-*/trial.json")).unlink(), "MISSING: trial.json of"),
    "a trial.json of another shape": (put("trials/*-random_rows-*/trial.json", "[]"), "it holds no mapping"),
    "half a config of a trial": (put("trials/*-random_rows-*/config.yaml", "a: [1,"), "config.yaml is damaged"),
    "a torn last line of scores": (torn, "MacDrop against plain"),
    "damaged lines of scores": (garbage, "scores.jsonl, line 4: not JSON"),
    "no scores": (lambda run: (run / "scores.jsonl").unlink(), "MISSING: scores of finished trials."),
    "half a finalists.json": (cut("models/*/finalists.json", 60), "finalists.json is damaged"),
    "a finalists.json of another shape": (put("models/*/finalists.json", '{"cells": 3}'), "No verdict: a file"),
    "half a scan": (cut("models/*/massive_weights.json", 40), "massive_weights.json is damaged"),
    "a proof of another shape": (put("models/*/proof.json", '{"verdict": "sensitive"}'), "part needs is damaged"),
    "no answers": (answers_lost, "items not recorded"),
    "damaged answers": (put("trials/*/answers/zero_shot-qa-none.jsonl", '{"task"\n'), "zero_shot-qa-none.jsonl"),
    "damaged metrics": (put("trials/*/metrics.jsonl", "{x\n"), "metrics.jsonl, line 1"),
    "half an environment": (put("environment.json", "{"), "environment.json is damaged"),
    "a config of another shape": (put("config.yaml", "sweep: 3\n"), "MacDrop against plain"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_the_rest_of_a_damaged_run_is_reported(case, shell, runs):
    damage, expected = DAMAGED[case]
    damage(runs / "one")
    before = {path: path.read_bytes() for path in (runs / "one").rglob("*") if path.is_file()}
    ended = shell("report", "one", "new")  # of two runs nothing is written
    assert ended.code == 0 and "Traceback" not in ended.out + ended.err and ended.new == []
    assert expected in " ".join(ended.out.split()), ended.out[:3000]
    assert "Scores as in the paper" in ended.out or case == "no scores"  # the rest is there
    assert {path: path.read_bytes() for path in before} == before  # nothing of the run is touched


def test_a_run_damaged_in_many_places_is_written_and_compared(shell, runs):
    for damage in (torn, garbage, answers_lost, put("models/*/*.json", "{"), put("trials/*/metrics.jsonl", "{x\n")):
        damage(runs / "one")
    ended = shell("report", "one")
    assert ended.code == 0 and {f"one/{name}" for name in FILES} <= set(ended.new)
    text = (runs / "one/report.md").read_text()
    assert text.count("DAMAGED, omitted: ") == 5 and re.search(r"DAMAGED: \d+ more", text)
    ended = shell("compare", "one")
    assert ended.code == 0 and "zoo:planted-llama LoRA (one)" in ended.out


@pytest.mark.parametrize("file", ["run.json", "config.yaml"])
def test_a_run_without_its_own_record_is_refused(file, shell, runs):
    (runs / "one" / file).write_text("{")
    for verb in ("report", "compare"):
        assert "damaged run folder" in shell.refused(verb, "one")


def test_a_run_without_trials(shell, runs):
    ended = shell("report", "new")
    assert ended.code == 0 and "No verdict: nothing has been trained or scored yet." in ended.out


# --- compare ---


def test_the_leaderboard_ranks_different_measurements_apart(shell, runs):
    ended = shell("compare", "two", "one", "new", "--format", "csv")
    assert ended.code == 0 and ended.new == []
    table = pandas.read_csv(io.StringIO(ended.out))
    assert list(table["model"]) == ["org/other", "zoo:planted-llama", "org/m"]
    assert list(table["measured"][:2]) == ["A", "B"]
    first = table.iloc[0]
    assert first["headline_column"] == "qa acc" and table.iloc[1]["headline_column"] == "mean of 2 acc"
    assert first["headline_low"] < first["headline_delta"] < first["headline_high"] and first["tried"] == 2
    text = " ".join(shell("compare", "two", "one", "new").out.split())
    assert "measured differently: they are ranked apart" in text and "A: qa acc" in text and "B: mean of 2 acc" in text
    assert "new, org/m: No verdict: nothing has been trained or scored yet." in text and "PLANTED" in text


def test_the_leaderboard_sorts_and_is_written(shell, runs):
    """The same model in two runs has two lines."""
    make_run(runs / "three", tried=3, items=20, attacks=ATTACKS, effect={("macdrop", "none"): 0.1})
    by_headline = pandas.read_csv(io.StringIO(shell("compare", "one", "three", "--format", "csv").out))
    assert list(by_headline["run"]) == ["three", "one"] and set(by_headline["model"]) == {"zoo:planted-llama"}
    shutil.copytree(runs / "one", runs / "other" / "one")
    same_name = pandas.read_csv(io.StringIO(shell("compare", "one", "other/one", "--format", "csv").out))
    assert sorted(same_name["run"]) == ["one", "other/one"]
    by_tried = pandas.read_csv(io.StringIO(shell("compare", "three", "one", "--sort", "tried", "--format", "csv").out))
    assert list(by_tried["tried"]) == [2, 3]
    by_run = pandas.read_csv(io.StringIO(shell("compare", "three", "one", "--sort", "run", "--format", "csv").out))
    assert list(by_run["run"]) == ["one", "three"]
    signs = {"board.md": "# Leaderboard", "board.tex": r"\begin{tabular}", "board.csv": "headline_delta"}
    for file, sign in signs.items():
        ended = shell("compare", "one", "three", "--output", file)
        assert ended.code == 0 and ended.new == [file] and sign in (runs / file).read_text()


# --- watch ---


def test_watching_rewrites_the_page_until_the_run_has_ended(shell, runs, monkeypatch):
    folder = RunFolder.open(runs / "one")
    folder.set_status(RunStatus.RUNNING)
    pages = []

    def sleep(seconds):
        pages.append((runs / "one" / "report.csv").read_text())
        assert seconds == 2.5
        if len(pages) == 1:
            folder.add_scores([{**folder.score_rows()[-1], "trial": "base", "task": "late_task", "arm": "base"}])
        else:
            folder.set_status(RunStatus.DONE)

    monkeypatch.setattr("tune.cli.verbs.report.time.sleep", sleep)
    with locked(runs / "one"):
        ended = shell("report", "one", "--watch", "2.5")
    assert ended.code == 0 and ended.out.count("; running: one") == 2 and "Verdict" in ended.out
    assert ["late_task" in page for page in pages] == [False, True]


def test_watching_a_run_that_nobody_works_in_ends_at_once(shell, runs, monkeypatch):
    monkeypatch.setattr("tune.cli.verbs.report.time.sleep", lambda seconds: pytest.fail("nothing to wait for"))
    assert shell("report", "one", "--watch", "1").code == 0
    RunFolder.open(runs / "one").set_status(RunStatus.RUNNING)  # and its process was killed
    assert shell("report", "one", "--watch", "1").code == 0


@pytest.mark.parametrize(
    "words, said",
    [
        (["one", "--watch", "0"], "seconds above 0"),
        (["one", "--watch", "nan"], "seconds above 0"),
        (["one", "--watch", "1", "--format", "csv"], "--format csv prints one"),
        (["one", "two", "--watch", "1"], "--output FOLDER"),
        (["one.tar.xz", "--watch", "1"], "is not a folder"),
    ],
)
def test_what_cannot_be_watched_is_refused(shell, runs, words, said):
    ended = shell("report", *words)
    assert ended.code == 2 and said in ended.err and ended.new == []
