"""tune.data.dataset: label masks against a slow reference, determinism, the cache, and refusals."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
from helpers.prepared_data import CHATML, answers, make_tokenizer, read, spec, write
from tokenizers import Tokenizer, models, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from macdrop.errors import ConfigError, DataError
from tune.config.train.data_keys import DatasetEntry
from tune.data import dataset as data
from tune.data.templates import ALPACA_WITH_INPUT, ALPACA_WITHOUT_INPUT, IGNORE, Encoder
from tune.errors import ResourceError

ALPACA = [
    {"instruction": "Name a colour.", "input": "", "output": "Blue."},
    {"instruction": "Add the numbers.", "input": "2 and 3", "output": "5"},
    {"instruction": "Say hello twice.", "output": "Hello hello"},
]
# The shape of Qwen3's: an empty thought before the answer that no question follows.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# No generation prompt and no mark after an answer.
BARE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "second answer"},
]


# --- label masks ---


def test_alpaca_mask_equals_a_slow_reference(tmp_path):
    tokenizer = make_tokenizer()
    prepared = read(write(tmp_path / "a.jsonl", ALPACA), tokenizer, tmp_path)
    for row, (ids, labels) in zip(ALPACA, prepared.train, strict=True):
        opening = ALPACA_WITH_INPUT if row.get("input") else ALPACA_WITHOUT_INPUT
        context = f"### Input:\n{row['input']}\n\n" if row.get("input") else ""
        prompt = f"{opening}### Instruction:\n{row['instruction']}\n\n{context}### Response:"
        prompt_ids = tokenizer(prompt)["input_ids"]
        expected = [*tokenizer(prompt + row["output"])["input_ids"], tokenizer.eos_token_id]
        assert ids.tolist() == expected and ids.dtype == np.int64
        assert labels.tolist() == [IGNORE] * len(prompt_ids) + expected[len(prompt_ids) :]
        assert ids.tolist().count(tokenizer.bos_token_id) == 1
    assert prepared.info["format"] == "alpaca" and prepared.info["sources"][0]["detected"]
    assert prepared.info["template"] == "alpaca" and prepared.info["tokenised_by_pieces"] == 0


def test_label_counts_equal_a_loop(tmp_path):
    tokenizer = make_tokenizer(bos=False)
    rows = [*ALPACA, {"instruction": "Two.", "output": ""}]
    for changes in ({}, {"train_on_prompt": True}, {"cutoff_len": 65}):
        examples = read(write(tmp_path / "a.jsonl", rows), tokenizer, tmp_path, **changes).train
        assert examples.label_counts.tolist() == [int((labels[1:] != IGNORE).sum()) for _, labels in examples]
        assert examples.lengths.tolist() == [len(ids) for ids, _ in examples]


def test_train_on_prompt_labels_everything(tmp_path):
    path = write(tmp_path / "a.jsonl", ALPACA)
    for ids, labels in read(path, make_tokenizer(), tmp_path, train_on_prompt=True).train:
        assert ids.tolist() == labels.tolist()


@pytest.mark.parametrize(
    "template, expected",
    [
        (CHATML, "a<|im_end|>second answer<|im_end|>"),
        (THINKING, "a<|im_end|>second answer<|im_end|>"),
        (BARE, " a</s> second answer</s>"),
        (None, "a</s>second answer</s>"),
    ],
    ids=["chatml", "thinking", "bare", "alpaca"],
)
def test_every_answer_of_a_dialogue_carries_loss(tmp_path, template, expected):
    tokenizer = make_tokenizer(template)
    prepared = read(write(tmp_path / "m.jsonl", [{"messages": DIALOGUE}]), tokenizer, tmp_path)
    assert prepared.info["template"] == ("alpaca" if template is None else "chat")
    assert answers(tokenizer, prepared.train[0]) == expected
    text = tokenizer.decode(prepared.train[0][0])
    assert text.count("<s>") == (template is None)  # a chat template writes its own bos, or none
    assert text.index("Be brief.") < text.index("One?") < text.index("Two?") < text.index("second answer")


def test_template_that_refuses_a_turn_names_the_row(tmp_path):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHATML
    rows = [{"messages": DIALOGUE[1:]}, {"messages": DIALOGUE}]
    with pytest.raises(DataError, match="line 2: the chat template refuses this conversation: no system turn"):
        read(write(tmp_path / "m.jsonl", rows), make_tokenizer(template), tmp_path)


def test_template_with_its_end_mark_inside_a_turn(tmp_path):
    """The shape of Llama 2 and Mistral: no generation prompt, the end-of-sequence token as the mark of an answer."""
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer = make_tokenizer(template)
    example = read(write(tmp_path / "m.jsonl", [{"messages": DIALOGUE[1:]}]), tokenizer, tmp_path).train[0]
    assert answers(tokenizer, example) == " a</s> second answer</s>"
    assert tokenizer.decode(example[0]) == "<s>[INST] One? [/INST] a</s>[INST] Two? [/INST] second answer</s>"


def test_chat_tokens_equal_the_template(tmp_path):
    tokenizer = make_tokenizer("{{ bos_token }}" + CHATML)
    ids, _ = read(write(tmp_path / "m.jsonl", [{"messages": DIALOGUE}]), tokenizer, tmp_path).train[0]
    whole = tokenizer.apply_chat_template(DIALOGUE, tokenize=False).rstrip()
    assert ids.tolist() == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_sharegpt_and_messages_give_the_same_tokens(tmp_path):
    tokenizer = make_tokenizer(CHATML)
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    shared = {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in DIALOGUE]}
    sharegpt = read(write(tmp_path / "s.jsonl", [shared]), tokenizer, tmp_path)
    messages = read(write(tmp_path / "m.jsonl", [{"messages": DIALOGUE}]), tokenizer, tmp_path)
    assert sharegpt.info["format"] == "sharegpt" and messages.info["format"] == "messages"
    for a, b in zip(sharegpt.train[0], messages.train[0], strict=True):
        assert a.tolist() == b.tolist()


def test_plain_text_carries_loss_everywhere(tmp_path):
    tokenizer = make_tokenizer()
    (tmp_path / "t.txt").write_text("first line\n\nsecond line\n")
    prepared = read(str(tmp_path / "t.txt"), tokenizer, tmp_path)
    assert [tokenizer.decode(ids) for ids, _ in prepared.train] == ["<s>first line</s>", "<s>second line</s>"]
    assert [answers(tokenizer, e) for e in prepared.train] == ["first line</s>", "second line</s>"]


def test_merge_across_a_border_is_tokenised_by_pieces(tmp_path):
    raw = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"], show_progress=False)
    rows = [{"instruction": "Well?", "output": "Yes indeed"}]
    text = ALPACA_WITHOUT_INPUT + "### Instruction:\nWell?\n\n### Response:Yes indeed\n"
    raw.train_from_iterator([text] * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")
    prepared = read(write(tmp_path / "a.jsonl", rows), tokenizer, tmp_path)
    assert prepared.info["tokenised_by_pieces"] == 1
    ids, labels = prepared.train[0]
    answer = "".join(tokenizer.convert_ids_to_tokens(labels[labels != IGNORE].tolist()))
    assert answer == "Yes indeed</s>"
    assert "".join(tokenizer.convert_ids_to_tokens(ids.tolist())).endswith("### Response:Yes indeed</s>")


def test_alpaca_history_is_a_dialogue(tmp_path):
    rows = [{"instruction": "And now?", "output": "end", "history": [["Start?", "begin"]], "system": "Be brief."}]
    tokenizer = make_tokenizer()
    example = read(write(tmp_path / "a.jsonl", rows), tokenizer, tmp_path).train[0]
    assert answers(tokenizer, example) == "begin</s>end</s>"
    assert tokenizer.decode(example[0]).startswith("<s>Be brief.\n\n### Instruction:\nStart?\n\n### Response:begin</s>")


# --- files ---


def test_all_file_kinds_give_the_same_arrays(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"input": "", **row} for row in ALPACA]
    write(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(rows, indent=2), encoding="utf-8")
    lines = ["instruction,input,output", *(f'"{r["instruction"]}","{r["input"]}","{r["output"]}"' for r in rows)]
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    tokenizer = make_tokenizer()
    kinds = ("jsonl", "json", "csv", "parquet")
    first, *others = [read(str(tmp_path / f"a.{kind}"), tokenizer, tmp_path) for kind in kinds]
    for other in others:
        assert other.info["files"] == first.info["files"]  # checksums of the arrays


def test_several_data_sets_and_their_limits(tmp_path):
    write(tmp_path / "a.jsonl", ALPACA)
    (tmp_path / "train.txt").write_text("line one\nline two\nline three\n")
    entries = [str(tmp_path / "a.jsonl"), DatasetEntry(path=str(tmp_path / "train.txt"), max_samples=2)]
    info = read(entries, make_tokenizer(), tmp_path, max_samples=1).info
    assert [part["rows"] for part in info["sources"]] == [1, 2] and info["format"] == "alpaca, text"


def test_validation_split_is_drawn_by_its_seed(tmp_path):
    path = write(tmp_path / "a.jsonl", [{**ALPACA[0], "output": str(i)} for i in range(40)])
    tokenizer = make_tokenizer()

    def parts(**changes):
        prepared = read(path, tokenizer, tmp_path, **changes)
        return [[answers(tokenizer, example) for example in part] for part in (prepared.train, prepared.validation)]

    train, validation = parts(val_size=0.25)
    assert len(train) == 30 and len(validation) == 10 and not set(train) & set(validation)
    assert parts(val_size=10) == [train, validation]
    assert parts(val_size=0.25, data_seed=1)[1] != validation
    assert read(path, tokenizer, tmp_path).validation is None


def test_cutoff_truncates_on_the_right_and_drops_examples_without_answer(tmp_path):
    tokenizer = make_tokenizer()
    rows = [{"instruction": "x", "output": "a b c d e f g h"}, {"instruction": "long " * 60, "output": "lost"}]
    path = write(tmp_path / "a.jsonl", rows)
    whole, _ = read(path, tokenizer, tmp_path).train[0]
    prepared = read(path, tokenizer, tmp_path, cutoff_len=len(whole) - 3)
    assert len(prepared.train) == 1 and prepared.info["dropped"] == 1 and prepared.info["truncated"] == 1
    assert prepared.train[0][0].tolist() == whole[:-3].tolist()


# --- the cache ---


def test_cache_is_reused_and_its_key_covers_every_input(tmp_path):
    path, tokenizer = write(tmp_path / "a.jsonl", ALPACA), make_tokenizer()
    first = data.prepare(spec(path), tokenizer, tmp_path / "cache")
    stamp = (first / "info.json").stat().st_mtime_ns
    tokenizer("cut me down", max_length=4, truncation=True)  # leaves its mark on the tokenizer, not on the key
    assert data.prepare(spec(path), tokenizer, tmp_path / "cache") == first
    assert data.prepare(spec(path), make_tokenizer(), tmp_path / "cache") == first
    assert (first / "info.json").stat().st_mtime_ns == stamp
    others = [data.prepare(spec(path), make_tokenizer(bos=False), tmp_path / "cache")]
    for change in ({"cutoff_len": 80}, {"train_on_prompt": True}, {"val_size": 1}, {"max_samples": 2}):
        others.append(data.prepare(spec(path, **change), tokenizer, tmp_path / "cache"))
    write(tmp_path / "a.jsonl", ALPACA[:2])
    others.append(data.prepare(spec(path), tokenizer, tmp_path / "cache"))
    assert len({first, *others}) == 7
    assert not list((tmp_path / "cache").glob(".*.tmp"))


@pytest.mark.parametrize("damage", ["missing", "short", "flipped", "no info"])
def test_damaged_folder_is_rebuilt(tmp_path, damage):
    path, tokenizer = write(tmp_path / "a.jsonl", ALPACA), make_tokenizer()
    folder = data.prepare(spec(path), tokenizer, tmp_path / "cache")
    good = data.load(folder).train[1][0].tolist()
    tokens = folder / "tokens.npy"
    content = bytearray(tokens.read_bytes())
    if damage == "missing":
        tokens.unlink()
    elif damage == "no info":
        (folder / "info.json").write_text("{")
    else:
        content[-1] ^= 1
        tokens.write_bytes(content if damage == "flipped" else content[:-8])
    if damage != "flipped":
        with pytest.raises(DataError, match="damaged"):
            data.load(folder)
    assert data.prepare(spec(path), tokenizer, tmp_path / "cache") == folder
    assert data.load(folder).train[1][0].tolist() == good


def _prepare_and_count(path: str, cache: str, log: str, barrier) -> None:
    class CountingEncoder(Encoder):
        def encode(self, *args):
            with open(log, "a") as file:
                file.write(f"{os.getpid()}\n")
            return super().encode(*args)

    data.Encoder = CountingEncoder
    tokenizer = make_tokenizer()
    barrier.wait()
    data.load(data.prepare(spec(path), tokenizer, cache))


def test_one_of_two_concurrent_processes_builds(tmp_path):
    path = write(tmp_path / "a.jsonl", ALPACA * 200)
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    args = (path, str(tmp_path / "cache"), str(tmp_path / "log"), barrier)
    workers = [context.Process(target=_prepare_and_count, args=args) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len((tmp_path / "log").read_text().split()) == 1


# --- refusals ---


@pytest.mark.parametrize(
    "name, content, changes, words",
    [
        ("a.jsonl", '{"instruction": "x", "output": "y"}\n{"instruction": "x"}\n', {}, ["line 2", "Missing: output"]),
        ("a.jsonl", '{"instruction": "x", "output": "y"}\n\n{"instruction": "x"\n', {}, ["line 3", "not valid JSON"]),
        ("a.json", '[\n {"instruction": "x", "output": "y"},\n {"instruction": "x"}\n]', {}, ["line 3", "output"]),
        ("a.json", '[\n {"instruction": "x", "output": "y"}\n {"instruction": "x"}\n]', {}, ["line 3", "comma"]),
        ("a.json", '[\n {"instruction": "x",\n "output": }\n]', {}, ["line 3", "not valid JSON"]),
        ("a.json", "[\n" + "[" * 5000, {}, ["line 2", "nested too deeply"]),
        ("a.jsonl", "\n" + '{"a":' * 5000, {}, ["line 2", "nested too deeply"]),
        ("a.jsonl", "[1, 2]", {}, ["line 1", "object"]),
        ("a.jsonl", '{"question": "x", "answer": "y"}\n', {}, ["question, answer", "alpaca: instruction, output"]),
        ("a.jsonl", '{"instruction": "x", "output": 3}\n', {}, ["line 1", "output must be text"]),
        ("a.jsonl", '{"messages": [{"role": "bot", "content": "x"}]}\n', {}, ["line 1", "'bot'", "assistant"]),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "x"}]}\n', {}, ["line 1", "answer"]),
        ("a.jsonl", '{"messages": [{"role": "user"}]}\n', {}, ["line 1", "turn 0", "content"]),
        ("a.jsonl", '{"text": "x"}\n', {"format": "alpacka"}, ["alpacka", "Did you mean 'alpaca'?"]),
        ("a.jsonl", '{"text": "x"}\n', {"template": "chat"}, ["chat template", "alpaca"]),
        ("a.jsonl", '{"text": "x"}\n', {"template": "llama3"}, ["llama3", "Allowed"]),
        ("a.jsonl", '{"text": "x"}\n', {"val_size": 0.5}, ["val_size", "empty"]),
        ("a.jsonl", '{"text": "x"}\n{"text": "y"}\n', {"val_size": 2}, ["val_size", "training"]),
        ("a.jsonl", '{"text": "x"}\n', {"val_size": 1}, ["of 1 usable", "Allowed: 0."]),
        ("a.jsonl", '{"text": "x"}\n{"text": "y"}\n', {"val_size": 1.5}, ["val_size", "1.5"]),
        ("a.jsonl", '{"instruction": "x", "output": "y"}\n', {"cutoff_len": 8}, ["cutoff_len 8", "shortest"]),
        ("a.jsonl", "", {}, ["empty"]),
        ("a.json", "[]", {}, ["empty"]),
        ("a.csv", "instruction,output\nx\n", {}, ["line 2", "fewer"]),
        ("a.parquet", "no parquet", {}, ["not a parquet file"]),
        ("a.txt", b"\xff\xfe\x00", {}, ["UTF-8"]),
        ("a.xlsx", "x", {}, [".xlsx", "Allowed"]),
    ],
)
def test_bad_data_is_refused_with_its_place(tmp_path, name, content, changes, words):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        read(str(tmp_path / name), make_tokenizer(), tmp_path, **changes)
    for word in words:
        assert word in str(caught.value)
    assert not list((tmp_path / "cache").glob("*/")) and len(str(caught.value).splitlines()) <= 7


def test_missing_data_are_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text("")
    for dataset, word in [
        (str(tmp_path / "trein.jsonl"), "Did you mean 'train.jsonl'?"),
        ("./nowhere/train.json", "does not exist either"),
        ("nobody/no-such-set", "neither"),  # conftest keeps the hub offline
        ("", "empty"),
        ([], "empty"),
    ]:
        with pytest.raises(DataError) as caught:
            read(dataset, make_tokenizer(), tmp_path)
        assert word in str(caught.value)


def test_unwritable_cache_is_a_resource_error(tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(ResourceError, match="Cannot write"):
        read(write(tmp_path / "a.jsonl", ALPACA), make_tokenizer(), tmp_path)


# --- data that is at hand ---


def test_zoo_answers_carry_loss(tmp_path):
    from tune.zoo.catalog import resolve

    tokenizer = AutoTokenizer.from_pretrained(resolve("zoo:planted-llama"))
    prepared = read("zoo:train", tokenizer, tmp_path, val_size=0.1)
    assert prepared.info["dropped"] == 0 and prepared.info["tokenised_by_pieces"] == 0
    rows = [json.loads(line) for line in Path(resolve("zoo:train")).read_text().splitlines()]
    assert {answers(tokenizer, example) for example in prepared.train} <= {f"{r['output']} <eos>" for r in rows}
    for ids, _ in prepared.train:
        assert ids[0] == tokenizer.bos_token_id and ids.tolist().count(tokenizer.bos_token_id) == 1


def test_real_instructions_with_a_real_tokenizer(tmp_path, shared):
    path = shared / "data/alpaca_en_demo/train.json"
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/stories260k")
    prepared = read(str(path), tokenizer, tmp_path, cutoff_len=4096, max_samples=200)
    rows = json.loads(path.read_text())[:200]
    assert prepared.info["dropped"] == 0 and len(prepared.train) == 200
    for row, (ids, labels) in zip(rows, prepared.train, strict=True):
        carried = labels[labels != IGNORE]
        assert ids[0] == tokenizer.bos_token_id and carried[-1] == tokenizer.eos_token_id
        prompt = tokenizer.decode(ids[: len(ids) - len(carried)])
        assert prompt.endswith("### Response:")
        assert tokenizer.decode(carried[:-1]) == row["output"]
