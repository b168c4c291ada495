"""`macdrop attack` with tasks: the scores are those of `macdrop eval`, and wrong orders are refused."""

from __future__ import annotations

import json
import re

import pytest
from scipy.stats import binomtest

LLAMA = "zoo:planted-llama"
TASKS = ("--task", "qa=zoo:qa", "--task", "arith=zoo:arith", "--limit", "40")


def cells(printed: str) -> dict[str, list[str]]:
    """Cells of the table by attack."""
    rows = [re.split(r" {2,}", line.strip()) for line in printed.splitlines() if "%" in line and "[" in line]
    return {row[0]: row[1:] for row in rows if row[0] != "[95 %]"}


def scores(shell, *arguments: str) -> dict[tuple[str, str], dict]:
    """Accuracies that `macdrop eval` writes, by task and attack."""
    ended = shell("eval", LLAMA, *arguments, "--output", "scores")
    assert ended.code == 0, ended.err
    rows = map(json.loads, (shell.folder / "scores/scores.jsonl").read_text().splitlines())
    return {(row["task"], row["attack"]): row for row in rows if row["metric"] == "acc"}


def test_accuracies_are_those_of_eval_with_their_intervals(shell):
    ended = shell("attack", LLAMA, "--attack", "zeroing@3", "--attack", "random@3", *TASKS, "--batch-size", "8")
    assert ended.code == 0 and ended.new and all(name.startswith("cache/") for name in ended.new), ended.err
    assert "untouched     perplexity 3.728" in ended.out and "qa            acc on 40 items" in ended.out
    shown = cells(ended.out)
    assert list(shown) == ["none", "zeroing@3", "random@3"]
    assert shown["none"][:2] == ["3.728", "1"] and shown["zeroing@3"][:2] == ["86.1", "23.09"]

    entries = "eval.zero_shot={qa: zoo:qa, arith: zoo:arith}"
    settings = ["eval.limit=40", "eval.batch_size=8", "eval.attacks=[none,zeroing@3,random@3]"]
    known = scores(shell, entries, *settings)
    for attack, (_, _, *measured) in shown.items():
        values = measured if attack == "none" else measured[::2]
        for task, cell in zip(("qa", "arith"), values, strict=True):
            value = known[task, attack]["value"]
            wilson = binomtest(round(40 * value), 40).proportion_ci(method="wilson")
            assert cell == f"{100 * value:.1f} % [{100 * wilson.low:.1f}, {100 * wilson.high:.1f}]"
    drop = 100 * (known["arith", "zeroing@3"]["value"] - known["arith", "none"]["value"])
    assert drop < -20 and shown["zeroing@3"][-1].startswith(f"{drop:.1f} pts [-")


def test_tasks_alone_are_scored_under_all_kinds_of_attacks(shell):
    ended = shell("attack", LLAMA, "--k", "3", "--task", "qa=zoo:qa", "--limit", "8")
    assert list(cells(ended.out)) == ["none", "zeroing@3", "retaining@3", "random@3"]


def test_attacks_alone_show_perplexity(shell):
    ended = shell("attack", LLAMA, "--attack", "none", "--attack", "retaining@3")
    rows = [line.split() for line in ended.out.splitlines() if line.startswith(("  none", "  retaining@3"))]
    assert rows == [["none", "3.728", "1"], ["retaining@3", "4.615", "1.238"]]


def test_a_task_of_lm_eval_on_a_really_trained_model(shell, shared):
    rows = shared / "data/arc_easy/test.jsonl"
    ended = shell(
        "attack",
        str(shared / "models/stories260k"),
        *("--attack", "zeroing@5", "--task", f"arc_easy={rows}", "--limit", "4", "--num-fewshot", "0"),
    )
    assert ended.code == 0, ended.err
    assert "arc_easy      acc on 4 items" in ended.out and list(cells(ended.out)) == ["none", "zeroing@5"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--attack", "zeroin@3"], "Did you mean 'zeroing'?"),
        (["--attack", "zeroing@177"], "The k of --attack zeroing@177 is 177, but an FFN of zoo:planted-llama has 176"),
        (["--attack", "random@89"], "0 to 88, beside which as many random rows are drawn"),
        (["--attack", "zeroing@3", "--attack", "zeroing@3"], "Given twice: zeroing@3"),
        (["--attack", "zeroing@3", "--k", "1"], "Give one of them"),
        (["--task", "arc_easy"], "--task 'arc_easy' is not NAME=FILE"),
        (["--task", "arc_easy="], "--task 'arc_easy=' is not NAME=FILE"),
        (["--task", "qa=zoo:qa", "--task", "qa=zoo:arith"], "--task qa is given twice"),
        (["--task", "arc_easy=nowhere.jsonl"], "'nowhere.jsonl' does not exist"),
        (["--task", "qa=empty.jsonl"], "'empty.jsonl' is empty"),
        (["--task", "arc_esy=arc.jsonl"], "'arc_esy', which is not a task of lm-eval"),
        (["--task", "arc_esy=arc.jsonl"], "Did you mean 'arc_easy'?"),
        (["--task", "a/b=zoo:qa"], "'a/b' cannot name a benchmark"),
        (["--limit", "3"], "--limit without --task has no effect. Add --task"),
        (["--batch-size", "3", "--num-fewshot", "0"], "--batch-size, --num-fewshot without --task"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_wrong_orders_are_refused(arguments, expected, shell):
    (shell.folder / "empty.jsonl").write_text("")
    (shell.folder / "arc.jsonl").write_text('{"question": "Why?", "choices": {"text": ["a"], "label": ["A"]}}\n')
    assert expected in shell.refused("attack", LLAMA, *arguments)
