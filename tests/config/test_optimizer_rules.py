"""Settings that go with an optimizer, and those that it would ignore or cannot work with."""

from __future__ import annotations

import pytest

from macdrop.errors import ConfigError
from tune.config.messages import build
from tune.config.run_spec import RunSpec, TrainSpec, load, with_values
from tune.config.train.optimizer_rules import RULES

STEADY = {"lr_scheduler_type": "constant_with_warmup"}


def spec(**settings) -> TrainSpec:
    return build(TrainSpec, {"model_name_or_path": "m", **settings})


@pytest.mark.parametrize("optimizer", RULES)
def test_stage_0_does_for_every_optimizer_and_an_engine_is_for_one(optimizer):
    rules = {"slimadam_rules": {}} if optimizer == "slimadam" else {}
    made = spec(optimizer=optimizer, zero_stage=0, **rules, **STEADY)
    other = spec(zero_stage=0, **STEADY)
    assert (made.engine_key() == other.engine_key()) == (made.trial_id() == other.trial_id()) == (optimizer == "adamw")


REFUSED = {
    "partitioned blocks": ({"optimizer": "adamw_8bit"}, "cannot be used with zero_stage: 2.* blocks of a tensor"),
    "partitioned matrices": ({"optimizer": "muon", "zero_stage": 3}, "adamw, lion, schedule_free_adamw"),
    "partitioned means": ({"optimizer": "slimadam", "slimadam_rules": {}}, "means over dimensions of a tensor"),
    "no rules": ({"optimizer": "slimadam", "zero_stage": 0}, "optimizer: slimadam needs slimadam_rules"),
    "measured means, partitioned": ({"optimizer": "slimadam", "slimadam_rules": "auto"}, "means over dimensions"),
    "idle measured rules": ({"slimadam_rules": "auto"}, "slimadam_rules has no effect with optimizer: adamw"),
    "no such name of rules": (
        {"optimizer": "slimadam", "zero_stage": 0, "slimadam_rules": "aut"},
        "^slimadam_rules must be 'auto' or a block of keys, not 'aut'. Did you mean 'auto'",
    ),
    "idle rules": ({"slimadam_rules": {"A": "fan_in"}}, "slimadam_rules has no effect with optimizer: adamw"),
    "an unknown rule": (
        {"optimizer": "slimadam", "zero_stage": 0, "slimadam_rules": {"A": "fan_inn"}},
        "^slimadam_rules.A must be 'none', 'fan_in', 'fan_out' or 'both', not 'fan_inn'. Did you mean 'fan_in'",
    ),
    "a schedule": ({"optimizer": "schedule_free_adamw"}, "lr_scheduler_type is linear. Set lr_scheduler_type to"),
    "no beta 1": ({"optimizer": "schedule_free_adamw", "adam_beta1": 0, **STEADY}, "must be above 0"),
    "epsilon": ({"optimizer": "lion", "adam_epsilon": 1e-6}, "adam_epsilon: 1e-06 has no effect with optimizer: lion"),
    "a beta": ({"optimizer": "muon", "zero_stage": 0, "adam_beta2": 0.9}, "has no effect with optimizer: muon"),
    "a typo": ({"optimizer": "lionn"}, "lion"),
    "a ratio": ({"loraplus_lr_ratio": 0.5}, "loraplus_lr_ratio"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights"),
    "eva": ({"init_lora_weights": "eva"}, "passes over the data"),
    "no start": ({"init_lora_weights": False}, "before its first step"),
    "an odd rank": ({"init_lora_weights": "orthogonal", "lora_rank": 5}, "even lora_rank, not 5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused(case):
    settings, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        spec(**settings)


def test_muon_reads_adamw_s_settings_where_adamw_trains_something():
    assert spec(optimizer="muon", zero_stage=0, use_dora=True, adam_beta2=0.9)
    assert spec(optimizer="muon", zero_stage=0, lora_target=["embed_tokens"], adam_beta2=0.9)


def test_ratios_share_an_engine_and_a_ratio_of_1_is_plain():
    one, four, nine = (spec(loraplus_lr_ratio=ratio) for ratio in (1, 4, 9))
    assert one.trial_id() == spec().trial_id() and one.engine_key() == spec().engine_key()
    assert four.engine_key() == nine.engine_key() != one.engine_key()
    assert len({each.trial_id() for each in (one, four, nine)}) == 3


def test_starts_share_an_engine_and_are_trials_of_their_own():
    made = [spec(init_lora_weights=init) for init in (True, "gaussian", "orthogonal")]
    assert len({each.engine_key() for each in made}) == 1 and len({each.trial_id() for each in made}) == 3
    assert with_values(spec(), {"init_lora_weights": True}).trial_id() == spec().trial_id()


def test_optimizers_are_searched_and_impossible_draws_are_refused():
    def run(*overrides: str) -> RunSpec:
        return load(None, ["model_name_or_path=m", *overrides])

    found = run("zero_stage=0", "sweep.parameters={optimizer: [adamw, muon], loraplus_lr_ratio: [1, 4]}")
    assert found.sweep.parameters["optimizer"].values == ["adamw", "muon"]
    keys = ("zero_stage=0", "optimizer=slimadam", "slimadam_rules={A: fan_in}")
    slim = run(*keys, "sweep.parameters={optimizer: [adamw, slimadam]}")
    (study,) = slim.studies()
    assert with_values(study, {"optimizer": "adamw"}).slimadam_rules is None
    assert with_values(study, {"optimizer": "slimadam"}).slimadam_rules == {"A": "fan_in"}
    with pytest.raises(ConfigError, match=r"sweep\.parameters.*zero_stage"):
        run("sweep.parameters={optimizer: [adamw, muon]}")
    with pytest.raises(ConfigError, match=r"would draw .*linear"):
        run(
            "lr_scheduler_type=constant",
            "sweep.parameters={optimizer: [adamw, schedule_free_adamw], lr_scheduler_type: [constant, linear]}",
        )
