"""The key `quantization_bit`: its values, its companions, its place in a sweep and in names."""

import pytest

from macdrop.errors import ConfigError
from tune.config.messages import build
from tune.config.run_spec import RunSpec, TrainSpec, searchable, with_values
from tune.config.train_spec import UNNAMED_DEFAULTS
from tune.scheduling.study import studies

ONE = {"model_name_or_path": "zoo:planted-llama"}


def run(**keys):
    return build(RunSpec, {**ONE, **keys})


@pytest.mark.parametrize("value", [2, 16, 4.5, "nf4", True])
def test_other_values_are_refused(value):
    with pytest.raises(ConfigError, match="quantization_bit"):
        run(quantization_bit=value)


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_3_is_refused_and_says_why(bits):
    with pytest.raises(ConfigError, match="partitions weights that bitsandbytes needs whole"):
        run(quantization_bit=bits, zero_stage=3)
    with pytest.raises(ConfigError, match="zero_stage: 3 cannot be used"):
        run(quantization_bit=bits, sweep={"parameters": {"zero_stage": [2, 3]}})
    assert all(run(quantization_bit=bits, zero_stage=stage).zero_stage == stage for stage in (0, 1, 2))


@pytest.mark.parametrize("block", ["eval", "validation"])
@pytest.mark.parametrize("place", ["merged", "both"])
def test_attacks_on_merged_rows_are_refused(block, place):
    entry = {"perplexity": {"own": {"data": "zoo:text"}}, "attacks": ["none", "zeroing@3"], "attack_on": place}
    with pytest.raises(ConfigError, match=f"{block}.attack_on: {place} needs a base that is not quantised"):
        run(quantization_bit=4, **{block: entry})
    assert run(quantization_bit=4, **{block: {**entry, "attack_on": "base"}})


def test_it_is_a_key_of_each_model_in_a_sweep():
    models = [{**ONE, "quantization_bit": 4}, {"model_name_or_path": "zoo:planted-opt"}]
    found = build(RunSpec, {"sweep": {"models": models}}).studies()
    assert [study.quantization_bit for study in found] == [4, None]
    assert "quantization_bit" not in searchable()
    with pytest.raises(ConfigError, match="belongs to the model"):
        run(sweep={"parameters": {"quantization_bit": [4, 8]}})
    twice = build(RunSpec, {"sweep": {"models": [{**ONE, "quantization_bit": 4}, ONE]}})
    with pytest.raises(ConfigError, match="macdrop compare"):
        studies(twice)


def test_names_tell_formats_apart_and_keep_those_without():
    plain = build(TrainSpec, ONE)
    others = [with_values(plain, {"quantization_bit": bits}) for bits in (4, 8)]
    assert len({each.trial_id() for each in (plain, *others)}) == 3
    assert len({each.engine_key() for each in (plain, *others)}) == 3
    assert "quantization_bit" in UNNAMED_DEFAULTS  # run files without it keep their names
