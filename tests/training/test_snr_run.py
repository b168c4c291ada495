"""SlimAdam's rules measured for real: once, to the bit, and recorded so that a trial needs no new measurement."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.small import SMALL

from macdrop.errors import ConfigError
from tune.config.messages import build
from tune.config.run_spec import RunSpec, TrainSpec
from tune.scheduling.study import studies
from tune.storage.records import SNR_FILE
from tune.training import single
from tune.training.optimizers.snr_record import read_snr, recorded_rules

pytestmark = [pytest.mark.zero, pytest.mark.usefixtures("own_cache")]

SETTINGS = {**SMALL, "zero_stage": 0, "max_steps": 3, "save_steps": 0, "lora_rank": 8, "macdrop": {"p0": 0.0}}
AUTO = {"optimizer": "slimadam", "slimadam_rules": "auto"}


def trained(folder: Path, **settings) -> Path:
    from tune.training.single import train_here

    train_here(build(TrainSpec, {**SETTINGS, **settings}), folder, observe=None, threads=1)
    return folder


def adapter(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("auto") / "run", **AUTO)


def test_it_is_the_same_twice_and_the_trial_is_that_of_the_rules(measured, tmp_path):
    again = trained(tmp_path / "again", **AUTO, seed=1)
    assert (again / SNR_FILE).read_bytes() == (measured / SNR_FILE).read_bytes(), "another seed shares it"
    rules = read_snr(measured / SNR_FILE).adapters[0].rules
    assert len(rules) == 6 and set(rules.values()) > {"none"} or "none" not in rules.values()
    for name in ("trial.json", "reproduce.json"):
        assert json.loads((measured / name).read_text())["slimadam_rules"] == rules
    given = trained(tmp_path / "given", optimizer="slimadam", slimadam_rules=rules)
    plain = trained(tmp_path / "plain")
    assert adapter(given) == adapter(measured) != adapter(plain)
    assert (given / "config.yaml").read_text() == (measured / "config.yaml").read_text()
    assert not (given / SNR_FILE).exists()


def test_a_recorded_measurement_is_used_and_a_changed_one_refused(measured, tmp_path, monkeypatch):
    def fail(*arguments):
        raise AssertionError("it was measured before")

    monkeypatch.setattr(single, "_measure", fail)
    spec = build(TrainSpec, {**SETTINGS, **AUTO})
    (tmp_path / "kept").mkdir()
    content = json.loads((measured / SNR_FILE).read_text())
    (tmp_path / "kept" / SNR_FILE).write_text(json.dumps(content))
    assert recorded_rules(spec, tmp_path / "kept").slimadam_rules == read_snr(measured / SNR_FILE).adapters[0].rules
    assert adapter(trained(tmp_path / "kept", **AUTO)) == adapter(measured)
    with pytest.raises(ConfigError, match="measured with other settings"):
        trained(tmp_path / "kept", **AUTO, learning_rate=1e-4)
    content["adapters"][0]["kinds"]["q_proj/A"]["rule"] = "both"
    (tmp_path / "kept" / SNR_FILE).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="was changed after it was measured"):
        trained(tmp_path / "kept", **AUTO)


def test_an_evaluation_actor_measures_every_kind_of_adapter_of_a_study_once(tmp_path, monkeypatch):
    from tune.distributed.actors.evaluators import Evaluator, Opening

    searched = {"parameters": {"optimizer": ["adamw", "slimadam"], "use_dora": [False, True]}}
    (study,) = studies(build(RunSpec, {**SETTINGS, **AUTO, "macdrop": {"p0": 0.5}, "sweep": searched}))
    weights = tmp_path / "massive_weights.json"
    opening = Opening(study.spec, {}, str(weights), scan=False, k=5, threads=1, unruled=study.unruled, workers=2)
    Evaluator().prepare(opening)
    content = (tmp_path / SNR_FILE).read_bytes()
    record = read_snr(tmp_path / SNR_FILE)
    assert [adapter.use_dora for adapter in record.adapters] == [False, True]
    ruled = study.with_measured(record.rules())
    for values in ruled.trials or ():
        spec = ruled.searched(values)
        known = record.adapters[spec.use_dora].rules
        assert spec.slimadam_rules == (known if spec.optimizer == "slimadam" else None)
    assert any("magnitude" in kind for kind in record.adapters[1].rules)
    monkeypatch.setattr(single, "_measure", None)
    Evaluator().prepare(opening)
    assert (tmp_path / SNR_FILE).read_bytes() == content
