"""The benchmark of scoring compares equal scores; no time is judged."""

from __future__ import annotations

import argparse

import pytest
import scoring
import task_files
from scoring_ways import Scored


def given(**changes) -> argparse.Namespace:
    settings = {"model": "zoo:planted-llama", "benchmark": ["zoo:qa"], "limit": 6, "batch_size": 4, "dtype": "fp32"}
    return argparse.Namespace(**settings | {"device": "cpu", "threads": 1, "tokenizer": "zoo:planted-llama"} | changes)


@pytest.mark.long
def test_suite_is_scored_by_lm_eval_and_ours(tmp_path, capfd):
    text = scoring.measure(scoring.prepared(given(), tmp_path), ["zeroing@3"], 1)
    assert "4 of 4 scores equal in every digit, the same answer chosen in 12 of 12 items" in text
    assert "suite under 1 attacks and none" in text and "peak memory" in text
    assert "warm in both" in text and "from float64, in the 4 items that differ most: ours within" in text
    printed = capfd.readouterr().out
    assert all(line in printed for line in text.splitlines())


def test_other_scores_choices_and_likelihoods_are_counted():
    key, answers = ("t", "acc", "none"), {("t", "none"): [[-1.0, -2.0], [-3.0, -1.0]]}
    one = Scored(1.0, 1.0, {key: 0.5}, answers)
    assert scoring.Agreement.of(one, one) == scoring.Agreement(1, 0, 2, 0, 0.0)
    scoring.Agreement.of(one, one).check()
    other = Scored(1.0, 1.0, {key: 0.25}, {("t", "none"): [[-1.0, -2.0], [-3.0, -3.5]]})
    found = scoring.Agreement.of(one, other)
    assert found == scoring.Agreement(1, 1, 2, 1, 2.5)
    with pytest.raises(AssertionError, match="0 of 1 scores equal"):
        found.check()


def test_distances_are_from_float64_in_the_items_that_differ_most():
    one = Scored(1.0, 1.0, {}, {("t", "none"): [[-1.0, -2.0], [-3.0, -1.0]]})
    other = Scored(1.0, 1.0, {}, {("t", "none"): [[-1.0, -2.0], [-3.0, -1.5]]})
    items = scoring.furthest(one, other)
    assert items == [("t", "none", 1), ("t", "none", 0)]
    exact = [[-3.0, -1.25], [-1.0, -2.125]]
    assert (scoring.distance(one, items, exact), scoring.distance(other, items[1:], exact[1:])) == (0.25, 0.125)


def test_entries_are_those_of_the_task_files():
    assert task_files.Benchmark.parse("piqa=rows.jsonl").entry == {"data": "rows.jsonl", "task": "piqa"}
    assert task_files.Benchmark.parse("zoo:qa").entry == {"data": "zoo:qa", "target_delimiter": " "}
