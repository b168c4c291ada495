"""The dispatcher and the trials may die at any time: the run continues as if nothing had happened."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from helpers.small import SMALL

from tune.config.run_spec import RunSpec, TrainSpec

pytestmark = [pytest.mark.long, pytest.mark.ray, pytest.mark.timeout(240), pytest.mark.usefixtures("local_ray")]

STEPS = 30
SPEC = {
    **SMALL,
    "max_steps": STEPS,
    "eval_steps": 10,
    "ray": {"dashboard": False},
    "sweep": {
        "arms": ["macdrop"],
        "search_alg": "optuna",
        "parameters": {"learning_rate": {"min": 1e-4, "max": 1e-2, "distribution": "log_uniform"}},
        "metric": {"name": "eval_loss"},
        "num_samples": 3,
        "seeds": 0,
        "max_concurrent_trials": 2,
    },
    "validation": {"limit": 8, "zero_shot": {"fact": {"data": "zoo:fact"}}},
    "eval": {"limit": 8, "zero_shot": {"qa": {"data": "zoo:qa"}}},
}
DISPATCHER, TRIAL = "Dispatcher", "ImplicitFunc"


def run(folder: Path) -> str:
    from rich.console import Console

    from tune.cli.progress import Progress
    from tune.distributed.sweep.runtime import run as run_sweep

    out = io.StringIO()
    spec = RunSpec.model_validate({**SPEC, "output_dir": str(folder)})
    assert run_sweep(spec, progress=Progress(Console(file=out, width=200))) == 0
    return out.getvalue()


def kill(kind: str) -> int:
    """SIGKILL every actor of a class in the cluster that this process started; returns how many there were."""
    import psutil

    killed = 0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[:1] and process.cmdline()[0].startswith(f"ray::{kind}"):
                os.kill(process.pid, signal.SIGKILL)
                killed += 1
    return killed


def rows(folder: Path) -> list[int]:
    """How many lines of metrics each trial has that began, the fewest first."""
    return sorted(path.read_bytes().count(b"\n") for path in folder.glob("trials/*/metrics.jsonl"))


#: When somebody dies, and who: in the middle of the first, the second and the third fine-tuning.
DEATHS: list[tuple[Callable[[list[int]], bool], str]] = [
    (lambda found: bool(found) and found[0] >= 5, DISPATCHER),
    (lambda found: len(found) >= 2 and found[0] >= 12, TRIAL),
    (lambda found: len(found) >= 3 and found[0] >= 3, DISPATCHER),
]


class Murderer(threading.Thread):
    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.killed = folder, []
        self.start()

    def run(self) -> None:
        for due, kind in DEATHS:
            while not due(rows(self.folder)):
                time.sleep(0.01)
            self.killed.append((kind, rows(self.folder), kill(kind)))


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory) -> tuple[Path, list, str]:
    folder = tmp_path_factory.mktemp("disturbed") / "run"
    murderer = Murderer(folder)
    log = run(folder)
    murderer.join(timeout=1)
    return folder, murderer.killed, log


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_they_died_in_the_middle(disturbed):
    _, killed, log = disturbed
    print(killed, log)
    assert [kind for kind, _, _ in killed] == [kind for _, kind in DEATHS]
    assert all(count >= 1 and found[0] < STEPS for _, found, count in killed)


def test_adapters_equal_those_of_an_undisturbed_process(disturbed, tmp_path):
    from tune.training.single import train_here

    folders = sorted((disturbed[0] / "trials").iterdir())
    assert len(folders) == SPEC["sweep"]["num_samples"]
    for folder in folders:
        spec = TrainSpec.model_validate(yaml.safe_load((folder / "config.yaml").read_text()))
        train_here(spec, tmp_path / folder.name, observe=None, threads=1)
        assert digest(tmp_path / folder.name) == digest(folder)


def test_every_trial_is_trained_once_and_every_step_reported_once(disturbed):
    for file in disturbed[0].glob("trials/*/trial.json"):
        trial = json.loads(file.read_text())
        assert (trial["status"], trial["attempts"]) == ("done", 1)
        steps = [json.loads(line)["step"] for line in file.with_name("metrics.jsonl").open() if '"loss"' in line]
        assert steps == list(range(1, STEPS + 1))


def test_every_trial_is_scored_once(disturbed):
    trials = {file.parent.name for file in disturbed[0].glob("trials/*/trial.json")}
    lines = [json.loads(line) for line in (disturbed[0] / "scores.jsonl").open()]
    searched = Counter((row["trial"], row["metric"]) for row in lines if row["split"] == "validation")
    assert {trial for trial, _ in searched} == trials and set(searched.values()) == {1}
    (final,) = {row["trial"] for row in lines if row["split"] == "test"}
    assert final in trials


def test_deaths_show_no_errors_and_leave_nothing_behind(disturbed):
    import ray
    from ray.util.placement_group import placement_group_table

    folder, _, log = disturbed
    assert not any(word in log for word in ("Error", "error", "died", "Traceback"))
    assert not list(folder.glob("ray/queue-*"))
    assert {group["state"] for group in placement_group_table().values()} <= {"REMOVED"}
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"]


def test_tune_does_not_retry_a_failed_task(tmp_path):
    """Optuna gets the trial as failed, which it ignores: the setting itself may be good."""
    from optuna.trial import TrialState
    from ray.tune import FailureConfig, RunConfig, TuneConfig, Tuner

    from tune.distributed.lanes.dispatcher import call, dispatching
    from tune.distributed.sweep.searcher import optuna_searcher, param_space
    from tune.distributed.sweep.trial import RESTARTS, CancelStopped, TrialContext, run_trial
    from tune.scheduling.study import studies

    spec = RunSpec.model_validate({**SPEC, "output_dir": str(tmp_path)})
    (study,) = studies(spec)
    searcher = optuna_searcher(spec.sweep)
    over = threading.Event()
    with dispatching(tmp_path / "ray") as dispatcher:
        call(dispatcher, "lane_up", "lane", 1, "host")

        def fail() -> None:
            while not over.wait(0.05):
                if task := call(dispatcher, "take", "lane", None):
                    call(dispatcher, "failed", task.id, "failed", "no reason", "lane")

        lane = threading.Thread(target=fail, daemon=True)
        lane.start()
        context = TrialContext(dispatcher, study, str(tmp_path), "", None, 1)
        results = Tuner(
            functools.partial(run_trial, context=context),
            param_space=param_space(study, None),
            tune_config=TuneConfig(search_alg=searcher, num_samples=1),
            run_config=RunConfig(
                storage_path=str(tmp_path / "ray"),
                callbacks=[CancelStopped(context)],
                failure_config=FailureConfig(max_failures=RESTARTS),
                verbose=0,
            ),
        ).fit()
        over.set()
        lane.join()
        tasks = call(dispatcher, "snapshot")["tasks"]
    assert [row["state"] for row in tasks] == ["failed"] and not results.errors
    assert [trial.state for trial in searcher._ot_study.trials] == [TrialState.FAIL]


def test_a_dispatcher_that_cannot_restart_raises(tmp_path):
    from tune.distributed.lanes.dispatcher import call, dispatching
    from tune.errors import ResourceError

    with pytest.raises(ResourceError, match="is not responding"), dispatching(tmp_path) as dispatcher:
        call(dispatcher, "lane_up", "lane", 1, "host")
        (log,) = tmp_path.glob("queue-*")
        log.write_text("{oops\n")
        assert kill(DISPATCHER) == 1
        call(dispatcher, "snapshot")
    assert log.exists(), "kept for diagnosis"
