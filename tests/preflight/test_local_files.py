"""Overrides for local files: with all of them set, a recipe names nothing of the Hub."""

from __future__ import annotations

import shlex

import pytest

from macdrop.errors import ConfigError
from tune.config.recipes import RECIPES
from tune.config.run_spec import load
from tune.preflight.local_files import PATH, local_overrides
from tune.zoo import real_models

HUB = sorted(path.stem for path in RECIPES.glob("*.yaml") if path.stem not in ("demo", "real"))


@pytest.mark.parametrize("name", HUB)
def test_with_every_line_a_recipe_is_local(name):
    recipe = RECIPES / f"{name}.yaml"
    found = local_overrides(load(recipe))
    assert [about for _, about in found if about]
    lines = [
        line.replace(PATH, f"./mine-{number}") for number, (given, _) in enumerate(found) for line in shlex.split(given)
    ]
    assert local_overrides(load(recipe, lines)) == []


def test_lines_name_the_data_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("MACDROP_CACHE", str(tmp_path))  # in which no model has been fetched
    monkeypatch.setattr(real_models, "_cached", lambda *place: False)
    found = dict(local_overrides(load(RECIPES / "smollm2-quick.yaml")))
    assert found["'sweep.models=[PATH]'"] == "HuggingFaceTB/SmolLM2-135M-Instruct, or macdrop zoo fetch smollm2-135m"
    assert found["dataset=PATH"] == "yahma/alpaca-cleaned"
    assert found["eval.zero_shot.arc_easy.data=PATH"] == "allenai/ai2_arc (ARC-Easy, split test)"
    assert found["validation.zero_shot.arc_easy.data=PATH"] == "allenai/ai2_arc (ARC-Easy, split validation)"
    assert found["eval.perplexity.wikitext.data=PATH"] == "Salesforce/wikitext (wikitext-2-raw-v1, split test)"


def test_what_a_list_holds_besides_is_kept():
    models = "sweep.models=[zoo:planted-llama, {model_name_or_path: org/model, bf16: true}]"
    data = "dataset=[zoo:train, {path: org/data, split: train}]"
    task = "eval.zero_shot.arc_easy={split: validation}"
    found = local_overrides(load(None, [models, data, task]))
    assert found == [
        ("""'sweep.models=[zoo:planted-llama,{"model_name_or_path": "PATH", "bf16": true}]'""", "org/model"),
        ("""'dataset=[zoo:train,{"path": "PATH", "split": "train"}]'""", "org/data"),
        (
            "eval.zero_shot.arc_easy.data=PATH eval.zero_shot.arc_easy.split=null",
            "allenai/ai2_arc (ARC-Easy, split validation)",
        ),
    ]


def test_local_runs_need_no_lines():
    assert local_overrides(load(RECIPES / "demo.yaml")) == []
    assert local_overrides(load(None, ["model=org/model", "dataset=zoo:train"])) == [
        ("model_name_or_path=PATH", "org/model")
    ]


def test_an_override_leaves_out_a_benchmark_of_the_file():
    recipe = RECIPES / "smollm2-quick.yaml"
    spec = load(recipe, ["eval.zero_shot.boolq=off", "eval.perplexity.c4=off"])
    assert list(spec.eval.zero_shot) == ["arc_easy", "arc_challenge", "piqa", "winogrande"]
    assert list(spec.eval.perplexity) == ["wikitext"]
    demo = load(RECIPES / "demo.yaml", ["eval.zero_shot.qa=off"])
    assert list(demo.eval.zero_shot) == ["arith"]


@pytest.mark.parametrize("override", ["eval.zero_shot.arit=off", "eval.zero_shot.arit=false"])
def test_off_that_leaves_out_nothing_is_refused(override):
    with pytest.raises(ConfigError, match="no such benchmark to leave out. Did you mean 'arith'"):
        load(RECIPES / "demo.yaml", [override])
