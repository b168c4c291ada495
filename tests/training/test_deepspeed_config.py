"""DeepSpeed's configuration is a pure function of the spec and the adapter's size."""

from __future__ import annotations

import json

import pytest

from tune.config.run_spec import TrainSpec
from tune.training.deepspeed_config import deepspeed_config


def config(**values):
    spec = TrainSpec(model_name_or_path="m", **values)
    return deepspeed_config(spec, adapter_numel=1000, largest_tensor=64)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_stage_and_buckets_follow_the_adapter_size(stage):
    zero = config(zero_stage=stage)["zero_optimization"]
    assert zero["stage"] == stage
    assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == 1000
    assert "offload_optimizer" not in zero and "offload_param" not in zero


def test_under_zero_3_the_adapter_stays_whole_and_the_base_does_not():
    assert config(zero_stage=3)["zero_optimization"]["stage3_param_persistence_threshold"] == 65
    assert "stage3_param_persistence_threshold" not in config(zero_stage=2)["zero_optimization"]


@pytest.mark.parametrize(("stage", "parts"), [(1, {"optimizer"}), (2, {"optimizer"}), (3, {"optimizer", "param"})])
def test_offload(stage, parts):
    zero = config(zero_stage=stage, offload="cpu")["zero_optimization"]
    assert {key.removeprefix("offload_") for key in zero if key.startswith("offload_")} == parts
    assert all(zero[f"offload_{part}"] == {"device": "cpu"} for part in parts)


def test_batch_precision_and_clipping_come_from_the_spec():
    found = config(per_device_train_batch_size=3, gradient_accumulation_steps=5, bf16=True, max_grad_norm=0.5)
    assert found["train_micro_batch_size_per_gpu"] == 3 and found["gradient_accumulation_steps"] == 5
    assert found["bf16"] == {"enabled": True} and found["gradient_clipping"] == 0.5
    assert config()["bf16"] == {"enabled": False}


def test_settings_that_vary_within_one_engine_are_left_out():
    """Except the learning rate, which is set on the live optimizer before every step."""
    one, other = config(seed=0, weight_decay=0.0), config(seed=5, weight_decay=0.1, adam_beta1=0.5, max_steps=3)
    assert one == other


def test_it_is_plain_data_and_the_same_each_time():
    assert json.loads(json.dumps(config())) == config()


def test_an_adapter_without_entries_still_gives_buckets():
    spec = TrainSpec(model_name_or_path="m")
    zero = deepspeed_config(spec, adapter_numel=0, largest_tensor=0)["zero_optimization"]
    assert zero["reduce_bucket_size"] == 1
