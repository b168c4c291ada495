"""Zero-shot scores by the real lm-eval from local rows, against slow references."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import benchmark_fixtures as fix
from helpers.benchmark_fixtures import TEXT, score, values

from macdrop.errors import ConfigError, DataError
from tune.config.eval_spec import EvalSpec
from tune.config.messages import build


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    fix.refuse_connections(monkeypatch)


@torch.no_grad()
def log_likelihood(model, tokenizer, context, continuation):
    """Slow: one forward pass, no batch, no padding."""
    ids, start = tokenizer(context + continuation).input_ids, len(tokenizer(context).input_ids)
    logits = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
    return sum(logits[at - 1, ids[at]].item() for at in range(start, len(ids)))


def accuracies(model, tokenizer, items):
    """acc and acc_norm of (context, choices, label), by definition."""
    hits, normed = [], []
    for context, choices, label in items:
        scores = [log_likelihood(model, tokenizer, context, " " + choice) for choice in choices]
        lengths = [s / len(choice) for s, choice in zip(scores, choices, strict=True)]
        hits.append(float(scores.index(max(scores)) == label))
        normed.append(float(lengths.index(max(lengths)) == label))
    return hits, normed


def test_arc_easy_from_a_local_file_equals_a_slow_reference(tmp_path, model, tokenizer):
    rows = fix.hub_rows("arc_easy", 20)
    found = score(model, tokenizer, {"zero_shot": {"arc_easy": fix.write_jsonl(tmp_path / "t.jsonl", rows)}})
    items = [(f"Question: {r['question']}\nAnswer:", r["choices"]["text"], "ABC".index(r["answerKey"])) for r in rows]
    hits, normed = accuracies(model, tokenizer, items)
    assert values(found) == {("arc_easy", "acc"): sum(hits) / 20, ("arc_easy", "acc_norm"): sum(normed) / 20}
    row = found[0]
    p = row["value"]
    assert 0 < p < 1 and row["stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 19))
    assert (row["n"], row["version"], row["num_fewshot"], row["batch_size"]) == (20, "1.0", 0, 16)


def test_our_own_multiple_choice_format_equals_a_slow_reference(tmp_path, model, tokenizer):
    items = [
        (f"It is made of {w}, not of", [fix.WORDS[i - 1], fix.WORDS[i - 3]], i % 2) for i, w in enumerate(fix.WORDS)
    ]
    rows = [{"context": c, "choices": choices, "label": label} for c, choices, label in items]
    found = score(model, tokenizer, {"zero_shot": {"my_questions": fix.write_jsonl(tmp_path / "q.jsonl", rows)}})
    hits, normed = accuracies(model, tokenizer, items)
    assert values(found) == {("my_questions", "acc"): sum(hits) / 8, ("my_questions", "acc_norm"): sum(normed) / 8}


@pytest.mark.parametrize("task", ["arc_challenge", "piqa", "boolq", "winogrande", "hellaswag"])
def test_lm_eval_tasks_run_on_local_rows_of_their_hub_schema(tmp_path, model, tokenizer, task):
    path = fix.write_jsonl(tmp_path / "t.jsonl", fix.hub_rows(task))
    found = score(model, tokenizer, {"limit": 4, "zero_shot": {task: {"data": path}}})
    assert {row["metric"] for row in found} >= {"acc"}
    assert all(row["n"] == 4 and 0 <= row["value"] <= 1 and row["higher_is_better"] for row in found)


def test_functions_of_a_task_are_used(tmp_path, model, tokenizer):
    """winogrande scores the ending after each option: by code of the task, not by a template."""
    rows = fix.hub_rows("winogrande")
    path = fix.write_jsonl(tmp_path / "t.jsonl", rows)
    found = score(model, tokenizer, {"zero_shot": {"winogrande": path}})
    hits = []
    for row in rows:
        head, _, tail = row["sentence"].partition("_")
        scores = [log_likelihood(model, tokenizer, head + row[key], tail) for key in ("option1", "option2")]
        hits.append(scores.index(max(scores)) == int(row["answer"]) - 1)
    assert values(found)["winogrande", "acc"] == sum(hits) / len(hits)


def test_gsm8k_generates_with_its_filters_and_few_shot_examples(tmp_path, tokenizer):
    model = fix.tiny_llama(positions=512)
    data = fix.write_jsonl(tmp_path / "t.jsonl", fix.hub_rows("gsm8k", 3))
    shots = fix.write_jsonl(tmp_path / "s.jsonl", fix.hub_rows("gsm8k", 8))
    entry = {"data": data, "fewshot_data": shots, "num_fewshot": 2, "max_new_tokens": 4}
    items = tmp_path / "items.jsonl"
    found = score(model, tokenizer, {"zero_shot": {"gsm8k": entry}}, answers_path=items)
    assert [row["metric"] for row in found] == ["exact_match,strict-match", "exact_match,flexible-extract"]
    assert found[0]["num_fewshot"] == 2 and found[0]["version"] == "3.0"
    assert len(items.read_text().splitlines()) == 6


def test_few_shot_task_without_room_is_refused(tmp_path, model, tokenizer):
    data = fix.write_jsonl(tmp_path / "t.jsonl", fix.hub_rows("gsm8k", 1))
    with pytest.raises(ConfigError, match="max_new_tokens"):
        score(model, tokenizer, {"zero_shot": {"gsm8k": data}})


@pytest.fixture
def hub(monkeypatch):
    """Replace downloads only: hub data sets with our rows."""
    import datasets

    def load(path, name=None, split=None, **_):
        known = {"baber/piqa": "piqa", "allenai/ai2_arc": "arc_easy"}
        rows = fix.hub_rows(known[path]) if path in known else [{"text": TEXT}, {"text": ""}, {"text": "the end"}]
        found = datasets.Dataset.from_list(rows)
        return found if split else datasets.DatasetDict(train=found, validation=found, test=found)

    monkeypatch.setattr(datasets, "load_dataset", load)


def test_hub_data_and_the_same_local_rows_score_equally(tmp_path, hub, model, tokenizer):
    path = fix.write_jsonl(tmp_path / "t.jsonl", fix.hub_rows("piqa"))
    local = score(model, tokenizer, {"zero_shot": {"piqa": path}})
    assert values(score(model, tokenizer, {"zero_shot": ["piqa"]})) == values(local)
    mine = score(model, tokenizer, {"zero_shot": {"mine": {"task": "piqa"}}})
    assert [row["value"] for row in mine] == [row["value"] for row in local] and mine[0]["task"] == "mine"
    (tmp_path / "t.txt").write_text(TEXT + "\n\nthe end")
    [a] = score(model, tokenizer, {"perplexity": {"t": {"data": "some/corpus", "split": "validation"}}})
    [b] = score(model, tokenizer, {"perplexity": {"t": str(tmp_path / "t.txt")}})
    assert a["value"] == b["value"] and "split=validation" in a["settings"]
    with pytest.raises(DataError, match="no column 'txt'; it has text"):
        score(model, tokenizer, {"perplexity": {"t": {"data": "some/corpus", "column": "txt"}}})


@pytest.mark.slow
def test_tag_of_lm_eval_is_found_in_its_index(hub, model, tokenizer):
    """Building the index takes 14 s; only groups and tags need it."""
    found = values(score(model, tokenizer, {"zero_shot": ["ai2_arc"]}))
    assert {task for task, _ in found} == {"ai2_arc", "ai2_arc/arc_easy", "ai2_arc/arc_challenge"}


def test_entry_name_may_differ_from_its_task(tmp_path, model, tokenizer):
    entry = {"task": "piqa", "data": fix.write_jsonl(tmp_path / "t.jsonl", fix.hub_rows("piqa"))}
    found = score(model, tokenizer, {"zero_shot": {"piqa_mine": entry}})
    assert {row["task"] for row in found} == {"piqa_mine"}


def test_groups_and_tags_have_a_row_of_their_own_name(tmp_path, model, tokenizer):
    """Members are local tasks here; real groups come from the hub by the same path."""
    from tune.evaluation.zero_shot import harness, task_loader, task_scoring, zero_shot_rows

    parts = {}
    for name in ("arc_easy", "piqa"):
        entry = {"data": fix.write_jsonl(tmp_path / f"{name}.jsonl", fix.hub_rows(name))}
        spec = build(EvalSpec, {"zero_shot": {name: entry}})
        parts[name] = task_loader.Tasks().load(name, spec.zero_shot[name], spec, 256).loaded["tasks"][name]
    asking = harness.Harness(model, fix.byte_tokenizer(), 256)
    asking.use(model, 4, spec.zero_shot["piqa"])
    group = task_loader.Tasks()._direct.load(
        {"group": "both", "task": [], "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    )["groups"]["both"]
    for part in parts.values():
        group.add(part)
    whole = {"tasks": parts, "groups": {"both": group}, "group_map": {"both": list(parts)}}
    rows, _ = task_scoring.score(zero_shot_rows.ResidentTask("mine", "both", whole, True), asking, None)
    found = values(rows)
    members = [found[f"mine/{name}", "acc"] for name in parts]
    assert found["mine", "acc"] == pytest.approx(sum(members) / 2) and rows[-1]["n"] == 12
    assert rows[-1]["stderr"] > 0
    tag = {"tasks": parts, "groups": {}, "group_map": {}}
    rows, items = task_scoring.score(zero_shot_rows.ResidentTask("mine", "a_tag", tag, True), asking, None)
    assert values(rows)["mine", "acc"] == pytest.approx(sum(members) / 2) and len(items) == 12
    assert rows[0]["stderr"] == pytest.approx(
        math.hypot(*(row["stderr"] for row in rows if row["task"] != "mine" and row["metric"] == "acc")) / 2
    )


def test_rows_that_task_code_cannot_use_are_a_data_error(tmp_path, model, tokenizer):
    path = fix.write_jsonl(tmp_path / "t.jsonl", [{"goal": "x"}])
    with pytest.raises(DataError, match="t.jsonl, line 1: lm-eval's task 'hellaswag' cannot use"):
        score(model, tokenizer, {"zero_shot": {"hellaswag": path}})
