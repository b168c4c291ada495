"""Progress of a sweep: the live table of a terminal, and the lines of a log."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from tune.cli.progress import Progress
from tune.config.eval_spec import EvalJob
from tune.config.sweep_spec import Metric
from tune.distributed.actors.eval_task import EvalTask, Result
from tune.scheduling.queue import TaskQueue
from tune.scheduling.tasks import TrainTask
from tune.scheduling.time_left import StageWork, StudyWork, Work


def task(name: str) -> TrainTask:
    return TrainTask(name, "model", {}, "folder", "data", None, "engine", "p")


def scored(name: str, attack: str, value: float) -> Result:
    row = {"task": "qa", "attack": attack, "value": value}
    return Result(EvalTask({"name": name}, EvalJob("zero_shot", "qa", attack), None, "answers"), [row])


def shown(width: int) -> str:
    out = io.StringIO()
    progress = Progress(Console(file=out, width=width))
    queue = TaskQueue()
    queue.lane_up("lane", "p", "host")
    for name in ("model-plain-1", "model-macdrop-2"):
        queue.place(task(name), "trial")
    queue.take("lane", None)
    queue.progress("model-plain-1", {"step": 7, "loss": 1.25, "p": 0.5, "tokens_per_second": 1234.5})
    progress.started(Path("runs/x"), "127.0.0.1:8265", "1 lane")
    progress.show(queue.snapshot(), scoring={"model": 3})
    progress.scored("model-plain-1", scored("model-plain-1", "none", 0.5), "model")
    progress.scored("model:base", scored("model:base", "zeroing@3", 0.25), "model")
    queue.failed("model-plain-1", "diverged", "loss nan")
    progress.ended(queue.entries["model-plain-1"])
    progress.show(queue.snapshot(), scoring={})
    progress.console.print(progress._table())
    return out.getvalue()


def test_log_and_table_show_steps_states_scores_and_reasons():
    text = shown(160)
    for word in ("127.0.0.1:8265", "model-plain-1 is training", "diverged (loss nan)", "1234", "1.25", "queued"):
        assert word in text
    assert "qa 0.5" in text and "qa@zeroing@3 0.25" in text
    assert "To resume    macdrop sweep --resume output_dir=runs/x" in text


@pytest.mark.parametrize("width", [80, 100])
def test_only_scores_are_cut_in_a_narrow_terminal(width):
    table = shown(width).splitlines()[-4:]
    assert any("model-macdrop-2" in line and "queued" in line for line in table)
    assert max(map(len, table)) <= width


def test_the_stage_and_its_progress_are_shown():
    out = io.StringIO()
    progress = Progress(Console(file=out, width=120))
    queue = TaskQueue()
    queue.lane_up("lane", "p", "host")
    progress.stage(SimpleNamespace(name="model"), "search", 3)
    for name, stage in (("one", "search"), ("two", "search"), ("three", "final")):
        queue.place(replace(task(name), stage=stage), "trial")
    queue.take("lane", None)
    progress.show(queue.snapshot(), scoring={})
    assert progress._line.startswith("model   search 0/3   lanes 1 of 1 busy")
    queue.failed("one", "failed", "no reason")
    progress.ended(queue.entries["one"])
    text = out.getvalue()
    assert "model: search, 3 trial(s)" in text and "one failed (no reason) (search 1/3)" in text
    progress.stage(SimpleNamespace(name="model"), "final", 1)
    progress.show(queue.snapshot(), scoring={})
    assert "final 0/1" in progress._line


@pytest.mark.parametrize("terminal", [False, True])
def test_a_log_has_a_line_a_minute_and_a_terminal_the_time_left_in_its_table(terminal):
    out, now = io.StringIO(), [0.0]
    progress = Progress(Console(file=out, width=300, force_terminal=terminal), clock=lambda: now[0])
    queue = TaskQueue()
    queue.lane_up("lane", "p", "host")
    stages = (StageWork("search", 2, 0), StageWork("final", 3, 1))
    studies = (StudyWork("other", 40, stages), StudyWork("model", 40, stages))
    progress.started(Path("runs/x"), "", "1 lane")
    progress.planned(Work(studies, 1, 1, 1, 4, None, Metric()))
    progress.stage(SimpleNamespace(name="model"), "search", 2)
    for name in ("one", "two"):
        queue.place(replace(task(name), stage="search"), "trial")
    for tick in range(1, 131):
        now[0] = float(tick)
        queue.take("lane", None)
        queue.progress("one" if tick <= 40 else "two", {"step": (tick - 1) % 40 + 1})
        if tick == 40:
            queue.trained("one", {"status": "done", "step": 40, "total_steps": 40, "eval_loss": 1.5})
            queue.scored("one", {}, None)
            progress.ended(queue.entries["one"])
        progress.show(queue.snapshot(), scoring={})
    progress.finished()
    lines = [line for line in out.getvalue().splitlines() if "; all trials" in line]
    if terminal:
        assert not lines and "without benchmarks about" in progress._line
        return
    assert len(lines) == 2
    wanted = "study 2 of 2, model: search 1/2; best eval_loss 1.5 (one); all trials 1/5, steps 60/200; "
    assert wanted + "without benchmarks about 2.3 min left (1 s per step, 1 lane, 1 evaluator)" in lines[0]


def test_lines_above_the_table_wait_a_second_at_most_and_none_is_lost(tmp_path):
    """Also where no table follows, as while answers are judged."""
    now, out = [0.0], io.StringIO()
    progress = Progress(Console(file=out, width=200, force_terminal=True), clock=lambda: now[0])
    progress.started(tmp_path, "", "")
    progress.note("first")
    progress.note("second")
    assert "second" not in out.getvalue()
    now[0] = 1.5
    progress.judged(1, 2)
    assert "second" in out.getvalue() and "judged 1 of 2" in out.getvalue()
    progress.note("last")
    progress.finished()
    assert "last" in out.getvalue()


def test_the_table_is_drawn_anew_also_where_lines_come_all_the_time(tmp_path):
    now, out = [0.0], io.StringIO()
    progress = Progress(Console(file=out, width=200, force_terminal=True), clock=lambda: now[0])
    queue = TaskQueue()
    queue.lane_up("lane", "p", "host")
    queue.place(task("one"), "trial")
    queue.take("lane", None)
    progress.started(tmp_path, "", "")
    for step in range(1, 5):
        now[0] += 1.1
        queue.progress("one", {"step": 1000 + step})
        progress.note(f"line {step}")
        progress.show(queue.snapshot(), scoring={})
        assert str(1000 + step) in out.getvalue() and f"line {step}" in out.getvalue()
    progress.finished()
