"""The benchmark of training compares the same work, and counts what it says; no time is judged."""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack, closing

import gemm
import measure
import numpy as np
import pytest
import random_llama
import torch
import training
import training_ways
from helpers.holder import Holder
from worker import Worker

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.json"
    made = [{"instruction": f"Say {'much ' * (i % 5)}of {i}", "input": "", "output": f"This is {i}"} for i in range(24)]
    file.write_text(json.dumps(made))
    return file


def given(rows, **changes) -> argparse.Namespace:
    settings = {"model": "zoo:planted-llama", "dataset": str(rows), "dtype": "fp32", "device": "cpu", "batch": 4}
    settings |= {"cutoff": 64, "threads": 1, "attention": None, "tokenizer": "zoo:planted-llama"}
    return argparse.Namespace(**settings | changes)


@pytest.mark.long
def test_training_is_compared_with_the_trainer(rows, tmp_path, monkeypatch):
    monkeypatch.setenv("MACDROP_CACHE", str(tmp_path / "cache"))
    setting = training.prepared(given(rows), tmp_path)
    assert "24 examples" in training.describe(setting, 1)
    with ExitStack() as stack:
        bench = training.Bench(setting, ["trainer", "share"], 1, stack)
        timings = measure.interleave(bench.variants(), 1, warm_up=1)
    assert "Trainer" in training.check_losses(bench.losses, "fp32")
    assert bench.losses[training.MACDROP] != bench.losses[training.PLAIN]
    text = training.report(bench, timings)
    assert "macdrop over Trainer" in text and "GEMM rate" in text and "TRL" not in text


def test_ways_that_do_not_do_the_same_work_are_refused():
    losses = {training.PLAIN: 2.0, training.TRAINER: 2.0001, training.TRL_PACKED: 5.0}
    assert training.check_losses(losses, "fp32").startswith("first losses agree")
    with pytest.raises(AssertionError, match="Trainer begins with loss 2.1"):
        training.check_losses(losses | {training.TRAINER: 2.1}, "bf16")


def test_all_ways_take_the_examples_of_our_order():
    from tune.data.batching import Batches

    setting = training_ways.Setting("m", "d", "", "fp32", "cpu", 4, 64, 1)
    ours = Batches(24, seed=0, per_device=4, accumulation=1, world=1)
    expected = np.array([ours.step(step).ravel() for step in range(5, 9)])  # from one epoch into the next
    assert np.array_equal(training_ways.picked(setting, 24, 5, 4), expected)


def test_products_of_a_small_llama_are_counted(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = random_llama.write(tmp_path / "model", "zoo:planted-llama", **SIZES, vocab_size=512)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    shapes = gemm.shapes(adapted, np.arange(5))
    attention, ffn = 2 * 64 * 64 + 2 * 32 * 64, 3 * 64 * 96
    first = 64 * 64 + 2 * 32 * 64  # q, k, v of the first layer: nothing below them is trained
    assert shapes.head == (512, 64)
    assert gemm.operations(shapes, 10, 3) == 10 * (8 * (attention + ffn) - 2 * first) + 3 * 4 * 512 * 64
    rate = gemm.rate(shapes, 10, 3, 1, next(model.parameters()))
    assert rate.flop == gemm.operations(shapes, 10, 3) and 0 < rate.flop / rate.wall < rate.best


def test_stand_in_fits_a_random_model(tmp_path):
    from transformers import AutoConfig

    folder = random_llama.write(tmp_path / "model", "zoo:planted-llama", **SIZES, vocab_size=512)
    weights = random_llama.stand_in(AutoConfig.from_pretrained(folder), "random")
    assert (weights.layer, weights.hidden_size, len(weights.top(5))) == (1, 64, 5)
    with pytest.raises(ValueError, match="tokens, the model 8"):
        random_llama.write(tmp_path / "small", "zoo:planted-llama", **SIZES, vocab_size=8)


def test_memory_of_a_process_is_the_most_since_the_last_reset():
    with closing(Worker(Holder)) as worker:
        worker.call("fill", 400 << 20)
        worker.call("reset_peak")
        before = worker.call("memory")
        assert before["peak"] - before["now"] < 20 << 20
        worker.call("fill", 100 << 20)
        assert 90 << 20 < worker.call("memory")["peak"] - before["now"] < 150 << 20
        with pytest.raises(RuntimeError, match="it does not fit"):
            worker.call("fail")
