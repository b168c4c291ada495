"""A resumed run's other workers: which numbers share a step evenly, and what is said of the adapter."""

from __future__ import annotations

import pytest

from macdrop.errors import ConfigError
from tune.config.run_spec import load
from tune.storage.segments import (
    check_run_shared,
    check_shared,
    continued,
    describe,
    recorded,
    shared,
    worker_seconds,
    workers_at_start,
)

KEYS = ["per_device_train_batch_size=4", "gradient_accumulation_steps=3"]


def run_file(*overrides: str):
    return load(None, ["model=m", *KEYS, *overrides])


def segment(step: int, workers: int, seconds: float = 0.0, masks: bool = True) -> dict:
    return {"step": step, "seconds": seconds, "workers": workers, "masks": masks}


def test_workers_that_share_a_step_evenly_keep_the_global_batch():
    spec = run_file().studies()[0]
    for workers in (1, 2, 3, 6):
        here = shared(spec, 2, workers)
        assert here.per_device_train_batch_size * here.gradient_accumulation_steps * workers == 24
    assert shared(spec, None, 5) is spec and shared(spec, 5, 5) is spec
    assert workers_at_start(spec, {"global_batch": 24}) == 2
    assert workers_at_start(spec, {"global_batch": 20}) is None and workers_at_start(spec, {}) is None


def test_a_global_batch_that_cannot_stay_is_refused_with_the_arithmetic_and_the_keys():
    with pytest.raises(ConfigError) as caught:
        check_shared(run_file().studies()[0], 2, 4)
    told = str(caught.value)
    assert "ray.num_workers is 4, but an optimizer step has 6 micro-batches" in told
    assert "per_device_train_batch_size 4 x gradient_accumulation_steps 3 x ray.num_workers 2 = 24 examples" in told
    assert "Set ray.num_workers to one of 1, 2, 3, 6," in told


def test_every_step_that_a_search_may_draw_is_shared_evenly():
    searched = "sweep.parameters.gradient_accumulation_steps"
    check_run_shared(run_file(f"{searched}=[3,6]"), [3])
    with pytest.raises(ConfigError, match="(?s)gradient_accumulation_steps 2 x .*one of 1,"):
        check_run_shared(run_file(f"{searched}=[2,6]"), [3])
    with pytest.raises(ConfigError, match="(?s)gradient_accumulation_steps 4 x ray.num_workers 2 .*one of 1, 2,"):
        space = f"{searched}={{min: 3, max: 6, distribution: int_uniform}}"
        check_run_shared(run_file("ray.num_workers=2", "sweep.search_alg=random", space), [3])


# --- the record ---


def test_segments_follow_checkpoints_and_merge_where_nothing_changed():
    spec = run_file().studies()[0]

    def resumed(known: list, step: int, workers: int) -> list:
        return continued(spec, {"segments": known}, step=step, seconds=2.0 * step, begun=2, workers=workers)

    start = continued(spec, {}, step=0, seconds=0.0, begun=2, workers=2)
    assert start == [segment(0, 2)] == resumed(start, 4, 2)
    one = resumed(start, 8, 1)
    assert one == [segment(0, 2), segment(8, 1, 16.0)] == resumed(one, 12, 1)
    # It never reached another checkpoint there: nothing of it is in the adapter.
    assert resumed(one, 8, 2) == start
    assert worker_seconds(one, 20.0) == 16 * 2 + 4


def test_a_checkpoint_that_does_not_say_how_masks_were_drawn_is_named():
    spec = run_file().studies()[0]
    old = continued(spec, {"global_batch": 24}, step=8, seconds=1.0, begun=2, workers=2)
    assert old == [segment(0, 2, masks=False), segment(8, 2, 1.0)]
    assert describe(old) == (
        "the checkpoint of step 8 does not say how masks were drawn up to there: the micro-batches of 2 workers may "
        "have shared one"
    )
    assert describe(continued(spec, {"global_batch": 12}, step=8, seconds=1.0, begun=1, workers=1)) is None
    plain = run_file("macdrop.p0=0").studies()[0]
    assert describe(continued(plain, {}, step=8, seconds=1.0, begun=2, workers=2)) is None, "which has no masks"


def test_what_is_said_of_segments():
    both = [segment(0, 2), segment(8, 1), segment(12, 4)]
    assert describe(both, 2).startswith(
        "2 workers up to step 8, 1 worker up to step 12, 4 workers from there: bits may differ from step 8 ("
    )
    assert describe([segment(0, 2)], 2) is None and describe([], 2) is None and describe([segment(0, 2)]) is None
    assert describe([segment(0, 1)], 2).startswith("1 worker in a run that began with 2: bits may differ")
    assert recorded({"segments": both}) == both and recorded({}) == recorded({"segments": [{"step": "x"}]}) == []
