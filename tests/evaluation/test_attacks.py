"""Scores under attack equal those of the edited model; masks are off; scores are reproducible."""

from __future__ import annotations

import json
import math

import pytest
import torch
from helpers import benchmark_fixtures as fix
from helpers.benchmark_fixtures import TEXT, score

from macdrop.attack import ATTACKS, attack
from macdrop.errors import ConfigError, MacDropError
from tune.config.eval_spec import EvalJob, EvalSpec
from tune.config.messages import build
from tune.config.run_spec import load
from tune.errors import BenchmarkError
from tune.evaluation.scorer import Scorer, masks_off


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    fix.refuse_connections(monkeypatch)


@pytest.mark.parametrize(("attack", "kept"), [("zeroing@3", slice(0, 45)), ("retaining@5", slice(43, 48))])
def test_attacked_score_equals_that_of_the_edited_model_and_leaves_no_trace(tmp_path, tokenizer, attack, kept):
    model, edited = fix.tiny_llama(), fix.tiny_llama()
    before = {name: p.clone() for name, p in model.named_parameters()}
    (tmp_path / "t.txt").write_text(TEXT)
    block = {
        "attacks": ["none", attack],
        "zero_shot": {"piqa": fix.write_jsonl(tmp_path / "t.jsonl", fix.hub_rows("piqa"))},
        "perplexity": {"text": {"data": str(tmp_path / "t.txt"), "window": 64}},
        "generation": {"g": {"data": "zoo:generate", "limit": 3, "max_new_tokens": 8}},
    }
    scorer = Scorer(model, tokenizer, build(EvalSpec, block), fix.massive(model))
    with torch.no_grad():  # row 47 is the most massive one
        keep = torch.zeros(fix.FFN, 1)
        keep[kept] = 1
        for matrix in (edited.model.layers[0].mlp.gate_proj, edited.model.layers[0].mlp.up_proj):
            matrix.weight *= keep
    reference = Scorer(edited, tokenizer, build(EvalSpec, block | {"attacks": "none"}))
    answers = {}
    for job in scorer.jobs():
        rows = scorer.score(job, answers_path=tmp_path / "items.jsonl")
        answers[job] = (tmp_path / "items.jsonl").read_text().replace(f'"{attack}", "attack_on": "base"', '"none"')
        if job.attack == attack:
            want = reference.score(EvalJob(job.benchmark, job.task))
            assert [row["value"] for row in rows] == [row["value"] for row in want]
            assert all((row["attack"], row["attack_on"]) == (attack, "base") for row in rows)
        else:
            assert all(row["attack_on"] is None for row in rows)
    for job in scorer.jobs():
        assert job.attack == "none" or answers[job] != answers[EvalJob(job.benchmark, job.task)]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_an_attack_registered_from_outside_is_configured_and_scored(tokenizer, monkeypatch):
    monkeypatch.setattr("macdrop.attack.ATTACKS", dict(ATTACKS))

    @attack("second_half")
    def rows(weights, k, seed):
        return weights.top(k)[k // 2 :]

    model = fix.tiny_llama()
    block = {"attacks": ["none", "second_half@8"], "generation": {"g": {"data": "zoo:generate", "limit": 3}}}
    spec = load(None, ["model=zoo:planted-llama", f"eval={json.dumps(block)}"]).eval
    scorer = Scorer(model, tokenizer, spec, fix.massive(model))
    plain, attacked = scorer.jobs()
    assert attacked.key == "generation/g/second_half@8/base"
    with torch.no_grad():
        edited = fix.tiny_llama()
        for matrix in (edited.model.layers[0].mlp.gate_proj, edited.model.layers[0].mlp.up_proj):
            matrix.weight[list(fix.massive(model).indices[4:8])] = 0
    want = Scorer(edited, tokenizer, build(EvalSpec, block | {"attacks": "none"})).score(plain)
    assert [row["value"] for row in scorer.score(attacked)] == [row["value"] for row in want]


def test_impossible_attacks_are_refused_at_once(model, tokenizer):
    spec = build(EvalSpec, {"attacks": "zeroing@49", "generation": {"g": "zoo:generate"}})
    with pytest.raises(ConfigError, match="49"):
        Scorer(model, tokenizer, spec, fix.massive(model))
    with pytest.raises(ConfigError, match="macdrop scan"):
        Scorer(model, tokenizer, spec)
    with pytest.raises(ConfigError, match="max_length 300"):
        Scorer(model, tokenizer, EvalSpec(max_length=300))


def test_masks_are_off_while_scoring_and_modes_are_restored(tmp_path, tokenizer):
    from macdrop import MacDrop, MacDropConfig

    model = fix.tiny_llama().requires_grad_(False)
    drop = MacDrop(model, fix.massive(model), MacDropConfig(k=5, p0=1.0, schedule="constant"))
    drop.attach()
    plain = score(fix.tiny_llama(), tokenizer, {"generation": {"g": {"data": "zoo:generate", "limit": 2}}})
    model.train()
    model.lm_head.eval()
    found = score(model, tokenizer, {"generation": {"g": {"data": "zoo:generate", "limit": 2}}}, drop=drop)
    assert found == plain and drop.entries_dropped == 0
    assert model.training and not model.lm_head.training and model.model.layers[0].training
    drop.begin(0.5, 1)
    with pytest.raises(MacDropError, match="masks are on"), masks_off(model, drop):
        pass


def test_drops_while_scoring_void_the_score(model):
    class Leaky:
        active, entries_dropped = False, 0

    leaky = Leaky()
    with pytest.raises(MacDropError, match="void"), masks_off(model, leaky):
        leaky.entries_dropped = 4


def test_scores_repeat_bit_for_bit_and_print_nothing(tmp_path, model, tokenizer, capfd):
    (tmp_path / "t.txt").write_text(TEXT)
    spec = build(
        EvalSpec,
        {
            "batch_size": 3,
            "zero_shot": {"piqa": fix.write_jsonl(tmp_path / "t.jsonl", fix.hub_rows("piqa"))},
            "perplexity": {"text": {"data": str(tmp_path / "t.txt"), "window": 32}},
            "generation": {"g": {"data": "zoo:generate", "limit": 4, "max_new_tokens": 5, "metrics": ["chrf"]}},
        },
    )
    scorer = Scorer(model, tokenizer, spec)
    scorer.prepare()
    capfd.readouterr()
    first = [scorer.score(job) for job in scorer.jobs()]
    assert [scorer.score(job) for job in scorer.jobs()] == first
    assert [Scorer(model, tokenizer, spec).score(job) for job in scorer.jobs()] == first
    assert capfd.readouterr() == ("", "")
    assert all(set(row) == set(first[0][0]) for rows in first for row in rows)
    json.dumps(first, allow_nan=False)


def test_model_that_returns_nan_is_refused(tmp_path, tokenizer):
    model = fix.tiny_llama()
    model.lm_head.weight.data.fill_(math.nan)
    (tmp_path / "t.txt").write_text(TEXT)
    piqa = fix.write_jsonl(tmp_path / "t.jsonl", fix.hub_rows("piqa"))
    with pytest.raises(BenchmarkError, match="NaN"):
        score(model, tokenizer, {"zero_shot": {"piqa": piqa}})
    with pytest.raises(BenchmarkError, match="nan"):
        score(model, tokenizer, {"perplexity": {"t": str(tmp_path / "t.txt")}})
