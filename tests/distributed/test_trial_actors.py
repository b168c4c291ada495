"""Processes of Tune's trials: kept where trials end together, and where others are still starting.

Tune's own rules are replaced through private attributes: another version of Ray may lose this.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tune.config.run_spec import load
from tune.distributed.cluster.ray_internals import HEAD
from tune.scheduling.study import studies

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]
AT_ONCE, TRIALS = 6, 40


def search(
    folder: Path,
    trial: Callable,
    trials: int,
    at_once: int,
    share: float = 0.001,
    seconds: float | None = None,
    **options: Any,
) -> Any:
    """The results of a search by Tune, as a study of a sweep runs it."""
    import ray.tune
    from ray.tune import FailureConfig, RunConfig, TuneConfig, Tuner

    from tune.distributed.sweep.schedulers import scheduler
    from tune.distributed.sweep.study_run import _REGISTERING
    from tune.distributed.sweep.trial import RESTARTS

    spec = load(None, ["model=m", "sweep.parameters.macdrop.p0=[0.5]", f"sweep.max_concurrent_trials={at_once}"])
    (study,) = studies(spec)
    name = f"trial-{folder.name}"
    with _REGISTERING:
        ray.tune.register_trainable(name, ray.tune.with_resources(trial, {"CPU": 0, HEAD: share}))
    return Tuner(
        name,
        param_space={"number": ray.tune.grid_search(list(range(trials)))},
        tune_config=TuneConfig(
            scheduler=scheduler(study, spec.sweep, None),
            max_concurrent_trials=at_once,
            reuse_actors=True,
            time_budget_s=seconds,
        ),
        run_config=RunConfig(
            storage_path=str(folder),
            verbose=0,
            failure_config=FailureConfig(max_failures=RESTARTS),
            **options,
        ),
    ).fit()


def actors_made() -> int:
    from ray._private import state

    return len([each for each in state.actors().values() if "ImplicitFunc" in each["ActorClassName"]])


def test_as_many_processes_as_trials_at_once_run_them_all(tmp_path):
    def trial(config: dict) -> None:
        import ray.tune

        time.sleep(0.3)  # less than a process takes to start
        ray.tune.report({"done": 1})

    before = actors_made()
    results = search(tmp_path, trial, TRIALS, AT_ONCE)
    assert len(results) == TRIALS and not results.errors
    assert actors_made() - before == AT_ONCE, "of those that end too early to be used, too"


def test_studies_that_begin_together_keep_their_own_actors(tmp_path):
    """Each has its rules on its own controller: the class of Ray, which all studies share, stays as it is."""
    from ray.tune.execution.tune_controller import TuneController

    def trial(config: dict) -> None:
        import ray.tune

        ray.tune.report({"done": 1})

    original, results = TuneController._maybe_reuse_cached_actor, {}
    begin = threading.Barrier(2)

    def study(name: str) -> None:
        begin.wait()
        results[name] = search(tmp_path / name, trial, 6, 2)

    threads = [threading.Thread(target=study, args=(name,)) for name in ("one", "two")]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert [(len(each), len(each.errors)) for each in results.values()] == [(6, 0)] * 2
    assert TuneController._maybe_reuse_cached_actor is original
    for state in tmp_path.rglob("experiment_state*.json"):
        assert "_maybe_reuse_cached_actor" not in json.loads(state.read_text())["runner_data"]


def killer(kill: Callable[[Any], None]) -> Any:
    """A callback that kills the actor of the first trial once it is idle, and remembers the order of events."""
    from ray.tune import Callback

    class Killer(Callback):
        def __init__(self) -> None:
            self.killed: list[str] = []

        def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            if not self.killed:
                self.killed.append(trial.trial_id)
                kill(trial)

        def __reduce__(self) -> Any:
            return str, ()  # Tune writes its callbacks into the folder

    return Killer()


def run_and_kill(folder: Path, patience: float) -> Any:
    """A search of 8 trials, 2 at once, whose first actor is killed as it becomes idle."""

    def trial(config: dict) -> None:
        import ray.tune

        ray.tune.report({"done": 1, "pid": os.getpid()})

    def kill(trial: Any) -> None:
        os.kill(trial.last_result["pid"], signal.SIGKILL)
        time.sleep(patience)

    callback = killer(kill)
    results = search(folder, trial, 8, 2, callbacks=[callback])
    assert callback.killed
    return results


def test_an_idle_actor_that_died_costs_no_trial(tmp_path):
    results = run_and_kill(tmp_path, 2.0)
    assert len(results) == 8 and not results.errors
    assert all(each.metrics["done"] == 1 for each in results)


def test_a_trial_that_got_a_dead_actor_is_retried(tmp_path, monkeypatch):
    """Here the death is noticed only when the actor gets its next trial."""
    from tune.distributed.cluster import ray_internals

    monkeypatch.setattr(ray_internals, "alive", lambda actor: True)
    results = run_and_kill(tmp_path, 2.0)
    assert len(results) == 8 and not results.errors
    assert all(each.metrics["done"] == 1 for each in results)


def test_trials_without_room_on_the_head_take_idle_actors(tmp_path):
    """Idle actors hold their resources: a trial that waited for some would wait until the end of the search."""

    def trial(config: dict) -> None:
        import ray.tune

        time.sleep(0.1)
        ray.tune.report({"done": 1})

    results = search(tmp_path, trial, 7, 4, share=0.4, seconds=60)
    assert len(results) == 7 and [each.metrics.get("done") for each in results] == [1] * 7


class _Trial:
    placement_group_factory = "alike"


def test_idle_actors_are_kept_and_a_trial_whose_own_is_starting_takes_none():
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.utils.object_cache import _ObjectCache

    from tune.distributed.sweep.trial_actors import keep_idle_and_starting

    inner, trial = TuneController.__new__(TuneController), _Trial()
    inner._actor_cache, inner._trial_to_actor, inner._resetting_trials = _ObjectCache(may_keep_one=True), {}, set()
    inner._actor_manager = SimpleNamespace(is_actor_started=lambda actor: actor == "starting")
    keep_idle_and_starting(SimpleNamespace(_tune_controller=inner), trial, 2)
    assert [inner._actor_cache.cache_object("alike", number) for number in range(3)] == [True, True, False]
    inner._trial_to_actor[trial] = "starting"
    assert inner._maybe_reuse_cached_actor(trial) is False and inner._actor_cache.num_cached_objects == 2
    assert type(inner) is not TuneController and type(TuneController.__new__(TuneController)) is TuneController


def test_a_trial_whose_idle_actor_is_still_at_its_last_one_gets_another(tmp_path):
    """Tune would end it without a word to the searcher, which keeps its place among those at once for ever."""

    def trial(config: dict) -> None:
        import ray.tune

        os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = "0"
        try:
            ray.tune.report({"done": 1})
        finally:  # the report ends the thread of a trial that has ended
            time.sleep(600 if config["number"] == 0 else 0)

    results = search(tmp_path, trial, 4, 1)
    assert len(results) == 4 and not results.errors
    assert [each.metrics["done"] for each in results] == [1] * 4


def test_a_trial_that_tune_gave_up_is_a_failure_of_the_run():
    from tune.distributed.sweep.study_run import StudyRun

    lost = []
    run: Any = SimpleNamespace(
        controller=SimpleNamespace(trial_lost=lambda *about: lost.append(about)), _name=lambda values: f"name {values}"
    )
    results: Any = [
        SimpleNamespace(config={"point": {"p": number}}, error=error)
        for number, error in enumerate([None, RuntimeError("many lines\nThe actor died."), RuntimeError()])
    ]
    StudyRun._count_lost(run, results)
    assert lost == [("name {'p': 1}", "The actor died."), ("name {'p': 2}", "RuntimeError")]


def test_an_actor_waits_for_its_last_thread_longer_than_that_waits_for_news(monkeypatch):
    from tune.distributed.sweep import trial

    name = "TUNE_FUNCTION_THREAD_TIMEOUT_S"
    monkeypatch.setenv(name, "")  # to be restored
    monkeypatch.delenv(name)
    context: Any = SimpleNamespace(study=None)
    with pytest.raises(AttributeError):  # without a study it gets no further
        trial.run_trial({}, context=context)
    assert int(os.environ[name]) > trial.NEWS_S
