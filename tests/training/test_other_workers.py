"""A fine-tuning on 1, then 2, then 1 gloo process is the one on 1, up to the order of sums; what is not is refused."""

from __future__ import annotations

import json
import shutil

import pytest
from helpers.other_workers_cases import CASES, STEPS, leg, spec
from helpers.ranks import run_ranks
from safetensors.torch import load_file

from macdrop.errors import ConfigError

pytestmark = [pytest.mark.long, pytest.mark.zero]

#: Of a loss; what AdamW makes of sums in another order is within it.
CLOSE = 1e-4


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """case -> the legs, by what they were."""
    from tune.training.engine import Engine
    from tune.training.process_group import prepare_process

    prepare_process(1)
    root = tmp_path_factory.mktemp("workers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MACDROP_CACHE", str(root / "cache"))
        engines = {case: Engine(spec(case)) for case in CASES}
        results: dict = {case: {} for case in CASES}
        for case, engine in engines.items():
            results[case]["whole"] = leg(engine, case, root, "whole")
            results[case]["first"] = leg(engine, case, root, "changed", stop_after=2)
            shutil.copytree(root / case / "changed", root / case / "same")
            results[case]["same"] = leg(engine, case, root, "same")
        run_ranks("other_workers_worker", 2, root, root, timeout=500, MACDROP_CACHE=str(root / "cache"))
        for case, second in json.loads((root / "results.json").read_text()).items():
            results[case]["second"] = second
            results[case]["last"] = leg(engines[case], case, root, "changed")
    return {"root": root, **results}


def adapter(found: dict, case: str, folder: str):
    return found["root"] / case / folder / "adapter/adapter_model.safetensors"


@pytest.mark.parametrize("case", CASES)
def test_the_same_number_of_workers_gives_the_same_bytes(found, case):
    same = found[case]["same"]
    assert same["outcome"]["resumed_from"] == 2
    assert same["seen"] == found[case]["whole"]["seen"][-len(same["seen"]) :]
    assert adapter(found, case, "same").read_bytes() == adapter(found, case, "whole").read_bytes()
    (segment,) = same["outcome"]["segments"]
    assert (segment["step"], segment["workers"], segment["masks"]) == (0, 1, True)


@pytest.mark.parametrize("case", CASES)
def test_other_workers_continue_with_the_same_batches_and_masks(found, case):
    whole = {step: (loss, dropped) for step, loss, dropped in found[case]["whole"]["seen"]}
    second, last = found[case]["second"], found[case]["last"]
    assert (second["outcome"]["resumed_from"], last["outcome"]["resumed_from"]) == (2, 4)
    for step, loss, dropped in [*second["seen"], *last["seen"]]:
        assert loss == pytest.approx(whole[step][0], rel=CLOSE)
        assert dropped == whole[step][1], "the masks of the run, entry for entry"
    assert last["seen"][-1][0] == STEPS
    then, now = load_file(adapter(found, case, "whole")), load_file(adapter(found, case, "changed"))
    for name, tensor in then.items():
        assert float((tensor - now[name]).abs().max()) <= 1e-3 * float(tensor.abs().max())


@pytest.mark.parametrize("case", CASES)
def test_the_record_says_from_which_step_on_there_were_other_workers(found, case):
    segments = found[case]["last"]["outcome"]["segments"]
    assert [(each["step"], each["workers"]) for each in segments] == [(0, 1), (2, 2), (4, 1)]
    assert found[case]["last"]["outcome"]["entries_dropped"] == found[case]["whole"]["outcome"]["entries_dropped"]


def test_ranks_that_cannot_share_a_step_evenly_are_refused(found, monkeypatch):
    from tune.training.engine import Engine

    engine = Engine(spec("zero0"))
    monkeypatch.setattr(engine, "world", 4)
    with pytest.raises(ConfigError, match="(?s)2 micro-batches, which 4 workers cannot.*to one of 1, 2,"):
        leg(engine, "zero0", found["root"], "refused")
