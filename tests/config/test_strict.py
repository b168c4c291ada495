"""One strict base model: no section of a run file takes a value of another type for the right one."""

from __future__ import annotations

import pytest
from helpers.config_models import config_models

from macdrop.errors import ConfigError
from tune.config.messages import build
from tune.config.rubrics import Rubric
from tune.config.run_spec import load
from tune.config.sections import Strict

MODEL = "model_name_or_path=zoo:planted-llama"


def test_every_model_of_the_configuration_is_strict():
    found = config_models()
    assert len(found) > 10
    for kind in found:
        assert issubclass(kind, Strict), kind
        assert kind.model_config == Strict.model_config, kind


@pytest.mark.parametrize(
    "override",
    [
        "bf16='yes'",
        "bf16=1",
        "lora_rank='8'",
        "lora_rank=true",
        "learning_rate='1e-4'",
        "learning_rate=true",
        "eval.add_bos_token=1",
        "eval.add_bos_token='yes'",
        "eval.limit='5'",
        "eval.perplexity.t={data: t.txt, keep_empty: 'yes'}",
        "eval.perplexity.t={data: t.txt, full_windows: 1}",
        "eval.perplexity.t={data: t.txt, join: 3}",
        "eval.zero_shot.t={task: 3}",
        "eval.zero_shot.t={num_fewshot: true}",
        "eval.generation.g={data: g.jsonl, limit: '5'}",
        "eval.generation.g={data: g.jsonl, stop: [3]}",
        "eval.judge={model: m, temperature: true}",
        "eval.judge={model: m, retries: '2'}",
        "eval.judge={model: m, bf16: 'on'}",
        "sweep.seeds='3'",
        "sweep.parameters.lora_rank={min: '1', max: 2}",
        "ray.dashboard='no'",
    ],
)
def test_a_value_of_another_type_is_refused_and_never_repaired(override):
    with pytest.raises(ConfigError, match="must be "):
        load(None, [MODEL, override])


@pytest.mark.parametrize("override", ["learning_rate=1", "eval.judge={model: m, temperature: 1}"])
def test_a_whole_number_is_a_number(override):
    load(None, [MODEL, override])


def test_a_rubric_is_strict_too():
    scale = {"criteria": "Is it short?", "scores": ["a", "b", "c", "d", "e"]}
    assert build(Rubric, {"name": "mine", "version": 1, "default": scale}).id.startswith("mine@1#")
    for version in (True, None, []):
        with pytest.raises(ConfigError, match="version must be"):
            build(Rubric, {"name": "mine", "version": version, "default": scale})
