"""The JSON Schema of a run file accepts what the loader accepts, and flags unknown keys."""

from __future__ import annotations

import json

import pytest
import yaml

from tune.config.recipes import RECIPES
from tune.config.run_spec import dump, load
from tune.config.schema import json_schema

jsonschema = pytest.importorskip("jsonschema")

MODEL = "model: zoo:planted-llama\n"
ACCEPTED = [
    "model: zoo:planted-llama",
    "base_model: m\nlora_r: 4\nmicro_batch_size: 2\nray_num_workers: 2",
    "model: m\nmacdrop.k: 3\nsweep.num_samples: 2\nray.lanes: 2\neval.limit: 5\neval.judge.model: j",
    "model: m\nlearning_rate: 1\ndataset: [a.json, {path: b.json, max_samples: 5}]\nlora_target: [q_proj]",
    "model: m\nreport_to: wandb",
    "model: m\nreport_to: none",
    "model: m\nreport_to: [wandb, mlflow]",
    "sweep: {models: a}",
    "sweep: {models: [a, {model: b, lora_r: 4, macdrop.k: 3}, {base_model: c, macdrop: {p0: 0.5}}]}",
    MODEL + "sweep: {parameters: {lora_r: [2, 4], macdrop: {k: [1, 5]}, macdrop.p0: {values: [0.5]}}}",
    MODEL + "sweep: {search_alg: random, parameters: {learning_rate: {min: 1.0e-5, max: 1.0e-3}}}",
    MODEL + "sweep.parameters.lora_rank: [2, 4]\nsweep.metric.name: eval_loss",
    MODEL + "sweep: {metric: {name: eval_loss}}",
    MODEL + "sweep: {search_alg: optuna, parameters: {lora_rank: [2]}, metric: [{name: eval_loss, goal: minimize}]}",
    MODEL + "eval: {suite: zero-shot, zero_shot: {boolq: off, piqa: {limit: 3}}, attacks: none}",
    MODEL + "eval: {suite: [zero-shot, perplexity], attacks: [none, zeroing@3, random@2]}",
    MODEL
    + "eval: {zero_shot: piqa, perplexity: {t: t.txt}, generation: {g: {data: [a, b], stop: '.'}}, judge: some/model}",
    MODEL
    + "eval: {zero_shot: [piqa, {mine: {data: x.jsonl}}], generation: {g: {data: g, limit: 2 per category, stop: []}}}",
    MODEL + "eval: {zero_shot: {piqa: null, boolq: {num_fewshot: null}}, judge: null, limit: null}",
    MODEL + "eval.zero_shot.piqa: {limit: 3}\neval.zero_shot.boolq.limit: 3\nvalidation.perplexity.t: t.txt",
]
REFUSED = [
    ("lora_rnk: 4", "lora_rnk"),
    ("macdrop: {kk: 4}", "kk"),
    ("macdrop.kk: 4", "macdrop.kk"),
    ("macdrop: {schedule: stp}", "stp"),
    ("bf16: 'yes'", "yes"),
    ("lora_rank: 0", "minimum"),
    ("sweep: {seed: 1}", "seed"),
    ("sweep: {parameters: {seed: [1, 2]}}", "seed"),
    ("sweep: {models: [{model: a, lanes: 2}]}", "lanes"),
    ("eval: {zero_shot: {piqa: {dta: x}}}", "dta"),
    ("eval: {attacks: [zeroin@3]}", "zeroin@3"),
    ("eval.zero_shot.piqa.dta: x", "dta"),
    ("ray: {worker: 2}", "worker"),
]


@pytest.fixture(scope="module")
def validator():
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_it_is_json():
    assert json.loads(json.dumps(json_schema())) == json_schema()


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_names_the_schema(path, validator):
    validator.validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    assert path.read_text(encoding="utf-8").splitlines()[1] == "# yaml-language-server: $schema=macdrop.schema.json"


@pytest.mark.parametrize("text", ACCEPTED)
def test_what_the_loader_accepts_is_valid(text, validator, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    load(tmp_path / "run.yaml")
    validator.validate(yaml.safe_load(text))


@pytest.mark.parametrize(("text", "word"), REFUSED)
def test_an_unknown_key_or_value_is_flagged(text, word, validator):
    errors = list(validator.iter_errors(yaml.safe_load(MODEL + text)))
    assert errors and word in str(errors)


def test_a_written_run_file_is_valid(validator):
    for path in sorted(RECIPES.glob("*.yaml")):
        validator.validate(json.loads(json.dumps(dump(load(path)))))
