"""Searched keys, the identity of a fine-tuning, and the round trip to YAML."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml

from macdrop.errors import ConfigError
from tune.config.run_spec import ENGINE_KEYS, RunSpec, TrainSpec, dump, load, slug, with_values
from tune.config.sections import ARMS
from tune.scheduling.study import studies

MODEL = "model_name_or_path=zoo:planted-llama"


def spec(*overrides: str) -> RunSpec:
    return load(None, [MODEL, *overrides])


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        spec(*overrides)
    return str(caught.value)


# --- searched keys ---


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sweep.parameters.macdrop.p0=[0.5, 1.5]"], "sweep.parameters.macdrop.p0: macdrop: p0 is 1.5"),
        (["sweep.parameters.macdrop.k=[3, -1]"], "k is -1"),
        (["sweep.parameters.macdrop.k=[3, 2.5]"], "macdrop.k must be a whole number, not 2.5"),
        (["sweep.parameters.macdrop.schedule=[stp]"], "Did you mean 'step'?"),
        (["sweep.parameters.macdrop.alpha=[0.1]"], "has no effect"),
        (["sweep.parameters.macdrop.schedule=[step, exp]"], "needs an alpha"),
        (["sweep.parameters.macdrop.schedule=[step, exp]", "sweep.parameters.macdrop.alpha=[-1]"], "alpha is -1"),
        (["sweep.parameters.zero_stage=[0, 2]", "sweep.parameters.offload=[none, cpu]"], "'zero_stage': 0"),
        (["sweep.parameters.macdrop.k=5"], "a list of values, or a block with min and max"),
        (["sweep.parameters.macdrop.k=[]"], "empty list"),
        (["sweep.parameters.macdrop.p0={min: 0.1}"], "needs a list of values, or min and max"),
        (["sweep.parameters.macdrop.p0={min: 0.5, max: 0.1}"], "min < max"),
        (["sweep.parameters.macdrop.p0={min: 0.1, max: 0.5}"], "a grid needs lists of values"),
        (["sweep.search_alg=random", "sweep.parameters.lora_rank={min: 2, max: 8}"], "distribution: int_uniform"),
        (["sweep.search_alg=random", "sweep.parameters.lora_rank={min: .5, max: 8, distribution: int_uniform}"], "who"),
        (["sweep.parameters.seed=[0, 1]"], "Set sweep.seeds"),
        (["sweep.search_alg=random"], "nothing to draw"),
        (["sweep.parameters.model_name_or_path=[a, b]"], "under sweep.models"),
        (["sweep.scheduler=asha"], "eval_steps is not set"),
        (["sweep.metric.name=zero_shot/a/acc"], "list benchmarks under validation"),
        (
            ["validation.zero_shot.arc={data: x}", "sweep.metric.name=zero_shot/ark/acc"],
            "Did you mean 'zero_shot/arc/METRIC'?",
        ),
        (["validation.zero_shot.arc={data: x}", "sweep.metric.name=zero_shot/arc/acc@zeroing@3"], "gives such a score"),
        (["eval.zero_shot.arc={data: x}", "sweep.metric.name=zero_shot/arc/acc"], "validation.zero_shot.arc, other"),
        (["eval.zero_shot=[arc]", "validation.zero_shot=[b]", "sweep.metric.name=zero_shot/arc/acc"], "looks better"),
        (["eval.zero_shot.a={data: x}", "validation.zero_shot.b={data: [y, x]}"], "eval.zero_shot.a score the same"),
        (["eval.zero_shot=[arc]", "validation.zero_shot.mine={task: arc}"], "the same rows (arc)"),
        (["eval.perplexity.w={data: a/x}", "validation.perplexity.v={data: a/x}"], "another split of them"),
        (["validation.generation.g={data: x}", "validation.judge={model: m}"], "Write it under eval"),
        (["sweep.metric=[]"], "metric is an empty list"),
        (["sweep.metric=[{name: eval_loss}, {name: eval_loss}]"], "metric lists eval_loss more than once"),
        (["validation.zero_shot=[b]", "sweep.metric=[{}, {name: zero_shot/b/acc, goal: maximize}]"], "to optuna"),
        (["sweep.metric.goal=minimise"], "Did you mean 'minimize'?"),
        (["sweep.decayed=1"], "sweep.decayed must be below 1"),
        (["sweep.arms=[base, plain, random_rows]"], "Add macdrop to sweep.arms"),
        (["sweep.arms=[macdrop, random_row]"], "Did you mean 'random_rows'?"),
        (["sweep.arms=[plan]"], "Did you mean 'plain'?"),
        (["sweep.arms=[]"], "arms is empty"),
    ],
)
def test_a_space_with_invalid_values_is_refused(overrides, message):
    assert message in refusal(*overrides)


def test_good_searches_are_accepted():
    found = spec(
        "sweep.search_alg=optuna",
        "sweep.parameters.macdrop={k: [1, 5], p0: {min: 0, max: 1}, schedule: [step, exp], alpha: [0.01]}",
        "sweep.parameters.learning_rate={min: 1e-5, max: 1e-3, distribution: log_uniform}",
        "sweep.parameters.lora_rank={min: 2, max: 8, distribution: int_uniform}",
        "validation.zero_shot.arc={task: arc_easy, split: validation}",
        "eval.zero_shot=[arc_easy]",
        "eval.perplexity.w={data: a/x}",
        "validation.perplexity.w={data: a/x, split: validation}",
        "validation.attacks=[none, zeroing@3]",
        "sweep.metric=[{name: zero_shot/arc/acc@zeroing@3, goal: maximize}, {name: eval_loss}]",
    )
    assert [metric.name for metric in found.sweep.metric] == ["zero_shot/arc/acc@zeroing@3", "eval_loss"]
    assert dump(spec())["sweep"]["metric"] == {"name": "eval_loss", "goal": "minimize"}
    assert found.sweep.parameters["lora_rank"].bounds() == [2, 8]
    assert list(found.sweep.parameters) == [
        "macdrop.k",
        "macdrop.p0",
        "macdrop.schedule",
        "macdrop.alpha",
        "learning_rate",
        "lora_rank",
    ]


def test_with_values_sets_dotted_keys_and_leaves_an_unused_alpha_out():
    base = spec().studies()[0]
    found = with_values(base, {"macdrop.k": 2, "macdrop.schedule": "step", "macdrop.alpha": 0.1, "lora_rank": 4})
    assert (found.macdrop.k, found.macdrop.alpha, found.lora_rank) == (2, None, 4)
    assert with_values(base, {"macdrop.schedule": "exp", "macdrop.alpha": 0.1}).macdrop.alpha == 0.1
    with pytest.raises(ConfigError, match="alpha"):
        with_values(base, {"macdrop.schedule": "exp"})
    assert with_values(base, {"macdrop.schedule": "exp"}, partial=True).macdrop.schedule == "exp"


# --- identity and round trip ---


def test_yaml_round_trip(tmp_path):
    found = spec(
        "learning_rate=3e-4",
        "adam_epsilon=1e-8",
        "lora_target=[q_proj]",
        "macdrop={schedule: exp, alpha: 0.05}",
        "dataset=[{path: a}]",
        "sweep.parameters.lora_rank=[2, 4]",
        "sweep.search_alg=random",
        'output_dir="a b: c"',
        "sweep.parameters.macdrop.p0={min: 0.1, max: 0.5}",
        "eval.zero_shot=[arc_easy]",
        "eval.attacks=[zeroing@1]",
    )
    file = tmp_path / "written.yaml"
    file.write_text(yaml.safe_dump(dump(found)))
    assert load(file) == found
    assert json.loads(json.dumps(dump(found))) == dump(found)


def test_round_trip_of_several_models(tmp_path):
    found = load(None, ["sweep.models=[a, {model: b, lora_r: 2}]"])
    file = tmp_path / "written.yaml"
    file.write_text(yaml.safe_dump(dump(found)))
    assert "model_name_or_path" not in dump(found) and load(file) == found


def test_replace_takes_precedence_over_file_and_overrides(tmp_path):
    (tmp_path / "a.yaml").write_text("sweep: {models: [a, b]}\neval: {limit: 3}\n")
    found = load(tmp_path / "a.yaml", ["eval.limit=4"], replace={"sweep.models": [], "model_name_or_path": "c: d"})
    assert (found.model_name_or_path, found.eval.limit) == ("c: d", 4)


def test_engine_key_covers_the_settings_of_an_engine():
    base = spec().studies()[0]
    assert set(ENGINE_KEYS) < set(TrainSpec.model_fields)
    for key, value in {"lora_rank": 2, "use_dora": True, "zero_stage": 0, "bf16": True}.items():
        assert with_values(base, {key: value}).engine_key() != base.engine_key()
    for key, value in {"learning_rate": 1.0, "seed": 3, "macdrop.p0": 0.1, "max_steps": 3, "cutoff_len": 9}.items():
        assert with_values(base, {key: value}).engine_key() == base.engine_key()


def test_trial_id_depends_on_the_content_only():
    base = spec().studies()[0]
    for key, value in {"logging_steps": 7, "save_steps": 3}.items():
        assert with_values(base, {key: value}).trial_id() == base.trial_id()
    other = [{"seed": 1}, {"learning_rate": 1e-3}, {"macdrop.k": 4}, {"macdrop.p0": 0.7}, {"use_dora": True}]
    assert len({with_values(base, values).trial_id() for values in other} | {base.trial_id()}) == len(other) + 1
    off = [{"macdrop.k": 0}, {"macdrop.p0": 0.0}, {"macdrop.p0": 0, "macdrop.schedule": "constant"}]
    ids = {with_values(base, values).trial_id() for values in off}
    assert len(ids) == 1 and ids.pop().startswith("planted-llama-plain-")


def test_trials_keep_their_names_from_version_to_version():
    """Run folders hold them: under another name every trial would be trained again."""
    assert spec().studies()[0].trial_id() == "planted-llama-macdrop-d287202c"
    for value in ("bad_rows=skip", "packing=off", "packing=on", "max_tokens_per_micro_batch=4096"):
        assert spec(value).studies()[0].trial_id() != spec().studies()[0].trial_id(), value


def test_packing_and_its_budget_are_searched_like_any_key():
    found = spec("sweep.parameters={packing: [on, off], cutoff_len: [64]}")
    assert found.sweep.parameters["packing"].values == ["on", "off"]
    assert spec("sweep.parameters={max_tokens_per_micro_batch: [512, 1024]}")
    message = refusal("sweep.parameters={packing: [on, off], max_tokens_per_micro_batch: [512]}")
    assert "has no effect with packing: off" in message


@pytest.mark.parametrize("arm", ARMS)
def test_the_scope_determines_the_arm_and_unused_settings_do_not_change_the_trial(arm):
    def trial(**block):
        return TrainSpec(model_name_or_path="m", macdrop={"scope": ARMS[arm], **block})

    assert trial().arm == arm and f"-{arm}-" in trial().trial_id()
    assert trial(p0=0.0).arm == "plain" and trial(p0=0.0).trial_id() == trial(k=0, p0=0.0).trial_id()
    assert (trial(k=3).trial_id() == trial(k=4).trial_id()) == (arm in ("all_rows", "activations"))
    assert trial(k=3).canonical().canonical() == trial(k=3).canonical()


def test_the_scope_is_an_arm_of_a_sweep_and_never_searched():
    message = refusal("sweep.parameters.macdrop.scope=[massive,random]")
    assert "cannot be searched" in message and "sweep.arms" in message
    with pytest.raises(ConfigError, match="(?s)one fine-tuning.*sweep.arms"):
        studies(spec("macdrop.scope=random"))
    assert "mean 'random'" in refusal("macdrop.scope=randm")


def test_trial_id_is_the_same_in_another_process():
    code = f"from tune.config.run_spec import load; print(load(None, [{MODEL!r}, 'seed=3']).studies()[0].trial_id())"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == spec("seed=3").studies()[0].trial_id()


@pytest.mark.parametrize(
    ("name", "short"),
    [("zoo:planted-llama", "planted-llama"), ("a/b-1.5", "b-1.5"), ("/x/y z/", "y-z"), ("./m", "m")],
)
def test_slug(name, short):
    assert slug(name) == short
