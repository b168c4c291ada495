"""The adapter of a study is built before anything starts, and models without an FFN are used where none is needed."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from helpers import tiny
from helpers.zoo_of_families import build_family

from macdrop.errors import ConfigError, UnsupportedModel
from tune.config.eval_spec import EvalSpec
from tune.config.messages import build
from tune.config.run_spec import RunSpec, TrainSpec
from tune.preflight.inputs import check_inputs, check_scoring, check_training
from tune.scheduling.study import studies


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MACDROP_CACHE", str(tmp_path / "cache"))


def saved(folder: Path, model: transformers.PreTrainedModel) -> str:
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


SETTINGS = {"dataset": "zoo:train", "max_samples": 20, "cutoff_len": 64, "val_size": 4, "template": "alpaca"}


def test_what_all_leaves_alone_is_noted_for_a_fine_tuning_and_a_sweep(tmp_path):
    name = saved(tmp_path / "moe", build_family("llama4"))
    (note,) = check_training(TrainSpec(model_name_or_path=name, **SETTINGS), 1).notes
    assert "routers" in note
    run = build(RunSpec, {**SETTINGS, "sweep": {"models": [{"model_name_or_path": name}]}})
    (checked,) = check_inputs(run, studies(run)).values()
    assert checked.notes == (note,)


def test_an_adapter_that_a_search_may_draw_and_that_cannot_be_built_is_refused(tmp_path):
    name = saved(tmp_path / "moe", build_family("mixtral"))
    sweep = {"models": [{"model_name_or_path": name}], "parameters": {"use_dora": {"values": [False, True]}}}
    run = build(RunSpec, {**SETTINGS, "sweep": sweep})
    with pytest.raises(ConfigError, match="fused 3-D parameters, which cannot take DoRA"):
        check_inputs(run, studies(run))


def test_a_model_without_ffn_may_be_trained_plain_and_scored_without_attacks(tmp_path):
    config = transformers.MambaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    name = saved(tmp_path / "mamba", transformers.AutoModelForCausalLM.from_config(config))
    spec = TrainSpec(model_name_or_path=name, macdrop={"p0": 0.0}, **SETTINGS)
    assert check_training(spec, 1).steps > 0
    (tmp_path / "t.txt").write_text("w3 w4 w5 " * 20)
    block = {"perplexity": {"t": str(tmp_path / "t.txt")}}
    check_scoring(spec, build(EvalSpec, block))
    with pytest.raises(UnsupportedModel, match="no feed-forward network"):
        check_scoring(spec, build(EvalSpec, {**block, "attacks": ["zeroing@1"]}))
    with pytest.raises(UnsupportedModel, match="no feed-forward network"):
        check_training(spec.model_copy(update={"macdrop": TrainSpec(model_name_or_path=name).macdrop}), 1)
