"""What became of a run and when: bars of lanes and actors, shares, what trained beside, whether it still runs."""

from __future__ import annotations

from helpers.run_folders import make_run

from tune.report.report import make_report
from tune.scheduling.time_watch import EVALUATOR, LANE
from tune.storage.run_lock import locked
from tune.storage.states import RunStatus

BUSY = [("lane-1", "planted-llama", 0, 40), ("lane-1", "other", 40, 80), ("lane-2", "other", 20, 60)]


SCORED = [("actor 1", "planted-llama", 40, 60)]


def rows() -> list[dict]:
    lanes = [*BUSY, ("lane-1", None, 0, 80), ("lane-2", None, 10, 70)]
    actors = [*SCORED, ("actor 1", None, 0, 80)]
    keys = ("name", "study", "begin", "end")
    return [
        dict(zip(keys, row, strict=True), trial=row[1] and "trial", role=role)
        for role, rows in ((LANE, lanes), (EVALUATOR, actors))
        for row in rows
    ]


def test_a_report_shows_when_lanes_worked_for_which_model(tmp_path):
    run = make_run(tmp_path / "run", tried=2, items=8, attacks=("none",))
    report = make_report(run.run_dir)
    (model,) = report.models
    assert not report.parts(model)["timeline"], "a run that kept no times has no timeline"
    run.add_times(rows())
    made = make_report(run.run_dir).parts(model)["timeline"]
    assert made.lines == [
        "Lanes were busy for 86% of the time that they were held, evaluation actors for 25%.",
        "This model trained from 0.0 s to 40.0 s after the first worker was up, beside other.",
    ]
    (table,) = made.tables
    assert table.rows == [
        ["lane-1", "1.3 min", "100%", 20 * "#" + 20 * "="],
        ["lane-2", "1.0 min", "67%", 5 * " " + 5 * "-" + 20 * "=" + 5 * "-"],
        ["actor 1", "1.3 min", "25%", 20 * "-" + 10 * "#" + 10 * "-"],
    ]


def test_a_damaged_line_is_left_out_and_said(tmp_path):
    run = make_run(tmp_path / "run", tried=2, items=8, attacks=("none",))
    run.add_times(rows())
    file = run.run_dir / "times.jsonl"
    file.write_text("{]\n" + file.read_text())
    report = make_report(run.run_dir)
    assert report.parts(report.models[0])["timeline"].tables and any("times" in line for line in report.about)


def test_a_worker_of_a_killed_run_was_held_while_it_worked(tmp_path):
    run = make_run(tmp_path / "run", tried=2, items=8, attacks=("none",))
    killed = [{"role": LANE, "name": "lane-1", "study": "planted-llama", "trial": "trial"}]
    run.add_times([{**row, "begin": begin, "end": begin + 20} for row in killed for begin in (-100, -60)])
    run.add_times(rows())
    report = make_report(run.run_dir)
    made = report.parts(report.models[0])["timeline"]
    assert made.lines[1] == "This model trained from 0.0 s to 2.3 min after the first worker was up, beside other."
    assert made.tables[0].rows[0][:3] == ["lane-1", "2.3 min", "86%"]


def test_a_run_whose_process_is_gone_is_not_running(tmp_path):
    run = make_run(tmp_path / "run", tried=1, items=4, attacks=("none",))
    run.set_status(RunStatus.RUNNING)
    with locked(run.run_dir):
        assert make_report(run.run_dir).about[0].startswith("Run run: running, ")
    assert make_report(run.run_dir).about[0].startswith("Run run: interrupted (its process is gone), ")
