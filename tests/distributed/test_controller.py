"""The control loop, on a real queue and run folder; lanes, evaluators and Ray are not there."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from macdrop.errors import ConfigError
from tune.config.run_spec import dump, load
from tune.distributed.sweep import controller
from tune.report.report import make_report
from tune.report.sections.findings import no_verdict
from tune.scheduling.queue_log import LoggedQueue
from tune.scheduling.study import Study, studies
from tune.scheduling.tasks import TrainTask
from tune.storage.run_folder import RunFolder
from tune.storage.states import Stage
from tune.training.observer import Ending


@pytest.fixture
def queue(tmp_path) -> LoggedQueue:
    (tmp_path / "queue.jsonl").touch()
    return LoggedQueue(tmp_path / "queue.jsonl")


def study_of(name: str) -> Study:
    (study,) = studies(load(None, [f"model={name}", "sweep.parameters.macdrop.p0=[0.5]"]))
    return study


def task(run: RunFolder, study: Study, seed: int) -> TrainTask:
    spec = study.searched({"macdrop.p0": 0.5}).model_copy(update={"seed": seed})
    name = spec.trial_id()
    folder = str(run.trial(name).folder)
    return TrainTask(name, study.name, dump(spec), folder, "", None, spec.engine_key(), "pool", Stage.FINAL)


@pytest.fixture
def idle(tmp_path, monkeypatch):
    """A control loop that does nothing by itself, on a new run folder."""
    monkeypatch.setattr(controller, "Watch", mock.MagicMock())
    monkeypatch.setattr(controller, "TICK_S", 1000.0)
    run = RunFolder.create(tmp_path / "run", dump(load(None, ["model=a"])))
    scoring = mock.MagicMock(broken={}, opening=False)
    scoring.open.return_value = None
    found = controller.SweepController(run, mock.Mock(), mock.MagicMock(), scoring, {}, mock.MagicMock())
    yield found, run
    found.close()


def test_why_a_model_was_given_up_is_kept_and_reported_until_it_is_opened_again(idle):
    found, run = idle
    study = replace(study_of("a"), base=False)
    found.study_failed(study.name, "left out: GPU:\n  needs 1, there 0")
    assert found.failures == 1
    report = make_report(run.run_dir)
    (model,) = report.models
    assert no_verdict(model) == ["No verdict: left out: GPU: needs 1, there 0"]
    found.open(study, mock.Mock(scan=False))
    assert not run.failure_file(study.name).exists()
    assert no_verdict(make_report(run.run_dir).models[0]) == ["No verdict: nothing has been trained or scored yet."]


def test_an_error_in_what_a_study_takes_from_the_queue_ends_the_run(tmp_path, queue, monkeypatch):
    """Changes of the queue are given once: those of another study, which come with them, would be lost."""
    run = RunFolder.create(tmp_path / "run", dump(load(None, ["model=a"])))
    cursor: list[Any] = [None]

    def changes() -> Any:
        found = queue.since(cursor[0])
        if found is not None:
            cursor[0] = found.cursor
        return found

    monkeypatch.setattr(controller, "Watch", lambda _: SimpleNamespace(fetch=changes, news=changes))
    monkeypatch.setattr(controller, "TICK_S", 1000.0)
    scoring = mock.MagicMock(broken={}, opening=False)
    jobs: dict = {Stage.SEARCH: [], Stage.FINAL: []}
    found = controller.SweepController(run, mock.Mock(), mock.MagicMock(), scoring, jobs, mock.MagicMock())
    queue.call("lane_up", "lane", "pool", "host")
    for seed in (1, 2):
        queue.call("place", task(run, study_of("b"), seed), "follower")
        taken = queue.call("take", "lane", None)
        queue.call("trained", taken.id, {"status": Ending.DONE, "step": 1, "total_steps": 1}, "lane")
    damaged = run.trial(task(run, study_of("b"), 1).id).folder
    damaged.mkdir(parents=True)
    (damaged / "trial.json").write_text("{")
    try:
        with pytest.raises(ConfigError, match="damaged"):
            found.wait(study_of("a"))
        assert found.broken
        with pytest.raises(ConfigError, match="damaged"):
            found.check(study_of("b"))
    finally:
        found.close()
