"""Rows of conversations: parts, thoughts, weights, and rows that cannot be trained on."""

from __future__ import annotations

import json

import pytest
from helpers.prepared_data import CHATML, answers, make_tokenizer, read, write

from macdrop.errors import DataError
from tune.data.formats import NO_TEXT, NO_TURNS, WEIGHTS

GOOD = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "a"}]


def test_parts_of_type_text_are_their_text(tmp_path):
    parts = [{"type": "text", "text": "One"}, {"type": "text", "text": "?"}]
    rows = [{"messages": [{"role": "user", "content": parts}, GOOD[1]]}, {"messages": GOOD}]
    tokenizer = make_tokenizer(CHATML)
    first, second = read(write(tmp_path / "m.jsonl", rows), tokenizer, tmp_path).train
    assert first[0].tolist() == second[0].tolist()


def test_reasoning_content_is_the_thought_of_an_answer(tmp_path):
    row = {"messages": [GOOD[0], GOOD[1] | {"reasoning_content": "hm"}]}
    tokenizer = make_tokenizer(CHATML)
    example = read(write(tmp_path / "m.jsonl", [row]), tokenizer, tmp_path).train[0]
    assert answers(tokenizer, example) == "<think>\nhm\n</think>\n\na<|im_end|>"


@pytest.mark.parametrize("template", [CHATML, None], ids=["chat", "alpaca"])
def test_answers_of_weight_0_carry_no_loss(tmp_path, template):
    turns = [*GOOD[:1], GOOD[1] | {"weight": 0}, GOOD[0], GOOD[1] | {"content": "b", "weight": 1}]
    tokenizer = make_tokenizer(template)
    shared = [{"from": turn["role"], "value": turn["content"], **turn} for turn in turns]
    for name, row in (("m", {"messages": turns}), ("s", {"conversations": shared})):
        path = write(tmp_path / f"{name}.jsonl", [row])
        format = "messages" if name == "m" else "sharegpt"
        example = read(path, tokenizer, tmp_path, format=format).train[0]
        assert answers(tokenizer, example) == ("b<|im_end|>" if template else "b</s>")


def test_system_column_of_messages_is_a_turn(tmp_path):
    tokenizer = make_tokenizer(CHATML)
    example = read(write(tmp_path / "m.jsonl", [{"messages": GOOD, "system": "Rhyme."}]), tokenizer, tmp_path).train[0]
    assert tokenizer.decode(example[0]).startswith("<|im_start|>system\nRhyme.<|im_end|>")


BAD_ROWS = {
    "no answer": ({"messages": GOOD[:1]}, "must hold an answer", "no answer, or none that carries loss"),
    "unknown role": ({"messages": [*GOOD, {"role": "bot", "content": "x"}]}, "'bot'", "an unknown role"),
    "tools": (
        {"messages": GOOD, "tools": [{"name": "f"}]},
        "the tool 'f'",
        "the chat template refuses the conversation",
    ),
    "null": (
        {"messages": [GOOD[0], {"role": "assistant", "content": None}]},
        "must be text, found a NoneType",
        NO_TEXT,
    ),
    "image": (
        {"messages": [GOOD[0] | {"content": [{"type": "image_url"}]}, GOOD[1]]},
        "parts of type image_url",
        "parts that are not text",
    ),
    "no parts": ({"messages": [GOOD[0] | {"content": []}, GOOD[1]]}, "must be text, found a list", NO_TEXT),
    "no turns": ({"messages": []}, "(none)", "no answer, or none that carries loss"),
    "uneven lists": ({"messages": {"role": ["user", "assistant"], "content": ["x"]}}, "differ in length", NO_TURNS),
    "no list": ({"messages": "hello"}, "must be a list of turns, found a str", NO_TURNS),
    "no column": ({"text": "hello"}, "Missing: messages", "a column is missing"),
    "no weight": (
        {"messages": [GOOD[0], GOOD[1] | {"weight": 0}]},
        "every answer has weight 0",
        "no answer, or none that carries loss",
    ),
    "half a weight": ({"messages": [GOOD[0], GOOD[1] | {"weight": 0.5}]}, "weight of turn 1 is 0.5", WEIGHTS),
    "true weight": ({"messages": [GOOD[0], GOOD[1] | {"weight": True}]}, "weight of turn 1 is True", WEIGHTS),
    "weight of a question": ({"messages": [GOOD[0] | {"weight": 1}, GOOD[1]]}, "only answers carry loss", WEIGHTS),
    "left out": (
        {"messages": [{"role": "system", "content": "s"}, *GOOD]},
        "the system turn 's'",
        "the chat template leaves out or changes a turn",
    ),
}
NO_SYSTEM = CHATML.replace("for m in messages", "for m in messages if m.role != 'system'")


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_refused_or_skipped_and_counted(tmp_path, name):
    row, words, reason = BAD_ROWS[name]
    tokenizer = make_tokenizer(NO_SYSTEM)
    path = write(tmp_path / "m.jsonl", [row, {"messages": GOOD}, row])
    with pytest.raises(DataError) as caught:
        read(path, tokenizer, tmp_path, format="messages")
    assert words in str(caught.value) and "line 1" in str(caught.value)
    prepared = read(path, tokenizer, tmp_path, format="messages", bad_rows="skip")
    assert len(prepared.train) == 1 and answers(tokenizer, prepared.train[0]) == "a<|im_end|>"
    info = prepared.info
    assert (info["rows"], info["skipped"], info["dropped"], info["sources"][0]["rows"]) == (3, 2, 0, 3)
    assert info["first_skipped"] == str(caught.value)
    places = [f"{path}, line {line}" for line in (1, 3)]
    assert info["skipped_rows"] == [{"reason": reason, "count": 2, "places": places}]
    with pytest.raises(DataError, match="none of the 1 rows. The first: .*line 1"):
        read(write(tmp_path / "m.jsonl", [row]), tokenizer, tmp_path, format="messages", bad_rows="skip")


def test_turns_as_a_mapping_of_lists_are_turns(tmp_path):
    """As `datasets` stores a list of mappings."""
    lists = {"role": ["user", "assistant"], "content": ["One?", "a"]}
    tokenizer = make_tokenizer(CHATML)
    first, second = read(
        write(tmp_path / "m.jsonl", [{"messages": lists}, {"messages": GOOD}]), tokenizer, tmp_path
    ).train
    assert first[0].tolist() == second[0].tolist() and first[1].tolist() == second[1].tolist()


def test_a_conversation_may_begin_with_an_answer(tmp_path):
    """The template decides: ChatML writes it, others refuse it, and alpaca has no place for it."""
    row, tokenizer = {"messages": [GOOD[1] | {"content": "Hi."}, *GOOD]}, make_tokenizer(CHATML)
    path = write(tmp_path / "m.jsonl", [row])
    example = read(path, tokenizer, tmp_path).train[0]
    assert answers(tokenizer, example) == "Hi.<|im_end|>a<|im_end|>"
    assert tokenizer.decode(example[0]).startswith("<|im_start|>assistant\nHi.<|im_end|>\n<|im_start|>user\nOne?")
    strict = "{% if messages[0].role == 'assistant' %}{{ raise_exception('user first') }}{% endif %}" + CHATML
    for template, words in ((strict, "refuses this conversation: user first"), (None, "before the first question")):
        with pytest.raises(DataError, match=words):
            read(path, make_tokenizer(template), tmp_path)


def test_skipping_does_not_reach_damaged_files(tmp_path):
    (tmp_path / "m.jsonl").write_text(json.dumps({"messages": GOOD}) + '\n{"messages":\n')
    with pytest.raises(DataError, match="line 2"):
        read(str(tmp_path / "m.jsonl"), make_tokenizer(CHATML), tmp_path, bad_rows="skip")


def test_format_is_detected_behind_an_empty_conversation(tmp_path):
    path = write(tmp_path / "m.jsonl", [{"conversations": []}, {"conversations": GOOD}])
    assert read(path, make_tokenizer(CHATML), tmp_path, bad_rows="skip").info["format"] == "messages"
