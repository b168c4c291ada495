"""From a run file to a spec: YAML, overrides, aliases, blocks, models."""

from __future__ import annotations

import pytest
import yaml

from macdrop.errors import ConfigError
from tune.config.messages import build
from tune.config.parse import ALIASES, normalise, override
from tune.config.run_spec import RunSpec, dump, load
from tune.config.syntax.yaml_core import write_yaml
from tune.config.train.data_keys import DatasetEntry

MODEL = "model_name_or_path=zoo:planted-llama"


def spec(*overrides: str, file: str | None = None, tmp_path=None) -> RunSpec:
    path = None
    if file is not None:
        path = tmp_path / "run.yaml"
        path.write_text(file)
    return load(path, overrides if file is not None else [MODEL, *overrides])


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        spec(*overrides)
    return str(caught.value)


# --- names ---


@pytest.mark.parametrize("name", [".", "..", "x/..", "x/../", "/", "x/.hidden", "a\x1bb"])
def test_a_model_must_have_a_name_that_folders_can_have(name):
    for raw in ({"model_name_or_path": name}, {"sweep": {"models": [name]}}):
        with pytest.raises(ConfigError, match="model_name_or_path: "):
            build(RunSpec, raw)


def test_a_run_folder_has_no_control_characters():
    with pytest.raises(ConfigError, match=r"output_dir: .*'\\x00'"):
        build(RunSpec, {"model_name_or_path": "zoo:planted-llama", "output_dir": "runs/\x00"})


# --- values ---


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("learning_rate=3e-4", "learning_rate", 3e-4),
        ("learning_rate=3E-4", "learning_rate", 3e-4),
        ("learning_rate=1", "learning_rate", 1.0),
        ("learning_rate=.5", "learning_rate", 0.5),
        ("bf16=true", "bf16", True),
        ("eval_steps=null", "eval_steps", None),
        ("eval_steps=10", "eval_steps", 10),
        ("lora_target=[q_proj, v_proj]", "lora_target", ["q_proj", "v_proj"]),
        (
            "dataset=[{path: a.json, max_samples: 5}, b.json]",
            "dataset",
            [DatasetEntry(path="a.json", max_samples=5), "b.json"],
        ),
        ("output_dir=2024-01-01", "output_dir", "2024-01-01"),
        ("output_dir=runs/a=b", "output_dir", "runs/a=b"),
        ('model_revision="12e45"', "model_revision", "12e45"),
        ("packing=on", "packing", "on"),
        ("packing=off", "packing", "off"),
        ("max_tokens_per_micro_batch=4096", "max_tokens_per_micro_batch", 4096),
    ],
)
def test_a_value_is_yaml(text, key, value):
    found = getattr(spec(text), key)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bf16=1", "bf16 must be true or false, not 1"),
        ("learning_rate=true", "learning_rate must be a number, not True"),
        ('learning_rate="1e-4"', "learning_rate must be a number, not '1e-4'"),
        ("learning_rate=.inf", "finite"),
        ("learning_rate=0", "learning_rate must be above 0"),
        ("lora_rank=8.0", "lora_rank must be a whole number, not 8.0"),
        ("lora_rank=0", "lora_rank must be at least 1, not 0"),
        ("lora_target=q_proj", "lora_target must be 'all' or a list, not 'q_proj'"),
        ("lora_target=[]", "names no layer"),
        ("zero_stage=4", "zero_stage must be 0, 1, 2 or 3, not 4"),
        ("template=alpca", "Did you mean 'alpaca'?"),
        ("eval_steps=none", "Nothing is written null."),
        ("seed=-1", "seed must be at least 0"),
        ("dataset=5", "dataset must be a text or a list, not 5"),
        ("macdrop=0.5", "macdrop must be a block of keys, not 0.5"),
        ("macdrop=null", "macdrop must be a block of keys"),
        ("offload=cpu zero_stage=0", "offload: cpu needs zero_stage 1, 2 or 3"),
        ("packing=true", "packing must be 'auto', 'on' or 'off', not True. Write on."),
        ("packing=false", "packing must be 'auto', 'on' or 'off', not False. Write off."),
        ("packing=yes", "packing must be 'auto', 'on' or 'off', not 'yes'. Write on."),
        ("packing=of", "Did you mean 'off'?"),
        ("max_tokens_per_micro_batch=1", "max_tokens_per_micro_batch must be at least 2, not 1"),
        ("packing=off max_tokens_per_micro_batch=64", "has no effect with packing: off"),
        ("learning_rate", "not an override"),
        ("=3", "not an override"),
        ("dataset=[a", "not valid YAML"),
        ("dataset=@a", "not valid YAML"),
    ],
)
def test_a_wrong_value_is_refused_and_never_repaired(text, message):
    assert message in refusal(*text.split(" "))


def test_every_wrong_value_is_reported_at_once():
    message = refusal("lora_rank=0", "learning_rate=fast", "lora_rnk=3")
    assert [line.split(" ")[0] for line in message.splitlines()] == ["lora_rank", "learning_rate", "lora_rnk"]


def test_on_and_off_of_a_file_stay_the_words_that_they_are(tmp_path):
    """YAML 1.1 reads them as true and false; what is written is quoted for such readers."""
    found = spec(file="model: zoo:planted-llama\npacking: on\n", tmp_path=tmp_path)
    assert found.packing == "on" and "packing: 'on'" in write_yaml(dump(found))
    assert yaml.safe_load(write_yaml(dump(found)))["packing"] == "on"
    with pytest.raises(ConfigError, match="packing must be 'auto', 'on' or 'off', not True"):
        spec(file="model: zoo:planted-llama\npacking: true\n", tmp_path=tmp_path)


# --- keys ---


def test_dotted_keys_equal_blocks(tmp_path):
    dotted = spec(file="model: m\nmacdrop.k: 3\nsweep.num_samples: 2\nray.num_workers: 2\n", tmp_path=tmp_path)
    nested = spec(file="model: m\nmacdrop: {k: 3}\nsweep: {num_samples: 2}\nray: {num_workers: 2}\n", tmp_path=tmp_path)
    assert dotted == nested
    assert (nested.macdrop.k, nested.macdrop.p0) == (3, 0.8)


@pytest.mark.parametrize("alias", sorted(ALIASES))
def test_names_of_other_tools_are_translated(alias):
    name = ALIASES[alias]
    assert normalise({alias: 1}) == normalise({name: 1})
    assert override({}, alias, 1) == normalise({name: 1})


def test_aliases_apply_to_models_and_searched_keys(tmp_path):
    text = (
        "sweep:\n  models: [{base_model: a/b, lora_r: 4}, c]\n  parameters: {lora_r: [4, 8], micro_batch_size: [1]}\n"
    )
    found = spec(file=text, tmp_path=tmp_path)
    assert [study.lora_rank for study in found.studies()] == [4, 16]
    assert list(found.sweep.parameters) == ["lora_rank", "per_device_train_batch_size"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora_r: 4\nlora_rank: 8\n", "lora_r and lora_rank mean the same; write only lora_rank."),
        ("macdrop.k: 3\nmacdrop: {k: 4}\n", "given twice"),
        ("macdrop: 5\nmacdrop.k: 4\n", "macdrop"),
        ("seed: 1\nseed: 2\n", "seed is written twice (line 3"),
        ("macdrop:\n  k: 1\n  k: 1\n", "k is written twice (line 4"),
        ("sweep:\n  parameters: {lora_r: [1], lora_rank: [2]}\n", "mean the same"),
        ("sweep:\n  parameters: {macdrop.k: [1], macdrop: {k: [2]}}\n", "sweep.parameters.macdrop.k is given twice"),
        ("3: 4\n", "the key 3 is not a text"),
        ("a: [1\n", "not valid YAML"),
        ("- a\n", "must hold keys and values"),
    ],
)
def test_a_key_given_twice_is_refused(text, message, tmp_path):
    with pytest.raises(ConfigError, match=".") as caught:
        spec(file=f"model: m\n{text}" if text[0] != "-" else text, tmp_path=tmp_path)
    assert message in str(caught.value)


def test_an_override_may_use_another_alias_than_the_file(tmp_path):
    found = spec("model_name_or_path=b", "lora_rank=2", file="base_model: a\nlora_r: 4\n", tmp_path=tmp_path)
    assert (found.model_name_or_path, found.lora_rank) == ("b", 2)


def test_an_override_replaces_a_block_and_a_dotted_one_its_key_only(tmp_path):
    file = "model: m\nmacdrop: {k: 3, p0: 0.2}\nsweep: {parameters: {macdrop.p0: [0.1], lora_rank: [2, 4]}}\n"
    assert spec("macdrop={k: 4}", file=file, tmp_path=tmp_path).macdrop.p0 == 0.8
    assert spec("macdrop.k=4", file=file, tmp_path=tmp_path).macdrop.p0 == 0.2
    assert spec("sweep.parameters={}", file=file, tmp_path=tmp_path).sweep.parameters == {}
    one = spec("sweep.parameters.lora_rank=[5]", file=file, tmp_path=tmp_path).sweep.parameters
    assert (one["lora_rank"].values, one["macdrop.p0"].values) == ([5], [0.1])


def test_one_benchmark_of_a_list_can_be_overridden(tmp_path):
    file = "model: m\neval: {zero_shot: [arc_easy, piqa], perplexity: {w: a.txt}}\n"
    found = spec("eval.zero_shot.piqa.limit=3", "eval.perplexity.w.window=8", file=file, tmp_path=tmp_path).eval
    assert list(found.zero_shot) == ["arc_easy", "piqa"] and found.zero_shot["piqa"].limit == 3
    assert (found.perplexity["w"].data, found.perplexity["w"].window) == (["a.txt"], 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate=1", "lerning_rate is an unknown key. Did you mean 'learning_rate'?"),
        ("learning-rate=1", "Did you mean 'learning_rate'?"),
        ("macdrop.p=1", "macdrop.p is an unknown key. Did you mean 'p0'? Allowed: alpha, k, p0, schedule, scope."),
        ("ray.num_worker=1", "Did you mean 'num_workers'?"),
        ("sweep.num_sample=1", "Did you mean 'num_samples'?"),
        ("sweep.metric.gaol=maximize", "Did you mean 'goal'?"),
        ("sweep.parameters.macdrop.p=[1]", "Did you mean 'macdrop.p0'?"),
        ("sweep.parameters.macdrop.p0={mim: 1, max: 2}", "Did you mean 'min'?"),
        ("sweep.parameters.lr=[1.0]", "Write learning_rate."),
        ("eval.zero_shots.a.data=b", "Did you mean 'zero_shot'?"),
        ("eval.zero_shot.a.dta=b", "eval.zero_shot.a.dta is an unknown key. Did you mean 'data'?"),
        ("eval.perplexity.a={data: b, windw: 3}", "Did you mean 'window'?"),
        ("lr=1e-4", "Write learning_rate."),
        ("deepspeed=ds.json", "zero_stage"),
        ("load_in_4bit=true", "Write quantization_bit: 4"),
        ("k=3", "Write macdrop.k."),
        ("sweep.models.0.seed=3", "sweep.models is not a block of keys"),
        ("a.b.c=1", "a is an unknown key."),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(text, message):
    found = refusal("sweep.models=[m]", text) if text.startswith("sweep.models") else refusal(text)
    assert message in found


# --- models ---


def test_models_have_their_own_values_in_either_spelling(tmp_path):
    file = """
seed: 7
macdrop: {k: 3}
sweep:
  models:
    - zoo:planted-llama
    - {model_name_or_path: zoo:planted-phi3, macdrop.p0: 0.5, lora_rank: 4}
    - {model: other/model, macdrop: {k: 1}}
"""
    first, second, third = spec(file=file, tmp_path=tmp_path).studies()
    assert (first.macdrop.k, first.macdrop.p0, first.seed) == (3, 0.8, 7)
    assert (second.macdrop.k, second.macdrop.p0, second.lora_rank) == (3, 0.5, 4)
    assert (third.macdrop.k, third.macdrop.p0, third.lora_rank) == (1, 0.8, 16)


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (
            "[{model: m, lora_rnk: 3}]",
            "sweep.models, entry 1 (m): lora_rnk is an unknown key. Did you mean 'lora_rank'?",
        ),
        ("[m, {model: n, macdrop: {p: 3}}]", "sweep.models, entry 2 (n): macdrop.p is an unknown key."),
        ("[{model: n, macdrop: {p0: 3}}]", "p0 is 3"),
        ("[{lora_rank: 3}]", "model_name_or_path is missing"),
        ("[{model: n, eval: {limit: 3}}]", "eval is for the whole run"),
        ("[3]", "sweep.models.0 must be a block of keys"),
        ("[]", "no model is given"),
    ],
)
def test_a_wrong_model_entry_is_refused(models, message):
    with pytest.raises(ConfigError) as caught:
        load(None, [f"sweep.models={models}"])
    assert message in str(caught.value)


def test_one_model_or_several_but_not_both():
    assert "sweep.models=[zoo:planted-llama]" in refusal("sweep.models=[b]")
