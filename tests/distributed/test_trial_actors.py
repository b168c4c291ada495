"""Processes of Tune's trials: kept where trials end together, and where others are still starting."""

from __future__ import annotations

import pytest

from tune.config.run_spec import load
from tune.distributed.cluster.ray_internals import HEAD, keep_actors
from tune.distributed.sweep.schedulers import scheduler
from tune.scheduling.study import studies

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]
AT_ONCE, TRIALS = 6, 40


def test_as_many_processes_as_trials_at_once_run_them_all(tmp_path):
    """What Tune has of its own is replaced through private attributes: another version of Ray may lose this."""
    import ray.tune
    from ray._private import state
    from ray.tune import RunConfig, TuneConfig, Tuner

    spec = load(None, ["model=m", "sweep.parameters.macdrop.p0=[0.5]", f"sweep.max_concurrent_trials={AT_ONCE}"])
    (study,) = studies(spec)

    def trial(config: dict) -> None:
        import time

        time.sleep(0.3)  # less than a process takes to start
        ray.tune.report({"done": 1})

    results = Tuner(
        ray.tune.with_resources(trial, {"CPU": 0, HEAD: 0.001}),
        param_space={"number": ray.tune.grid_search(list(range(TRIALS)))},
        tune_config=TuneConfig(
            scheduler=scheduler(study, spec.sweep, None), max_concurrent_trials=AT_ONCE, reuse_actors=True
        ),
        run_config=RunConfig(storage_path=str(tmp_path), verbose=0),
    ).fit()
    assert len(results) == TRIALS and not results.errors
    made = [each for each in state.actors().values() if "ImplicitFunc" in each["ActorClassName"]]
    assert len(made) == AT_ONCE, "of those that end too early to be used, too"


class _Trial:
    placement_group_factory = "alike"


def test_idle_actors_are_kept_and_a_trial_whose_own_is_starting_takes_none():
    from types import SimpleNamespace

    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.utils.object_cache import _ObjectCache

    inner, trial = TuneController.__new__(TuneController), _Trial()
    inner._actor_cache, inner._trial_to_actor, inner._resetting_trials = _ObjectCache(may_keep_one=True), {}, set()
    keep_actors(SimpleNamespace(_tune_controller=inner), trial, 2)
    assert [inner._actor_cache.cache_object("alike", number) for number in range(3)] == [True, True, False]
    inner._trial_to_actor[trial] = "starting"
    assert inner._maybe_reuse_cached_actor(trial) is False and inner._actor_cache.num_cached_objects == 2
