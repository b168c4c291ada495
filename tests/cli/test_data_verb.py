"""`macdrop data`: first rows as tokens with and without loss, lengths, padding, and what is left out."""

from __future__ import annotations

import json

import numpy as np
import pytest

from macdrop import load_tokenizer
from tune.config.train_spec import TrainSpec
from tune.data.dataset import load, prepare
from tune.preflight.preview import first_examples, lengths_of
from tune.zoo.catalog import resolve

PLANTED = "model_name_or_path=zoo:planted-llama"


@pytest.fixture
def rows(tmp_path):
    """Rows with one bad among them, and the words that train on them."""
    good = [{"instruction": f"name {n}", "output": "a b c"} for n in range(12)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*good[:2], {"instruction": "name"}, *good[2:]]))
    return [PLANTED, f"dataset={file}", "val_size=0", "per_device_train_batch_size=4"]


def test_what_is_shown_of_the_data(shell, rows):
    ended = shell("data", *rows, "bad_rows=skip", "--rows", "2")
    assert ended.code == 0, ended.err
    out = ended.out
    assert "example 1" in out and "rows.jsonl, line 1: " in out and "example 3" not in out
    assert out.count("\n  no loss") == 2 and out.count("\n  loss") == 2
    assert "format alpaca, template chat; loss on assistant" in out
    assert "1 row skipped: a column is missing (" in out and "rows.jsonl, line 3)" in out
    assert "12 to train on, 0 for validation" in out and "of the tokens in padded micro-batches" in out
    assert "median" in out and "#" in out


def test_every_key_of_the_data_has_its_effect_there(shell, rows):
    assert "loss on every token" in shell("data", *rows, "bad_rows=skip", "train_on_prompt=true").out
    assert "loss on user" in shell("data", *rows, "bad_rows=skip", "train_on_roles=[user]").out
    message = shell.refused("data", *rows)
    assert "line 3: format alpaca needs the columns" in message
    assert "max_skipped_share is 0.01" in shell.refused("data", *rows, "bad_rows=skip", "max_skipped_share=0.01")


def test_a_run_file_is_needed(shell):
    assert "macdrop data my.yaml" in shell.refused("data")


def test_tokens_and_loss_are_those_of_the_arrays(tmp_path):
    spec = TrainSpec(model_name_or_path="zoo:planted-llama", dataset="zoo:train", max_samples=20)
    tokenizer = load_tokenizer(resolve("zoo:planted-llama"))
    prepared = load(prepare(spec, tokenizer, tmp_path))
    for at, example in enumerate(first_examples(prepared, tokenizer, 20)):
        part = slice(*prepared.train.offsets[at : at + 2])
        ids, labels = prepared.train.tokens[part], prepared.train.labels[part]
        assert example.count(True) == int((labels[1:] >= 0).sum()) and example.count(True) + example.count(
            False
        ) == len(ids)
        carried = "".join(text for run in example.runs if run.loss for text in run.tokens)
        assert "".join(carried.split()) == "".join(tokenizer.decode(ids[labels >= 0]).split())
        assert example.place.endswith(f"line {at + 1}")


@pytest.mark.parametrize("lengths", [[5], [1, 2], [3, 3, 3], list(range(1, 101)), [7, 900, 23, 23, 512]])
def test_a_histogram_counts_every_example_once(lengths):
    found = lengths_of(np.array(lengths))
    starts = [start for start, _ in found.bins]
    slow = [
        sum(start <= each < end for each in lengths) for start, end in zip(starts, [*starts[1:], 10**9], strict=True)
    ]
    assert [count for _, count in found.bins] == slow and sum(slow) == len(lengths) and len(starts) <= 10
    assert (found.at[0], found.at[-1], found.mean) == (min(lengths), max(lengths), sum(lengths) / len(lengths))
