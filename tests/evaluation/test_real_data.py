"""The benchmarks on a real checkpoint and real data, if available; a few items of each."""

from __future__ import annotations

import pytest

from macdrop.errors import MacDropError
from tune.config.eval_spec import EvalSpec
from tune.config.messages import build
from tune.evaluation.benchmark import check_files
from tune.evaluation.scorer import Scorer


def test_stories260k_on_real_benchmark_files(shared, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, data = shared / "models" / "stories260k", shared / "data"
    if not folder.is_dir() or not data.is_dir():
        pytest.skip("no real checkpoint or data")
    spec = build(
        EvalSpec,
        {
            "limit": 10,
            "zero_shot": {
                "arc_easy": str(data / "arc_easy/test.jsonl"),
                "piqa": str(data / "piqa/validation.jsonl"),
                "gsm8k": {"data": str(data / "gsm8k/test.jsonl"), "limit": 3, "max_new_tokens": 8},
            },
            "perplexity": {"wikitext": {"data": str(data / "wikitext_demo/validation.txt"), "window": 128}},
            "generation": {
                "spec_bench": {"data": str(data / "spec_bench/question.jsonl"), "limit": 1, "max_new_tokens": 4},
                "alpaca": {"data": str(data / "alpaca_en_demo/train.json"), "limit": 3, "max_new_tokens": 8},
            },
        },
    )
    check_files(spec)
    scorer = Scorer(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), spec)
    found = {job.task: scorer.score(job, answers_path=tmp_path / f"{job.task}.jsonl") for job in scorer.jobs()}
    assert {row["metric"] for row in found["arc_easy"]} == {"acc", "acc_norm"}
    assert all(row["n"] == 10 for task in ("arc_easy", "piqa") for row in found[task])
    assert 50 < found["wikitext"][0]["value"] < 300
    categories = {row["task"].partition("/")[2] for row in found["spec_bench"]} - {"", "multi_turn"}
    assert len(categories) == 13
    assert len((tmp_path / "spec_bench.jsonl").read_text().splitlines()) == 13


def test_built_in_model_scores_well_and_fails_under_attack():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from macdrop import find_massive_weights
    from tune.zoo.catalog import zoo_path

    path = zoo_path("planted-llama")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    weights = find_massive_weights(model, tokenizer, source=str(path), fingerprint="test")
    block = {
        "limit": 40,
        "attacks": ["none", "zeroing@5", "retaining@5", "random@5"],
        "zero_shot": {"fact": "zoo:fact"},
        "perplexity": {"text": {"data": "zoo:text", "limit": 20}},
        "generation": {"qa": {"data": "zoo:generate-qa", "metrics": ["exact_match"], "max_new_tokens": 4, "stop": "."}},
    }
    scorer = Scorer(model, tokenizer, build(EvalSpec, block), weights)
    value = {(job.task, job.attack): scorer.score(job)[0]["value"] for job in scorer.jobs()}
    assert value["text", "zeroing@5"] > 5 * value["text", "none"] > 4 * value["text", "random@5"]
    assert value["text", "retaining@5"] < 2 * value["text", "none"]
    for task in ("fact", "qa"):
        assert value[task, "none"] > value[task, "zeroing@5"]
        assert value[task, "none"] - value[task, "random@5"] < 0.1


def test_unavailable_hub_task_suggests_local_data():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tune.zoo.catalog import zoo_path

    path = zoo_path("planted-llama")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    scorer = Scorer(
        model, tokenizer, build(EvalSpec, {"zero_shot": ["openbookqa"], "perplexity": {"w": "no/such-data-set"}})
    )
    for job in scorer.jobs():
        with pytest.raises(MacDropError, match="Without internet"):
            scorer.score(job)
