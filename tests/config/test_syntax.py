"""YAML as files of ours are read and written, and values in messages."""

from __future__ import annotations

import math

import pytest
import yaml

from macdrop.errors import ConfigError
from tune.config.run_spec import load
from tune.config.syntax.user_paths import expand_arguments
from tune.config.syntax.yaml_core import parse_blocks, parse_yaml, write_blocks, write_yaml

MODEL = "model_name_or_path=zoo:planted-llama"
#: Nine levels of nine: 43 million values.
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((word, word) for word in ("yes", "no", "on", "off", "y", "1:30", "190:20:30", "2026-01-01", "1_000", "0b11")),
        *(("010", 10), ("0o17", 15), ("0x1F", 31), ("+5", 5), ("-0", 0), ("3e-4", 3e-4), (".5", 0.5), ("5.", 5.0)),
        *(("true", True), ("False", False), ("null", None), ("~", None), ("", None), ("-.inf", -math.inf)),
        *(("'010'", "010"), ("!!float 3", 3.0), ("{a: &x {b: 1}, c: {<<: *x}}", {"a": {"b": 1}, "c": {"b": 1}})),
    ],
)
def test_values_are_those_of_the_core_schema(text, value):
    found = parse_yaml(text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("9" * 5000, "is too large a number"),
        (str(2**63), "is too large a number"),
        ("!!int abc", "abc is not a number"),
        ("!!bool maybe", "neither true nor false"),
        ("!!timestamp x", "could not determine a constructor"),
        ("!!python/name:os.system x", "could not determine a constructor"),
        ("&a [*a]", "aliases"),
        (BOMB, "aliases stand for more than 100000 values"),
        ('"\\ud800"', "half of a surrogate pair"),
        ("{a: 1, a: 2}", "a is written twice"),
        ("{1: 2}", "the key 1 is not a text"),
        ("[" * 3000, "nested too deeply"),
    ],
)
def test_what_is_not_plain_data_is_refused(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_yaml(text)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "text", ["010", "1:30", "yes", "1e5", "0o17", "5.", ".5", "2026-01-01", "=", "<<", "1_0", "+1"]
)
def test_texts_are_texts_for_every_reader(text):
    written = write_yaml({"key": text})
    assert parse_yaml(written) == yaml.safe_load(written) == {"key": text}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bf16=yes", "bf16 must be true or false, not 'yes'. Write true."),
        ("bf16=off", "bf16 must be true or false, not 'off'. Write false."),
        ("seed=1:30", "seed must be a whole number, not '1:30'."),
        ("max_steps=1_000", "max_steps must be a whole number, not '1_000'."),
        ("dataset=[{path: zoo:train, max_samples: '5'}]", "entry 1: max_samples must be a whole number, not '5'."),
        ("dataset=[{path: zoo:train, max_samples: 5.5}]", "entry 1: max_samples must be a whole number, not 5.5."),
        ("dataset=[{path: zoo:train, max_samples: true}]", "entry 1: max_samples must be a whole number, not True."),
        ("dataset=[zoo:train, {path: [a, b]}]", "entry 2: path must be a text, not ['a', 'b']."),
        ("dataset=[{path: x, split: 3}]", "entry 1: split must be a text, not 3."),
        ("dataset=[{path: x, fromat: text}]", "entry 1: fromat is an unknown key. Did you mean 'format'?"),
        ("dataset=[{split: train}]", "entry 1: path is missing."),
        ("dataset=[[a]]", "entry 1 must be a text or a block of keys, not ['a']"),
        ("eval.generation.g={data: x, stop: ['']}", "stop.0 must be a text that is not empty, not ''."),
    ],
)
def test_messages_name_the_value(override, message):
    with pytest.raises(ConfigError) as caught:
        load(None, [MODEL, override])
    assert message in str(caught.value)


def test_an_entry_of_a_suite_is_left_out_by_off(tmp_path):
    spec = load(None, [MODEL, "eval.suite=zero-shot", "eval.zero_shot.boolq=off", "eval.zero_shot.piqa=false"])
    assert not {"boolq", "piqa"} & set(spec.eval.zero_shot) and spec.eval.zero_shot


def test_large_values_are_shortened_in_messages():
    for value in ("[" + ",".join(["abcdef"] * 50_000) + "]", "x" * 500_000):
        with pytest.raises(ConfigError) as caught:
            load(None, [MODEL, f"lora_rank={value}"])
        assert len(str(caught.value)) < 400


def test_the_shell_leaves_some_home_folders_to_us(monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    given = ["eval", "~/m", "--output=~/x", "--k=3", "dataset=~/d", "a~b"]
    assert expand_arguments(given) == ["eval", "/h/m", "--output=/h/x", "--k=3", "dataset=~/d", "a~b"]


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\nb: {c: [1, 2.5, null]}\nd:\n- x\n- y: z\ne:\n  f: yes\n",
        "a: |\n  two\n\n  lines\nb: 'it''s'\nc: |+\n  kept\n\n",
        "a: &x [1]\nb: *x\n",
        "# a comment\na: 1\n",
        "a:\n  - 1\n\nb: 010\n",
        'a: "over\n  lines"\nb: -0.0\n',
        "a: 1",
        "",
        "- 1\n- 2\n",
        "a: 1\n...\n",
        "a:\n  b: 1\n  c:\n    d: 2.50\n    e: x\n  f:\n  - 1\ng: 7\n",
        "a:\n  b: |\n    x: 1\n    y\n  c: >\n    x\n\n    y\n",
        "a:\n  b: &x 1\n  c: *x\n",
        "a:\n  <<: {b: 1}\n  c: 2\n",
        "a:\n  b c: 1\n",
        "a:\n  # a comment\n  b: 1\n",
        "a:\n\n  b: 1\n",
        "a: 1\nb: -12\nc: 0.5\nd: 1.0e-08\ne: 1e-08\nf: 0x1f\ng: 1_000\nh: -0\ni: 1.\nj: .5\nk: 12:30\nl: 2024-01-01\n",
        "a: 999999999999999999\nb: 9223372036854775807\nc: 9999999999999999999.5\nd: 00.50\n",
    ],
)
def test_a_file_read_key_by_key_is_the_same_file(text):
    def read(parse) -> str:
        return repr(parse(text))

    assert read(parse_blocks) == read(parse_yaml) == read(parse_blocks)


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\na: 2\n",
        "a: [1\nb: 2\n",
        "a: 1\n b: 2\n",
        "a: *x\n",
        "null: 1\n",
        "a: 'x\nb: 1\n",
        "a:\n  b: 1\n  b: 2\n",
        "a:\n  true: 1\n",
        "a:\n  b: *x\n",
        "a:\n  text\n  over: lines\n",
        "a: 99999999999999999999\n",
    ],
)
def test_a_mistake_is_found_at_its_line_key_by_key_too(text):
    found = []
    for parse in (parse_yaml, parse_blocks):
        with pytest.raises(ConfigError) as raised:
            parse(text)
        found.append(str(raised.value))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"a": 1, "b": True, "c": 1.0, "d": "1", "e": None, "f": "yes", "g": "", "h": "x: y"},
        {"a": {"b": [1, {"c": "two\nlines"}], "d": {}}, "e": [], "f": [[]], "g": "long " * 40},
        {"on": "off", "1": "010", "a b": "\u00e9\u2028", "tab": "\t", "quote": 'it\'s "so"'},
    ],
)
def test_a_file_written_key_by_key_is_the_same_file(value):
    assert write_blocks(value) == write_yaml(value) == write_blocks(value)
    assert parse_blocks(write_blocks(value)) == value


def test_values_read_key_by_key_are_the_reader_s_own():
    parse_blocks("a: [1]\n")["a"].append(2)
    assert parse_blocks("a: [1]\n") == {"a": [1]}
