"""Greedy generation, Spec-Bench and reference metrics on a tiny random model, against slow references."""

from __future__ import annotations

import json
import math
import re

import pytest
from helpers import benchmark_fixtures as fix
from helpers.benchmark_fixtures import score, slow_greedy, values

from macdrop.errors import ConfigError, DataError
from tune.config.eval_spec import EvalSpec
from tune.config.messages import build
from tune.evaluation.decode import fit_prompt, greedy
from tune.evaluation.scorer import Scorer
from tune.evaluation.text_metrics import mean_and_stderr, repetition, text_metric


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    fix.refuse_connections(monkeypatch)


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


def test_generation_config_of_the_checkpoint_is_ignored(tokenizer):
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


def test_alpaca_prompt_equals_training_and_cut_prompts_are_counted(tmp_path, model, tokenizer):
    from tune.data.formats import Turn
    from tune.data.templates import Encoder
    from tune.evaluation import generation

    row = {"instruction": "Add.", "input": "1, 2", "output": "3"}
    spec = build(EvalSpec, {"generation": {"g": {"data": fix.write_jsonl(tmp_path / "a.jsonl", [row])}}})
    resident = generation.load("g", spec.generation["g"], tokenizer, 256)
    prompt = generation.prompt(resident, tokenizer, resident.questions[0], []).ids
    trained = Encoder(tokenizer, "alpaca", False).encode(
        [[Turn("user", "Add.", "1, 2"), Turn("assistant", "3")]], ["x"]
    )[0]
    assert prompt == trained.input_ids[: trained.prompt_length]
    assert len(prompt) > 256 - 64 and "prompts_cut_left=1" in score(model, tokenizer, spec.model_dump())[0]["settings"]


def test_a_template_in_a_file_asks_as_training_saw_it(tmp_path, model, tokenizer):
    from tune.data.formats import Turn
    from tune.data.templates import Encoder, choose_template
    from tune.evaluation import questions

    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}<assistant>{# #}")
    data = fix.write_jsonl(tmp_path / "a.jsonl", [{"instruction": "Add.", "output": "3"}])
    entry = {"data": data, "max_new_tokens": 4}
    settings = [
        score(model, tokenizer, {"generation": {"g": {**entry, **keys}}})[0]["settings"]
        for keys in ({}, {"template": str(file)})
    ]
    assert "template=alpaca" in settings[0] and re.search("template=chat:[0-9a-f]{12} ", settings[1])
    spec = build(EvalSpec, {"generation": {"g": {**entry, "template": str(file)}}})
    resident = questions.load("g", spec.generation["g"], tokenizer, 256)
    asked = questions.prompt(resident, tokenizer, resident.questions[0], []).ids
    kind, own = choose_template(str(file), tokenizer)
    (trained,) = Encoder(own, kind, False).encode([[Turn("user", "Add."), Turn("assistant", "3")]], ["x"])
    assert asked == trained.input_ids[: trained.prompt_length]
    with pytest.raises(ConfigError, match="'chatml' is not a template"):
        build(EvalSpec, {"generation": {"g": {**entry, "template": "chatml"}}})


def test_bos_can_be_switched_on(tmp_path, model, tokenizer):
    off = Scorer(model, tokenizer, EvalSpec(add_bos_token=False)).tokenizer
    assert off("a").input_ids[:1] != [0] and tokenizer("a").input_ids[:1] == [0]
    block = {
        "zero_shot": {"piqa": fix.write_jsonl(tmp_path / "t.jsonl", fix.hub_rows("piqa"))},
        "generation": {"g": {"data": "zoo:generate", "limit": 4, "max_new_tokens": 5}},
    }
    with_bos = Scorer(model, tokenizer, build(EvalSpec, block))
    switched = Scorer(model, off, build(EvalSpec, block | {"add_bos_token": True}))
    for number, job in enumerate(with_bos.jobs()):
        kept = [tmp_path / f"{number}{name}.jsonl" for name in ("a", "b", "c")]
        for scorer, path in zip([with_bos, switched, Scorer(model, off, build(EvalSpec, block))], kept, strict=True):
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


def test_prompts_of_reference_rows_are_used_unchanged(tmp_path, model, tokenizer):
    prompts = ["river", "b c"]
    right = tokenizer.decode(slow_greedy(model, tokenizer("river").input_ids, 4), skip_special_tokens=True)
    rows = [{"prompt": p, "reference": r} for p, r in zip(prompts, [["no", right], "no"], strict=True)]
    entry = {"data": fix.write_jsonl(tmp_path / "r.jsonl", rows), "max_new_tokens": 4}
    found = values(score(model, tokenizer, {"generation": {"g": entry}}))
    assert found["g", "exact_match"] == 0.5
    stop = right[2]
    cut = values(score(model, tokenizer, {"generation": {"g": entry | {"stop": stop, "metrics": ["exact_match"]}}}))
    assert cut["g", "exact_match"] == 0.5 and set(found) == {("g", m) for m in ("exact_match", "chrf", "rouge_l")}


def test_chat_template_that_refuses_a_row_is_a_data_error(tmp_path, model):
    tokenizer = fix.byte_tokenizer(chat_template="{{ raise_exception('no such turn') }}")
    with pytest.raises(DataError, match="question 0: the chat template refuses this conversation: no such turn"):
        score(model, tokenizer, {"generation": {"g": spec_bench_file(tmp_path / "q.jsonl")}})


def test_chat_template_and_room_are_checked(tmp_path, model, tokenizer):
    data = spec_bench_file(tmp_path / "q.jsonl")
    with pytest.raises(ConfigError, match="template 'chat' needs"):
        score(model, tokenizer, {"generation": {"g": {"data": data, "template": "chat"}}})
    with pytest.raises(ConfigError, match="leaves no room"):
        score(model, tokenizer, {"generation": {"g": {"data": data, "max_new_tokens": 255}}})
