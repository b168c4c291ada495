"""Turns of tools: calls and results in the structures of well-known templates, forms of rows, and refusals."""

from __future__ import annotations

import json
import pickle

import pytest
from helpers.prepared_data import CHATML, answers, make_tokenizer, read, write
from helpers.tool_dialects import ANSWERED, ASKED, CALLED, LLAMA31, MISTRAL, QWEN25, RESULT, ROW, TOOLS, call

from macdrop.errors import DataError
from tune.data.formats import converter
from tune.data.lost_rows import BadRow
from tune.data.readers import Row

QWEN_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call><|im_end|>'
#: Template, and what carries loss of a call and of an answer.
DIALECTS = {
    "qwen25": (QWEN25, QWEN_CALL, "It rains.<|im_end|>"),
    "llama31": (
        LLAMA31,
        '{"name": "weather", "parameters": {"city": "Paris", "days": 2}}<|eot_id|>',
        "It rains.<|eot_id|>",
    ),
    "mistral": (
        MISTRAL,
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris", "days": 2}}]</s>',
        " It rains.</s>",
    ),
}


def example(row, template, tmp_path, **keys):
    tokenizer = make_tokenizer(template)
    prepared = read(write(tmp_path / "m.jsonl", [row]), tokenizer, tmp_path, **keys)
    return tokenizer, prepared.train[0]


@pytest.mark.parametrize("name", DIALECTS)
def test_calls_and_answers_carry_loss_and_results_do_not(tmp_path, name):
    template, called, answered = DIALECTS[name]
    tokenizer, found = example(ROW, template, tmp_path)
    assert answers(tokenizer, found) == called + answered
    # The tokens are those of the whole rendering: a model sees at inference what it was trained on.
    messages = [{**CALLED, "content": ""} if turn is CALLED else turn for turn in ROW["messages"]]
    whole = tokenizer.apply_chat_template(messages, tools=TOOLS, tokenize=False).rstrip()
    assert tokenizer.decode(found[0]) == whole


@pytest.mark.parametrize("name", DIALECTS)
def test_a_row_may_end_with_a_call(tmp_path, name):
    template, called, _ = DIALECTS[name]
    row = {"messages": [ASKED, CALLED], "tools": TOOLS}
    tokenizer, found = example(row, template, tmp_path)
    assert answers(tokenizer, found) == called
    prompt = tokenizer.apply_chat_template([ASKED], tools=TOOLS, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(found[0]) == prompt + called


def test_words_before_a_call_are_part_of_the_answer(tmp_path):
    row = {"messages": [ASKED, CALLED | {"content": "Let me look."}, RESULT, ANSWERED]}
    tokenizer, found = example(row, QWEN25, tmp_path)
    assert answers(tokenizer, found) == f"Let me look.\n{QWEN_CALL}It rains.<|im_end|>"


def test_several_rounds_of_calls_and_questions(tmp_path):
    again = {"role": "assistant", "content": None, "tool_calls": [call("weather", city="Rome"), call("clock")]}
    turns = [ASKED, CALLED, RESULT, again, RESULT, RESULT | {"content": "noon"}, ANSWERED, ASKED]
    tokenizer, found = example({"messages": turns}, QWEN25, tmp_path)
    second = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>\n'
    second += '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call><|im_end|>'
    assert answers(tokenizer, found) == QWEN_CALL + second + "It rains.<|im_end|>"


def test_a_call_of_weight_0_carries_no_loss(tmp_path):
    turns = [ASKED, CALLED | {"weight": 0}, RESULT, ANSWERED]
    tokenizer, found = example({"messages": turns}, QWEN25, tmp_path)
    assert answers(tokenizer, found) == "It rains.<|im_end|>"
    turns = [ASKED, CALLED, RESULT, ANSWERED | {"weight": 0}]
    tokenizer, found = example({"messages": turns}, QWEN25, tmp_path)
    assert answers(tokenizer, found) == QWEN_CALL and tokenizer.decode(found[0]).endswith("It rains.<|im_end|>")


def test_forms_of_calls_and_tools_are_read_alike(tmp_path):
    flat = {"name": "weather", "arguments": '{"city": "Paris", "days": 2}'}
    as_text = CALLED | {"tool_calls": json.dumps([flat])}
    older = {"role": "assistant", "content": None, "function_call": flat}
    without_content = {key: value for key, value in CALLED.items() if key != "content"}
    forms = [CALLED, CALLED | {"tool_calls": [flat]}, as_text, older, without_content]
    rows = [{"messages": [ASKED, each, RESULT, ANSWERED], "tools": TOOLS} for each in forms]
    rows += [ROW | {"tools": json.dumps(TOOLS)}, ROW | {"tools": [TOOLS[0]["function"]]}]
    tokenizer = make_tokenizer(QWEN25)
    prepared = read(write(tmp_path / "m.jsonl", rows), tokenizer, tmp_path)
    first, *others = [found[0].tolist() for found in prepared.train]
    assert len(others) == len(rows) - 1 and all(each == first for each in others)


def test_sharegpt_has_turns_of_its_own_for_tools(tmp_path):
    flat = json.dumps({"name": "weather", "arguments": {"city": "Paris", "days": 2}})
    shared = [("human", ASKED), ("function_call", flat), ("observation", RESULT), ("gpt", ANSWERED)]
    turns = [{"from": name, "value": turn if isinstance(turn, str) else turn["content"]} for name, turn in shared]
    row = {"conversations": turns, "tools": json.dumps(TOOLS)}
    tokenizer, found = example(row, QWEN25, tmp_path)
    _, same = example(ROW, QWEN25, tmp_path)
    assert found[0].tolist() == same[0].tolist() and answers(tokenizer, found).startswith("<tool_call>")


REFUSED = {
    "a template without tools": (CHATML, ROW, "leaves out the tool 'weather'"),
    "a template without calls": (CHATML, {"messages": ROW["messages"]}, "leaves out 'weather' of a tool call"),
    "words that the template drops": (
        LLAMA31,
        {"messages": [ASKED, CALLED | {"content": "Let me look."}, RESULT, ANSWERED]},
        "changes the assistant turn 'Let me look.'",
    ),
    "two calls at once": (
        LLAMA31,
        {"messages": [ASKED, CALLED | {"tool_calls": [call("a"), call("b")]}]},
        "refuses this conversation: one call at once",
    ),
    "alpaca": (None, ROW, "template alpaca has no place for tools"),
    "no name": (QWEN25, {"messages": [ASKED, CALLED | {"tool_calls": [{"arguments": {}}]}]}, "a call without a name"),
    "arguments": (
        QWEN25,
        {"messages": [ASKED, CALLED | {"tool_calls": [{"name": "f", "arguments": "[1]"}]}]},
        "arguments of 'f' that are not a JSON object",
    ),
    "no JSON": (
        QWEN25,
        {"messages": [ASKED, CALLED | {"tool_calls": [{"name": "f", "arguments": "{"}]}]},
        "arguments of 'f' that are not valid JSON",
    ),
    "a call of the user": (
        QWEN25,
        {"messages": [ASKED | CALLED | {"role": "user"}, ANSWERED]},
        "of the user calls a tool",
    ),
    "tools without a name": (QWEN25, ROW | {"tools": [{}]}, "a tool needs a name"),
    "a result first": (QWEN25, {"messages": [RESULT, ANSWERED]}, "begin with the result of a tool"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_lost_is_refused(tmp_path, name):
    template, row, words = REFUSED[name]
    with pytest.raises(DataError) as caught:
        example(row, template, tmp_path)
    assert words in str(caught.value) and "line 1" in str(caught.value)


def test_the_reason_of_a_bad_row_crosses_processes():
    with pytest.raises(BadRow) as caught:
        converter("messages")(Row({"messages": [ASKED | {"role": "bot"}]}, "a.jsonl, line 3"))
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.reason) == (str(caught.value), "an unknown role")
