"""tune.data.chat_template: structures of well-known templates against accounts in plain Python, and refusals."""

from __future__ import annotations

import pytest
from fuzz.conversations import check_conversation, conversations
from helpers.benchmark_fixtures import byte_tokenizer
from helpers.chat_accounts import Said
from helpers.chat_dialects import DIALECTS
from hypothesis import given, settings

from macdrop.errors import DataError
from tune.data.chat_template import ChatTemplate, end_of_answers
from tune.data.formats import Turn
from tune.data.templates import Encoder

USER, SYSTEM = Said("user", "say cat"), Said("system", "Be brief.")
ONE, TWO = Said("assistant", "cat"), Said("assistant", "dog")
THINKING = [Said("assistant", "cat", thought="hm"), Said("assistant", "dog", thought="hm")]
CONVERSATIONS = {
    "one answer": [USER, ONE],
    "two answers": [USER, ONE, USER, TWO],
    "system": [SYSTEM, USER, ONE],
    "system and two answers": [SYSTEM, USER, ONE, USER, TWO],
    "question at the end": [USER, ONE, USER],
    "first answer muted": [USER, Said("assistant", "cat", trained=False), USER, TWO],
    "last answer muted": [USER, ONE, USER, Said("assistant", "dog", trained=False)],
    "system and a muted answer": [SYSTEM, USER, ONE, USER, Said("assistant", "dog", trained=False)],
    "thought": [USER, THINKING[0]],
    "two thoughts": [USER, THINKING[0], USER, THINKING[1]],
    "muted thought": [USER, Said("assistant", "cat", thought="hm", trained=False), USER, THINKING[1]],
    "blanks": [Said("user", " say cat "), Said("assistant", " cat\n")],
    "empty": [Said("user", ""), Said("assistant", "")],
    "marks in texts": [Said("user", "what is </s>?"), Said("assistant", "<|im_end|> ends a turn\n\n###")],
}


@pytest.fixture(scope="module")
def encoders() -> dict[str, Encoder]:
    return {name: encoder(dialect.jinja) for name, dialect in DIALECTS.items()}


def encoder(template: str) -> Encoder:
    return Encoder(byte_tokenizer(chat_template=template), "chat", train_on_prompt=False)


@pytest.mark.parametrize("name", DIALECTS)
def test_what_carries_loss_and_what_stands_before_it(name, encoders):
    for turns in CONVERSATIONS.values():
        check_conversation(name, turns, encoders[name])


@settings(max_examples=150, deadline=None, derandomize=True)  # new ones are the fuzzer's to find
@given(conversations())
def test_random_conversations(encoders, drawn):
    name, turns = drawn
    check_conversation(name, turns, encoders[name])


@pytest.mark.parametrize("name", DIALECTS)
def test_answers_end_where_the_template_ends_them(name):
    assert end_of_answers(byte_tokenizer(chat_template=DIALECTS[name].jinja)) == DIALECTS[name].mark


def test_end_mark_stops_before_a_header_that_begins_like_it():
    """Tags are whole: `<s>` before the first header and `<|eot|>` before the others share their last character."""
    template = (
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|eot|>' }}{% endfor %}"
        "{{ '<|assistant|>\n' }}"
    )
    assert end_of_answers(byte_tokenizer(chat_template=template)) == "<|eot|>"


def test_no_template_has_no_end_mark():
    assert end_of_answers(byte_tokenizer()) == ""
    assert end_of_answers(byte_tokenizer(chat_template="{{ raise_exception('never') }}")) == ""


CHATML = DIALECTS["chatml"].jinja


@pytest.mark.parametrize(
    ("template", "turns", "words"),
    [
        ("{% for m in messages if m.role != 'system' %}{{ m.content }};{% endfor %}", [SYSTEM, USER, ONE],
         "leaves out or changes the system turn 'Be brief.'"),
        (CHATML.replace("m.content", "m.content | upper"), [USER, ONE], "changes the user turn 'say cat'"),
        (CHATML.replace("m.content", "(m.content | upper if m.role == 'assistant' else m.content)"), [USER, ONE],
         "changes, omits or repeats an answer"),
        (CHATML.replace("m.content", "(m.content + m.content)"), [USER, ONE], "repeats an answer"),
        ("{% for m in messages[-2:] %}<{{ m.role }}>{{ m.content }}</>{% endfor %}",
         [USER, ONE, Said("user", "b"), TWO], "leaves out or changes the user turn 'say cat'"),
        (CHATML + "{{ raise_exception('not today') }}", [USER, ONE], "refuses this conversation: not today"),
        (CHATML.replace("assistant\n", "bot\n"), [USER, ONE], "training would not see what inference sends"),
        (DIALECTS["qwen3"].jinja, [USER, THINKING[0], USER, TWO], "with weight: 0 on the answers before it"),
    ],
)  # fmt: skip
def test_what_vanishes_is_named(template, turns, words):
    row = [Turn(turn.role, turn.content, trained=turn.trained) for turn in turns]
    with pytest.raises(DataError) as caught:
        encoder(template).encode([row], ["a.jsonl, line 3"])
    assert words in str(caught.value) and "alpaca" in str(caught.value)
    assert str(caught.value).startswith("a.jsonl, line 3: ")


def test_prompt_of_a_thinking_mode():
    template = ChatTemplate(byte_tokenizer(chat_template=DIALECTS["qwen3"].jinja))
    asked = [{"role": "user", "content": "say cat"}]
    header = "<|im_start|>user\nsay cat<|im_end|>\n<|im_start|>assistant\n"
    assert template.prompt(asked).text == header + "<think>\n\n</think>\n\n"
    assert template.prompt(asked, thinking=True).text == header
    assert not template.prompt(asked).opened
    opened = ChatTemplate(byte_tokenizer(chat_template=DIALECTS["r1_distill"].jinja)).prompt(asked)
    assert opened.text == "<s><|User|>say cat<|Assistant|><think>\n" and opened.opened


def test_a_thought_that_history_writes_closed_is_opened_by_its_prompt():
    """The structure of DeepSeek-V3.1: `<think>` or `</think>` in the generation prompt, `</think>` in history."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}<|Assistant|></think>"
        "{{ m.content.split('</think>')[-1] }}<|eos|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|Assistant|>"
        "{% if enable_thinking %}<think>{% else %}</think>{% endif %}{% endif %}"
    )
    chat = ChatTemplate(byte_tokenizer(chat_template=template))
    for answer, wanted in (("cat", "</think>cat<|eos|>"), ("<think>hm</think>cat", "<think>hm</think>cat<|eos|>")):
        asked, said = {"role": "user", "content": "u"}, {"role": "assistant", "content": answer}
        assert chat.render([asked, said], [False, True]).text == "<|User|>u<|Assistant|>" + wanted


def test_header_that_differs_in_white_space_alone_is_that_of_inference():
    template = CHATML.replace("}}<|im_start|>assistant\n", "").replace("\n" + "{{ m.content", "  {{ m.content")
    chat = ChatTemplate(byte_tokenizer(chat_template=template))
    rendered = chat.render([{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}], [False, True])
    assert rendered.text == "<|im_start|>user  u<|im_end|>\n<|im_start|>assistant\na<|im_end|>"


def test_answers_of_weight_0_never_carry_loss():
    """Also where the prompt is trained on; its mark and an added end-of-sequence token are part of the answer."""
    for template in (CHATML, DIALECTS["bare"].jinja, None):
        tokenizer = byte_tokenizer(chat_template=template)
        row = [Turn("user", "u"), Turn("assistant", "mute", trained=False), Turn("user", "v"), Turn("assistant", "w")]
        for on_prompt in (False, True):
            kind = "chat" if template else "alpaca"
            encoded = Encoder(tokenizer, kind, train_on_prompt=on_prompt).encode([row], ["here"])[0]
            silent = tokenizer.decode(
                [i for i, label in zip(encoded.input_ids, encoded.labels, strict=True) if label < 0]
            )
            end = "<|im_end|>" if template == CHATML else "</s>"
            assert ("mute" + end) in silent
            assert not on_prompt or silent.strip() == "mute" + end
