"""One engine, fine-tuning after fine-tuning, on two gloo processes: the bits of a fresh one, and of no interruption."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable

import pytest
from helpers.engine_cases import CASES, INTERRUPTED_AFTER, QUICK, REST, STEPS, WORLD
from helpers.ranks import run_ranks

pytestmark = pytest.mark.zero

every_case = pytest.mark.parametrize("case", [*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in REST)])


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Callable[[tuple[str, ...]], dict]:
    """Results of rank 0 of two processes for a set of cases; started once per set."""
    return functools.cache(lambda cases: _run(cases, tmp_path_factory))


@pytest.fixture
def results(found, case) -> dict:
    return found(tuple(REST if case in REST else QUICK))


def _run(cases: tuple[str, ...], tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("engine")
    run_ranks("engine_worker", WORLD, out, out, *cases, timeout=500, MACDROP_CACHE=str(out / "cache"))
    return json.loads((out / "results.json").read_text())


@every_case
def test_deepspeed_uses_the_configured_stage(results, case):
    assert results[case]["stage"] == CASES[case][0]


@every_case
def test_reused_engine_is_bit_identical_to_a_fresh_one(results, case):
    reused, fresh = results[case]["b reused"], results[case]["b fresh"]
    assert reused["losses"] == fresh["losses"]
    assert reused["digest"] == fresh["digest"]


@every_case
def test_training_repeats_to_the_bit(results, case):
    assert results[case]["a"]["digest"] == results[case]["a again"]["digest"]
    assert results[case]["a"]["digest"] != results[case]["b fresh"]["digest"]


@every_case
def test_resumed_run_is_bit_identical_to_an_uninterrupted_one(results, case):
    cut, resumed, whole = (results[case][name] for name in ("b interrupted", "b resumed", "b fresh"))
    assert cut["outcome"]["status"] == "stopped"
    assert resumed["outcome"]["resumed_from"] == INTERRUPTED_AFTER
    assert resumed["losses"] == whole["losses"][INTERRUPTED_AFTER:]
    assert resumed["digest"] == whole["digest"]


@every_case
def test_masks_were_drawn_and_dropped(results, case):
    outcome = results[case]["a"]["outcome"]
    assert outcome["step"] == STEPS and outcome["status"] == "done"
    assert 0 < outcome["entries_dropped"] < outcome["entries_masked"]
    assert outcome["rows_hooked"] == 10


@pytest.mark.parametrize("kind", ["lora", pytest.param("dora", marks=pytest.mark.slow)])
def test_stages_agree_in_fp32(found, kind):
    """The same fine-tuning under every ZeRO stage, up to the order of sums."""
    results = found(tuple(QUICK if kind == "lora" else REST))
    reference = [loss for _, loss, *_ in results[f"zero0-{kind}-fp32"]["a"]["losses"]]
    for stage in (1, 2, 3):
        losses = [loss for _, loss, *_ in results[f"zero{stage}-{kind}-fp32"]["a"]["losses"]]
        assert losses == pytest.approx(reference, rel=1e-4)
