"""Benchmarks are read with each model's tokenizer and positions before anything starts."""

from __future__ import annotations

import pytest
from helpers import benchmark_fixtures as fix

from macdrop.errors import MacDropError
from tune.config.messages import build
from tune.config.run_spec import RunSpec
from tune.preflight.inputs import check_inputs
from tune.scheduling.study import studies


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"max_length": 4, "zero_shot": {"mine": {"data": "FILE"}}}, "line 1: the answer .*tokens.*may have 4"),
        ({"max_length": 10**6, "zero_shot": {"mine": {"data": "FILE"}}}, "max_length 1000000 is more than the"),
        ({"generation": {"g": {"data": "zoo:generate-qa", "max_new_tokens": 10**6}}}, "leaves no room for a prompt"),
        ({"perplexity": {"p": {"data": "zoo:text", "window": 10**6}}}, "window 1000000 is longer than"),
    ],
)
def test_what_a_model_cannot_score_is_known_before_anything_is_trained(tmp_path, block, message):
    rows = [{"context": "a", "choices": ["far too long an answer for this", "b"], "label": 0}]
    file = fix.write_jsonl(tmp_path / "t.jsonl", rows)
    for entry in block.get("zero_shot", {}).values():
        entry["data"] = file
    spec = build(RunSpec, {"sweep": {"models": ["zoo:planted-llama"], "arms": ["base"]}, "dataset": "x", "eval": block})
    with pytest.raises(MacDropError, match=message):
        check_inputs(spec, studies(spec))
