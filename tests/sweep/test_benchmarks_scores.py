"""Scores by the real lm-eval, perplexity and generation code on a tiny random model, against slow references."""

from __future__ import annotations

import json
import math
import socket

import benchmark_fixtures as fix
import pytest
import torch

from macdrop.errors import BenchmarkError, ConfigError, DataError, MacDropError
from tune.benchmarks import EvalSpec, Job, Scorer
from tune.benchmarks.decode import fit_prompt, greedy
from tune.benchmarks.perplexity import cut
from tune.benchmarks.scorer import masks_off
from tune.benchmarks.text_metrics import mean_and_stderr, repetition, text_metric

TEXT = "The river ran past the old mill, and nobody in the village knew where it came from. " * 12


@pytest.fixture(scope="module")
def tokenizer():
    return fix.byte_tokenizer()


@pytest.fixture(scope="module")
def model():
    return fix.tiny_llama()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Everything here is local: a connection attempt is a failure."""

    def refuse(*_: object) -> None:
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def score(model, tokenizer, block, attack="none", on=None, **options):
    """Rows of the only entry of `block`."""
    spec = EvalSpec.parse(block)
    scorer = Scorer(model, tokenizer, spec, weights=options.pop("weights", None))
    first = scorer.jobs()[0]
    return scorer.score(Job(first.benchmark, first.task, attack, on), **options)


def values(rows):
    return {(row["task"], row["metric"]): row["value"] for row in rows}


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


# --- zero-shot -------------------------------------------------------------------------------------------------------


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


def test_functions_of_a_task_are_kept(tmp_path, model, tokenizer):
    """winogrande asks for the likelihood of the ending after each option: code of the task, not a template."""
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


def test_a_few_shot_task_without_room_says_so(tmp_path, model, tokenizer):
    data = fix.write_jsonl(tmp_path / "t.jsonl", fix.hub_rows("gsm8k", 1))
    with pytest.raises(BenchmarkError, match="max_new_tokens"):
        score(model, tokenizer, {"zero_shot": {"gsm8k": data}})


@pytest.fixture
def hub(monkeypatch):
    """Stands in for downloads alone: hub data sets with rows of ours."""
    import datasets

    def load(path, name=None, split=None, **_):
        known = {"baber/piqa": "piqa", "allenai/ai2_arc": "arc_easy"}
        rows = fix.hub_rows(known[path]) if path in known else [{"text": TEXT}, {"text": ""}, {"text": "the end"}]
        found = datasets.Dataset.from_list(rows)
        return found if split else datasets.DatasetDict(train=found, validation=found, test=found)

    monkeypatch.setattr(datasets, "load_dataset", load)


def test_data_of_the_hub_gives_the_scores_of_the_same_rows_in_a_file(tmp_path, hub, model, tokenizer):
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
def test_a_tag_of_lm_eval_is_found_in_its_index(hub, model, tokenizer):
    """Building the index takes 14 s; nothing but groups and tags needs it."""
    found = values(score(model, tokenizer, {"zero_shot": ["ai2_arc"]}))
    assert {task for task, _ in found} == {"ai2_arc", "ai2_arc/arc_easy", "ai2_arc/arc_challenge"}


def test_an_entry_may_have_another_name_than_its_task(tmp_path, model, tokenizer):
    entry = {"task": "piqa", "data": fix.write_jsonl(tmp_path / "t.jsonl", fix.hub_rows("piqa"))}
    found = score(model, tokenizer, {"zero_shot": {"piqa_mine": entry}})
    assert {row["task"] for row in found} == {"piqa_mine"}


def test_groups_and_tags_have_a_row_of_their_own_name(tmp_path, model, tokenizer):
    """Members are local tasks here; real groups come from the hub by the same path."""
    from tune.benchmarks import zero_shot

    parts = {}
    for name in ("arc_easy", "piqa"):
        entry = {"data": fix.write_jsonl(tmp_path / f"{name}.jsonl", fix.hub_rows(name))}
        spec = EvalSpec.parse({"zero_shot": {name: entry}})
        parts[name] = zero_shot.Tasks().load(name, spec.zero_shot[name], spec).loaded["tasks"][name]
    harness = zero_shot.Harness(model, fix.byte_tokenizer(), 256)
    harness.use(model, 4)
    group = zero_shot.Tasks()._direct.load(
        {"group": "both", "task": [], "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    )["groups"]["both"]
    for part in parts.values():
        group.add(part)
    whole = {"tasks": parts, "groups": {"both": group}, "group_map": {"both": list(parts)}}
    rows, _ = zero_shot.score(zero_shot.ResidentTask("mine", "both", whole, True), harness, None)
    found = values(rows)
    members = [found[f"mine/{name}", "acc"] for name in parts]
    assert found["mine", "acc"] == pytest.approx(sum(members) / 2) and rows[-1]["n"] == 12
    assert rows[-1]["stderr"] > 0
    tag = {"tasks": parts, "groups": {}, "group_map": {}}
    rows, items = zero_shot.score(zero_shot.ResidentTask("mine", "a_tag", tag, True), harness, None)
    assert values(rows)["mine", "acc"] == pytest.approx(sum(members) / 2) and len(items) == 12
    assert rows[0]["stderr"] == pytest.approx(
        math.hypot(*(row["stderr"] for row in rows if row["task"] != "mine" and row["metric"] == "acc")) / 2
    )


def test_rows_that_code_of_a_task_cannot_use_are_an_error_of_the_data(tmp_path, model, tokenizer):
    path = fix.write_jsonl(tmp_path / "t.jsonl", [{"goal": "x"}])
    with pytest.raises(DataError, match="t.jsonl, line 1: lm-eval's task 'hellaswag' cannot use"):
        score(model, tokenizer, {"zero_shot": {"hellaswag": path}})


def test_scores_repeat_bit_for_bit_and_print_nothing(tmp_path, model, tokenizer, capfd):
    (tmp_path / "t.txt").write_text(TEXT)
    spec = EvalSpec.parse(
        {
            "batch_size": 3,
            "zero_shot": {"piqa": fix.write_jsonl(tmp_path / "t.jsonl", fix.hub_rows("piqa"))},
            "perplexity": {"text": {"data": str(tmp_path / "t.txt"), "window": 32}},
            "generation": {"g": {"data": "zoo:generate", "limit": 4, "max_new_tokens": 5, "metrics": ["chrf"]}},
        }
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


def test_a_model_that_returns_nan_is_refused(tmp_path, tokenizer):
    model = fix.tiny_llama()
    model.lm_head.weight.data.fill_(math.nan)
    (tmp_path / "t.txt").write_text(TEXT)
    piqa = fix.write_jsonl(tmp_path / "t.jsonl", fix.hub_rows("piqa"))
    with pytest.raises(BenchmarkError, match="NaN"):
        score(model, tokenizer, {"zero_shot": {"piqa": piqa}})
    with pytest.raises(BenchmarkError, match="nan"):
        score(model, tokenizer, {"perplexity": {"t": str(tmp_path / "t.txt")}})


# --- perplexity ------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("stride", [None, 10])
def test_perplexity_equals_a_token_by_token_loop(tmp_path, model, bos, stride):
    tokenizer, size, text = fix.byte_tokenizer(bos), 24, TEXT[:150]
    (tmp_path / "t.txt").write_text(text)
    block = {"batch_size": 4, "perplexity": {"t": {"data": str(tmp_path / "t.txt"), "window": size, "stride": stride}}}
    [row] = score(model, tokenizer, block)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    lead = [0] if bos else []
    room, losses, done = size - len(lead), [], 0 if bos else 1
    for start in range(0, len(ids), stride or room):
        for at in range(max(done, start if bos else start + 1), min(start + room, len(ids))):
            logits = model(torch.tensor([lead + ids[start:at]])).logits[0, -1]
            losses.append(-torch.log_softmax(logits, -1)[ids[at]].item())
        done = max(done, min(start + room, len(ids)))
    assert row["n"] == len(losses) and row["value"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert row["higher_is_better"] is False and f"window={size}" in row["settings"]


@pytest.mark.parametrize("bos", [None, 7])
@pytest.mark.parametrize("stride", [None, 1, 3])
@pytest.mark.parametrize("n", [1, 2, 5, 6, 7, 23])
def test_every_token_is_scored_once(bos, stride, n):
    ids = list(range(100, 100 + n))
    scored = [token for window in cut(ids, 5, stride, bos) for token in window.ids[window.first :]]
    if stride is None and bos is None:
        ids = [token for at, token in enumerate(ids) if at % 5]
    assert scored == (ids if bos is not None or stride is None else ids[1:])
    assert all(len(window.ids) <= 5 and (bos is None or window.ids[0] == bos) for window in cut(ids, 5, stride, bos))


def test_perplexity_stderr_is_that_of_a_ratio_over_windows(tmp_path, model, tokenizer):
    (tmp_path / "t.txt").write_text(TEXT)
    block = {"limit": 6, "perplexity": {"t": {"data": str(tmp_path / "t.txt"), "window": 32}}}
    [row] = score(model, tokenizer, block, answers_path=tmp_path / "items.jsonl")
    items = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    means = torch.tensor([item["nll"] / item["tokens"] for item in items], dtype=torch.float64)  # windows of one length
    assert row["stderr"] == pytest.approx(row["value"] * means.std().item() / math.sqrt(6))
    assert row["value"] == pytest.approx(means.mean().exp().item())


def test_jsonl_and_text_give_the_same_windows(tmp_path, model, tokenizer):
    (tmp_path / "t.txt").write_text("one text\n\nanother text")
    rows = fix.write_jsonl(tmp_path / "t.jsonl", [{"body": "one text"}, {"body": "another text"}])
    [a] = score(model, tokenizer, {"perplexity": {"t": str(tmp_path / "t.txt")}})
    [b] = score(model, tokenizer, {"perplexity": {"t": {"data": rows, "column": "body"}}})
    assert a == b and a["stderr"] is None


@pytest.mark.parametrize("entry", [{"window": 300}, {"stride": 256}])
def test_windows_that_do_not_fit_are_refused(tmp_path, model, tokenizer, entry):
    (tmp_path / "t.txt").write_text(TEXT)
    with pytest.raises(ConfigError, match="256"):
        score(model, tokenizer, {"perplexity": {"t": {"data": str(tmp_path / "t.txt"), **entry}}})


# --- generation ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def slow_greedy(model, ids, n):
    new = []
    while len(new) < n and (not new or new[-1] != 1):
        new.append(model(torch.tensor([list(ids) + new])).logits[0, -1].argmax().item())
    return new


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batched_generation_equals_one_by_one(model, tokenizer, batch_size):
    assert tokenizer.pad_token_id is None
    prompts = [tokenizer(text).input_ids for text in ("a", "a much longer prompt, it is", "river", "b c", "x y z")]
    found = greedy(model, tokenizer, prompts, max_new_tokens=12, batch_size=batch_size)
    assert [answer.tokens for answer in found] == [slow_greedy(model, ids, 12) for ids in prompts]


def test_answers_end_at_eos_or_at_a_stop_text(tokenizer):
    model = fix.tiny_llama()
    prompts = [tokenizer(text).input_ids for text in ("a", "river", "b c")]
    free = greedy(model, tokenizer, prompts, max_new_tokens=12, batch_size=3)
    stop = next(c for answer in free for c in answer.text[1:])
    for answer, whole in zip(
        greedy(model, tokenizer, prompts, max_new_tokens=12, batch_size=3, stop=[stop]), free, strict=True
    ):
        assert answer.text == whole.text.partition(stop)[0]
        assert answer.ended == ("stop" if stop in whole.text else whole.ended)
        assert answer.tokens == whole.tokens[: len(answer.tokens)]
    model.generation_config.eos_token_id = [1, free[0].tokens[2]]  # chat models end turns by another token
    ended = greedy(model, tokenizer, prompts[:1], max_new_tokens=12, batch_size=1)[0]
    assert ended.ended == "eos" and len(ended.tokens) <= 3


def test_generation_settings_of_the_checkpoint_do_not_leak_in(tokenizer):
    model, prompts = fix.tiny_llama(), [tokenizer("river").input_ids]
    plain = greedy(model, tokenizer, prompts, max_new_tokens=12, batch_size=1)
    settings = {"repetition_penalty": 3.0, "no_repeat_ngram_size": 1, "do_sample": True, "temperature": 0.3}
    model.generation_config.update(**settings)
    assert greedy(model, tokenizer, prompts, max_new_tokens=12, batch_size=1) == plain
    assert all(getattr(model.generation_config, name) == value for name, value in settings.items())


def test_long_prompts_lose_tokens_on_the_left_but_keep_bos():
    assert fit_prompt([0, 5, 6, 7, 8], 3, bos=0) == [0, 7, 8]
    assert fit_prompt([5, 6, 7, 8], 3, bos=0) == [6, 7, 8]
    assert fit_prompt([5, 6, 7, 8], 3, bos=None) == [6, 7, 8]
    assert fit_prompt([0, 5], 3, bos=0) == [0, 5]


def spec_bench_file(path):
    rows = [{"question_id": i, "category": "qa" if i % 2 else "writing", "turns": [f"Question {i}?"]} for i in range(6)]
    rows[0]["turns"].append("And then?")
    rows[1]["reference"] = ["kept for a judge"]
    return fix.write_jsonl(path, rows)


CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize("template", ["chat", "alpaca", "plain"])
def test_spec_bench_answers_every_turn_after_its_own_first_answer(tmp_path, model, template):
    tokenizer = fix.byte_tokenizer(chat_template=CHAT)
    entry = {"data": spec_bench_file(tmp_path / "q.jsonl"), "limit": "2 per category", "max_new_tokens": 6}
    entry |= {} if template == "chat" else {"template": template}
    path = tmp_path / "answers" / "a.jsonl"
    rows = score(model, tokenizer, {"generation": {"sb": entry}}, answers_path=path)
    items = [json.loads(line) for line in path.read_text().splitlines()]
    assert [item["question_id"] for item in items] == [0, 1, 2, 3]
    assert items[0]["attack"] == "none" and items[1]["reference"] == ["kept for a judge"]
    first, second = items[0]["answers"]
    assert len(items[0]["tokens"]) == len(items[0]["ended"]) == 2
    if template == "chat":
        prompt = f"[user]Question 0?[assistant]{first}[user]And then?[assistant]"
        again = tokenizer.decode(slow_greedy(model, tokenizer(prompt, add_special_tokens=False).input_ids, 6), True)
    elif template == "plain":
        again = tokenizer.decode(slow_greedy(model, tokenizer(f"Question 0?\n{first}\n\nAnd then?").input_ids, 6), True)
    if template != "alpaca":
        assert second == again
    assert f"template={template}" in rows[0]["settings"]
    tokens = {row["task"]: row for row in rows if row["metric"] == "new_tokens"}
    assert list(tokens) == ["sb", "sb/multi_turn", "sb/writing", "sb/qa"]
    assert [row["n"] for row in tokens.values()] == [5, 2, 3, 2]
    assert tokens["sb"]["value"] == sum(sum(item["tokens"]) for item in items) / 5


def test_the_alpaca_prompt_is_that_of_training_and_cut_prompts_are_counted(tmp_path, model, tokenizer):
    from tune.benchmarks import generation
    from tune.formats import Turn
    from tune.templates import Encoder

    row = {"instruction": "Add.", "input": "1, 2", "output": "3"}
    spec = EvalSpec.parse({"generation": {"g": {"data": fix.write_jsonl(tmp_path / "a.jsonl", [row])}}})
    resident = generation.load(spec.generation["g"], tokenizer, 256)
    prompt = generation.prompt_ids(resident, tokenizer, resident.questions[0], [])
    trained = Encoder(tokenizer, "alpaca", False).encode(
        [[Turn("user", "Add.", "1, 2"), Turn("assistant", "3")]], ["x"]
    )[0]
    assert prompt == trained.input_ids[: trained.prompt_length]
    assert len(prompt) > 256 - 64 and "prompts_cut_left=1" in score(model, tokenizer, spec.model_dump())[0]["settings"]


def test_bos_can_be_switched_on_for_tokenizers_that_leave_it_out(tmp_path, model, tokenizer):
    off = Scorer(model, tokenizer, EvalSpec(add_bos_token=False)).tokenizer
    assert off("a").input_ids[:1] != [0] and tokenizer("a").input_ids[:1] == [0]
    block = {
        "zero_shot": {"piqa": fix.write_jsonl(tmp_path / "t.jsonl", fix.hub_rows("piqa"))},
        "generation": {"g": {"data": "zoo:generate", "limit": 4, "max_new_tokens": 5}},
    }
    with_bos = Scorer(model, tokenizer, EvalSpec.parse(block))
    switched = Scorer(model, off, EvalSpec.parse(block | {"add_bos_token": True}))
    for number, job in enumerate(with_bos.jobs()):
        kept = [tmp_path / f"{number}{name}.jsonl" for name in ("a", "b", "c")]
        for scorer, path in zip([with_bos, switched, Scorer(model, off, EvalSpec.parse(block))], kept, strict=True):
            scorer.score(job, answers_path=path)
        assert kept[0].read_text() == kept[1].read_text() != kept[2].read_text()
    with pytest.raises(ConfigError, match="no bos token"):
        Scorer(model, fix.byte_tokenizer(bos=False), EvalSpec(add_bos_token=True))


def test_reference_metrics():
    answers, references = (
        ["the cat sat", " the  cat", "a dog"],
        [["the cat sat"], ["the cat"], ["the cat", "a dog ran"]],
    )
    assert text_metric("exact_match", answers, references) == [1, 1, 0]
    chrf, rouge = (text_metric(metric, answers, references) for metric in ("chrf", "rouge_l"))
    assert chrf[0] == pytest.approx(100) and rouge[:2] == [1, 1] and rouge[2] == pytest.approx(0.8)
    assert 40 < chrf[2] < 100
    assert mean_and_stderr([1, 1, 0, 0]) == (0.5, pytest.approx(math.sqrt(0.25 / 3)))
    assert mean_and_stderr([2.0]) == (2.0, None)
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5) and repetition([1, 2]) == 0


def test_reference_rows_take_prompts_as_they_are(tmp_path, model, tokenizer):
    prompts = ["river", "b c"]
    right = tokenizer.decode(slow_greedy(model, tokenizer("river").input_ids, 4), skip_special_tokens=True)
    rows = [{"prompt": p, "reference": r} for p, r in zip(prompts, [["no", right], "no"], strict=True)]
    entry = {"data": fix.write_jsonl(tmp_path / "r.jsonl", rows), "max_new_tokens": 4}
    found = values(score(model, tokenizer, {"generation": {"g": entry}}))
    assert found["g", "exact_match"] == 0.5
    stop = right[2]
    cut = values(score(model, tokenizer, {"generation": {"g": entry | {"stop": stop, "metrics": ["exact_match"]}}}))
    assert cut["g", "exact_match"] == 0.5 and set(found) == {("g", m) for m in ("exact_match", "chrf", "rouge_l")}


def test_a_chat_template_that_refuses_is_an_error_of_the_data(tmp_path, model):
    tokenizer = fix.byte_tokenizer(chat_template="{{ raise_exception('no such turn') }}")
    with pytest.raises(DataError, match="refuses question 0: no such turn"):
        score(model, tokenizer, {"generation": {"g": spec_bench_file(tmp_path / "q.jsonl")}})


def test_chat_template_and_room_are_checked(tmp_path, model, tokenizer):
    data = spec_bench_file(tmp_path / "q.jsonl")
    with pytest.raises(ConfigError, match="template 'chat' needs"):
        score(model, tokenizer, {"generation": {"g": {"data": data, "template": "chat"}}})
    with pytest.raises(ConfigError, match="leaves no room"):
        score(model, tokenizer, {"generation": {"g": {"data": data, "max_new_tokens": 255}}})


# --- attacks and masks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("attack", "kept"), [("zeroing@3", slice(0, 45)), ("retaining@5", slice(43, 48))])
def test_an_attacked_score_is_that_of_the_edited_model_and_leaves_no_trace(tmp_path, tokenizer, attack, kept):
    model, edited = fix.tiny_llama(), fix.tiny_llama()
    before = {name: p.clone() for name, p in model.named_parameters()}
    (tmp_path / "t.txt").write_text(TEXT)
    block = {
        "attacks": ["none", attack],
        "zero_shot": {"piqa": fix.write_jsonl(tmp_path / "t.jsonl", fix.hub_rows("piqa"))},
        "perplexity": {"text": {"data": str(tmp_path / "t.txt"), "window": 64}},
        "generation": {"g": {"data": "zoo:generate", "limit": 3, "max_new_tokens": 8}},
    }
    scorer = Scorer(model, tokenizer, EvalSpec.parse(block), fix.massive(model))
    with torch.no_grad():  # row 47 is the most massive one
        keep = torch.zeros(fix.FFN, 1)
        keep[kept] = 1
        for matrix in (edited.model.layers[0].mlp.gate_proj, edited.model.layers[0].mlp.up_proj):
            matrix.weight *= keep
    reference = Scorer(edited, tokenizer, EvalSpec.parse(block | {"attacks": "none"}))
    answers = {}
    for job in scorer.jobs():
        rows = scorer.score(job, answers_path=tmp_path / "items.jsonl")
        answers[job] = (tmp_path / "items.jsonl").read_text().replace(f'"{attack}", "attack_on": "base"', '"none"')
        if job.attack == attack:
            want = reference.score(Job(job.benchmark, job.task))
            assert [row["value"] for row in rows] == [row["value"] for row in want]
            assert all((row["attack"], row["attack_on"]) == (attack, "base") for row in rows)
        else:
            assert all(row["attack_on"] is None for row in rows)
    for job in scorer.jobs():
        assert job.attack == "none" or answers[job] != answers[Job(job.benchmark, job.task)]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_impossible_attacks_are_refused_at_once(model, tokenizer):
    spec = EvalSpec.parse({"attacks": "zeroing@49", "generation": {"g": "zoo:generate"}})
    with pytest.raises(ConfigError, match="49"):
        Scorer(model, tokenizer, spec, fix.massive(model))
    with pytest.raises(ConfigError, match="macdrop scan"):
        Scorer(model, tokenizer, spec)
    with pytest.raises(ConfigError, match="max_length 300"):
        Scorer(model, tokenizer, EvalSpec(max_length=300))


def test_masks_are_off_while_scoring_and_modes_come_back(tmp_path, tokenizer):
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
