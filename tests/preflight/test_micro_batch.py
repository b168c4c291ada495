"""Packed micro-batches that are impossible are refused before anything starts, with the values that would do."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from helpers import tiny

from macdrop.errors import ConfigError
from tune.config.run_spec import RaySpec, TrainSpec
from tune.config.sweep_spec import Space
from tune.preflight.inputs import check_training
from tune.preflight.micro_batch import check_fits
from tune.preflight.step_memory import Room, StepMemory, step_memory, worker_room
from tune.training.loading import open_base
from tune.training.lora import add_adapter

MODEL = "zoo:planted-llama"
LENGTHS = np.full(1000, 1000)


def spec(**keys) -> TrainSpec:
    return TrainSpec(model_name_or_path=MODEL, **{"per_device_train_batch_size": 4, "cutoff_len": 128, **keys})


# --- budgets ---


@pytest.mark.parametrize("verb", [("train",), ("sweep", "--dry-run"), ("plan",)])
def test_a_budget_below_the_longest_example_is_refused_with_what_would_do(shell, verb):
    rows = [{"instruction": "name", "output": "a " * length} for length in (2, 30)]
    (shell.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("dataset=rows.jsonl", "val_size=1", "macdrop.p0=0", "max_steps=2", "cutoff_len=128")
    model = "model_name_or_path" if verb == ("train",) else "sweep.models"
    ended = shell(verb[0], f"{model}={MODEL}", *words, "max_tokens_per_micro_batch=16", *verb[1:])
    assert ended.code == 2
    assert "max_tokens_per_micro_batch is 16, but the longest example has" in ended.err
    assert "rows.jsonl, line 2), and an example is never split." in ended.err
    assert "or more, or cutoff_len to 16 or less." in ended.err


def test_a_dry_run_shows_what_packing_does(shell):
    ended = shell("sweep", "--dry-run", f"sweep.models={MODEL}", "dataset=zoo:train", "macdrop.p0=0", "cutoff_len=64")
    assert ended.code == 0, ended.err
    assert "1 micro-batch of at most 512 tokens per worker and step" in " ".join(ended.out.split())


def test_packing_on_is_refused_for_a_model_that_carries_a_state(tmp_path, monkeypatch):
    monkeypatch.setenv("MACDROP_CACHE", str(tmp_path / "cache"))
    config = transformers.MambaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    folder = tmp_path / "mamba"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    keys = {"dataset": "zoo:train", "max_samples": 20, "val_size": 4, "template": "alpaca", "macdrop": {"p0": 0.0}}
    with pytest.raises(
        ConfigError, match=r"packing: on cannot be done.*MambaForCausalLM.*\nSet packing to auto or off"
    ):
        check_training(TrainSpec(model_name_or_path=str(folder), packing="on", **keys), 1)
    assert check_training(TrainSpec(model_name_or_path=str(folder), **keys), 1).steps > 0


# --- memory ---


def large(**keys) -> TrainSpec:
    """Steps of 100,000 tokens, each a row of its own budget."""
    return spec(per_device_train_batch_size=100, cutoff_len=1000, **keys)


@pytest.fixture(scope="module")
def takes() -> StepMemory:
    found = step_memory(large(), gpu=False)
    assert found is not None
    return found


def test_a_budget_that_surely_does_not_fit_is_refused_with_the_one_that_would(takes):
    with pytest.raises(ConfigError) as caught:
        check_fits(large(max_tokens_per_micro_batch=100_000), {}, LENGTHS, 1, Room(takes.of(30_000), gpu=False))
    estimate, there = takes.of(100_000) / 2**30, takes.of(30_000) / 2**30
    assert str(caught.value) == (
        f"max_tokens_per_micro_batch is 100000. One of 100000 tokens takes an estimated {estimate:.1f} GiB in training "
        f"{MODEL}, and a worker has {there:.1f} GiB here.\n"
        "Set max_tokens_per_micro_batch to 30000 or less, or set bf16 or gradient_checkpointing to true."
    )
    with pytest.raises(ConfigError, match="batch_size 100 x cutoff_len 1000 allows micro-batches of 100000 tokens"):
        check_fits(large(), {}, LENGTHS, 1, Room(takes.of(30_000), gpu=False))
    with pytest.raises(ConfigError, match="longest example alone has 1000 tokens, and 500 would fit: lower cutoff_len"):
        check_fits(large(), {}, LENGTHS, 1, Room(takes.of(500), gpu=False))


def test_what_may_fit_is_noted_and_what_fits_is_not(takes):
    (note,) = check_fits(large(), {}, LENGTHS, 1, Room(takes.of(90_000), gpu=False))
    assert "Set max_tokens_per_micro_batch to 90000 or less" in note and "\n" not in note
    assert check_fits(large(), {}, LENGTHS, 1, Room(takes.of(100_000), gpu=False)) == []
    small = large(max_tokens_per_micro_batch=90_000)
    assert check_fits(small, {}, LENGTHS, 1, Room(takes.of(90_000), gpu=False)) == []


def test_a_budget_beyond_what_a_step_has_is_judged_by_the_step(takes):
    endless = large(max_tokens_per_micro_batch=2**40)
    assert check_fits(endless, {}, LENGTHS, 1, Room(takes.of(100_000), gpu=False)) == []


def test_the_rows_of_several_workers_are_what_is_judged(takes):
    """400,000 tokens of a step in 4 rows, and 100,000 in 2 where one would go beyond the budget."""
    endless = large(max_tokens_per_micro_batch=2**40)
    assert check_fits(endless, {}, LENGTHS, 4, Room(takes.of(100_000), gpu=False)) == []
    assert check_fits(large(max_tokens_per_micro_batch=99_000), {}, LENGTHS, 1, Room(takes.of(50_000), gpu=False)) == []


def test_the_most_that_a_search_may_draw_is_judged(takes):
    room = Room(takes.of(30_000), gpu=False)
    sparing = large(max_tokens_per_micro_batch=1000)
    assert check_fits(sparing, {}, LENGTHS, 1, room) == []
    drawn = {"max_tokens_per_micro_batch": Space(values=[1000, 100_000])}
    with pytest.raises(ConfigError, match="max_tokens_per_micro_batch is 100000"):
        check_fits(sparing, drawn, LENGTHS, 1, room)
    drawn = {"max_tokens_per_micro_batch": Space(values=[1000, None])}
    with pytest.raises(ConfigError, match="batch_size 100 x cutoff_len 1000 allows"):
        check_fits(sparing, drawn, LENGTHS, 1, room)


def test_nothing_is_refused_where_memory_is_unknown_or_nothing_is_packed():
    assert check_fits(large(), {}, LENGTHS, 1, None) == []
    assert check_fits(large(packing="off"), {}, LENGTHS, 1, Room(1, gpu=False)) == []
    assert worker_room(RaySpec(address="auto")) is None


def test_workers_and_lanes_of_a_machine_share_its_memory():
    one, four = worker_room(RaySpec(gpus_per_worker=0)), worker_room(RaySpec(lanes=2, num_workers=2, gpus_per_worker=0))
    assert one is not None and four is not None and not one.gpu
    assert one.size // 4 == four.size


@pytest.mark.parametrize("keys", [{}, {"bf16": True}, {"use_dora": True}, {"lora_dropout": 0.1}], ids=str)
def test_the_estimate_counts_what_autograd_keeps(keys):
    """Against a count of the real tensors of a real forward pass; a fused kernel keeps a little more."""
    base, _ = open_base(spec(**keys))
    model = add_adapter(base, spec(**keys)).train()
    few, many = (kept(model, base.base_model, tokens) for tokens in (64, 128))
    found = step_memory(spec(**keys), gpu=False)
    assert found is not None
    assert found.kept == pytest.approx((many - few) / 64, rel=0.15)


def kept(model: torch.nn.Module, decoder: torch.nn.Module, tokens: int) -> int:
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        decoder(input_ids=torch.arange(tokens)[None] % 50, use_cache=False)
    return sum(storage.nbytes() for storage in found.values())


def test_checkpointing_and_half_precision_take_less(takes):
    for key in ("gradient_checkpointing", "bf16"):
        found = step_memory(large(**{key: True}), gpu=False)
        assert found is not None and found.kept < 0.6 * takes.kept and found.per_token < takes.per_token
    twice = step_memory(large(use_dora=True), gpu=False)
    assert twice is not None and twice.per_token > takes.per_token
