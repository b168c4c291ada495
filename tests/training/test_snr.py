"""SNRs of second moments on plain tensors, the rules that follow, and what is recorded of them."""

from __future__ import annotations

import json
import math

import pytest
import torch

from macdrop.errors import ConfigError
from tune.config.messages import build
from tune.config.run_spec import TrainSpec
from tune.storage.records import SNR_FILE
from tune.training.optimizers.adapter_tensors import AdapterTensor, Factor
from tune.training.optimizers.snr_formula import LARGEST, SnrMeter, snr
from tune.training.optimizers.snr_record import (
    CUTOFF,
    AdapterSnr,
    SnrRecord,
    read_snr,
    recorded_rules,
    rule_for,
    snr_spec,
    with_rules,
)


def auto(**settings) -> TrainSpec:
    base = {"model_name_or_path": "m", "optimizer": "slimadam", "zero_stage": 0, "slimadam_rules": "auto"}
    return build(TrainSpec, {**base, **settings})


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).square()


def ratio(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return mean**2 / (sum((value - mean) ** 2 for value in values) / len(values))


@pytest.mark.parametrize("shape", [(3, 5), (8, 2), (64, 33)])
def test_an_snr_is_that_of_a_slow_reference(shape):
    second = draw(*shape)
    rows = [[float(value) for value in row] for row in second]
    columns = [list(column) for column in zip(*rows, strict=True)]
    slow = {
        "fan_in": sum(map(ratio, rows)) / len(rows),
        "fan_out": sum(map(ratio, columns)) / len(columns),
        "both": ratio([value for row in rows for value in row]),
    }
    for rule, expected in slow.items():
        found = snr(second, rule)
        assert found == pytest.approx(expected, rel=1e-9) and found == snr(second, rule)


def test_an_snr_does_not_depend_on_the_scale_of_the_loss():
    second = draw(6, 7)
    assert snr(second * 2.0**-20, "fan_in") == pytest.approx(snr(second, "fan_in"), rel=1e-12)


PLANTED = {
    "fan_in": draw(16, 1).expand(16, 24),
    "fan_out": draw(1, 24).expand(16, 24),
    "both": torch.full((16, 24), 0.3),
    "none": draw(16, 24, seed=1) ** 3,
}


@pytest.mark.parametrize("rule", PLANTED)
def test_second_moments_that_are_equal_along_dimensions_get_that_rule(rule):
    meter = SnrMeter({"a": AdapterTensor("q_proj", Factor.A, (16, 24))})
    for _ in range(2):
        meter.add({"a": PLANTED[rule]})
    kind = meter.kinds()["q_proj/A"]
    assert kind.rule == rule and (kind.tensors, kind.entries) == (1, 384)
    assert kind.kept == {"fan_in": 16, "fan_out": 24, "both": 1, "none": 384}[rule]
    if rule != "none":
        assert getattr(kind, rule) > 1e9 > CUTOFF
    assert meter.factors()["A"].fan_in == kind.fan_in


def test_where_nothing_is_saved_or_known_there_is_no_snr():
    assert snr(draw(1, 9), "fan_out") is None and snr(draw(9), "fan_in") is None and snr(draw(9), "both") is None
    assert snr(torch.zeros(4, 5), "both") is None and snr(draw(9), "fan_out") is not None
    half = draw(4, 6)
    half[:2] = 0.0
    assert snr(half, "fan_in") == pytest.approx(snr(half[2:], "fan_in")), "rows without gradient do not count"
    assert snr(torch.ones(2, 2), "both") == LARGEST
    assert rule_for({"fan_in": None, "fan_out": None, "both": None}) == rule_for({"fan_in": CUTOFF}) == "none"


def test_layers_of_a_kind_are_averaged_and_an_expert_without_gradients_does_not_count():
    names = ("one", "two", "still")
    meter = SnrMeter({name: AdapterTensor("up_proj", Factor.B, (6, 4)) for name in names})
    values = {"one": draw(6, 4, seed=1), "two": draw(6, 4, seed=2), "still": torch.zeros(6, 4)}
    meter.add(values)
    meter.add({**values, "one": draw(6, 4, seed=3)})
    one = (snr(draw(6, 4, seed=1), "fan_out") + snr(draw(6, 4, seed=3), "fan_out")) / 2
    assert meter.kinds()["up_proj/B"].fan_out == pytest.approx((one + snr(values["two"], "fan_out")) / 2)


def test_arms_seeds_and_lengths_share_a_measurement_and_other_keys_do_not():
    first = snr_spec(auto()).trial_id()
    for same in (
        {"macdrop": {"p0": 0.5, "k": 3}},
        {"seed": 4, "save_steps": 7, "num_train_epochs": 9},
        {"max_steps": 900, "eval_steps": 5, "early_stopping_patience": 2},
    ):
        assert snr_spec(auto(**same)).trial_id() == first, same
    others = [{"use_dora": True}, {"lora_rank": 4}, {"lora_target": ["q_proj"]}, {"learning_rate": 1e-3}]
    others += [{"dataset": "other.jsonl"}, {"cutoff_len": 99}, {"model_name_or_path": "n"}]
    assert len({snr_spec(auto(**other)).trial_id() for other in others} | {first}) == len(others) + 1
    assert snr_spec(auto()).optimizer == "adamw" and snr_spec(auto()).arm == "plain"


def record(spec: TrainSpec) -> SnrRecord:
    meter = SnrMeter(
        {"a": AdapterTensor("q_proj", Factor.A, (16, 24)), "b": AdapterTensor("q_proj", Factor.B, (9, 16))}
    )
    meter.add({"a": PLANTED["fan_out"], "b": PLANTED["none"][:9, :16]})
    own = {key: getattr(spec, key) for key in ("use_dora", "use_rslora", "lora_target", "lora_rank")}
    measured = AdapterSnr(
        **own, trial=snr_spec(spec).trial_id(), data="d", kinds=meter.kinds(), factors=meter.factors()
    )
    return SnrRecord(model="m", fingerprint="f", steps=20, skipped=10, cutoff=CUTOFF, adapters=[measured]).sealed()


def test_rules_take_the_place_of_auto_in_what_a_trial_is_named_by(tmp_path):
    spec, kept = auto(), record(auto())
    (tmp_path / SNR_FILE).write_text(json.dumps(kept.model_dump(mode="json")))
    assert read_snr(tmp_path / SNR_FILE) == kept
    kept.check(tmp_path / SNR_FILE, [spec, auto(seed=3)])
    ruled = recorded_rules(spec, tmp_path)
    assert ruled.slimadam_rules == {"q_proj/A": "fan_out", "q_proj/B": "none"}
    given = auto(slimadam_rules={"q_proj/A": "fan_out", "q_proj/B": "none"})
    other = auto(slimadam_rules={"q_proj/A": "fan_in", "q_proj/B": "none"})
    assert (ruled.trial_id(), ruled.engine_key()) == (given.trial_id(), given.engine_key())
    assert ruled.trial_id() != other.trial_id() and ruled.engine_key() != other.engine_key()
    assert with_rules(other, kept.rules()) is other and recorded_rules(spec, tmp_path / "none") is spec
    assert recorded_rules(auto(use_dora=True), tmp_path).slimadam_rules == "auto", "another kind of adapter"


def test_a_record_that_was_changed_or_is_of_other_settings_is_refused(tmp_path):
    kept, file = record(auto()), tmp_path / SNR_FILE
    with pytest.raises(ConfigError, match=r"snr\.json was measured with other settings"):
        kept.check(file, [auto(learning_rate=1e-3)])
    content = kept.model_dump(mode="json")
    content["adapters"][0]["kinds"]["q_proj/A"]["rule"] = "both"
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"snr\.json was changed after it was measured"):
        read_snr(file).check(file, [auto()])
    content["adapters"][0]["kinds"]["q_proj/A"]["rule"] = "all"
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"snr\.json is damaged.*rule"):
        read_snr(file)
    assert math.isfinite(kept.adapters[0].kinds["q_proj/A"].fan_out)
